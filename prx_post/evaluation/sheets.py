"""Labelled sheets of images: which prompt, which seed, which step can be read on the image and in its metadata."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

GAP = 4
FONT_PX = 13
PAPER, INK = (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True)
class Sheet:
    """Rows of images of one size, each with a label above it; a title for the sheet, one for each column."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Image.Image]]]

    def image(self) -> Image.Image:
        font = ImageFont.load_default(FONT_PX)
        line = FONT_PX + 6
        width, height = self.rows[0][1][0].size
        texts = [self.title, *self.columns, *(label for label, _ in self.rows)]
        cell = max(width, *(round(font.getlength(name)) for name in self.columns)) + GAP
        total = (
            max(cell * len(self.columns), round(max(font.getlength(text) for text in (texts[0], *texts[1:])))) + 2 * GAP
        )
        canvas = Image.new("RGB", (total, 2 * line + len(self.rows) * (line + height + GAP) + GAP), PAPER)
        draw = ImageDraw.Draw(canvas)
        draw.text((GAP, 2), self.title, INK, font)
        for i, name in enumerate(self.columns):
            draw.text((GAP + i * cell, line), name, INK, font)
        top = 2 * line
        for label, images in self.rows:
            draw.text((GAP, top), label, INK, font)
            for i, image in enumerate(images):
                canvas.paste(image, (GAP + i * cell, top + line))
            top += line + height + GAP
        return canvas

    def info(self, **settings: Any) -> PngInfo:
        """The labels and `settings` as PNG text chunks."""
        info = PngInfo()
        labels = "; ".join(label for label, _ in self.rows)
        for name, value in {
            "title": self.title,
            "columns": ", ".join(self.columns),
            "rows": labels,
            **settings,
        }.items():
            info.add_itxt(name, str(value))
        return info
