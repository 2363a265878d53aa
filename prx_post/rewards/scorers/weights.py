"""Finding and reading the files of published scorers: a path, the Hub's cache, or the Hub; tensors only, never code."""

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.files import file_sha256

MODEL = ("model.safetensors", "pytorch_model.bin")
"""What transformers calls the weights, the preferred name first."""
HASHED_BYTES = 64 * 2**20
"""Larger files are told apart by size and time: hashing gigabytes would hold up every start."""


@dataclass(frozen=True)
class Published:
    """Files of one Hub repository that a reward reads."""

    hub_id: str
    files: tuple[tuple[str, ...], ...]
    """A tuple a file: its name, and names that serve as well. The weights, if it has any, come first."""


@dataclass(frozen=True)
class Files:
    """Where they are."""

    paths: tuple[Path, ...]
    """In the order of `Published.files`."""
    version: str
    """Differs where the files differ: part of a reward's identity."""


def locate(reward: str, published: Published, weights: str | None) -> Files:
    """The files of `published`, or of what stands in for them.

    Args:
        weights: None for the published ones; a folder with files of those names; the weights' file, the others being
            beside it; or another Hub id.

    Raises:
        PrxPostError: a file is neither there nor can be fetched. Nothing has been loaded then.
    """
    if weights is None:
        return _from_hub(reward, published, published.hub_id)
    path = Path(weights).expanduser()
    if path.is_file():
        return _local(reward, published, path.parent, path)
    if path.is_dir():
        return _local(reward, published, path)
    if weights.startswith((".", "/", "~")) or weights.count("/") != 1:
        raise PrxPostError(
            f"{reward} has the weights {weights!r}, but there is no such file or folder, and it is not a Hub id "
            f"(owner/name). Check the path."
        )
    return _from_hub(reward, published, weights)


def locate_companion(reward: str, published: Published, weights: str | None) -> Files:
    """Files that go with weights of another repository: beside those, or in a folder there with the repository's name
    (`vocab.json`, or `CLIP-ViT-H-14-laion2B-s32B-b79K/vocab.json`); if they are not there, the Hub's.

    Raises:
        PrxPostError: see `locate`.
    """
    given = Path(weights).expanduser() if weights is not None else None
    if given is not None and given.exists():
        folder = given if given.is_dir() else given.parent
        for candidate in (folder / published.hub_id.rpartition("/")[2], folder):
            if all(any((candidate / name).is_file() for name in names) for names in published.files):
                return _local(reward, published, candidate)
    return _from_hub(reward, published, published.hub_id)


def _local(reward: str, published: Published, folder: Path, first: Path | None = None) -> Files:
    paths = [first] if first is not None else []
    for names in published.files[len(paths) :]:
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise PrxPostError(
                f"{reward} needs {' or '.join(names)} in {folder}, but it is not there. "
                f"{_how_to_get(reward, published.hub_id, names[0])}"
            )
        paths.append(found)
    digest = hashlib.sha256("\n".join(_fingerprint(path) for path in paths).encode()).hexdigest()[:16]
    return Files(tuple(paths), f"{paths[0].name} {digest}")


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    return file_sha256(path) if size <= HASHED_BYTES else f"{size} {path.stat().st_mtime_ns}"


def _from_hub(reward: str, published: Published, hub_id: str) -> Files:
    paths = tuple(_fetch(reward, hub_id, names) for names in published.files)
    commit = paths[0].parts[paths[0].parts.index("snapshots") + 1]
    return Files(paths, f"{hub_id}@{commit[:12]}")


def _fetch(reward: str, hub_id: str, names: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    failures: list[Exception] = []
    for name in names:
        try:
            return Path(hf_hub_download(hub_id, name))
        except EntryNotFoundError as error:  # also raised if it is not cached and there is no network
            failures.append(error)
        except (HfHubHTTPError, HFValidationError) as error:
            failures.append(error)
            break
    offline = isinstance(failures[0], LocalEntryNotFoundError)
    reason = "the Hub cannot be reached" if offline else str(failures[0]).strip().splitlines()[0].rstrip(".")
    raise PrxPostError(
        f"{reward} needs {' or '.join(names)} of {hub_id}, which is not in the Hub's cache and could not be fetched: "
        f"{reason}. {_how_to_get(reward, hub_id, names[0])}"
    ) from failures[0]


def _how_to_get(reward: str, hub_id: str, name: str) -> str:
    return f"Fetch it by `hf download {hub_id} {name}`, or say where it is by `{reward}=PATH`."


def read_json(path: Path, required: Iterable[str] = ()) -> dict[str, Any]:
    """A JSON object that has the keys `required`. Raises PrxPostError if it is none or lacks one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PrxPostError(f"{path} is not valid JSON: {error}. Copy it again.") from error
    if not isinstance(content, dict):
        raise PrxPostError(f"{path} must hold a JSON object. Copy it again.")
    if missing := [key for key in required if key not in content]:
        raise PrxPostError(f"{path} has no {missing[0]!r}, so it is not this model's configuration. Copy it again.")
    return content


def read_tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Tensors by name, on the CPU.

    Args:
        key: what the dictionary of tensors is under, if it is not the whole file.

    Raises:
        PrxPostError: damaged, or a pickle of more than tensors. Such a one is never loaded, as it may run any code.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PrxPostError(
            f"{path} is damaged or holds more than tensors, and is not loaded because a pickle may run any code. "
            f"Get the published file again."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PrxPostError(f"{path} cannot be read: {reason}. It may be cut short: copy it again.") from error
    if key is not None and isinstance(content, dict) and key in content:
        content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise PrxPostError(f"{path} holds no dictionary of tensors. Get the published file again.")
    return content


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], path: Path, what: str) -> None:
    """Raise PrxPostError, naming the first that are wrong, unless names and shapes are exactly those of `expected`."""
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    misshaped = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    found = {"it lacks": missing, "it also has": unexpected, "of another shape are": misshaped}
    if problems := [f"{label} {_some(names)}" for label, names in found.items() if names]:
        raise PrxPostError(f"{path} does not hold {what}: {'; '.join(problems)}. Check which file it is.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def require_tensors(tensors: Mapping[str, Tensor], names: Iterable[str], path: Path, what: str) -> None:
    """Raise PrxPostError unless all `names` are there."""
    if missing := [name for name in names if name not in tensors]:
        raise PrxPostError(f"{path} does not hold {what}: it lacks {_some(missing)}. Check which file it is.")


def build(model_class: Any, config: Any, tensors: dict[str, Tensor], path: Path, **options: Any) -> Any:
    """A frozen transformers model with exactly these weights.

    Args:
        tensors: by the model's names; `path` is where they came from, for errors.
        options: `dtype`, and the constructor's own.

    Raises:
        PrxPostError: names or shapes differ from the model's.
    """
    # Checkpoints written before transformers 4.31 carry this buffer, which is no weight.
    tensors = {name: value for name, value in tensors.items() if not name.endswith("position_ids")}
    constructor_options = {name: value for name, value in options.items() if name != "dtype"}
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in model_class(config, **constructor_options).state_dict().items()}
    check_tensors(tensors, shapes, path, f"a {model_class.__name__} of its configuration")
    model = model_class.from_pretrained(None, config=config, state_dict=tensors, **options)
    return model.eval().requires_grad_(False)
