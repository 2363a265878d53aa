"""Images from their bytes: sizes from headers, decoding as a viewer shows them."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PREPROCESSING = 1
"""Version of `decode` and of the resizing after it; part of the cache's name, so that a change is not mixed in."""

BROKEN = (SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for some broken files, besides OSError."""

ORIENTATION_TAG, ROTATED = 0x0112, (5, 6, 7, 8)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) as a viewer shows it, from the header. Raises OSError if these bytes are no image."""
    with readable(), Image.open(io.BytesIO(data)) as image:
        if image.getexif().get(ORIENTATION_TAG) in ROTATED:
            return image.width, image.height
        return image.height, image.width


def decode(data: bytes, formats: list[str] | None = None) -> Image.Image:
    """The whole image as a viewer shows it: turned as its EXIF says, transparent parts white, 16 bits scaled to 8.

    Returns an RGB image. Raises OSError if it is truncated, no image, or none of `formats` (None: any).
    """
    with readable(), Image.open(io.BytesIO(data), formats=formats) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


@contextmanager
def readable() -> Iterator[None]:
    """Turn everything that Pillow raises for a broken image into an OSError that says what is wrong with it."""
    try:
        yield
    except UnidentifiedImageError as error:  # its own message shows the buffer's address in memory
        raise OSError("no image format that Pillow knows") from error
    except BROKEN as error:
        raise OSError(f"not a readable image ({type(error).__name__}: {error})") from error
