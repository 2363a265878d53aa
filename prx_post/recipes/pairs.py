"""Preference tables -> TRL's columns prompt, chosen, rejected, as parquet shards.

A row holds two or more images of one prompt and a score for each: Pick-a-Pic's labels (1, 0, or 0.5 twice for a
tie), HPDv2's human_preference (1 and 0) or its ranks (lower is better). Every two images whose scores differ make a
pair. Images keep their bytes. Rows are streamed: a row group of the source and one to be written are in memory.

The folder appears under its name when it is complete, with a manifest.json of counts and checksums; what a killed run
left beside it is removed by the next one, which starts over.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prx_post.base.errors import PrxPostError
from prx_post.base.files import FolderLock, cannot_write, file_sha256, json_line, make_folder, require_empty
from prx_post.base.progress import Progress
from prx_post.base.settings import doc, require, require_one_of
from prx_post.data.images import decode
from prx_post.recipes.tables import TableConfig, open_table

GROUP_BYTES = 32 * 2**20
"""Images in a row group, which is what a reader has to hold."""
MANIFEST, DROPPED = "manifest.json", "dropped.jsonl"


@dataclass
class PairsConfig(TableConfig):
    """Preference pairs from a table of images with scores."""

    output_dir: str | None = doc("Folder for the shards; must be new or empty.", None)
    prompt_column: str = doc("Column with the prompts.", "prompt")
    image_columns: list[str] = doc("One column for each image, or one that holds a list of them.", [])
    score_columns: list[str] = doc("One column for each image's score, or one that holds a list of them.", [])
    higher_is_better: bool = doc("False where the scores are ranks, of which 1 is the best.", True)
    labelled_column: str | None = doc("Column that is false where a row has no label; null: all have one.", None)
    image_dir: str | None = doc("Folder that the images' paths are relative to, where the table has paths.", None)
    pairs_per_row: str = doc("`all` pairs with different scores, or only `best_worst`.", "all")
    max_rows: int | None = doc("Only the first rows of the table; null: all.", None, above=0)
    shard_mb: int = doc("Images in a shard, MB.", 500, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_set("output_dir", "prompt_column", "image_columns", "score_columns")
        images, scores = len(self.image_columns), len(self.score_columns)
        reason = f"there are {images} image_columns"
        require(
            images == scores, "score_columns", self.score_columns, "as many as image_columns", reason, "List both alike"
        )
        require_one_of("pairs_per_row", self.pairs_per_row, ("all", "best_worst"))


@dataclass(frozen=True)
class Pair:
    prompt: str
    chosen: bytes
    rejected: bytes


class Counts(Counter[str]):
    """What became of the rows, and a line for each image that could not be used."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped: list[dict[str, Any]] = []

    def drop(self, row: int, reason: str, name: str) -> None:
        self[name] += 1
        self.dropped.append({"row": row, "reason": reason})


