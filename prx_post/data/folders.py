"""A local data set's files and their table. No name makes a split unless one is asked for, and no path is a pattern."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

from prx_post.data.rows import DataError
from prx_post.data.text_files import csv_rows, json_rows, lines_of

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
TABLES = ("metadata.jsonl", "metadata.csv")
CAPTIONS = (".txt", ".caption")
FILE_NAME, IMAGE = "file_name", "image"
"""As in `datasets`, a table's column `file_name` becomes the column `image`, `chosen_file_name` becomes `chosen`."""
ALL = "train"
"""What a set without splits is called: the split of that name is then all of it."""


@dataclass(frozen=True)
class Files:
    """Of a folder and the folders in it, in the order of their paths; hidden ones are left out.

    Attributes:
        split: of which `ending` gives files; None: all are given.
    """

    folder: Path
    paths: list[Path]
    split: str | None = None

    def ending(self, suffixes: Sequence[str]) -> list[Path]:
        """Files with these endings, in upper or lower case."""
        return [path for path in self.paths if path.suffix.lower() in suffixes and self.has(path)]

    def tables(self) -> list[Path]:
        """Of all splits: one may name images of several."""
        return [path for path in self.paths if path.name.lower() in TABLES]

    def has(self, path: Path) -> bool:
        """Whether it is of the split: a folder that it is in is called so, or a file of many rows itself.

        An image's own name says what it shows.
        """
        if self.split is None:
            return True
        *folders, name = path.relative_to(self.folder).parts if path.is_relative_to(self.folder) else path.parts
        named = [*folders, *([name] if path.suffix.lower() not in (*IMAGES, *CAPTIONS) else [])]
        return any(_is_of(part, self.split) for part in named)


def files_of(folder: Path, split: str | None = None) -> Files:
    """All files, or those of a split: a folder or file below `folder` is called so, or so and then `-`, `_` or `.`.

    Raises:
        DataError: a folder cannot be listed, or there is no such split.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}. Check its permissions.") from error

    paths, seen = [], set[str]()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(root).resolve()
        leads_back = root != str(folder) and Path(root).parent.resolve().is_relative_to(real)
        if leads_back or (str(real) in seen and split is None):  # links may well give a split's files a second name
            folders.clear()
            continue
        seen.add(str(real))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    paths.sort()
    found = Files(folder, paths, split)
    if split is None or any(found.has(path) for path in paths):
        return found
    if split != ALL:
        raise DataError(
            f"dataset_split is {split!r}, but no file or folder in {folder} is called so. Correct it, or leave it out "
            f"to take all."
        )
    return Files(folder, paths)


def _is_of(name: str, split: str) -> bool:
    return name.startswith(split) and name[len(split) : len(split) + 1] in ("", "-", "_", ".")


@dataclass
class FolderTable:
    """Rows of images that lie in a folder. Has what is asked of a `datasets.Dataset` before columns are chosen.

    Attributes:
        columns: values by name; of images their paths.
        images: names of the columns of images.
        written: names of the columns whose values are text as it was written, of a CSV file.
        notes: what is there but in no row.
    """

    columns: dict[str, list[Any]]
    images: set[str]
    written: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def select_columns(self, names: Sequence[str], texts: Sequence[str] = ()) -> Any:
        """A `datasets.Dataset`; columns of numbers that were written into a CSV file hold numbers, but for `texts`."""
        import datasets

        chosen = {}
        for name in names:
            values = self.columns[name]
            chosen[name] = _numbers(values) if name in self.written and name not in texts else values
        return datasets.Dataset.from_dict(chosen)


def _numbers(values: list[str]) -> list[Any]:
    """Cells as whole numbers, or as numbers, if all are but for empty ones, which are None; else as they are."""
    for kind in (int, float):
        try:
            return [kind(value) if value.strip() else None for value in values]
        except ValueError:
            continue
    return values


def read_folder(files: Files, caption: str) -> FolderTable:
    """Images by the tables beside them; if there is none, by text files beside them.

    Args:
        caption: name of the column that captions in text files become.

    Raises:
        DataError: no image has a caption, or a table cannot be read.
    """
    images, tables = files.ending(IMAGES), files.tables()
    for table in tables:
        other = [path for path in tables if path.parent == table.parent and path != table]
        if other:
            raise DataError(f"{table.parent} has both {table.name} and {other[0].name}. Remove one of them.")
    if tables:
        found = [read_table(path) for path in tables]
        return _joined(found if files.split is None else [_of_split(table, files) for table in found], images)
    return _captioned(files, images, caption)


def _of_split(table: FolderTable, files: Files) -> FolderTable:
    """The rows with an image of the split."""
    paths = zip(*(table.columns[name] for name in sorted(table.images)), strict=True)
    kept = [any(path and files.has(Path(path)) for path in row) for row in paths]
    columns = {name: list(compress(values, kept)) for name, values in table.columns.items()}
    return replace(table, columns=columns)


def read_table(path: Path) -> FolderTable:
    """A metadata.jsonl or metadata.csv, whose file names are relative to its folder.

    Raises:
        DataError: it is not UTF-8, a line is no row, or it names no files; the line is given.
    """
    is_csv = path.suffix.lower() == ".csv"
    rows: list[dict[str, Any]] = list((csv_rows if is_csv else _json_rows)(path))
    names = list(dict.fromkeys(name for row in rows for name in row))
    images = {name: _image_column(name) for name in names if _image_column(name)}
    if not images:
        raise DataError(
            f"{path} has the columns {', '.join(names) or 'of nothing'}, but must have {FILE_NAME}, each image's path "
            f"from the folder of this file. Add it."
        )
    of_images = {str(column) for column in images.values()}
    columns: dict[str, list[Any]] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if name in images:
            columns[str(images[name])] = [str(path.parent / value) if value else None for value in values]
        elif name not in of_images:  # or else the paths would be lost
            columns[name] = values
    return FolderTable(columns, of_images, set(columns) - of_images if is_csv else set())


def _image_column(name: str) -> str | None:
    if name == FILE_NAME:
        return IMAGE
    return name.removesuffix(f"_{FILE_NAME}") if name.endswith(f"_{FILE_NAME}") else None


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, row in json_rows(path):
        wrong = next((name for name, value in row.items() if _image_column(name) and not _is_text(value)), None)
        if wrong is not None:
            raise DataError(f"{path}, line {number}: {wrong} is {row[wrong]!r}, but must be a path. Correct it.")
        yield row


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _joined(tables: Sequence[FolderTable], images: Sequence[Path]) -> FolderTable:
    """One after another; a column that a table lacks is empty there."""
    names = list(dict.fromkeys(name for table in tables for name in table.columns))
    columns = {name: [v for table in tables for v in table.columns.get(name, [None] * len(table))] for name in names}
    of_images = {name for table in tables for name in table.images}
    used = {os.path.normpath(path) for name in of_images for path in columns[name] if path}
    left = [path for path in images if os.path.normpath(path) not in used]
    notes = _notes("image without a caption", "images without a caption", left)
    return FolderTable(columns, of_images, set.intersection(*(table.written for table in tables)), notes)


def _captioned(files: Files, images: Sequence[Path], caption: str) -> FolderTable:
    """By text files of the images' names; an image without one has no caption."""
    texts = files.ending(CAPTIONS)
    beside = BesideImages(texts)
    found = [beside(image, CAPTIONS) for image in images]
    if not any(found):
        raise DataError(_nothing_captioned(files, images))
    captions = [None if path is None else _read_caption(path) for path in found]
    used = set(found)
    notes = _notes("text without an image", "texts without an image", [path for path in texts if path not in used])
    return FolderTable({IMAGE: [str(path) for path in images], caption: captions}, {IMAGE}, notes=notes)


