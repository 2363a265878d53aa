"""How large a data set's latents and embeddings are, from image headers and token counts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from prx_post.base.errors import PrxPostError
from prx_post.data.buckets import Buckets, Size
from prx_post.data.images import image_size
from prx_post.data.rows import ImageRows
from prx_post.model.checkpoint import PipelineFolder
from prx_post.model.text import PromptCleaner, count_tokens

LOOKED_AT = 1000
"""Rows that are opened; of a longer data set as many are taken at equal distances."""


@dataclass(frozen=True)
class CacheSize:
    """Bytes of latents and embeddings. Of more than LOOKED_AT rows an estimate from those.

    Attributes:
        rows: images.
        entries: what is trained on: images, or pairs of them.
    """

    rows: int
    looked_at: int
    latents: int
    embeddings: int
    entries: int

    @property
    def total(self) -> int:
        return self.latents + self.embeddings


def cache_size(
    name: str | None,
    read: Callable[[], ImageRows],
    pipeline: PipelineFolder,
    buckets: Buckets,
    cleaner: PromptCleaner,
    text_dtype: torch.dtype,
) -> CacheSize | str:
    """The cache of a local data set, from image headers and token counts; or why it is not known.

    Nothing is written, so what an earlier run may have put there is not looked up. Every row is counted as an image of
    its own.

    Args:
        name: of the data set.
        read: opens it.
    """
    if not Path(str(name)).expanduser().exists():
        return f"{name} is not on this machine"
    try:
        rows = read()
        tokenizer = pipeline.load_tokenizer()
    except (PrxPostError, OSError) as error:
        return " ".join(str(error).split())
    chosen = range(len(rows)) if len(rows) <= LOOKED_AT else [i * len(rows) // LOOKED_AT for i in range(LOOKED_AT)]
    prompts = {cleaner(rows.prompts[row] or "") for row in chosen} - {""}
    tokens = sum(min(count, pipeline.max_prompt_tokens) for count in count_tokens(tokenizer, sorted(prompts)))
    embeddings = text_dtype.itemsize * tokens * pipeline.configs["transformer"]["context_in_dim"]
    latents = 0
    for row in chosen:
        size = _size(rows, row, buckets)
        if size is not None:
            channels, height, width = pipeline.latent_shape(*size)
            latents += torch.float32.itemsize * channels * height * width
    scale = len(rows) / len(chosen)
    return CacheSize(
        len(rows), len(chosen), round(latents * scale), round(embeddings * scale), len(rows) // rows.images_per_entry
    )


def _size(rows: ImageRows, row: int, buckets: Buckets) -> Size | None:
    if buckets.fixed is not None:
        return buckets.fixed
    try:
        return buckets(*image_size(rows.image_bytes(row)))
    except OSError:  # a row that the run will leave out and report
        return None
