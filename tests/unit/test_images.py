"""Pixels as a viewer shows them: orientation, colour profiles, bit depths, transparency."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from prx_post.data.images import decode, image_size

ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""XYZ of its primaries, adapted to D50 as ICC profiles are."""
ADOBE_GAMMA = 563 / 256
D50_TO_LINEAR_SRGB = np.array(
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
)


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def matrix_profile(primaries, gamma):
    """An ICC v2 profile of three primaries and one gamma."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(78)
    tags = {b"desc": description, b"wtpt": xyz((0.9642, 1, 0.8249)), b"cprt": b"text\0\0\0\0none\0"}
    tags |= {name: xyz(values) for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + body


def to_srgb(rgb):
    """Adobe RGB to sRGB by their definitions, 0..255."""
    linear = (np.array(rgb) / 255) ** ADOBE_GAMMA
    light = np.clip(D50_TO_LINEAR_SRGB @ (linear @ np.array(ADOBE_RGB)), 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_bytes_of_no_known_format_are_called_that():
    with pytest.raises(OSError, match=r"^no image format that Pillow knows$"):
        image_size(b"no image")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_picture_as_it_is_shown(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.new("RGB", (40, 24), "white"), kind, exif=exif)
    expected = (40, 24) if orientation >= 5 else (24, 40)
    assert image_size(data) == expected
    assert decode(data).size == expected[::-1]


def test_images_are_turned_as_their_exif_says():
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: the top left corner is shown at the top right
    assert decode(encoded(image, exif=exif)).getpixel((1, 0)) == (0, 0, 0)


def test_transparent_parts_are_white():
    assert decode(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("PNG", np.array([[0, 32768, 65535]], np.uint16)),
        ("TIFF", np.array([[0, 32768, 65535]], np.uint16)),
        ("TIFF", np.array([[0, 0.4981, 1]], np.float32)),
    ],
)
def test_other_depths_are_scaled_to_8_bits(kind, values):
    shown = decode(encoded(Image.fromarray(values), kind))
    assert [shown.getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 200.0]], np.float32), "numbers from 0 to 200, but must be from 0 to 1"),
        (np.array([[-0.5, 1]], np.float32), r"numbers from -0\.5 to 1"),
        (np.array([[0, np.nan]], np.float32), "numbers from nan to nan"),
        (np.array([[0, 70000]], np.int32), "32 bits, whose range is not known"),
    ],
)
def test_pixels_of_no_known_range_are_refused(values, reason):
    data = encoded(Image.fromarray(values), "TIFF")
    with pytest.raises(OSError, match=reason):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("colour", [(200, 100, 50), (60, 180, 90), (128, 128, 128)])
def test_colours_of_a_profile_become_srgb(kind, colour):
    settings = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(
        Image.new("RGB", (2, 2), colour), kind, icc_profile=matrix_profile(ADOBE_RGB, ADOBE_GAMMA), **settings
    )
    assert np.array(decode(data).getpixel((0, 0))) == pytest.approx(to_srgb(colour), abs=1.5)
    assert decode(encoded(Image.new("RGB", (2, 2), colour), kind, **settings)).getpixel((0, 0)) == colour


def test_a_profile_leaves_transparency_alone():
    profile = matrix_profile(ADOBE_RGB, ADOBE_GAMMA)
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    shown = decode(encoded(image, icc_profile=profile))
    assert np.array(shown.getpixel((0, 0))) == pytest.approx(to_srgb((200, 100, 50)), abs=1.5)
    assert shown.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_profile_leaves_a_transparent_colour_alone(mode):
    hidden, profile = (10, 10, 10) if mode == "RGB" else 10, matrix_profile(ADOBE_RGB, ADOBE_GAMMA)
    data = encoded(Image.new(mode, (2, 1), hidden), transparency=hidden, icc_profile=profile)
    assert decode(data).getpixel((0, 0)) == (255, 255, 255)


def test_colours_of_a_palette_have_the_profile_too():
    image = Image.new("RGB", (2, 2), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE)
    shown = decode(encoded(image, icc_profile=matrix_profile(ADOBE_RGB, ADOBE_GAMMA)))
    assert np.array(shown.getpixel((0, 0))) == pytest.approx(to_srgb((200, 100, 50)), abs=1.5)


@pytest.mark.parametrize("profile", [b"no profile", matrix_profile(ADOBE_RGB, ADOBE_GAMMA)[:200]])
def test_a_profile_that_cannot_be_used_is_passed_over(profile):
    data = encoded(Image.new("RGB", (2, 2), (200, 100, 50)), icc_profile=profile)
    assert decode(data).getpixel((0, 0)) == (200, 100, 50)


def test_a_profile_of_other_channels_is_passed_over():
    data = encoded(Image.new("L", (2, 2), 100), icc_profile=matrix_profile(ADOBE_RGB, ADOBE_GAMMA))
    assert decode(data).getpixel((0, 0)) == (100, 100, 100)