class BesideImages:
    """Finds the files that have an image's name but for the extension, which may be in upper or lower case."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = {(path.parent, path.stem, path.suffix.lower()): path for path in paths}

    def __call__(self, image: Path, suffixes: Sequence[str]) -> Path | None:
        """The one with the first of these extensions, in lower case, that there is."""
        names = ((image.parent, image.stem, suffix) for suffix in suffixes)
        return next((self._paths[name] for name in names if name in self._paths), None)


def _read_caption(path: Path) -> str:
    return "".join(lines_of(path)).strip()


def _notes(one: str, many: str, paths: Sequence[Path]) -> list[str]:
    if not paths:
        return []
    return [f"{len(paths)} {one if len(paths) == 1 else many} (such as {paths[0].name})"]


def _nothing_captioned(files: Files, images: Sequence[Path]) -> str:
    archives, other = files.ending((".tar",)), files.ending((".csv", ".jsonl", ".json", ".tsv"))
    if archives:
        return refused_archive(archives[0])
    if not images:
        kinds = sorted({path.suffix.lower() for path in files.paths})
        has = f"has files ending in {', '.join(kinds[:6])}" if kinds else "is empty"
        return f"{files.folder} {has}, but must have images or parquet files. Check the path."
    sidecars = [path for path in other if path.suffix == ".json" and any(i.stem == path.stem for i in images[:100])]
    if sidecars:
        return (
            f"{files.folder} has images with .json files beside them. Captions are read from "
            f"metadata.jsonl, which this writes: prx-post data image-folder --image_dir {files.folder}"
        )
    seen = f" {other[0].name} is not read: if it has the captions, call it metadata{other[0].suffix}." if other else ""
    return (
        f"{files.folder} has images, but no caption: neither a text file beside each (a.png, a.txt) nor "
        f"a metadata.jsonl with a file_name and a prompt on each line.{seen}"
    )


def refused_archive(path: Path) -> str:
    """That a WebDataset shard is to be unpacked."""
    target = path.parent / path.stem
    return (
        f"{path} is an archive, which is not read as it is. Unpack it, and give the folder: "
        f"mkdir {target} && tar -xf {path} -C {target}"
    )
