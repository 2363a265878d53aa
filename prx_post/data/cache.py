"""An on-disk cache of tensors, keyed by content and shared by runs and stages.

    cache_dir/latents/<fingerprint of the VAE>/<uuid>.safetensors
    cache_dir/embeddings/<fingerprint of tokenizer and text encoder>/<uuid>.safetensors

Each shard is a safetensors file whose tensor names are the keys, so the files are their own index; its metadata holds
a CRC-32 of every tensor, checked when the tensor is first read. A shard is written beside its place and renamed, so it
is complete or absent; several processes may write at once.
"""

import hashlib
import json
import shutil
import time
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from prx_post.base.errors import PrxPostError
from prx_post.base.files import file_sha256, make_folder, replacing, write_json

SHARD_BYTES = 256 * 2**20
SHARD_S = 300.0


class TensorCache:
    """Tensors by key in one folder; reading is memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)
        self._shard_of: dict[str, Path] = {}
        self._open: dict[Path, tuple[Any, dict[str, str]]] = {}
        self._verified: set[str] = set()
        for shard in sorted(folder.glob("*.safetensors")):
            try:
                self._index(shard)
            except SafetensorError as error:
                tqdm.write(f"warning: {shard} is damaged ({error}) and left unused; what it held is encoded again.")

    def _index(self, shard: Path) -> None:
        with safe_open(shard, framework="pt") as file:
            self._shard_of.update(dict.fromkeys(file.keys(), shard))

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def __getitem__(self, key: str) -> Tensor:
        """The tensor under `key`. Raises PrxPostError, naming the shard, if it is not what was written."""
        shard = self._shard_of[key]
        if shard not in self._open:
            file = safe_open(shard, framework="pt")
            self._open[shard] = file, file.metadata() or {}
        file, checksums = self._open[shard]
        tensor = file.get_tensor(key)
        if key not in self._verified and key in checksums:
            if checksum(tensor) != checksums[key]:
                raise PrxPostError(
                    f"cache file {shard} is corrupt: the checksum of {key} is not what was written. "
                    f"Delete that file; what it held is encoded again."
                )
            self._verified.add(key)
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker process opens its own files

    def write(self, items: Iterable[tuple[str, Tensor]]) -> None:
        """Add tensors as they come, a shard for every 256 MiB or five minutes. What an interrupted call had is kept."""
        pending: dict[str, Tensor] = {}
        size, began = 0, time.monotonic()
        try:
            for key, tensor in items:
                pending[key] = tensor.detach().cpu().contiguous()
                size += tensor.nbytes
                if size >= SHARD_BYTES or time.monotonic() - began > SHARD_S:
                    self._write_shard(pending)  # and only then forgotten: a signal may interrupt the writing
                    pending, size, began = {}, 0, time.monotonic()
        finally:
            if pending:
                self._write_shard(pending)

    def _write_shard(self, tensors: dict[str, Tensor]) -> None:
        shard = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            with replacing(shard) as partial:
                save_file(tensors, partial, metadata={key: checksum(tensor) for key, tensor in tensors.items()})
        except (OSError, SafetensorError) as error:
            raise PrxPostError(
                f"{self.folder} cannot be written: {error}. Free some space, or set cache_dir."
            ) from error
        self._index(shard)


class JoinedCache:
    """Several caches to read from as if they were one."""

    def __init__(self, *parts: "TensorCache | JoinedCache") -> None:
        self._parts = parts

    @property
    def folder(self) -> Path:
        """Of the first."""
        return self._parts[0].folder

    def __contains__(self, key: str) -> bool:
        return any(key in part for part in self._parts)

    def __getitem__(self, key: str) -> Tensor:
        return next(part for part in self._parts if key in part)[key]


def check_free_space(folder: Path, bytes_needed: int) -> None:
    """Raise PrxPostError if `folder`'s disk has not `bytes_needed` left."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if bytes_needed > free:
        raise PrxPostError(
            f"cache_dir is {str(folder)!r}, which has {free / 2**30:.1f} GiB free, but must have "
            f"{bytes_needed / 2**30:.1f} GiB because latents and embeddings are stored there. "
            f"Choose another cache_dir, or cache: none."
        )


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a contiguous tensor's bytes."""
    return f"{zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data):08x}"


def content_key(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:32]


def fingerprint(cache_dir: Path, *folders: Path) -> str:
    """A digest of the JSON and weight files in `folders`.

    Hashing gigabytes takes seconds, so each file's digest is remembered by path, size and modification time.
    """
    memo_path = cache_dir / "fingerprints.json"
    memo = _read_memo(memo_path)
    known, digests = len(memo), []
    for folder in folders:
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model")):
            stat = path.resolve().stat()
            memo_key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
            if memo_key not in memo:
                memo[memo_key] = file_sha256(path)
            digests.append(f"{folder.name}/{path.name}:{memo[memo_key]}")
    if len(memo) > known:
        make_folder(cache_dir)
        write_json(memo_path, memo)
    return content_key("\n".join(digests))[:16]


def _read_memo(path: Path) -> dict[str, str]:
    """The remembered digests; a damaged file only costs the time to hash again."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
