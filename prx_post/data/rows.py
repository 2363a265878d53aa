"""Rows of images with captions, and what becomes of those that cannot be used."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prx_post.base.errors import PrxPostError


class DataError(PrxPostError):
    """A data set that cannot be trained on."""


@dataclass(frozen=True)
class BadRow:
    """A row that is left out, and why. Written to bad_rows.jsonl."""

    row: int
    name: str
    reason: str


@dataclass(frozen=True)
class Opened:
    """The columns of a data set that are asked for.

    Attributes:
        dataset: a `datasets.Dataset`, its images encoded: {"bytes", "path"}.
        prompt_column: where the captions are.
        folder_of: of a row, the folder that paths of its images begin from; None: of none, they are whole.
        notes: what was found beside the rows.
    """

    dataset: Any
    prompt_column: str
    folder_of: Callable[[int], Path] | None = None
    notes: Sequence[str] = ()


class ImageRows:
    """Rows of an opened data set: encoded image bytes and a caption each; nothing is decoded here.

    Attributes:
        notes: what was found beside the rows.
    """

    notes: Sequence[str] = ()

    def __init__(self, opened: Opened, image_column: str) -> None:
        self._dataset, self._folder_of, self.notes = opened.dataset, opened.folder_of, opened.notes
        self._image_column = image_column
        self.prompts: list[str | None] = list(opened.dataset[opened.prompt_column])

    def __len__(self) -> int:
        return len(self._dataset)

    def _cell(self, row: int) -> dict[str, Any]:
        return self._placed(self._dataset[row][self._image_column], row)

    def _placed(self, cell: dict[str, Any] | None, row: int) -> dict[str, Any]:
        """With the path of an image that lies in a file of its own made whole; `row` is the data set's."""
        if not cell or cell.get("bytes") is not None or not cell.get("path") or self._folder_of is None:
            return cell or {}
        return {**cell, "path": str(self._folder_of(row) / cell["path"])}

    def name(self, row: int) -> str:
        return self._cell(row).get("path") or f"row {row}"

    def image_bytes(self, row: int) -> bytes:
        """The encoded image. Raises OSError if its file cannot be read or the cell is empty."""
        cell = self._cell(row)
        if cell.get("bytes") is not None:
            return cell["bytes"]
        if not cell.get("path"):
            raise OSError("the cell is empty")
        return Path(cell["path"]).read_bytes()


def report_bad_rows(bad: list[BadRow], total: int, max_bad_fraction: float, path: Path, is_main: bool = True) -> None:
    """Write the rows left out to `path` and say so, on the main process.

    Raises:
        DataError: they are too many, or nothing is left; on every process.
    """
    if is_main:
        path.unlink(missing_ok=True)  # an earlier try's
    if not bad:
        return
    if is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(vars(b), ensure_ascii=False) + "\n" for b in bad))
    if len(bad) == total or len(bad) > max_bad_fraction * total:
        first = bad[0]
        raise DataError(
            f"{len(bad)} of {total} rows cannot be used, but max_bad_fraction is {max_bad_fraction}. "
            f"The first is {first.name}: {first.reason}. All are listed in {path}."
        ).raised_by_all(is_main)
    if is_main:
        tqdm.write(f"{len(bad)} of {total} rows left out, listed in {path}")
