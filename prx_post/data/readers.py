"""A data set opened as rows: an image folder, parquet, MDS shards or the Hub; `datasets` does the reading."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prx_post.data.config import DataConfig, EncodedData
from prx_post.data.mds import MdsRows, mds_folder
from prx_post.data.rows import DataError, ImageRows


def read_rows(config: DataConfig) -> ImageRows:
    """Open the data set of a configuration.

    Raises:
        DataError: it does not exist, lacks a column, or is empty.
    """
    shards = mds_folder(Path(str(config.dataset_name)).expanduser(), config.dataset_split)
    if shards is not None:
        return _not_empty(MdsRows(shards, config), config)
    dataset = open_dataset(config, ("image_column",))
    return ImageRows(dataset, config.image_column, config.prompt_column)


def open_dataset(
    config: EncodedData, image_fields: Sequence[str], fields: Sequence[str] = (), also: Sequence[str] = ()
) -> Any:
    """A `datasets.Dataset` of the prompt column and of the columns that the settings `image_fields` and `fields` name.

    Cells of the former are encoded images: {"bytes", "path"}.

    Args:
        also: columns that are taken along where the set has them.

    Raises:
        DataError: it does not exist, lacks a column, is empty, or a column holds something else.
    """
    import datasets

    dataset = _load(config)
    columns = {field: getattr(config, field) for field in (*image_fields, *fields, "prompt_column")}
    for field, column in columns.items():
        if column not in dataset.column_names:
            raise DataError(
                f"{field} is {column!r}, but {config.dataset_name} has only the columns "
                f"{', '.join(dataset.column_names)}. {_column_hint(config, field)}"
            )
        same = [other for other in columns if other != field and columns[other] == column]
        if same:
            raise DataError(f"{field} is {column!r}, but so is {same[0]}. Choose another column for one of them.")
    if len(dataset) == 0:
        raise _no_rows(config.dataset_name)
    kept = [*columns.values(), *(name for name in also if name in dataset.column_names)]
    dataset = dataset.select_columns(kept)  # so that no other image is decoded
    prompt_kind = getattr(dataset.features[config.prompt_column], "dtype", "lists")
    if prompt_kind not in ("string", "large_string"):
        raise DataError(
            f"prompt_column is {config.prompt_column!r}, which holds {prompt_kind}, "
            f"but must hold text. Choose another column."
        )
    for field in image_fields:
        try:
            dataset = dataset.cast_column(columns[field], datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:  # of datasets and of pyarrow
            raise DataError(
                f"{field} is {columns[field]!r}, which does not hold images: {error}. Choose another column."
            ) from error
    return dataset


def _not_empty(rows: ImageRows, config: DataConfig) -> ImageRows:
    if len(rows) == 0:
        raise _no_rows(config.dataset_name)
    return rows


def _column_hint(config: EncodedData, field_name: str) -> str:
    folder = Path(str(config.dataset_name)).expanduser()
    captions = folder.is_dir() and not any(folder.rglob("metadata.*")) and not any(folder.rglob("*.parquet"))
    if field_name == "prompt_column" and captions:
        return (
            "An image folder's captions stand in its metadata.jsonl, a file_name and a prompt on each line; "
            "`prx-post data image-folder` writes one from text files beside the images."
        )
    return f"Set {field_name} to one of these."


def _no_rows(name: str | None) -> DataError:
    return DataError(f"dataset_name is {name!r}, which has no rows. Choose another data set or split.")


def _load(config: EncodedData) -> Any:
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
