"""Latents and embeddings of samples, in the cache."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from prx_post.base.progress import Progress
from prx_post.base.ranks import ALONE, Ranks
from prx_post.data.buckets import Buckets
from prx_post.data.cache import JoinedCache, TensorCache, check_free_space, content_key, fingerprint
from prx_post.data.config import DataConfig
from prx_post.data.encoders import Cleaned, Encoders
from prx_post.data.findings import counted, describe
from prx_post.data.images import PREPROCESSING
from prx_post.data.rows import BadRow, DataError, ImageRows, report_bad_rows
from prx_post.data.scan import Sample
from prx_post.data.scan_memory import scanned
from prx_post.model.checkpoint import PipelineFolder
from prx_post.model.text import count_tokens

Item = TypeVar("Item")


@dataclass
class EncodedCache:
    """The latents and the embeddings of one pipeline's VAE and text encoder."""

    latents: TensorCache | JoinedCache
    embeddings: TensorCache

    @classmethod
    def open(cls, cache_dir: Path, pipeline: PipelineFolder, text_dtype: torch.dtype) -> "EncodedCache":
        vae = fingerprint(cache_dir, pipeline.path / "vae")
        text = fingerprint(cache_dir, pipeline.path / "tokenizer", pipeline.path / "text_encoder")
        dtype = str(text_dtype).removeprefix("torch.")
        return cls(
            TensorCache(cache_dir / "latents" / f"{vae}-v{PREPROCESSING}"),
            TensorCache(cache_dir / "embeddings" / f"{text}-{dtype}"),
        )


def fill_cache(
    cache: EncodedCache,
    samples: Sequence[Sample],
    rows: ImageRows | None,
    prompts: Sequence[str],
    encoders: Encoders,
    ranks: Ranks = ALONE,
) -> list[BadRow]:
    """Encode this process's part of what the cache lacks of `samples` and of the extra `prompts`.

    Args:
        rows: of the samples; None if there are none.

    Returns rows that could not be decoded.

    Raises:
        PrxPostError: the disk has too little space, before anything is encoded.
    """
    by_image = {s.image_key: s for s in samples}

    def lacking() -> tuple[dict[str, Cleaned], list[str]]:
        texts = {s.prompt_key: Cleaned(s.cleaned, s.tokens) for s in samples if s.prompt_key not in cache.embeddings}
        texts |= _lacking_of(prompts, cache, encoders)
        images = [key for key in by_image if key not in cache.latents]
        check_free_space(cache.latents.folder, _bytes_needed(encoders, texts.values(), [by_image[k] for k in images]))
        return texts, images

    # what one process sees, for all: others may see another run's files later or earlier
    new_texts, image_keys = ranks.on_main(lacking)
    texts = {key: new_texts[key] for key in ranks.share(list(new_texts))}
    images = ranks.share([by_image[key] for key in image_keys])
    unreadable: dict[str, str] = {}

    def latents() -> Iterator[tuple[str, Tensor]]:
        assert rows is not None
        for sample, found in _progress(encoders.latents_of(images, rows), len(images), "image", ranks):
            if isinstance(found, str):
                unreadable[sample.image_key] = found
            else:
                yield sample.image_key, found

    assert isinstance(cache.latents, TensorCache)
    cache.embeddings.write(_progress(encoders.embeddings_of(texts), len(texts), "prompt", ranks))
    if images:
        cache.latents.write(latents())
    return [
        BadRow(s.row, rows.name(s.row), unreadable[s.image_key]) for s in samples if rows and s.image_key in unreadable
    ]


def _progress(items: Iterator[Item], total: int, unit: str, ranks: Ranks) -> Iterator[Item]:
    hidden = ranks.hides_progress if total else True
    return Progress(items, total=total, desc=f"encoding {unit}s", unit=unit, leave=False, disable=hidden)


def _lacking_of(prompts: Iterable[str], cache: EncodedCache, encoders: Encoders) -> dict[str, Cleaned]:
    """Of these prompts, by their keys, what the cache lacks."""
    texts = {content_key(text): text for text in map(encoders.cleaner, prompts)}
    texts = {key: text for key, text in texts.items() if key not in cache.embeddings}
    counts = count_tokens(encoders.pipeline.load_tokenizer(), list(texts.values())) if texts else []
    return {key: Cleaned(text, count) for (key, text), count in zip(texts.items(), counts, strict=True)}


