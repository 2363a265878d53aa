"""What images look like to no reward: how sharp they are, and how rich. A reward that is hacked moves them first."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

LEVELS = 64
"""Of grey, that entropy is taken over."""


def edge_energy(image: Image.Image) -> float:
    """Mean absolute difference of neighbouring grey levels, 0..255, across and down. Blur lowers it, contrast raises
    it."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    differences = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1) if grey.shape[axis] > 1]
    return float(np.mean(differences)) if differences else 0.0


def entropy(image: Image.Image) -> float:
    """Of the grey levels' histogram, bits; 0 for an image of one tone, 6 for one of all tones alike."""
    counts, _ = np.histogram(np.asarray(image.convert("L")), bins=LEVELS, range=(0, 256))
    fractions = counts[counts > 0] / counts.sum()
    return float(-(fractions * np.log2(fractions)).sum()) + 0.0


STATISTICS: dict[str, Callable[[Image.Image], float]] = {"edge_energy": edge_energy, "entropy": entropy}


def image_statistics(images: Sequence[Image.Image]) -> dict[str, list[float]]:
    """Each of STATISTICS, of each image."""
    return {name: [measure(image) for image in images] for name, measure in STATISTICS.items()}
