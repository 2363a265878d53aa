"""The teacher's latents: made once from prompts with its own guidance and steps, cached, tagged with all of that.

cache_dir/teacher-latents/<tag>/<uuid>.safetensors    latents [C, H/f, W/f] by prompt and noise
cache_dir/teacher-latents/<tag>/teacher.json          what the tag stands for
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.files import write_bytes
from prx_post.base.progress import Progress
from prx_post.base.ranks import Ranks
from prx_post.data.buckets import Buckets
from prx_post.data.cache import JoinedCache, TensorCache, check_free_space, content_key, fingerprint
from prx_post.data.encoders import Encoders
from prx_post.data.encoding import EncodedCache, encode_prompts, prepare, with_what_others_wrote
from prx_post.data.prompts import read_prompt_file
from prx_post.data.rows import ImageRows
from prx_post.data.scan import Sample
from prx_post.model.checkpoint import PipelineFolder
from prx_post.model.sampler import Sampler
from prx_post.model.text import PromptCleaner
from prx_post.stages.distill.config import TeacherConfig

BATCHES_A_FILE = 16
"""As many batches are lost at most when the work is killed."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that the teacher generates, and the seed of the noise it begins with."""

    row: int
    text: str
    key: str
    noise_seed: int

    @property
    def latent_key(self) -> str:
        return f"{self.key}-{self.noise_seed}"


def read_training_prompts(config: TeacherConfig, cleaner: PromptCleaner) -> list[Prompt]:
    """Every prompt, `latents_per_prompt` times. A noise seed is a function of the prompt, wherever it stands.

    Raises:
        PrxPostError: the file is missing, holds none, or a prompt of which cleaning leaves nothing.
    """
    path = Path(str(config.prompts_file)).expanduser()
    if not path.is_file():
        raise PrxPostError(f"prompts_file is {config.prompts_file!r}, but there is no such file. Check the path.")
    found: dict[str, Prompt] = {}
    for row, line in enumerate(read_prompt_file(path)):
        cleaned = cleaner(line["prompt"])
        if not cleaned:
            raise PrxPostError(
                f"{path}, prompt {row + 1} is {line['prompt']!r}, of which prompt cleaning leaves nothing. Remove it, "
                f"or set skip_text_cleaning: true."
            )
        key = content_key(cleaned)
        for copy in range(config.latents_per_prompt):
            sequence = np.random.SeedSequence([config.latents_seed, int(key[:16], 16), copy])
            prompt = Prompt(row, line["prompt"], key, int(sequence.generate_state(1, np.uint64)[0] >> 1))
            found.setdefault(prompt.latent_key, prompt)
    if not found:
        raise PrxPostError(f"prompts_file is {config.prompts_file!r}, which has no prompts. Choose another file.")
    return list(found.values())


def describe(config: TeacherConfig, pipeline: PipelineFolder, size: tuple[int, int], dtype: str) -> dict[str, Any]:
    """All that a latent depends on, besides prompt and noise."""
    cache_dir = Path(config.cache_dir).expanduser()
    return {
        "teacher": fingerprint(cache_dir, *pipeline.transformer_files, pipeline.path / "scheduler"),
        "text": fingerprint(cache_dir, pipeline.path / "tokenizer", pipeline.path / "text_encoder"),
        "num_inference_steps": config.teacher_num_inference_steps,
        "guidance_scale": config.teacher_guidance_scale,
        "height": size[0],
        "width": size[1],
        "dtype": dtype,
    }


def teacher_latents(
    config: TeacherConfig,
    prompts: Sequence[Prompt],
    encoders: Encoders,
    size: tuple[int, int],
    sampler: Any,
    ranks: Ranks,
    extra_prompts: Sequence[str] = (),
) -> tuple[list[Sample], EncodedCache]:
    """Samples for training; missing latents and embeddings are computed, each rank its part.

    What an interrupted run had made is kept. A latent does not depend on how many processes there are.

    Args:
        sampler: makes the teacher's `Sampler` when a latent is missing.
        extra_prompts: to be embedded as well.
    """
    pipeline, cache_dir = encoders.pipeline, Path(config.cache_dir).expanduser()
    made_with = describe(config, pipeline, size, str(encoders.text_dtype).removeprefix("torch."))
    folder = cache_dir / "teacher-latents" / content_key(json.dumps(made_with))[:16]

    def open_cache() -> EncodedCache:
        return EncodedCache(TensorCache(folder), EncodedCache.open(cache_dir, pipeline, encoders.text_dtype).embeddings)

    samples = [Sample(p.row, p.text, size, p.latent_key, p.key) for p in prompts]
    cache = encode_prompts(open_cache, [*extra_prompts, *(p.text for p in prompts)], encoders, ranks)
    if ranks.rank == 0:
        text = json.dumps({"source": pipeline.source, **made_with}, indent=2)
        write_bytes(folder / "teacher.json", (text + "\n").encode())
    batch = config.teacher_batch_size
    batches = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    # what one process sees, for all: others may see another run's files later or earlier
    indices = ranks.on_main(
        lambda: [i for i, part in enumerate(batches) if any(p.latent_key not in cache.latents for p in part)]
    )
    missing = [batches[i] for i in indices]
    if missing:
        channels, height, width = pipeline.latent_shape(*size)
        check_free_space(cache.latents.folder, 4 * channels * height * width * batch * len(missing))
    own = ranks.share(missing)
    if own:
        _make(own, cache, sampler(), hides_progress=ranks.hides_progress)
    return samples, with_what_others_wrote(open_cache, [p.latent_key for p in prompts], [], ranks)


def _make(
    batches: Sequence[Sequence[Prompt]], cache: EncodedCache, sampler: Sampler, hides_progress: bool | None
) -> None:
    assert isinstance(cache.latents, TensorCache)
    null = cache.embeddings[content_key("")]
    progress = Progress(total=len(batches), desc="teacher latents", unit="batch", disable=hides_progress)
    for start in range(0, len(batches), BATCHES_A_FILE):
        made: list[tuple[str, Tensor]] = []
        for part in batches[start : start + BATCHES_A_FILE]:
            latents = sampler.latents([cache.embeddings[p.key] for p in part], null, [p.noise_seed for p in part])
            for prompt, latent in zip(part, latents, strict=True):
                if not torch.isfinite(latent).all():
                    raise PrxPostError(
                        f"the teacher's latent of prompt {prompt.row + 1}, {prompt.text!r}, is not finite. Check the "
                        f"teacher's weights, or set bf16: false."
                    )
            made += zip((p.latent_key for p in part), latents.cpu(), strict=True)
            progress.update()
        cache.latents.write(item for item in made if item[0] not in cache.latents)
    progress.close()


def with_real_images(
    config: TeacherConfig,
    rows: ImageRows,
    samples: list[Sample],
    cache: EncodedCache,
    encoders: Encoders,
    size: tuple[int, int],
    bad_rows_path: Path,
    ranks: Ranks,
) -> tuple[list[Sample], EncodedCache]:
    """The teacher's samples followed by the real ones, and a cache of both."""
    data = config.real_images(size)
    real, encoded = prepare(data, rows, encoders, Buckets(encoders.pipeline, *size), bad_rows_path, (), ranks)
    assert encoded is not None
    joined = JoinedCache(cache.latents, encoded.latents)
    return [*samples, *real], EncodedCache(joined, encoded.embeddings)
