"""The manifest of an image folder that is being fetched: what became of every row, a JSON line each."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from prx_post.base.errors import PrxPostError
from prx_post.base.files import cannot_write, file_sha256, json_line
from prx_post.base.progress import Progress


@dataclass(frozen=True)
class Entry:
    """A line of the manifest."""

    key: str
    url: str
    status: str
    """ok, failed or skipped"""
    reason: str | None = None
    permanent: bool = False
    attempts: int = 0
    http_status: int | None = None
    file_name: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    width: int | None = None
    height: int | None = None


class Journal:
    """Adds lines to a manifest as rows are done, so that a killed run loses none but the last. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        data = path.read_bytes() if path.exists() else b""
        self._file = path.open("a", encoding="utf-8")
        if data and not data.endswith(b"\n"):
            self._file.write("\n")  # the line that a killed run left unfinished

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, entry: Entry) -> None:
        try:
            self._file.write(json_line(dataclasses.asdict(entry)))
            self._file.flush()
        except OSError as error:
            raise cannot_write(self._path, error) from error


def read_manifest(path: Path) -> dict[str, Entry]:
    """The last line for each key of what was fetched or failed. A line left unfinished by a killed run is no line."""
    entries: dict[str, Entry] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if entry.status != "skipped":  # a row without a key, or with the key of another
                entries[entry.key] = entry
    return entries


def damage(folder: Path, entry: Entry) -> str | None:
    """What is wrong with the file of an entry that is ok, or None."""
    path = folder / Path(str(entry.file_name)).name  # a name, not a path: the manifest may have been edited
    try:
        if path.stat().st_size != entry.bytes:
            return f"{path} has {path.stat().st_size} bytes, but had {entry.bytes}"
        return None if file_sha256(path) == entry.sha256 else f"{path} is not the file that was fetched"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def by_reason(entries: Iterable[Entry]) -> list[str]:
    """How many there are of each class of reasons, most first."""
    counts = Counter(str(e.reason).split(":")[0] for e in entries)
    return [f"  {count:6}  {reason}" for reason, count in counts.most_common()]


def verify(folder: Path, path: Path) -> None:
    """Compare the files with the manifest at `path`. Raises PrxPostError after naming all that are not as they were."""
    ok = [e for e in read_manifest(path).values() if e.status == "ok"]
    if not ok:
        raise PrxPostError(f"{path} names no image. Run the recipe without --verify first.")
    damaged = [
        what
        for e in Progress(ok, desc="checking", unit="file", leave=False, disable=None)
        if (what := damage(folder, e))
    ]
    for what in damaged:
        print(what)
    if damaged:
        raise PrxPostError(
            f"{len(damaged)} of {len(ok)} images are damaged or missing. Run without --verify to fetch them anew."
        )
    print(f"{len(ok)} images in {folder} are what was fetched")
