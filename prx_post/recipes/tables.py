"""Tables that data recipes start from: parquet, CSV, JSON on this disk, or a data set on the Hub."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prx_post.base.settings import check_fields, doc, require
from prx_post.data.folders import ALL, files_of
from prx_post.data.hub import load_from_hub
from prx_post.data.rows import DataError
from prx_post.data.text_files import SEPARATORS, csv_rows


@dataclass
class RecipeConfig:
    """What every recipe has."""

    kind: str = doc("What is made, and how; set by the recipe.", "")
    description: str = doc("One line about the set, shown by `prx-post data`.", "")

    def __post_init__(self) -> None:
        check_fields(self)

    def require_set(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value not in (None, "", []), name, value, "set", "the recipe needs it", f"Set {name}")


RECIPE_FOLDER = "{recipe}"
"""Stands in a recipe's `source` for the folder that the recipe is in."""


@dataclass
class TableConfig(RecipeConfig):
    """A recipe that starts from a table."""

    source: str | None = doc(
        f"A .parquet, .csv, .tsv, .json or .jsonl file, a folder of parquet, or a Hub id; {RECIPE_FOLDER} in it is the "
        f"folder of the recipe.",
        None,
    )
    source_split: str | None = doc(
        "Split to read: of local files those whose name, or whose folder's, begins so. null: all; of the Hub train.",
        None,
    )
    source_revision: str | None = doc("Hub revision (branch, tag or commit) of the source.", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_set("source")


READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
"""Builders of `datasets` by a file's suffix."""


def open_table(config: TableConfig, columns: Sequence[str], streaming: bool = False) -> Any:
    """The source as a `datasets.Dataset`, or an `IterableDataset` if `streaming`.

    Raises:
        DataError: it does not exist, cannot be read, or lacks one of `columns`.
    """
    import datasets
    import pyarrow

    source = str(config.source)
    path = Path(source).expanduser()
    suffixes = [*READERS, *SEPARATORS]
    if path.is_file() and path.suffix not in suffixes:
        raise DataError(f"source is {source!r}, but must be one of {', '.join(suffixes)}. Convert the file.")
    try:
        if path.suffix in SEPARATORS and path.is_file():
            table = datasets.Dataset.from_list(list(csv_rows(path)))
            table = table.to_iterable_dataset() if streaming else table
        elif path.is_file():
            builder = READERS[path.suffix]
            table = datasets.load_dataset(builder, data_files=glob.escape(str(path)), split=ALL, streaming=streaming)
        elif path.is_dir():
            files = files_of(path, config.source_split).ending((".parquet",))
            if not files:
                raise DataError(f"source is {source!r}, a folder without parquet files. Check the path.")
            paths = [glob.escape(str(file)) for file in files]
            table = datasets.load_dataset("parquet", data_files=paths, split=ALL, streaming=streaming)
        else:
            table = load_from_hub(
                "source", source, split=config.source_split or ALL, revision=config.source_revision, streaming=streaming
            )
        names = table.column_names or list(next(iter(table.take(1)), {}))
    except (
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
        ValueError,
        OSError,
    ) as error:
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"source is {source!r}, which could not be read: {reason}. Check the file.") from error
    for column in columns:
        if column not in names:
            raise DataError(
                f"column {column!r} is not in {source}, which has {', '.join(names) or 'none'}. "
                f"Set the recipe's column names to these."
            )
    return table
