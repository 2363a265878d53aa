"""Images as the published scorers see them, without torchvision (whose default wheel breaks a CPU build of torch)."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def unit_range(image: Image.Image) -> Tensor:
    """[3, H, W] in 0..1; alpha is dropped."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def normalised(pixels: Tensor) -> Tensor:
    """By CLIP's mean and standard deviation of each channel."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def centre_square(image: Image.Image, size: int) -> Tensor:
    """[3, size, size]: the shorter side resized to `size` by PIL's bicubic filter, the middle cut out.

    Rounds as torchvision's Resize and CenterCrop do, which is what ImageReward was trained with: half a pixel goes to
    the even side, where transformers' CLIP processor rounds down.
    """
    image = image.convert("RGB")
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return unit_range(resized.crop((left, top, left + size, top + size)))


def padded_square(image: Image.Image, size: int) -> Tensor:
    """[3, size, size]: the longer side resized to `size` by torch's antialiased bicubic filter, the rest black.

    Values may leave 0..1 a little, as HPSv2's do: it resizes after the conversion to floating point.
    Differs from hpsv2: an image whose longer side is `size` already is padded too; there it fails.
    """
    pixels = unit_range(image)
    scale = size / max(image.size)
    shape = [max(1, round(side * scale)) for side in pixels.shape[1:]]
    pixels = torch.nn.functional.interpolate(pixels[None], shape, mode="bicubic", align_corners=False, antialias=True)[
        0
    ]
    below, right = (size - side for side in pixels.shape[1:])
    return torch.nn.functional.pad(pixels, (right // 2, right - right // 2, below // 2, below - below // 2))
