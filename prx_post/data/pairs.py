"""Preference pairs: read, filtered, encoded, and made into batches whose two images have one timestep and, unless each
keeps its own, one noise.

An image is encoded once, however many pairs hold it. Both images of a pair are trained at the size of the chosen one's
aspect bucket.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from prx_post.base.files import write_jsonl
from prx_post.base.ranks import Ranks
from prx_post.data.buckets import Buckets
from prx_post.data.config import PreferenceConfig
from prx_post.data.encoders import Encoders
from prx_post.data.encoding import EncodedCache, fill_cache, with_what_others_wrote
from prx_post.data.findings import counted, describe
from prx_post.data.plan import Draw
from prx_post.data.readers import open_dataset
from prx_post.data.rows import BadRow, DataError, ImageColumn, ImageRows, Opened, report_bad_rows
from prx_post.data.scan import Sample
from prx_post.data.scan_memory import scanned
from prx_post.data.source import LatentSource
from prx_post.engine.protocols import Batch
from prx_post.flow import seeded_noise

IDENTICAL = "both images are the same"
DUPLICATE = "an earlier pair is the same"
TIE = "another pair prefers these images the other way round"
RefErrors = Mapping[tuple[int, int], tuple[float, float]]
"""By place of the pair and seed of the draw: the reference's errors on the chosen and on the rejected image."""


class PairRows(ImageRows):
    """The images of N pairs: row 2i is the chosen image of pair i, row 2i + 1 the rejected one.

    Raises:
        DataError: a column of noise seeds or scores holds something else.
    """

    images_per_entry = 2

    def __init__(self, opened: Opened, config: PreferenceConfig) -> None:
        super().__init__(opened, config.chosen_column)
        self.prompts = [prompt for prompt in self.prompts for _ in range(2)]
        self._columns += [ImageColumn(opened, config.rejected_column)]
        self._seeds, self._scores = (self._numbers(names) for names in (config.seed_columns, config.score_columns))

    def __len__(self) -> int:
        return 2 * len(self._dataset)

    def _place(self, row: int) -> tuple[ImageColumn, int]:
        pair, side = divmod(row, 2)
        return self._columns[side], pair

    def _numbers(self, columns: Sequence[str]) -> list[tuple[float, float] | None]:
        """Of each pair, those of both images; None if they are not all there."""
        if not set(columns) <= set(self._dataset.column_names):
            return [None] * len(self._dataset)
        for column in columns:
            kind = getattr(self._dataset.features[column], "dtype", "lists")
            if not kind.startswith(("int", "uint", "float", "double")):
                raise DataError(f"the column {column!r} holds {kind}, but must hold numbers. Rename or correct it.")
        both = zip(*(self._dataset[column] for column in columns), strict=True)
        return [None if any(n is None or math.isnan(n) for n in numbers) else numbers for numbers in both]

    def seeds(self, pair: int) -> tuple[int, int] | None:
        """Of the noise that the chosen and the rejected image were generated from, if that is known."""
        seeds = self._seeds[pair]
        return None if seeds is None else (int(seeds[0]), int(seeds[1]))

    def gap(self, pair: int) -> float | None:
        """By how much the chosen image scored higher, if that is known."""
        scores = self._scores[pair]
        return None if scores is None else scores[0] - scores[1]

    def name(self, row: int) -> str:
        pair, side = divmod(row, 2)
        return f"pair {pair}, {('chosen', 'rejected')[side]}"

    def entry_name(self, number: int) -> str:
        return f"pair {number}"


def read_pairs(config: PreferenceConfig) -> PairRows:
    """Open the pairs of a configuration. Raises DataError: they do not exist, lack a column, or are empty."""
    also = (*config.seed_columns, *config.score_columns)
    return PairRows(open_dataset(config, ("chosen_column", "rejected_column"), also=also), config)


