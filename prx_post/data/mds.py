"""Rows of MDS shards, the format of mosaicml-streaming in which PRX was pretrained."""

import io
import json
from pathlib import Path
from typing import Any

from prx_post.data.config import CAPTION_COLUMNS, DataConfig, caption_column
from prx_post.data.rows import DataError, ImageRows, digest_of

ENCODED, RAW_PIXELS = ("bytes", "jpeg", "png"), "pil"
"""Encodings of an image column: files as they are, or bare pixels."""
INSTALL = (
    "pip install 'prx-post[mds]', then pip install --no-deps mosaicml-streaming, and torchvision from where torch came"
)


def mds_folder(path: Path, split: str) -> Path | None:
    """`path`, or its folder `split`, if there is the index of MDS shards in it."""
    for folder in (path, path / split):
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(index, dict) and "shards" in index:
            return folder
    return None


class MdsRows(ImageRows):
    """Rows of a folder of MDS shards, as ImageRows gives them. Shards are read where they lie, never changed.

    Raises:
        DataError: mosaicml-streaming is missing, a shard is missing or cut short, or a column cannot be used.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self._image_column = config.image_column
        self._dataset = _open(folder)
        self._files = [folder / "index.json", *(folder / shard.raw_data.basename for shard in self._dataset.shards)]
        for shard in self._dataset.shards:
            _check_shard(shard, folder)
            prompt_column, self._pixels = _prepare_columns(shard, config)
        self.prompts = [self._text(row, prompt_column) for row in range(len(self._dataset))]

    def _text(self, row: int, column: str) -> str:
        try:
            return self._dataset[row][column]
        except (ValueError, IndexError) as error:
            raise DataError(f"{self.name(row)} cannot be read: {error}. Make the shard again.") from error

    def name(self, row: int) -> str:
        shard, index = self._dataset.spanner[row]
        return f"{self._dataset.shards[shard].raw_data.basename}, sample {index}"

    def __len__(self) -> int:
        return len(self._dataset)

    def fingerprint(self) -> str:
        return digest_of(self._files)

    def image_bytes(self, row: int) -> bytes:
        """The encoded image; bare pixels as PNG. Raises OSError if the sample cannot be read."""
        try:
            value = self._dataset[row][self._image_column]
        except (ValueError, IndexError) as error:
            raise OSError(f"the sample cannot be read ({error})") from error
        if not self._pixels:
            return value
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return buffer.getvalue()


def _open(folder: Path) -> Any:
    try:
        from streaming import LocalDataset
    except ImportError as error:
        raise DataError(f"{folder} holds MDS shards, which need mosaicml-streaming ({error}). {INSTALL}.") from error
    try:
        return LocalDataset(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'index.json'} is no index of MDS shards: {error}. Check the folder.") from error


def _check_shard(shard: Any, folder: Path) -> None:
    path = folder / shard.raw_data.basename
    if not path.is_file():
        packed = shard.zip_data is not None and (folder / shard.zip_data.basename).is_file()
        action = f"Unpack it ({shard.compression})" if packed else "Fetch all of the data set"
        raise DataError(f"{path} is in the index, but not in the folder. {action}.")
    if path.stat().st_size != shard.raw_data.bytes:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes, but must have {shard.raw_data.bytes} because the index says so. "
            f"Fetch it again."
        )


def _prepare_columns(shard: Any, config: DataConfig) -> tuple[str, bool]:
    """Let the shard decode the prompt and bare pixels alone. Returns the column with the captions, and whether images
    are bare pixels.

    Images keep their bytes so; and a pickled column, which runs what it likes when it is decoded, is left alone.
    """
    encodings = dict(zip(shard.column_names, shard.column_encodings, strict=True))
    prompt_column = config.prompt_column or caption_column(encodings) or CAPTION_COLUMNS[0]
    usable = {config.image_column: (*ENCODED, RAW_PIXELS), prompt_column: ("str",)}
    for field, column in (("image_column", config.image_column), ("prompt_column", prompt_column)):
        if encodings.get(column) not in usable[column]:
            listed = ", ".join(f"{name} ({encoding})" for name, encoding in encodings.items())
            raise DataError(
                f"{field} is {column!r}, but must be a column of {' or '.join(usable[column])}; "
                f"{config.dataset_name} has {listed}. Set {field} to one of these."
            )
    is_pixels = encodings[config.image_column] == RAW_PIXELS
    decoded = {prompt_column, *([config.image_column] if is_pixels else [])}
    shard.column_encodings = [e if name in decoded else "bytes" for name, e in encodings.items()]
    return prompt_column, is_pixels
