"""What a reward server and its clients agree on: JSON over HTTP with images as base64 of PNG. docs/reward-server.md.

JSON rather than multipart: one parser, which every language and curl has, and no file names, no spooling to disk. It
costs a third more bytes, which is little beside what scoring an image takes. Never pickle.
"""

import base64
import binascii
import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prx_post.data.images import readable

SERVICE = "prx-post rewards"
VERSION = 1
TOKEN_VARIABLE = "PRX_POST_REWARD_TOKEN"
"""Where server and clients find the token. Never on a command line, which every user of a machine can read."""
REWARDS_PATH = "/v1/rewards"
SCORE_PATH = "/v1/score"
CHECK_PATH = "/v1/check"

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Pillow's modes that come out of a PNG as they went in."""


def encode_image(image: Image.Image) -> str:
    """Base64 of a PNG of the very pixels; other modes than PNG_MODES as RGB, which is what scorers make of them.

    Nothing but pixels travels: a colour profile, say, may be many times as large.
    """
    kept = image if image.mode in PNG_MODES else image.convert("RGB")
    if kept.mode == "RGB":
        data = _rgb_png(np.asarray(kept))
    else:
        file = io.BytesIO()
        kept.save(file, "PNG", compress_level=1, icc_profile=None)
        data = file.getvalue()
    return base64.b64encode(data).decode("ascii")


def _rgb_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of pixels [H, W, 3], as small as Pillow's at level 1 and made in a fifth of its time.

    Pillow tries five filters on every row and has zlib look for repetitions. Images of a generator have none: what
    pays is each row less the one above it (the filter `up`), in Huffman codes alone.
    """
    height, width, channels = pixels.shape
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = 2  # the filter `up`
    rows[:, 1:] = pixels.reshape(height, -1)
    np.subtract(rows[1:, 1:], pixels.reshape(height, -1)[:-1], out=rows[1:, 1:])
    packer = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", packer.compress(rows.data) + packer.flush()), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def decode_image(text: str, max_pixels: int) -> Image.Image:
    """The image of `encode_image`, from a stranger: size is read from the header before a pixel is decoded.

    Raises:
        OSError: it is not base64, no PNG, has more than `max_pixels`, or is broken.
    """
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:  # binascii.Error among them
        raise OSError(f"not base64: {error}") from error
    with readable():
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.width * image.height > max_pixels:
            size = f"{image.width}x{image.height}"
            raise OSError(f"{size} are more than the {max_pixels} pixels that an image may have here")
        image.load()
    return image
