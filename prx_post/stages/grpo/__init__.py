"""Online alignment: groups of the policy's own images, rewarded, and learnt from."""
