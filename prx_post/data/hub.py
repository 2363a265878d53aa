"""Data sets of the Hub. A mistyped path is told from an id before the Hub is asked."""

import re
from pathlib import Path
from typing import Any

from prx_post.data.rows import DataError

HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
OF_FILES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".tar", ".zip", ".txt", ".arrow")
TIMEOUT_S = 10.0


def load_from_hub(field: str, name: str, **settings: Any) -> Any:
    """`datasets.load_dataset` of the Hub id `name`, a setting `field` that is no local path.

    Raises:
        DataError: it can be no Hub id, or is one that cannot be opened.
    """
    import datasets

    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name) or name.lower().endswith(OF_FILES):
        raise DataError(f"{field} is {name!r}, but there is no such file or folder. Check the path.")
    owner = name.split("/")[0]
    if owner != name and Path(owner).is_dir():
        where = f"in {owner!r}, a local folder"
        raise DataError(f"{field} is {name!r}, but there is no such file or folder {where}. Check the path.")
    try:
        _look_up(name)
        return datasets.load_dataset(name, **settings)
    except (datasets.exceptions.DatasetsError, ConnectionError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0].removesuffix(".")
        raise DataError(
            f"{field} is {name!r}, but there is no such local file or folder, and the Hub did not give a data set of "
            f"that name: {reason}. Check the path, or the Hub id and the connection."
        ) from error


def _look_up(name: str) -> None:
    """Ask the Hub once, for `datasets` asks many times.

    Raises:
        ConnectionError: it cannot be reached.
        FileNotFoundError: it has no such data set, or shows it to others alone.
    """
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(name, timeout=TIMEOUT_S)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError("it has none, or a private one, for which log in by `hf auth login`") from error
    except HfHubHTTPError:
        return  # `datasets` says more, and tries again where that helps
    except httpx2.TransportError as error:
        raise ConnectionError(
            f"it cannot be reached ({error}); if the data set was downloaded before, set HF_HUB_OFFLINE=1"
        ) from error
