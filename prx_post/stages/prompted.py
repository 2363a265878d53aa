"""What stages that generate their own training images have in common: the prompts, and the seeds of the images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prx_post.base.errors import PrxPostError
from prx_post.base.files import existing_file
from prx_post.data.cache import content_key
from prx_post.data.encoding import EncodedCache, encode_prompts
from prx_post.data.plan import stream
from prx_post.data.prompts import read_prompt_file
from prx_post.data.scan import Sample
from prx_post.engine.run import Run
from prx_post.evaluation.jobs import spread_over_groups
from prx_post.model.text import PromptCleaner
from prx_post.stages.base import Encoded, PipelineStage


def read_prompts(file: str, cleaner: PromptCleaner, count: int | None = None) -> list[dict[str, Any]]:
    """Rows with a `prompt` each, no prompt twice; `count` of them, spread evenly over the file.

    Raises:
        PrxPostError: the file is missing or has none, or cleaning leaves nothing of one.
    """
    path = existing_file("prompts_file", file)
    rows = list({row["prompt"]: row for row in read_prompt_file(path)}.values())
    if count is not None:
        rows = [rows[i] for i in spread_over_groups(rows, count)]
    for row in rows:
        if not cleaner(row["prompt"]):
            raise PrxPostError(
                f"{path} has the prompt {row['prompt']!r}, of which prompt cleaning leaves nothing. Remove it, or set "
                f"skip_text_cleaning: true."
            )
    if not rows:
        raise PrxPostError(f"prompts_file is {file!r}, which has no prompts. Choose another file.")
    return rows


def noise_seeds(seed: int, prompt: str, count: int) -> list[int]:
    """Of a prompt's images: 31 bits each, as `prx-post generate` takes them."""
    key = int(content_key(prompt)[:8], 16)
    return [stream(seed, key, k) >> 1 for k in range(count)]


def encode_prompt_set(stage: PipelineStage, run: Run, prompts: Sequence[str], file: str, purpose: str) -> Encoded:
    """Prompts as samples, their embeddings cached with those of the prompts that are shown.

    Args:
        purpose: what becomes of their images, for the model card.
    """
    encoders = stage.encoders(run)

    def open_cache() -> EncodedCache:
        return EncodedCache.open(stage.cache_dir, encoders.pipeline, encoders.text_dtype)

    cache = encode_prompts(open_cache, [*prompts, *stage.shown_prompts()], encoders, run.ranks)
    encoders.free()
    keys = [content_key(encoders.cleaner(text)) for text in prompts]
    samples = [Sample(i, prompts[i], stage.largest_size, key, key) for i, key in enumerate(keys)]
    name = Path(file).name
    described = f"its own images of the {len(samples)} prompts of {name}, {purpose}"
    return Encoded(samples, None, cache, encoders, lambda sample: f"{name}:{sample.row + 1}", described)
