"""Latents and embeddings of samples, in the cache."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prx_post.base.ranks import ALONE, Ranks
from prx_post.data.buckets import Buckets, Size
from prx_post.data.cache import JoinedCache, TensorCache, check_free_space, content_key, fingerprint
from prx_post.data.config import DataConfig
from prx_post.data.findings import describe
from prx_post.data.images import PREPROCESSING, decode
from prx_post.data.rows import BadRow, DataError, ImageRows, report_bad_rows
from prx_post.data.scan import Sample, scan
from prx_post.model.checkpoint import PipelineFolder
from prx_post.model.codec import LatentCodec, to_pixels
from prx_post.model.text import PromptCleaner, PromptEncoder, tokenize


class Encoders:
    """The VAE and the text encoder of a pipeline, each loaded at its first use."""

    def __init__(self, pipeline: PipelineFolder, cleaner: PromptCleaner, device: torch.device, text_dtype: torch.dtype):
        self.pipeline, self.cleaner, self.device, self.text_dtype = pipeline, cleaner, device, text_dtype
        self._codec: LatentCodec | None = None
        self._prompts: PromptEncoder | None = None

    @property
    def codec(self) -> LatentCodec:
        # fp32 always: the VAE runs once an image, and bfloat16 latents would cap what training can reach.
        if self._codec is None:
            self._codec = LatentCodec(self.pipeline.load_vae().to(self.device))
        return self._codec

    @property
    def prompts(self) -> PromptEncoder:
        if self._prompts is None:
            text_encoder = self.pipeline.load_text_encoder(self.text_dtype).to(self.device)
            self._prompts = PromptEncoder(self.pipeline.load_tokenizer(), text_encoder, self.cleaner)
        return self._prompts

    def latents(self, data: bytes, size: Size) -> Tensor:
        """Latents of one encoded image, [C, H/f, W/f] fp32. Raises OSError if it cannot be decoded."""
        pixels = to_pixels(decode(data), *size)  # first, so that a broken image does not load the VAE
        return self.codec.encode(pixels[None])[0]

    def free(self) -> None:
        """Let go of both, and of their memory."""
        self._codec = self._prompts = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
    samples: list[Sample],
    rows: ImageRows,
    prompts: list[str],
    encoders: Encoders,
    ranks: Ranks = ALONE,
) -> list[BadRow]:
    """Encode this process's part of what the cache lacks of `samples` and of the extra `prompts`.

    Returns rows that could not be decoded.

    Raises:
        PrxPostError: the disk has too little space, before anything is encoded.
    """
    wanted = {content_key(encoders.cleaner(p)): p for p in prompts} | {s.prompt_key: s.prompt for s in samples}
    by_image = {s.image_key: s for s in samples}

    def lacking() -> tuple[list[str], list[str]]:
        return [k for k in wanted if k not in cache.embeddings], [k for k in by_image if k not in cache.latents]

    # what one process sees, for all: others may see another run's files later or earlier
    prompt_keys, image_keys = ranks.on_main(lacking)
    new_prompts, new_images = {k: wanted[k] for k in prompt_keys}, {k: by_image[k] for k in image_keys}
    check_free_space(
        cache.latents.folder, _bytes_needed(encoders, list(new_prompts.values()), list(new_images.values()))
    )
    unreadable: dict[str, str] = {}

    def embeddings() -> Iterator[tuple[str, Tensor]]:
        items = ranks.share(list(new_prompts.items()))
        for key, prompt in tqdm(
            items, desc="encoding prompts", unit="prompt", leave=False, disable=ranks.hides_progress
        ):
            yield key, encoders.prompts(prompt)

    def latents() -> Iterator[tuple[str, Tensor]]:
        items = ranks.share(list(new_images.items()))
        for key, sample in tqdm(items, desc="encoding images", unit="image", leave=False, disable=ranks.hides_progress):
            try:
                yield key, encoders.latents(rows.image_bytes(sample.row), sample.size)
            except OSError as error:
                unreadable[key] = str(error)

    assert isinstance(cache.latents, TensorCache)
    cache.embeddings.write(embeddings())
    cache.latents.write(latents())
    return [BadRow(s.row, rows.name(s.row), unreadable[s.image_key]) for s in samples if s.image_key in unreadable]


def _bytes_needed(encoders: Encoders, prompts: list[str], samples: list[Sample]) -> int:
    """Exactly what fp32 latents and unpadded embeddings take, from shapes and token counts."""
    pipeline = encoders.pipeline
    latent_values = 0
    for sample in samples:
        channels, height, width = pipeline.latent_shape(*sample.size)
        latent_values += channels * height * width
    tokenizer = pipeline.load_tokenizer() if prompts else None
    tokens = sum(int(tokenize(tokenizer, encoders.cleaner(prompt))["attention_mask"].sum()) for prompt in prompts)
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
    samples, bad = (
        ranks.gather(found) for found in scan(rows, buckets, encoders.cleaner, config.cache == "none", ranks)
    )
    samples.sort(key=lambda sample: sample.row)

    def report() -> None:
        bad.sort(key=lambda bad_row: bad_row.row)
        report_bad_rows(bad, len(rows), config.max_bad_fraction, bad_rows_path, is_main=ranks.rank == 0)

    report()
    if ranks.is_main:
        counted = f"{len(samples)} of {len(rows)} images" if bad else f"{len(rows)} images"
        tokenizer = encoders.pipeline.load_tokenizer()
        tqdm.write(describe(str(config.dataset_name), counted, samples, rows.notes, tokenizer))
    if config.cache == "none":
        return samples, None
    cache_dir = Path(config.cache_dir).expanduser()
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
    no_rows: Any = None  # which are read for samples alone
    fill_cache(open_cache(), [], no_rows, texts, encoders, ranks)
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
