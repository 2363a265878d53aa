"""A table of URLs and prompts -> an image folder. Interrupted anywhere, it continues where it was.

    output_dir/<key>.jpg ...     the images, byte for byte as they were served
    output_dir/metadata.jsonl    file_name and prompt of each, what `prx-post sft` reads; written when all is done
    output_dir/manifest.jsonl    what became of every row; a line is added as each row is done

A row that is done is not fetched again as long as its file is what the manifest says. A permanent failure (404, no
image, a refused address) is not tried again unless asked; what another try may fix is tried in every run.
"""

import dataclasses
import hashlib
import itertools
import os
import random
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

from prx_post.base.errors import PrxPostError
from prx_post.base.files import PARTIAL, FolderLock, make_folder, write_bytes, write_jsonl
from prx_post.base.progress import Progress
from prx_post.base.settings import doc, require
from prx_post.recipes.download import EXTENSIONS, Fetched, Fetcher, Limits
from prx_post.recipes.manifest import Entry, Journal, by_reason, damage, read_manifest, verify
from prx_post.recipes.tables import TableConfig, open_table
from prx_post.recipes.urls import FetchError

MANIFEST, METADATA = "manifest.jsonl", "metadata.jsonl"
MAX_PAUSE_S = 60.0
"""A server that asks for a longer pause is left for the next run."""
TEST_SWITCH = "PRX_POST_TESTS_ALLOW_LOOPBACK"
"""Environment variable with which the tests' server on 127.0.0.1 may be reached. Not for any other use."""


