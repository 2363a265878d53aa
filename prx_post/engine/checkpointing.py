"""Checkpoints to resume from: written beside their place by a thread, flushed, renamed; checked when read.

    output_dir/checkpoint-000500/
      rank-00000.safetensors   this rank's part of weights, optimizer moments and averages, whole and by name,
                               and this rank's random state and unlogged sums
      state.json               step, settings, data digest; size and sha256 of every file, and of itself

Every rank writes a part, so `output_dir` must be on a disk that all of them see. Ranks meet in the file system, not in
a collective: rank 0 waits for the others' files before it renames the folder, while training goes on.
"""

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from prx_post.base.errors import PrxPostError
from prx_post.base.files import file_sha256, flush, write_json

FORMAT = 3
NAME = re.compile(r"checkpoint-(\d{6,})")
LATEST = "latest"
LAST_WAIT_S = 60.0
"""How long a run of several processes that ends in an error waits for its last checkpoint."""


class CheckpointWriteError(PrxPostError):
    """A checkpoint that could not be written. Earlier ones are whole."""


class DamagedCheckpoint(PrxPostError):
    """A checkpoint whose files are not what was written."""


@dataclass(frozen=True)
class SavedState:
    """A checkpoint folder and its state.json."""

    folder: Path
    info: dict[str, Any]

    @property
    def step(self) -> int:
        return self.info["step"]

    @property
    def world_size(self) -> int:
        return self.info["world_size"]

    def verify(self) -> None:
        """Raise DamagedCheckpoint, naming the file, unless every file has the size and sha256 it was written with."""
        for name, written in self.info["files"].items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != written["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, but was written with {written['bytes']}"
                raise DamagedCheckpoint(f"checkpoint file {path} {found}.")
            if file_sha256(path) != written["sha256"]:
                raise DamagedCheckpoint(f"checkpoint file {path} is corrupt: its sha256 is not what was written.")

    def tensors(self) -> "Tensors":
        return Tensors([self.folder / name for name in sorted(self.info["files"])])

    def of_rank(self, rank: int) -> "Tensors":
        return Tensors([self.folder / _rank_file(rank)])

    def joined(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under `prefix` of all ranks that saved, joined along their first axis in rank order."""
        parts = [dict(self.of_rank(rank).under(prefix)) for rank in range(self.world_size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Tensors:
    """Tensors by key in safetensors files, read when asked for."""

    def __init__(self, files: list[Path]) -> None:
        opened = [safe_open(file, framework="pt") for file in files]
        self._at = {key: file for file in opened for key in list(file.keys())}

    def __getitem__(self, key: str) -> Tensor:
        return self._at[key].get_tensor(key)

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Of every key under `prefix`, without reading the tensors."""
        keys = [key for key in self._at if key.startswith(f"{prefix}/")]
        return {key.removeprefix(f"{prefix}/"): tuple(self._at[key].get_slice(key).get_shape()) for key in keys}

    def under(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(rest of the key, tensor) of every key that begins with `prefix/`."""
        for key in self._at:
            if key.startswith(f"{prefix}/"):
                yield key.removeprefix(f"{prefix}/"), self[key]


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. What a killed save left behind has another name."""
    found = {int(m[1]): path for path in output_dir.glob("checkpoint-*") if (m := NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def open_checkpoint(folder: Path) -> SavedState:
    """Read state.json alone.

    Raises:
        DamagedCheckpoint: it is missing, or not what was written.
    """
    path = folder / "state.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        digest = info.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint file {path} cannot be read ({type(error).__name__}: {error}).") from error
    if digest != _digest_of(info):
        raise DamagedCheckpoint(f"checkpoint file {path} is corrupt: its sha256 is not what was written.")
    if info["format"] != FORMAT:
        raise PrxPostError(
            f"{folder} has checkpoint format {info['format']}, but this prx-post resumes from format {FORMAT}. Finish "
            f"that run with the version that began it, or start a new run from a pipeline that it emitted."
        )
    return SavedState(folder, info)


def select_checkpoint(resume_from: str | None, output_dir: Path, past_damage: bool) -> SavedState | None:
    """The checkpoint that `resume_from_checkpoint` means, verified; None to start afresh.

    Raises:
        PrxPostError: there is no such folder, or it is damaged (and there is no leave to take an older one).
    """
    if resume_from is None:
        return None
    if resume_from != LATEST:
        return _verified(Path(resume_from).expanduser())
    for folder, older in pairwise([*reversed(checkpoints(output_dir)), None]):
        assert folder is not None
        try:
            return _verified(folder)
        except DamagedCheckpoint as error:
            if older is None:
                raise DamagedCheckpoint(
                    f"{error} There is no older checkpoint; start again in a new folder."
                ) from error
            if not past_damage:
                raise DamagedCheckpoint(
                    f"{error} To resume from {older.name} instead, set resume_past_damage: true."
                ) from error
            tqdm.write(f"warning: {error} Resuming from {older.name}.")
    return None


def _verified(folder: Path) -> SavedState:
    if not (folder / "state.json").is_file() and not NAME.fullmatch(folder.name):
        inside = checkpoints(folder) if folder.is_dir() else []
        hint = f"Did you mean {inside[-1]}?" if inside else "Check the path, or use `latest`."
        raise PrxPostError(f"resume_from_checkpoint is {str(folder)!r}, which is no checkpoint folder. {hint}")
    state = open_checkpoint(folder)
    state.verify()
    return state


class CheckpointWriter:
    """Writes this rank's part of each checkpoint in a thread. One checkpoint is under way at a time."""

    def __init__(self, output_dir: Path, rank: int, world_size: int, keep: int | None, timeout_s: float) -> None:
        self.output_dir, self.rank, self.world_size = output_dir, rank, world_size
        self.keep, self.timeout_s = keep, timeout_s
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def clean(self) -> None:
        """Remove what killed saves and deletions left behind. For the main process, before the first save."""
        for leftover in (*self.output_dir.glob(".checkpoint-*.partial"), *self.output_dir.glob(".checkpoint-*.old")):
            _remove(leftover)

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints later than `step`, which a resumed run will write anew. For the main process."""
        for folder in checkpoints(self.output_dir):
            if int(folder.name.removeprefix("checkpoint-")) > step:
                aside = folder.with_name(f"superseded-{folder.name}")
                if aside.exists():
                    shutil.rmtree(aside)
                folder.rename(aside)
                tqdm.write(f"{folder.name} is kept as {aside.name}")

    def save(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Begin to write; returns at once. `tensors` must be on the CPU and no longer change.

        Nothing is raised here, where other ranks could not know of it: see `has_failed`.
        """
        self.join()
        needed = sum(t.nbytes for t in tensors.values()) * self.world_size
        free = shutil.disk_usage(self.output_dir).free
        if needed > free and self.rank == 0:  # before others have written anything
            self._error = self._no_room(info["step"], needed, f"{free / 2**30:.2f} GiB are free")
            return
        self._thread = threading.Thread(target=self._run, args=(tensors, info, needed), name="checkpoint", daemon=True)
        self._thread.start()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Let the checkpoint under way be completed, whatever ended the training; a lost rank's part never comes."""
        if self._thread is not None:
            self._thread.join(None if self.world_size == 1 else LAST_WAIT_S)

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Raise what went wrong with a checkpoint, if anything did."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Until the checkpoint under way is complete, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _no_room(self, step: int, needed: int, reason: str) -> CheckpointWriteError:
        whole = checkpoints(self.output_dir)
        return CheckpointWriteError(
            f"checkpoint-{step:06d} needs {needed / 2**30:.2f} GiB in {self.output_dir}, but {reason}. Free some space"
            + (f" and resume from {whole[-1].name} (resume_from_checkpoint: latest)." if whole else ".")
        )

    def _run(self, tensors: dict[str, Tensor], info: dict[str, Any], needed: int) -> None:
        partial = self.output_dir / f".checkpoint-{info['step']:06d}.partial"
        try:
            self._write_part(partial, tensors)
            if self.rank == 0:
                self._complete(partial, info)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            self._error = self._no_room(info["step"], needed, f"writing it failed: {error}")
        except BaseException as error:  # carried to the main thread, which raises it
            self._error = error

    def _write_part(self, partial: Path, tensors: dict[str, Tensor]) -> None:
        partial.mkdir(exist_ok=True)
        file = partial / _rank_file(self.rank)
        save_file(tensors, file)
        flush(file)
        write_json(partial / f"rank-{self.rank:05d}.json", {"bytes": file.stat().st_size, "sha256": file_sha256(file)})

    def _complete(self, partial: Path, info: dict[str, Any]) -> None:
        files = {_rank_file(rank): self._await_parts(partial, rank) for rank in range(self.world_size)}
        info = {"format": FORMAT, **info, "world_size": self.world_size, "files": files}
        write_json(partial / "state.json", {**info, "sha256": _digest_of(info)})
        for rank in range(self.world_size):
            (partial / f"rank-{rank:05d}.json").unlink()
        flush(partial)
        partial.rename(self.output_dir / f"checkpoint-{info['step']:06d}")
        flush(self.output_dir)
        for old in checkpoints(self.output_dir)[: -self.keep] if self.keep else []:
            _remove(old.rename(old.with_name(f".{old.name}.old")))

    def _await_parts(self, partial: Path, rank: int) -> dict[str, Any]:
        """Size and digest of another rank's file, once it is complete."""
        path = partial / f"rank-{rank:05d}.json"
        deadline = time.monotonic() + self.timeout_s
        while not path.exists():
            if time.monotonic() > deadline:
                raise CheckpointWriteError(
                    f"{path.name} of rank {rank} did not appear in {partial} within {self.timeout_s:.0f} s, so the "
                    f"checkpoint is not complete. Is output_dir on a disk that every node sees?"
                )
            time.sleep(0.02)
        return json.loads(path.read_text())


def _remove(folder: Path) -> None:
    """Delete a folder that is no longer needed; one that resists is no reason to stop a run."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        tqdm.write(f"warning: {folder} could not be deleted: {error}")


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _digest_of(info: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