@dataclass(frozen=True)
class Pair:
    """A usable pair.

    Attributes:
        seeds: of the noise that both images were generated from, at the size at which they are trained.
        gap: by how much the chosen image scored higher.
    """

    chosen: Sample
    rejected: Sample
    seeds: tuple[int, int] | None = None
    gap: float | None = None

    @property
    def number(self) -> int:
        """Its place in the data set."""
        return self.chosen.row // 2

    @property
    def images(self) -> tuple[str, str, str]:
        """Prompt and images, by content, whatever their bucket."""
        chosen, rejected = (sample.image_key.rpartition("-")[0] for sample in (self.chosen, self.rejected))
        return self.chosen.prompt_key, chosen, rejected


def pairs_of(samples: Sequence[Sample], rows: PairRows) -> list[Pair]:
    """Of the samples of usable pairs, in the order of their rows."""
    pairs = []
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        is_resized = any(sample.own_size != sample.size for sample in (chosen, rejected))
        number = chosen.row // 2
        seeds = None if is_resized else rows.seeds(number)  # a resized image has no noise
        pairs.append(Pair(chosen, rejected, seeds, rows.gap(number)))
    return pairs


def without_contradictions(pairs: Sequence[Pair]) -> tuple[list[Pair], list[BadRow]]:
    """Pairs that say something: no identical images, no duplicates, none that stands there both ways round (a tie)."""
    known: set[tuple[str, str, str]] = set()
    both_ways = {pair.images for pair in pairs} & {(p, lose, win) for p, win, lose in (pair.images for pair in pairs)}
    kept, left_out = [], []
    for pair in pairs:
        if pair.images[1] == pair.images[2]:
            reason = IDENTICAL
        elif pair.images in both_ways:
            reason = TIE
        elif pair.images in known:
            reason = DUPLICATE
        else:
            known.add(pair.images)
            kept.append(pair)
            continue
        left_out.append(BadRow(pair.number, f"pair {pair.number}", reason))
    return kept, left_out