@dataclass
class UrlListConfig(TableConfig):
    """Images fetched from a list of URLs."""

    output_dir: str | None = doc("Folder for the images; new, empty, or of an earlier run to be continued.", None)
    key_column: str = doc("Column with the rows' names, of which file names are made.", "key")
    url_column: str = doc("Column with the URLs.", "url")
    prompt_column: str = doc("Column with the captions.", "prompt")
    max_rows: int | None = doc("Only the first rows of the table; null: all.", None, above=0)
    num_workers: int = doc("Downloads at a time.", 16, above=0)
    per_host: int = doc("Downloads at a time from one host.", 2, above=0)
    max_attempts: int = doc("Tries a URL and run, where another try may help.", 4, above=0)
    backoff_s: float = doc(
        "Pause after the first failed try, seconds; doubled after each, and jittered.", 1.0, at_least=0
    )
    max_bytes: int = doc("Largest file accepted, bytes.", 32 * 2**20, above=0)
    max_pixels: int = doc("Largest image accepted, pixels; known before anything is decoded.", 80_000_000, above=0)
    connect_timeout_s: float = doc("Seconds to connect.", 10.0, above=0)
    read_timeout_s: float = doc("Seconds between two pieces of an answer.", 20.0, above=0)
    total_timeout_s: float = doc("Seconds for a whole try, redirects included.", 120.0, above=0)
    max_lost_fraction: float = doc(
        "Fail, keeping the images, when more than this fraction of the rows is lost.", 0.25, between=(0, 1)
    )
    retry_failed: bool = doc("Try permanent failures of earlier runs again.", False)
    verify: bool = doc("Only check the files on disk against the manifest; fetch nothing.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_set("output_dir", "key_column", "url_column", "prompt_column")
        pillow, reason = 2 * (Image.MAX_IMAGE_PIXELS or 0), "Pillow takes more for a decompression bomb"
        ok, action = self.max_pixels <= pillow, f"Set max_pixels to {pillow} or less"
        require(ok, "max_pixels", self.max_pixels, f"at most {pillow}", reason, action)


@dataclass(frozen=True)
class Row:
    key: str
    url: str
    prompt: str
    stem: str
    """The file's name without its extension; unique in the folder, also where case does not count."""


def run(config: UrlListConfig) -> None:
    """Fetch what is missing, or with `verify` only look. Raises PrxPostError if too much is lost or damaged."""
    folder = Path(str(config.output_dir)).expanduser()
    manifest = folder / MANIFEST
    if config.verify:
        verify(folder, manifest)
        return
    rows, skipped = read_list(config)
    if not manifest.exists() and folder.exists() and any(folder.iterdir()):
        raise PrxPostError(
            f"output_dir is {str(folder)!r}, but must be new, empty or of an earlier run because nothing of yours is "
            f"overwritten. Choose another output_dir."
        )
    make_folder(folder)
    with FolderLock(folder):
        for partial in folder.glob(f".*{PARTIAL}"):
            partial.unlink()
        manifest.touch()
        known = read_manifest(manifest)
        entries = _still_valid(rows, known, folder, config.retry_failed)
        with Journal(manifest) as journal:
            for entry in fetch_all(rows, entries, folder, config):
                entries[entry.key] = entry
                journal.add(entry)
        others = [entry for key, entry in known.items() if key not in entries]  # of a longer list, for another run
        _finish(rows, entries, [*skipped, *others], folder)
    _report(rows, entries, skipped, folder, config)


def read_list(config: UrlListConfig) -> tuple[list[Row], list[Entry]]:
    """The table's rows, and those that cannot be used: without key, URL or prompt, or with the key of another."""
    table = open_table(config, [config.key_column, config.url_column, config.prompt_column])
    if config.max_rows is not None:
        table = table.take(config.max_rows)
    rows: list[Row] = []
    skipped: list[Entry] = []
    keys: set[str] = set()
    stems: set[str] = set()
    for raw in table.select_columns([config.key_column, config.url_column, config.prompt_column]):
        key, url, prompt = (
            str(raw[name] if raw[name] is not None else "").strip()
            for name in (config.key_column, config.url_column, config.prompt_column)
        )
        missing = [name for name, value in (("key", key), ("URL", url), ("prompt", prompt)) if not value]
        if missing or key in keys:
            reason = f"no {missing[0]}" if missing else "the key of an earlier row"
            skipped.append(Entry(key, url, "skipped", reason))
            continue
        keys.add(key)
        rows.append(Row(key, url, prompt, _safe_stem(key, stems)))
    if not rows:
        raise PrxPostError(f"source is {config.source!r}, in which no row has a key, a URL and a prompt. Check it.")
    return rows, skipped


def _safe_stem(key: str, taken: set[str]) -> str:
    """A file name for a key, which may hold anything; what had to be changed gets a digest of the key behind it."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", key)[:100].lstrip(".")
    if stem != key or stem.lower() in taken or stem in ("manifest", "metadata"):
        stem = f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    taken.add(stem.lower())
    return stem


def _still_valid(rows: list[Row], known: dict[str, Entry], folder: Path, retry_failed: bool) -> dict[str, Entry]:
    """What an earlier run settled; damaged files are named and left out, so that they are fetched again."""
    valid = {}
    for row in Progress(rows, desc="checking", unit="file", leave=False, disable=None):
        entry = known.get(row.key)
        if entry is None or entry.url != row.url:
            continue
        if entry.status == "ok" and Path(str(entry.file_name)).stem == row.stem:
            what = damage(folder, entry)
            if what is None:
                valid[row.key] = entry
            else:
                tqdm.write(f"warning: {what}; it is fetched again.")
        elif entry.status == "failed" and entry.permanent and not retry_failed:
            valid[row.key] = entry
    return valid


def fetch_all(rows: list[Row], settled: dict[str, Entry], folder: Path, config: UrlListConfig) -> Iterator[Entry]:
    """Fetch the rows that are not settled, each URL once, and give their entries as they are done, in any order."""
    fetcher = Fetcher(
        Limits(
            max_bytes=config.max_bytes,
            max_pixels=config.max_pixels,
            connect_s=config.connect_timeout_s,
            read_s=config.read_timeout_s,
            total_s=config.total_timeout_s,
        ),
        allow_loopback=os.environ.get(TEST_SWITCH) == "1",
    )
    patient = Patient(fetcher, config)
    donors = {e.url: e for e in settled.values() if e.status == "ok"}
    by_url: dict[str, list[Row]] = {}
    for row in rows:
        if row.key not in settled:
            by_url.setdefault(row.url, []).append(row)
    pool = ThreadPoolExecutor(config.num_workers)
    try:
        jobs = [pool.submit(_fetch_group, patient, group, donors.get(url), folder) for url, group in by_url.items()]
        for job in Progress(
            as_completed(jobs), total=len(jobs), desc="fetching", unit="URL", leave=False, disable=None
        ):
            yield from job.result()
    finally:
        patient.stop.set()  # on an error or Ctrl-C nobody goes on waiting for another try
        pool.shutdown(cancel_futures=True)


class Patient:
    """Fetches with pauses between tries, and few at a time from one host."""

    def __init__(self, fetcher: Fetcher, config: UrlListConfig) -> None:
        self.fetcher, self.max_attempts, self.backoff_s = fetcher, config.max_attempts, config.backoff_s
        self.stop = threading.Event()
        self._per_host, self._hosts, self._lock = config.per_host, dict[str, threading.Semaphore](), threading.Lock()

    def fetch(self, url: str) -> tuple[Fetched | FetchError, int]:
        """The image or the last failure, and the number of tries."""
        for attempt in itertools.count(1):
            try:
                with self._host(url):
                    return self.fetcher.fetch(url), attempt
            except FetchError as error:
                pause_s = max(self.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5), error.retry_after_s or 0)
                if error.permanent or attempt == self.max_attempts or pause_s > MAX_PAUSE_S or self.stop.wait(pause_s):
                    return error, attempt
        raise AssertionError("unreachable")

    def _host(self, url: str) -> threading.Semaphore:
        try:
            host = urlsplit(url).netloc
        except ValueError:
            host = ""
        with self._lock:
            return self._hosts.setdefault(host, threading.Semaphore(self._per_host))


def _fetch_group(patient: Patient, rows: list[Row], donor: Entry | None, folder: Path) -> list[Entry]:
    """Entries of rows that share a URL; their files are written. `donor` is a settled row with the same URL."""
    if donor is not None:
        path = folder / str(donor.file_name)
        return [_store(row, donor, path.read_bytes(), path.suffix, folder) for row in rows]
    got, attempts = patient.fetch(rows[0].url)
    if isinstance(got, FetchError):
        return [Entry(row.key, row.url, "failed", got.reason, got.permanent, attempts, got.http_status) for row in rows]
    found = Entry(
        rows[0].key,
        rows[0].url,
        "ok",
        attempts=attempts,
        http_status=got.http_status,
        sha256=got.sha256,
        bytes=len(got.data),
        width=got.width,
        height=got.height,
    )
    return [_store(row, found, got.data, got.extension, folder) for row in rows]


def _store(row: Row, found: Entry, data: bytes, extension: str, folder: Path) -> Entry:
    """Write the row's own copy of the image; its entry is `found` under its own names."""
    file_name = row.stem + extension
    write_bytes(folder / file_name, data)
    return dataclasses.replace(found, key=row.key, file_name=file_name)


def _finish(rows: list[Row], entries: dict[str, Entry], rest: list[Entry], folder: Path) -> None:
    """The manifest in the table's order, `rest` behind it, and metadata.jsonl; no row keeps a file it does not own."""
    done = [entries[row.key] for row in rows]
    for row, entry in zip(rows, done, strict=True):
        for extension in dict.fromkeys(EXTENSIONS.values()):
            if entry.file_name != row.stem + extension:
                (folder / (row.stem + extension)).unlink(missing_ok=True)
    write_jsonl(folder / MANIFEST, (dataclasses.asdict(e) for e in [*done, *rest]))
    write_jsonl(
        folder / METADATA,
        (
            {"file_name": entry.file_name, "prompt": row.prompt}
            for row, entry in zip(rows, done, strict=True)
            if entry.status == "ok"
        ),
    )


def _report(
    rows: list[Row], entries: dict[str, Entry], skipped: list[Entry], folder: Path, config: UrlListConfig
) -> None:
    ok = [e for e in entries.values() if e.status == "ok"]
    lost = [entries[row.key] for row in rows if entries[row.key].status != "ok"]
    fraction = len(lost) / len(rows)
    size_mb = sum(e.bytes or 0 for e in ok) / 1e6
    print(f"{len(ok)} images ({size_mb:,.1f} MB) in {folder}; {len(lost)} of {len(rows)} lost ({fraction:.1%})")
    for line in by_reason(lost):
        print(line)
    if skipped:
        print(f"{len(skipped)} rows skipped:")
        for line in by_reason(skipped):
            print(line)
    retryable = sum(not e.permanent for e in lost)
    if retryable:
        print(
            f"{retryable} of the lost may come back: run the same command again. All rows are in {folder / MANIFEST}."
        )
    if not ok:
        raise PrxPostError(f"none of {len(rows)} rows gave an image; {folder / MANIFEST} says why. Check the list.")
    if fraction > config.max_lost_fraction:
        raise PrxPostError(
            f"{len(lost)} of {len(rows)} rows are lost, but max_lost_fraction is {config.max_lost_fraction}. What was "
            f"found is in {folder} and can be used. Run again to retry, or raise max_lost_fraction."
        )
