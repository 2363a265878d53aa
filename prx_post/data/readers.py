"""Rows of pictures with captions, from an image folder, parquet files or the Hub; `datasets` does the reading."""

import io
import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from prx_post.base.errors import PrxPostError
from prx_post.data.config import DataConfig


class DataError(PrxPostError):
    """A data set that cannot be trained on."""


@dataclass(frozen=True)
class BadRow:
    """A row that is left out, and why. Written to bad_rows.jsonl."""

    row: int
    name: str
    reason: str


class PictureRows:
    """Rows of a `datasets.Dataset`: encoded picture bytes and a caption each; nothing is decoded here."""

    def __init__(self, dataset: Any, image_column: str, prompt_column: str) -> None:
        self._dataset = dataset
        self._image_column = image_column
        self.prompts: list[str | None] = list(dataset[prompt_column])

    def __len__(self) -> int:
        return len(self._dataset)

    def _cell(self, row: int) -> dict[str, Any]:
        return self._dataset[row][self._image_column] or {}

    def name(self, row: int) -> str:
        return self._cell(row).get("path") or f"row {row}"

    def image_bytes(self, row: int) -> bytes:
        """The encoded picture. Raises OSError if its file cannot be read or the cell is empty."""
        cell = self._cell(row)
        if cell.get("bytes") is not None:
            return cell["bytes"]
        if not cell.get("path"):
            raise OSError("the cell is empty")
        return Path(cell["path"]).read_bytes()


def read_rows(config: DataConfig) -> PictureRows:
    """Open the data set of a configuration.

    Raises:
        DataError: it does not exist, lacks a column, or is empty.
    """
    import datasets

    from prx_post.data.mds import MdsRows, mds_folder

    shards = mds_folder(Path(str(config.dataset_name)).expanduser(), config.dataset_split)
    if shards is not None:
        return _not_empty(MdsRows(shards, config), config)
    dataset = _load(config)
    for field_name, column in (("image_column", config.image_column), ("prompt_column", config.prompt_column)):
        if column not in dataset.column_names:
            raise DataError(
                f"{field_name} is {column!r}, but {config.dataset_name} has only the columns "
                f"{', '.join(dataset.column_names)}. {_column_hint(config, field_name)}"
            )
    if len(dataset) == 0:
        raise _no_rows(config.dataset_name)
    dataset = dataset.select_columns([config.image_column, config.prompt_column])  # so that no other picture is decoded
    prompt_kind = getattr(dataset.features[config.prompt_column], "dtype", "lists")
    if prompt_kind not in ("string", "large_string"):
        raise DataError(
            f"prompt_column is {config.prompt_column!r}, which holds {prompt_kind}, "
            f"but must hold text. Choose another column."
        )
    try:
        dataset = dataset.cast_column(config.image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # of datasets and of pyarrow
        raise DataError(
            f"image_column is {config.image_column!r}, which does not hold pictures: {error}. Choose another column."
        ) from error
    return PictureRows(dataset, config.image_column, config.prompt_column)


def _not_empty(rows: PictureRows, config: DataConfig) -> PictureRows:
    if len(rows) == 0:
        raise _no_rows(config.dataset_name)
    return rows


def _column_hint(config: DataConfig, field_name: str) -> str:
    folder = Path(str(config.dataset_name)).expanduser()
    captions = folder.is_dir() and not any(folder.rglob("metadata.*")) and not any(folder.rglob("*.parquet"))
    if field_name == "prompt_column" and captions:
        return (
            "An image folder's captions stand in its metadata.jsonl, a file_name and a prompt on each line; "
            "`prx-post data image-folder` writes one from text files beside the pictures."
        )
    return f"Set {field_name} to one of these."


def _no_rows(name: str | None) -> DataError:
    return DataError(f"dataset_name is {name!r}, which has no rows. Choose another data set or split.")


def _load(config: DataConfig) -> Any:
    import datasets
    import pyarrow.parquet as pq

    name = str(config.dataset_name)
    path = Path(name).expanduser()
    try:
        parquet = [path] if path.is_file() and path.suffix == ".parquet" else sorted(path.glob("**/*.parquet"))
        if parquet:
            if not any(pq.read_metadata(file).num_rows for file in parquet):  # datasets fails obscurely on these
                raise _no_rows(name)
            if path.is_file():
                return datasets.load_dataset("parquet", data_files=str(path), split="train")
            return datasets.load_dataset("parquet", data_dir=str(path), split=config.dataset_split)
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=config.dataset_split)
        if path.exists():
            raise DataError(f"dataset_name is {name!r}, but must be a folder, a .parquet file or a Hub id.")
        return load_from_hub("dataset_name", name, split=config.dataset_split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise DataError(f"dataset_name is {name!r}, which could not be read: {reason}") from error


def load_from_hub(field: str, name: str, **settings: Any) -> Any:
    """`datasets.load_dataset` of the Hub id `name`, a setting `field` that is no local path.

    Raises:
        DataError: it can be no Hub id, or is one that cannot be opened.
    """
    import datasets

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"{field} is {name!r}, but there is no such file or folder. Check the path.")
    owner = name.split("/")[0]
    if owner != name and Path(owner).is_dir():
        where = f"in {owner!r}, a local folder"
        raise DataError(f"{field} is {name!r}, but there is no such file or folder {where}. Check the path.")
    try:
        return datasets.load_dataset(name, **settings)
    except (datasets.exceptions.DatasetsError, ConnectionError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{field} is {name!r}, but there is no such local file or folder, and the Hub did not give a data set of "
            f"that name: {reason}. Check the path, or the Hub id and the connection."
        ) from error


PREPROCESSING = 1
"""Version of `decode` and of the resizing after it; part of the cache's name, so that a change is not mixed in."""

BROKEN = (SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for some broken files, besides OSError."""

ORIENTATION_TAG, ROTATED = 0x0112, (5, 6, 7, 8)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) as a viewer shows it, from the header. Raises OSError if these bytes are no picture."""
    with readable(), Image.open(io.BytesIO(data)) as image:
        if image.getexif().get(ORIENTATION_TAG) in ROTATED:
            return image.width, image.height
        return image.height, image.width


def decode(data: bytes, formats: list[str] | None = None) -> Image.Image:
    """The whole picture as a viewer shows it: turned as its EXIF says, transparent parts white, 16 bits scaled to 8.

    Returns an RGB picture. Raises OSError if it is truncated, no picture, or none of `formats` (None: any).
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
    """Turn everything that Pillow raises for a broken picture into an OSError that says what is wrong with it."""
    try:
        yield
    except UnidentifiedImageError as error:  # its own message shows the buffer's address in memory
        raise OSError("no picture format that Pillow knows") from error
    except BROKEN as error:
        raise OSError(f"not a readable picture ({type(error).__name__}: {error})") from error


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
