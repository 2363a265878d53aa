"""What a scan found, remembered by the data it was of: a resumed run, or the next stage, does not read images again.

    cache_dir/scans/<digest of the data, and of what the scan depends on>.parquet

The file may be deleted; the data are then scanned again.
"""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from prx_post.base.files import make_folder, replacing
from prx_post.base.ranks import Ranks
from prx_post.data.buckets import Buckets
from prx_post.data.cache import content_key, fingerprint
from prx_post.data.encoders import Encoders
from prx_post.data.images import PREPROCESSING
from prx_post.data.rows import BadRow, ImageRows
from prx_post.data.scan import Sample, scan

FORMAT = 1
LARGE = 10_000
"""Rows from which on a scan is announced where no progress bar is seen."""
Found = tuple[list[Sample], list[BadRow]]


def scanned(
    rows: ImageRows, buckets: Buckets, encoders: Encoders, decode_all: bool, cache_dir: Path, ranks: Ranks
) -> Found:
    """The usable samples and the bad rows of all processes, in the order of the rows; each scans its part, unless it is
    remembered.
    """

    def look_up() -> tuple[Path | None, Found | None]:
        path = _path(rows, buckets, encoders, decode_all, cache_dir)
        return path, None if path is None else _read(path, rows)

    path, known = ranks.on_main(look_up)
    if known is not None:
        return known
    if ranks.is_main and len(rows) >= LARGE:
        tqdm.write(f"scanning {len(rows):,} rows, once")
    tokenizer = encoders.pipeline.load_tokenizer()
    found = scan(rows, buckets, encoders.cleaner, tokenizer, decode_all, ranks)
    samples, bad = (ranks.gather(part) for part in found)
    samples.sort(key=lambda sample: sample.row)
    bad.sort(key=lambda bad_row: bad_row.row)
    if path is not None:
        ranks.on_main(lambda: _write(path, samples, bad))
    return samples, bad


def _path(rows: ImageRows, buckets: Buckets, encoders: Encoders, decode_all: bool, cache_dir: Path) -> Path | None:
    data = rows.fingerprint()
    if data is None:
        return None
    depends_on = {
        "data": data,
        "format": [FORMAT, PREPROCESSING, rows.images_per_entry],
        "sizes": buckets.fixed or buckets.ratios,
        "skip_text_cleaning": encoders.cleaner.skip_text_cleaning,
        "cleaning": version("diffusers"),
        "tokenizer": fingerprint(cache_dir, encoders.pipeline.path / "tokenizer"),
        "decoded": decode_all,
    }
    return cache_dir / "scans" / f"{content_key(json.dumps(depends_on))}.parquet"


def _write(path: Path, samples: Sequence[Sample], bad: Sequence[BadRow]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole, size, text = pa.int64(), pa.list_(pa.int32(), 2), pa.string()
    columns = {"row": whole, "size": size, "own_size": size, "image_key": text, "cleaned": text, "tokens": whole}
    schema = pa.schema({**columns, "name": text, "reason": text})
    of_samples = [{name: getattr(sample, name) for name in columns} for sample in samples]
    make_folder(path.parent)
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist([*of_samples, *map(vars, bad)], schema), partial)


def _read(path: Path, rows: ImageRows) -> Found | None:
    """None if there is no such file, or none that can be read."""
    import pyarrow.parquet as pq

    try:
        lines = pq.read_table(path).to_pylist()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        tqdm.write(f"warning: {path} is damaged ({error}) and left unused; the data are scanned again.")
        return None
    samples = [
        Sample(
            row=line["row"],
            prompt=rows.prompts[line["row"]] or "",
            size=tuple(line["size"]),
            image_key=line["image_key"],
            prompt_key=content_key(line["cleaned"]),
            cleaned=line["cleaned"],
            tokens=line["tokens"],
            own_size=tuple(line["own_size"]),
        )
        for line in lines
        if line["reason"] is None
    ]
    bad = [BadRow(line["row"], line["name"], line["reason"]) for line in lines if line["reason"] is not None]
    return samples, bad
