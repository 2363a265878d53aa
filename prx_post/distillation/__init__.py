"""Few-step students: what `prx-post distill` is made of."""
