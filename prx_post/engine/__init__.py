"""The training loop and what surrounds it. The only place that imports accelerate or deepspeed."""