def _bytes_needed(encoders: Encoders, texts: Iterable[Cleaned], samples: Iterable[Sample]) -> int:
    """Exactly what fp32 latents and unpadded embeddings take, from shapes and token counts."""
    pipeline = encoders.pipeline
    latent_values = sum(math.prod(pipeline.latent_shape(*sample.size)) for sample in samples)
    tokens = sum(min(text.tokens, pipeline.max_prompt_tokens) for text in texts)
    width = pipeline.configs["transformer"]["context_in_dim"]
    return 4 * latent_values + encoders.text_dtype.itemsize * tokens * width


def prepare(
    config: DataConfig,
    rows: ImageRows,
    encoders: Encoders,
    buckets: Buckets,
    bad_rows_path: Path,
    extra_prompts: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> tuple[list[Sample], EncodedCache | None]:
    """Scan the rows and, unless `cache: none`, bring the cache up to date; every rank does its part.

    Raises:
        DataError: too many rows are bad, or none is left; they are listed in `bad_rows_path`.
    """
    cache_dir = Path(config.cache_dir).expanduser()
    samples, bad = scanned(rows, buckets, encoders, config.cache == "none", cache_dir, ranks)

    def report() -> None:
        bad.sort(key=lambda bad_row: bad_row.row)
        report_bad_rows(bad, len(rows), config.max_bad_fraction, bad_rows_path, is_main=ranks.rank == 0)

    report()
    if ranks.is_main:
        images, most = counted(len(samples), len(rows), "images"), encoders.pipeline.max_prompt_tokens
        tqdm.write(describe(str(config.dataset_name), images, samples, rows.notes, most))
    if config.cache == "none":
        return samples, None
    cache = EncodedCache.open(cache_dir, encoders.pipeline, encoders.text_dtype)
    undecodable = ranks.gather(fill_cache(cache, samples, rows, ["", *extra_prompts], encoders, ranks))
    if undecodable:
        bad += undecodable
        report()
        left_out = {bad_row.row for bad_row in undecodable}
        samples = [s for s in samples if s.row not in left_out]
    if ranks.world > 1:
        cache = with_what_others_wrote(
            lambda: EncodedCache.open(cache_dir, encoders.pipeline, encoders.text_dtype),
            [s.image_key for s in samples],
            [s.prompt_key for s in samples],
            ranks,
        )
    return samples, cache


def encode_prompts(
    open_cache: Callable[[], EncodedCache], prompts: Sequence[str], encoders: Encoders, ranks: Ranks
) -> EncodedCache:
    """The cache with the embeddings of these prompts and of the empty one; every rank encodes its part."""
    texts = list(dict.fromkeys(["", *prompts]))
    fill_cache(open_cache(), [], None, texts, encoders, ranks)
    return with_what_others_wrote(open_cache, [], [content_key(encoders.cleaner(text)) for text in texts], ranks)


def with_what_others_wrote(
    open_cache: Callable[[], EncodedCache],
    latents: Sequence[str],
    embeddings: Sequence[str],
    ranks: Ranks,
    patience_s: float = 10.0,
) -> EncodedCache:
    """Open the cache again, after every process has written, and find these keys in it.

    A network disk may show other machines' files late, so a miss is looked for again.

    Raises:
        DataError: on every process, if one of them does not see what another encoded.
    """
    ranks.wait()
    deadline = time.monotonic() + patience_s
    while True:
        cache = open_cache()
        missing = sum(k not in cache.latents for k in latents) + sum(k not in cache.embeddings for k in embeddings)
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(1)
    blind = ranks.gather([ranks.rank] if missing else [])
    if blind:
        raise DataError(
            f"cache_dir holds {cache.latents.folder}, but rank {blind[0]} does not see there what other processes "
            f"encoded. Choose a cache_dir on a disk that every machine sees."
        ).raised_by_all(ranks.rank == 0)
    return cache