def run(config: PairsConfig) -> None:
    """Write the shards. Raises PrxPostError if the table cannot be read, nothing is left, or the disk is full."""
    output_dir = require_empty(config.output_dir)
    columns = [config.prompt_column, *config.image_columns, *config.score_columns]
    columns += [config.labelled_column] if config.labelled_column else []
    table = open_table(config, columns, streaming=True).select_columns(columns)
    if table.features is not None:  # unknown for JSON, which holds paths and nothing to decode
        table = table.decode(False)
    if config.max_rows is not None:
        table = table.take(config.max_rows)
    make_folder(output_dir.parent)
    partial = output_dir.parent / f".{output_dir.name}.prx-post-partial"
    make_folder(partial)
    with FolderLock(partial):
        for leftover in partial.iterdir():
            leftover.unlink()
        counts = Counts()
        try:
            shards = write_shards(pairs_of(table, config, counts), partial, config.shard_mb * 10**6)
            if not shards:
                raise PrxPostError(f"{config.source} gives no pair: {_listed(counts)}. Check the recipe's columns.")
            manifest = {
                "source": config.source,
                "split": config.source_split,
                "revision": config.source_revision,
                "counts": dict(counts),
                "shards": shards,
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            (partial / DROPPED).write_text("".join(map(json_line, counts.dropped)), encoding="utf-8")
            partial.replace(output_dir)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise cannot_write(output_dir, error) from error
    print(f"{counts['pairs']} pairs in {len(shards)} shards in {output_dir}: {_listed(counts)}")


def _listed(counts: Counts) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "no rows"


def pairs_of(table: Iterable[dict[str, Any]], config: PairsConfig, counts: Counts) -> Iterator[Pair]:
    """Pairs of images with different scores, in the table's order; `counts` grows with what was read."""
    for number, row in enumerate(Progress(table, desc="pairing", unit="row", leave=False, disable=None)):
        counts["rows"] += 1
        prompt = (row[config.prompt_column] or "").strip()
        scores = _numbers(_cells(row, config.score_columns))
        cells = _cells(row, config.image_columns)
        if config.labelled_column and not row[config.labelled_column]:
            counts["rows without a label"] += 1
            continue
        if not prompt or scores is None or len(scores) != len(cells):
            reason = "no prompt" if not prompt else f"{len(cells)} images, scores {scores}"
            counts.drop(number, reason, "rows without a prompt or a score for each image")
            continue
        ranked = sorted(range(len(scores)), key=lambda i: scores[i], reverse=config.higher_is_better)
        couples = list(itertools.combinations(ranked, 2))
        if config.pairs_per_row == "best_worst":
            couples = [(ranked[0], ranked[-1])] if len(ranked) > 1 else []
        decided = [(better, worse) for better, worse in couples if scores[better] != scores[worse]]
        counts["ties"] += len(couples) - len(decided)
        images: dict[int, bytes] = {}
        for i in sorted({i for couple in decided for i in couple}):
            try:
                images[i] = image_bytes(cells[i], config.image_dir)
                decode(images[i])
            except OSError as error:
                images.pop(i, None)
                counts.drop(number, f"image {i}: {error}", "images that cannot be used")
        for better, worse in decided:
            if better in images and worse in images:
                counts["pairs"] += 1
                yield Pair(prompt, images[better], images[worse])


def _cells(row: dict[str, Any], columns: list[str]) -> list[Any]:
    """The cells of several columns, or those of the list that a single one holds."""
    if len(columns) == 1:
        return list(row[columns[0]] or [])
    return [row[name] for name in columns]


def _numbers(values: list[Any]) -> list[float] | None:
    """Scores as numbers, which a CSV file holds as text; None if one is missing or no number."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return None
    return None if any(number != number for number in numbers) else numbers


def image_bytes(cell: Any, image_dir: str | None) -> bytes:
    """The encoded image of a cell: bytes, a datasets Image, or a path. Raises OSError if there is none."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not cell:
        raise OSError("the cell is empty")
    if image_dir is None:
        raise OSError(f"{cell} is a path; set image_dir to the folder it is relative to")
    folder = Path(image_dir).expanduser().resolve()
    path = (folder / str(cell)).resolve()
    if not path.is_relative_to(folder):
        raise OSError(f"{cell} leads out of image_dir")
    return path.read_bytes()


def write_shards(pairs: Iterable[Pair], folder: Path, shard_bytes: int) -> list[dict[str, Any]]:
    """train-NNNNN.parquet in `folder`, each of about `shard_bytes`. Returns name, pairs, bytes and sha256 of each."""
    import datasets

    kinds = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    schema = datasets.Features(kinds).arrow_schema
    shards: list[dict[str, Any]] = []
    groups = _grouped(pairs, min(GROUP_BYTES, shard_bytes))
    for number in itertools.count():
        first = next(groups, None)
        if first is None:
            return shards
        path = folder / f"train-{number:05d}.parquet"
        size = count = 0
        with pq.ParquetWriter(path, schema) as writer:
            for group in itertools.chain([first], groups):
                writer.write_table(_table(group, schema))
                count += len(group)
                size += sum(len(pair.chosen) + len(pair.rejected) for pair in group)
                if size >= shard_bytes:
                    break
        shards.append({"file": path.name, "pairs": count, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
    raise AssertionError("unreachable")


def _grouped(pairs: Iterable[Pair], group_bytes: int) -> Iterator[list[Pair]]:
    group: list[Pair] = []
    size = 0
    for pair in pairs:
        group.append(pair)
        size += len(pair.chosen) + len(pair.rejected)
        if size >= group_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _table(pairs: list[Pair], schema: pa.Schema) -> pa.Table:
    def image(data: bytes) -> dict[str, Any]:
        return {"bytes": data, "path": None}

    rows = [{"prompt": p.prompt, "chosen": image(p.chosen), "rejected": image(p.rejected)} for p in pairs]
    return pa.Table.from_pylist(rows, schema=schema)
