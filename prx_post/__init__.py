"""Post-training and alignment for PRX, Photoroom's open text-to-image flow transformer."""

__version__ = "0.1.0"
