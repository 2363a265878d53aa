"""HTML pages: one file each, no network, everything user-made escaped."""

import base64
import io
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

MAX_SIDE = 320
"""Images are scaled down to this for a page, pixels."""
LOSSLESS_SIDE = 128
"""Images no larger than this are PNGs in a page; larger ones JPEGs."""


def page_template(name: str) -> Any:
    """A template of this package by its path in it, such as `evaluation/report.html.j2`."""
    loader = PackageLoader("prx_post", "")
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=loader, **options).get_template(name)  # type: ignore[arg-type]


def data_uri(image: Image.Image, max_side: int = MAX_SIDE) -> str:
    image = image.convert("RGB")
    image.thumbnail((max_side, max_side))
    kind = "png" if max(image.size) <= LOSSLESS_SIDE else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=88)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