def prepare_pairs(
    config: PreferenceConfig,
    rows: PairRows,
    encoders: Encoders,
    buckets: Buckets,
    folder: Path,
    extra_prompts: Sequence[str],
    ranks: Ranks,
    *,
    own_noise: bool = False,
    by_gap: bool = False,
) -> tuple[list[Pair], EncodedCache]:
    """Scan and filter the pairs and bring the cache up to date; every rank does its part.

    What cannot be used is listed in `folder`/bad_rows.jsonl, what says nothing in `folder`/filtered_pairs.jsonl.

    Args:
        own_noise, by_gap: every pair must have the seeds of its noise, or the scores of its images.

    Raises:
        DataError: too many pairs cannot be used, none is left, or one lacks what it must have; before it is encoded.
    """
    total, bad_rows_path = len(rows) // 2, folder / "bad_rows.jsonl"
    cache_dir = Path(config.cache_dir).expanduser()
    found, bad = scanned(rows, buckets, encoders, False, cache_dir, ranks)
    pairs = pairs_of(found, rows)

    def report() -> None:
        bad.sort(key=lambda bad_row: bad_row.row)
        report_bad_rows(bad, total, config.max_bad_fraction, bad_rows_path, is_main=ranks.is_main)

    report()
    pairs, left_out = without_contradictions(pairs)
    ranks.on_main(lambda: _list_filtered(left_out, folder / "filtered_pairs.jsonl", total))
    if not pairs:
        raise _nothing_left(config, total, left_out[0].reason, ranks)
    for pair in pairs:
        lacking = _lacking(pair, config, own_noise, by_gap)
        if lacking is not None:
            raise DataError(lacking).raised_by_all(ranks.is_main)
    samples = [sample for pair in pairs for sample in (pair.chosen, pair.rejected)]
    if ranks.is_main:
        found_pairs, most = counted(len(pairs), total, "pairs of images"), encoders.pipeline.max_prompt_tokens
        tqdm.write(describe(str(config.dataset_name), found_pairs, samples, rows.notes, most))

    def open_cache() -> EncodedCache:
        return EncodedCache.open(cache_dir, encoders.pipeline, encoders.text_dtype)

    undecodable = ranks.gather(fill_cache(open_cache(), samples, rows, ["", *extra_prompts], encoders, ranks))
    if undecodable:
        broken = {found.row // 2: found for found in undecodable}
        bad += [BadRow(number, found.name, found.reason) for number, found in sorted(broken.items())]
        report()
        pairs = [pair for pair in pairs if pair.number not in broken]
        samples = [sample for sample in samples if sample.row // 2 not in broken]
        if not pairs:
            raise _nothing_left(config, total, next(iter(broken.values())).reason, ranks)
    images, prompts = [s.image_key for s in samples], [s.prompt_key for s in samples]
    return pairs, with_what_others_wrote(open_cache, images, prompts, ranks)


def _nothing_left(config: PreferenceConfig, total: int, reason: str, ranks: Ranks) -> DataError:
    return DataError(
        f"dataset_name is {config.dataset_name!r}, of whose {total} pairs none is left: {reason}, for one. All are "
        f"listed in output_dir. Choose another data set."
    ).raised_by_all(ranks.is_main)


def _list_filtered(left_out: Sequence[BadRow], path: Path, total: int) -> None:
    path.unlink(missing_ok=True)
    if left_out:
        write_jsonl(path, [{"pair": row.row, "reason": row.reason} for row in left_out])
        tqdm.write(f"{len(left_out)} of {total} pairs say nothing and are left out, listed in {path}")


def _lacking(pair: Pair, config: PreferenceConfig, own_noise: bool, by_gap: bool) -> str | None:
    """What to say of a pair that lacks what the loss needs."""
    which = f"pair {pair.number} of {config.dataset_name}"
    if own_noise and pair.seeds is None:
        return (
            f"pair_noise is 'own', but {which} has no {' and '.join(config.seed_columns)}, or its images are not of "
            f"the size at which they are trained. Make pairs with `prx-post data make-pairs`, and set their height and "
            f"width; or set pair_noise: shared."
        )
    if by_gap and not (pair.gap or 0) > 0:
        return (
            f"beta_by_gap is set, but {which} has no {' above '.join(config.score_columns)}. Make pairs with "
            f"`prx-post data make-pairs`, or set beta_by_gap: 0."
        )
    return None


@dataclass
class PairSource(LatentSource):
    """Micro-batches of pairs: `samples` are the chosen images, whose latents are `latents`; `rejected` [B, C, H, W] are
    the others', under the same prompt, timestep and, unless each has its own in `rejected_noise`, noise.

    Args:
        pairs: whose chosen images `samples` are.
        own_noise: take the noise that each image was generated from.
        beta_by_gap: batches have `beta_scale` [B], (gap / mean gap) to this power.
        ref_errors: batches have `ref_errors` [B, 2].
    """

    pairs: Sequence[Pair] = field(default_factory=list)
    own_noise: bool = False
    beta_by_gap: float = 0.0
    ref_errors: RefErrors | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mean_gap = sum(pair.gap or 0.0 for pair in self.pairs) / max(1, len(self.pairs))

    def batch(self, draws: Sequence[Draw], step: int) -> Batch:
        pairs, batch = [self.pairs[draw.index] for draw in draws], super().batch(draws, step)
        batch["rejected"] = torch.stack([self._latents(pair.rejected) for pair in pairs])
        batch["rows"] = [pair.number for pair in pairs]
        if self.own_noise:
            shape = batch["latents"].shape[1:]
            chosen, rejected = zip(*(pair.seeds or () for pair in pairs), strict=True)
            batch["noise"], batch["rejected_noise"] = seeded_noise(chosen, shape), seeded_noise(rejected, shape)
        if self.beta_by_gap:
            gaps = torch.tensor([pair.gap for pair in pairs])
            batch["beta_scale"] = (gaps / self._mean_gap) ** self.beta_by_gap
        if self.ref_errors is not None:
            batch["ref_errors"] = torch.tensor([self.ref_errors[draw.index, draw.seed] for draw in draws])
        return batch
