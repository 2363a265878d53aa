"""Images from their bytes: sizes from headers, decoding as a viewer shows them."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

PREPROCESSING = 2
"""Version of `decode` and of the resizing after it; part of the cache's name, so that a change is not mixed in."""

BROKEN = (SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for some broken files, besides OSError."""

PROFILED = ("L", "RGB", "RGBA", "CMYK")
"""Modes whose pixels an ICC profile is about."""

ORIENTATION_TAG, ROTATED = 0x0112, (5, 6, 7, 8)
TURNED_BY_PILLOW = "TIFF"
"""The format whose size Pillow gives as it is shown, though the orientation is still there."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) as a viewer shows it, from the header. Raises OSError if these bytes are no image."""
    with readable(), Image.open(io.BytesIO(data)) as image:
        if image.format != TURNED_BY_PILLOW and image.getexif().get(ORIENTATION_TAG) in ROTATED:
            return image.width, image.height
        return image.height, image.width


def decode(data: bytes, formats: list[str] | None = None) -> Image.Image:
    """The whole image as a viewer shows it: turned as its EXIF says, in sRGB, transparent parts white, 16 bits and
    numbers from 0 to 1 scaled to 8 bits.

    Returns an RGB image. Raises OSError if it is truncated, no image, none of `formats` (None: any), or has pixels of
    no known range.
    """
    with readable(), Image.open(io.BytesIO(data), formats=formats) as opened:
        image = _in_srgb(_of_8_bits(ImageOps.exif_transpose(opened)), opened.info.get("icc_profile"))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Raises OSError for pixels whose range is not known."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode == "I":
        raise OSError("its pixels have 32 bits, whose range is not known; save it with 8 or 16")
    if image.mode != "F":
        return image
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 1):  # so that NaN is refused too
        raise OSError(f"its pixels are numbers from {values.min():.4g} to {values.max():.4g}, but must be from 0 to 1")
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """From the colours of its ICC profile. One that cannot be used is passed over, as viewers do."""
    if not profile:
        return image
    if image.has_transparency_data:  # also of one colour that stands for it, which a conversion would lose
        image = image.convert("RGBA")
    elif image.mode not in PROFILED:
        image = image.convert("RGB")
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colours = image.convert("RGB") if alpha is not None else image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        image = ImageCms.profileToProfile(colours, own, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):
        return image
    if alpha is not None:
        image.putalpha(alpha)
    return image


@contextmanager
def readable() -> Iterator[None]:
    """Turn everything that Pillow raises for a broken image into an OSError that says what is wrong with it."""
    try:
        yield
    except UnidentifiedImageError as error:  # its own message shows the buffer's address in memory
        raise OSError("no image format that Pillow knows") from error
    except BROKEN as error:
        raise OSError(f"not a readable image ({type(error).__name__}: {error})") from error
