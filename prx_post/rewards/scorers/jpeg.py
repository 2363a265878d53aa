"""How well an image compresses (Black et al. 2023, DDPO): a reward without a network, to try an algorithm with."""

import io
from collections.abc import Sequence

import PIL
import torch
from PIL import Image
from torch import Tensor

from prx_post.rewards.reward import check_counts

QUALITY = 95


class JPEGCompressibility:
    """Minus the size as a JPEG of quality 95, in kB of 1000 bytes; the prompt plays no part."""

    def __init__(self) -> None:
        self.identity = f"jpeg_compressibility, quality {QUALITY}, Pillow {PIL.__version__}"

    def check(self, prompts: Sequence[str]) -> None:
        """Every prompt will do."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        check_counts(images, prompts)
        return torch.tensor([-_jpeg_bytes(image) / 1000 for image in images])


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()
