"""Files and folders that are complete or absent: written beside their place, synced to the disk, then renamed."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from prx_post.base.errors import PrxPostError

CONFIG, FINAL = "config.yaml", "final"
"""In a run's folder: its settings, and the folder of the pipeline that it emits."""
PARTIAL = ".partial"
LOCK = ".lock"
TRACES = ("bad_rows.jsonl", "filtered_pairs.jsonl", LOCK)
"""What a run that ended before training may have left in its output_dir."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file or fill a folder at the path that is given inside; it takes its place at the end, whole, or never.

    What stood at `path` is replaced (a folder only if it is empty). An error inside leaves nothing behind.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")  # containers may have equal pids
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path`, all of it or nothing. Raises PrxPostError if the disk is full or not writable."""
    try:
        with replacing(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json(path: Path, content: Any) -> None:
    """Indented JSON, all of it or nothing. Raises PrxPostError as `write_bytes` does."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line, all of them or nothing."""
    write_bytes(path, "".join(json_line(row) for row in rows).encode())


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def cannot_write(path: Path, error: OSError) -> PrxPostError:
    return PrxPostError(f"{path} cannot be written: {error.strerror or error}. Free some space there, and run again.")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def existing_file(name: str, value: str) -> Path:
    """The file of a setting `name`. Raises PrxPostError if there is none."""
    path = Path(value).expanduser()
    if not path.is_file():
        raise PrxPostError(f"{name} is {value!r}, but there is no such file. Check the path.")
    return path


def require_empty(output_dir: str | None) -> Path:
    """The folder as a path; raises PrxPostError if it holds anything but what an earlier try left before training."""
    path = Path(str(output_dir)).expanduser()
    if path.is_file() or (path.exists() and any(p.name not in TRACES for p in path.iterdir())):
        raise PrxPostError(
            f"output_dir is {str(output_dir)!r}, but must be new or empty because nothing is overwritten. "
            f"Choose another output_dir, move this one away, or resume its run by resume_from_checkpoint: latest."
        )
    return path


def make_folder(path: Path) -> Path:
    """Create `path`; raises PrxPostError if that is not allowed, before hours of work meant for it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrxPostError(f"{path} cannot be made: {error.strerror}. Choose another folder.") from error
    if not os.access(path, os.W_OK):
        raise PrxPostError(f"{path} cannot be written to. Choose another folder.")
    return path


class FolderLock:
    """An exclusive lock on a folder, which the system releases when the process ends, however it ends.

    Args:
        name: of the setting that chose the folder.
        leaves_file: whether the file that is locked stays when the lock is released; a run is known by it.

    Raises:
        PrxPostError: another process holds it; says which.
    """

    def __init__(self, folder: Path, name: str = "output_dir", *, leaves_file: bool = False) -> None:
        self._path, self._leaves_file = folder / LOCK, leaves_file
        self._file: TextIO = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            while not self._is_the_file_there():  # its holder removed it after it was opened here
                self._file.close()
                self._file = self._path.open("a+")
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise PrxPostError(
                f"{name} is {str(folder)!r}, but another run writes there ({holder}). "
                f"Wait for it, stop it, or choose another {name}."
            ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        if not self._leaves_file:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _is_the_file_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False
