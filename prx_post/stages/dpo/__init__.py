"""Preference optimisation from pairs of images: Diffusion-DPO and its kin."""
