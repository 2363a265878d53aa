"""A data set opened as rows: an image folder, parquet, a saved `datasets` set, MDS shards or the Hub."""

import bisect
import glob
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prx_post.data.config import CAPTION_COLUMNS, DataConfig, EncodedData, caption_column
from prx_post.data.folders import ALL, FILE_NAME, IMAGE, FolderTable, files_of, read_folder, read_table, refused_archive
from prx_post.data.hub import load_from_hub
from prx_post.data.mds import MdsRows, mds_folder
from prx_post.data.rows import DataError, ImageRows, Opened

TEXT = ("string", "large_string", "string_view")
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""What `datasets.save_to_disk` leaves in a set's folder, and in that of its splits."""


@dataclass(frozen=True)
class _Table:
    """Before columns are chosen."""

    columns: Any
    folder_of: Callable[[int], Path] | None = None
    notes: list[str] = field(default_factory=list)


def read_rows(config: DataConfig) -> ImageRows:
    """Open the data set of a configuration.

    Raises:
        DataError: it does not exist, lacks a column, or is empty.
    """
    shards = mds_folder(Path(str(config.dataset_name)).expanduser(), config.dataset_split or ALL)
    if shards is not None:
        rows = MdsRows(shards, config)
        if len(rows) == 0:
            raise _no_rows(config.dataset_name)
        return rows
    return ImageRows(open_dataset(config, ("image_column",)), config.image_column)


def open_dataset(
    config: EncodedData, image_fields: Sequence[str], fields: Sequence[str] = (), also: Sequence[str] = ()
) -> Opened:
    """The prompt column, and the columns that the settings `image_fields` and `fields` name.

    Args:
        also: columns that are taken along where the set has them.

    Raises:
        DataError: it does not exist, lacks a column, is empty, or a column holds something else.
    """
    import datasets

    loaded = _load(config)
    table, names = loaded.columns, list(loaded.columns.column_names)
    prompt_column = config.prompt_column or caption_column(names)
    if prompt_column is None:
        raise DataError(
            f"{config.dataset_name} has the columns {', '.join(names)}, none of which is called "
            f"{', '.join(CAPTION_COLUMNS)}. Set prompt_column to the one with the captions."
        )
    columns = {field: getattr(config, field) for field in (*image_fields, *fields)} | {"prompt_column": prompt_column}
    _check_columns(config, columns, names)
    if len(table) == 0:
        raise _no_rows(config.dataset_name)
    kept = [*columns.values(), *(name for name in also if name in names)]
    texts = {"texts": [prompt_column]} if isinstance(table, FolderTable) else {}
    try:
        dataset = table.select_columns(kept, **texts)  # so that no other image is decoded
    except (TypeError, ValueError, OverflowError) as error:  # of pyarrow
        raise DataError(f"{config.dataset_name} has a column of mixed kinds: {error}. Correct it.") from error
    kind = getattr(dataset.features[prompt_column], "dtype", "lists")
    if kind == "null":
        raise DataError(f"no row of {config.dataset_name} has anything in {prompt_column}, its captions. Check it.")
    if kind not in TEXT:
        raise DataError(
            f"prompt_column is {prompt_column!r}, which holds {kind}, but must hold text. Choose another column."
        )
    for name in image_fields:
        try:
            dataset = dataset.cast_column(columns[name], datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:  # of datasets and of pyarrow
            raise DataError(
                f"{name} is {columns[name]!r}, which does not hold images: {error}. Choose another column."
            ) from error
    return Opened(dataset, prompt_column, loaded.folder_of, loaded.notes)


def _check_columns(config: EncodedData, columns: dict[str, str], names: Sequence[str]) -> None:
    for name, column in columns.items():
        if column not in names:
            raise DataError(
                f"{name} is {column!r}, but {config.dataset_name} has only the columns {', '.join(names)}. "
                f"Set {name} to one of these."
            )
        same = [other for other in columns if other != name and columns[other] == column]
        if same:
            raise DataError(f"{name} is {column!r}, but so is {same[0]}. Choose another column for one of them.")


def _no_rows(name: str | None) -> DataError:
    return DataError(f"dataset_name is {name!r}, which has no rows. Choose another data set or split.")


def _load(config: EncodedData) -> _Table:
    import datasets

    name, split = str(config.dataset_name), config.dataset_split
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return _load_file(path)
        if path.is_dir():
            return _load_folder(path, split, config.prompt_column or CAPTION_COLUMNS[0])
        return _Table(load_from_hub("dataset_name", name, split=split or ALL))
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        kept_in = Path(datasets.config.HF_DATASETS_CACHE)
        if isinstance(error, OSError) and error.filename and Path(error.filename).is_relative_to(kept_in):
            raise DataError(
                f"{kept_in}, where `datasets` keeps tables that it has read, cannot be used: {error.strerror}. Set "
                f"HF_DATASETS_CACHE to a folder that can be written to."
            ) from error
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise DataError(f"dataset_name is {name!r}, which could not be read: {reason}") from error


def _load_file(path: Path) -> _Table:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _load_parquet([path])
    if suffix in (".jsonl", ".csv"):
        return _Table(read_table(path))
    if suffix == ".tar":
        raise DataError(refused_archive(path))
    raise DataError(
        f"dataset_name is {str(path)!r}, but must be a folder, a .parquet file, a metadata.jsonl or .csv, or a Hub id."
    )


def _load_folder(path: Path, split: str | None, caption: str) -> _Table:
    if (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file():
        return _Table(_load_saved(path, split))
    files = files_of(path, split)
    parquet = files.ending((".parquet",))
    if parquet:
        return _load_parquet(parquet)
    table = read_folder(files, caption)
    return _Table(table, notes=table.notes)


def _load_saved(path: Path, split: str | None) -> Any:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        name = split or (next(iter(saved)) if len(saved) == 1 else ALL)
        if name not in saved:
            raise DataError(
                f"dataset_split is {split!r}, but {path} has {', '.join(saved)}. Set dataset_split to one of these."
            )
        saved = saved[name]
    elif split not in (None, ALL):
        raise DataError(f"dataset_split is {split!r}, but {path} is a set without splits. Leave it out.")
    return saved.with_format(None)


def _load_parquet(paths: Sequence[Path]) -> _Table:
    """Paths of images that their cells hold begin from the folder of their file."""
    import datasets

    counts = [_parquet_rows(path) for path in paths]
    if not any(counts):  # datasets fails obscurely on these
        raise _no_rows(str(paths[0] if len(paths) == 1 else paths[0].parent))
    files = [glob.escape(str(path)) for path in paths]
    table = datasets.load_dataset("parquet", data_files=files, split=ALL)
    if FILE_NAME in table.column_names and IMAGE not in table.column_names:
        table = table.rename_column(FILE_NAME, IMAGE)
    ends = list(itertools.accumulate(counts))
    return _Table(table, lambda row: paths[bisect.bisect_right(ends, row)].parent)


def _parquet_rows(path: Path) -> int:
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except (ValueError, OSError) as error:
        raise DataError(f"{path} could not be read: {str(error).splitlines()[0]} Make or fetch it again.") from error
