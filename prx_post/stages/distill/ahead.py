"""`prx-post data teacher-latents`: a distillation's latents, and every prompt's embeddings, ahead of it."""

from typing import Any

from prx_post.base.ranks import launched_ranks
from prx_post.engine.signals import StopSignals
from prx_post.model.checkpoint import load
from prx_post.model.sampler import build_sampler, default_device
from prx_post.stages.distill.latents import teacher_latents
from prx_post.stages.distill.stage import Distill


def run(configs: tuple[Any, ...]) -> None:
    """Make what is missing, on any number of processes."""
    stage = Distill(*configs)
    teacher, pipeline, size, device = stage.teacher_config, stage.teacher_pipeline, stage.image_size, default_device()
    dtype = stage.text_dtype()

    def sampler() -> Any:
        made = build_sampler(
            *(load(pipeline, dtype), size, teacher.teacher_num_inference_steps, teacher.teacher_guidance_scale, device)
        )
        made.autocast = stage.config.bf16
        return made

    with StopSignals(), launched_ranks() as ranks:
        encoders = stage.encoders_on(device)
        shown = stage.shown_prompts()
        samples, cache = teacher_latents(teacher, stage.prompts, encoders, size, sampler, ranks, shown)
        if ranks.is_main:
            print(f"{len(samples)} latents in {cache.latents.folder}")
