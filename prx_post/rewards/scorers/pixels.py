"""Images as the published scorers see them, without torchvision (whose default wheel breaks a CPU build of torch).

Each preparation comes twice: of PIL images, as published; and of pixels in torch, through which a gradient flows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Images = Sequence[Image.Image] | Tensor
"""PIL images of any size, or pixels [B, 3, H, W] in 0..1."""


@dataclass(frozen=True)
class Preparation:
    """What a network is given of images.

    Attributes:
        of_images: PIL images -> [B, 3, S, S], normalised.
        of_pixels: the same of pixels [B, 3, H, W] in 0..1, with a gradient.
    """

    of_images: Callable[[Sequence[Image.Image]], Tensor]
    of_pixels: Callable[[Tensor], Tensor]

    def __call__(self, images: Images) -> Tensor:
        return self.of_pixels(images) if isinstance(images, Tensor) else self.of_images(images)


def unit_range(image: Image.Image) -> Tensor:
    """[3, H, W] in 0..1; alpha is dropped."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def normalised(pixels: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """[..., 3, H, W] by the mean and standard deviation of each channel; CLIP's by default."""
    shift, scale = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels - shift) / scale


def centre_square(image: Image.Image, size: int) -> Tensor:
    """[3, size, size]: the shorter side resized to `size` by PIL's bicubic filter, the middle cut out.

    Rounds as torchvision's Resize and CenterCrop do, which is what ImageReward was trained with: half a pixel goes to
    the even side, where transformers' CLIP processor rounds down.
    """
    image = image.convert("RGB")
    width, height = _covering(*image.size, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return unit_range(resized.crop((left, top, left + size, top + size)))


def centre_square_of(pixels: Tensor, size: int, round_half: Callable[[float], int] = round) -> Tensor:
    """`centre_square` of pixels [B, 3, H, W], by torch's antialiased bicubic filter; [B, 3, size, size] in 0..1.

    Args:
        round_half: what becomes of half a pixel; math.floor is transformers' CLIP processor's.
    """
    width, height = _covering(pixels.shape[3], pixels.shape[2], size)
    resized = resize(pixels, (height, width)).clamp(0, 1)
    left, top = round_half((width - size) / 2), round_half((height - size) / 2)
    return resized[:, :, top : top + size, left : left + size]


def _covering(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height whose shorter side is `size`."""
    short = min(width, height)
    wide, high = (size if side == short else int(size * side / short) for side in (width, height))
    return wide, high


def resize(pixels: Tensor, shape: Sequence[int], mode: str = "bicubic") -> Tensor:
    """[B, C, H, W] to `shape`, height and width, by an antialiased filter."""
    if tuple(pixels.shape[2:]) == tuple(shape):
        return pixels
    return torch.nn.functional.interpolate(pixels, list(shape), mode=mode, align_corners=False, antialias=True)


def padded_square(pixels: Tensor, size: int) -> Tensor:
    """[B, 3, size, size] of [B, 3, H, W]: the longer side resized to `size`, the rest black.

    Values may leave 0..1 a little, as HPSv2's do: it resizes after the conversion to floating point.
    Differs from hpsv2: an image whose longer side is `size` already is padded too; there it fails.
    """
    scale = size / max(pixels.shape[2:])
    resized = resize(pixels, [max(1, round(side * scale)) for side in pixels.shape[2:]])
    below, right = (size - side for side in resized.shape[2:])
    return torch.nn.functional.pad(resized, (right // 2, right - right // 2, below // 2, below - below // 2))
