"""Rows of images with captions, and what becomes of those that cannot be used."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        images_per_entry: rows that are of use only together.
    """

    notes: Sequence[str] = ()
    images_per_entry = 1

    def __init__(self, opened: Opened, image_column: str) -> None:
        self._dataset, self._folder_of, self.notes = opened.dataset, opened.folder_of, opened.notes
        self._columns = [ImageColumn(opened, image_column)]
        self.prompts: list[str | None] = list(opened.dataset[opened.prompt_column])

    def __len__(self) -> int:
        return len(self._dataset)

    def _place(self, row: int) -> tuple["ImageColumn", int]:
        """The column that a row's image is in, and where."""
        return self._columns[0], row

    def name(self, row: int) -> str:
        column, place = self._place(row)
        return column.paths[place] or f"row {row}"

    def entry_name(self, number: int) -> str:
        return self.name(number)

    def image_bytes(self, row: int) -> bytes:
        """The encoded image. Raises OSError if its file cannot be read or the cell is empty."""
        column, place = self._place(row)
        return column.image_bytes(place)

    def fingerprint(self) -> str | None:
        """A digest that differs if a row has changed: captions are compared, and files by size and modification time.

        None if it cannot be known, where images are in memory alone.
        """
        files = [file["filename"] for file in self._dataset.cache_files]
        inside = any(any(column.has_bytes) for column in self._columns)
        if inside and not files:
            return None
        paths = (path for column in self._columns for path in column.paths)  # of rows without one, too: places count
        of_images = (path for column in self._columns for path in column.files())
        return digest_of([*files, *of_images], str(self._dataset.split), *map(repr, self.prompts), *map(repr, paths))


class ImageColumn:
    """A column of encoded images, in their cells or in files of their own.

    Attributes:
        paths: of each image; None for one that lies in its cell without a name.
        has_bytes: whether an image lies in its cell.
    """

    def __init__(self, opened: Opened, name: str) -> None:
        import pyarrow.compute as pc

        self._cells = opened.dataset.select_columns([name])  # so that it alone is read
        self._name = name
        cells = self._cells.with_format("arrow")[:][name]  # mapped; of bytes only whether there are any is read
        self.has_bytes: list[bool] = pc.struct_field(cells, "bytes").is_valid().to_pylist()
        self.paths: list[str | None] = pc.struct_field(cells, "path").to_pylist()
        if opened.folder_of is not None:
            for row, path in enumerate(self.paths):
                if path and not self.has_bytes[row]:
                    self.paths[row] = str(opened.folder_of(row) / path)

    def image_bytes(self, place: int) -> bytes:
        if self.has_bytes[place]:
            return self._cells[place][self._name]["bytes"]
        path = self.paths[place]
        if not path:
            raise OSError("the cell is empty")
        return Path(path).read_bytes()

    def files(self) -> Iterator[str]:
        """Paths of images in files of their own."""
        return (path for path, inside in zip(self.paths, self.has_bytes, strict=True) if path and not inside)


def digest_of(files: Iterable[str | Path], *texts: str) -> str:
    """Of texts, and of files by path, size and modification time."""
    digest = hashlib.sha256()
    for part in [*map(_stamp, files), *texts]:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def _stamp(path: str | Path) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return f"{path}: missing"
    return f"{path}: {stat.st_size}, {stat.st_mtime_ns}"


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
