"""Pieces of a small distillation on the embedded base."""

from pathlib import Path

import torch

from prx_post.data.encoders import Encoders
from prx_post.data.plan import Draw
from prx_post.model.checkpoint import load
from prx_post.model.config import ModelConfig
from prx_post.model.heads import DiscriminatorHeads
from prx_post.model.text import PromptCleaner, pad_embeddings
from prx_post.stages.distill.config import DistillConfig, TeacherConfig
from prx_post.stages.distill.levels import Randomness
from prx_post.stages.distill.objective import DistillationObjective, Teacher
from prx_post.stages.distill.terms import Adversarial, DistributionMatching, Trajectory
from prx_post.tiny import BASE

PROMPTS = ["472", "eighty-one", "trois cent six", "neunhundertfünf", "12", "77", "five hundred"]
SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.3, 0.0])
GUIDANCE = 3.0


BY_LEVEL = {
    "method": ["trajectory", "ladd"],
    "trajectory_levels": [2.0, 1.0, 0.0, 0.0],
    "ladd_levels": [0.0, 0.0, 0.5, 0.5],
    "own_state_levels": [0.0, 0.3, 0.6, 1.0],
    "sampler": "renoise",
}
"""A run whose methods have levels of their own, of four."""


def config(**changes) -> DistillConfig:
    values = {"output_dir": "unused", "num_inference_steps": 4, "max_steps": 100, "method": ["ladd"], **changes}
    return DistillConfig(**values)


def settings(prompts: Path, cache_dir: Path, output_dir: Path, **changes):
    """The three configurations of a short run."""
    values = {
        "model_name_or_path": "tiny",
        "prompts_file": str(prompts),
        "height": 32,
        "width": 64,
        "cache_dir": str(cache_dir),
        "output_dir": str(output_dir),
        "teacher_num_inference_steps": 3,
        "teacher_guidance_scale": GUIDANCE,
        "teacher_batch_size": 4,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "num_inference_steps": 4,
        "eval_num_inference_steps": [4, 1],
        "logging_steps": 1,
        "sample_steps": 0,
        "report_to": [],
        **changes,
    }

    def part(kind):
        return kind(**{k: v for k, v in values.items() if k in kind.__dataclass_fields__})

    return part(ModelConfig), part(TeacherConfig), part(DistillConfig)


def arguments(prompts: Path, cache_dir: Path, output_dir: Path, **changes) -> list[str]:
    """The same as a command line."""
    flags = []
    for part in settings(prompts, cache_dir, output_dir, **changes):
        for name, value in vars(part).items():
            if name in changes or name in PLAIN:
                flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return ["distill", *flags]


PLAIN = {
    *("model_name_or_path", "prompts_file", "height", "width", "cache_dir", "output_dir", "max_steps", "learning_rate"),
    *("teacher_num_inference_steps", "teacher_guidance_scale", "teacher_batch_size", "per_device_train_batch_size"),
    *("num_inference_steps", "logging_steps", "sample_steps"),
}


def prompts(*texts: str) -> tuple[torch.Tensor, torch.Tensor]:
    pipeline = load(str(BASE)).pipeline
    encode = Encoders(pipeline, PromptCleaner(), torch.device("cpu"), torch.float32).prompts
    return pad_embeddings([encode(text) for text in texts])


def objective(**changes) -> DistillationObjective:
    """A student that starts as its teacher, the embedded base, on the grid SIGMAS."""
    settings = config(**changes)
    torch.manual_seed(0)
    null = prompts("")[0][0]
    teacher = Teacher(load(str(BASE)).transformer, null, GUIDANCE, patch_size=2)
    networks: dict = {}
    terms: dict = {}
    for method in settings.method:
        if method == "trajectory":
            terms[method] = Trajectory(teacher, settings.trajectory_teacher_steps)
        if method == "ladd":
            blocks = settings.head_blocks or [1, 4]
            networks[method] = DiscriminatorHeads(blocks, channels=128, text_width=128, width=16)
            options = {name: getattr(settings, name) for name in ("mismatch_fraction", "r1_weight", "r1_noise")}
            terms[method] = Adversarial(teacher, networks[method], **options)
        if method == "dmd2":
            networks[method] = load(str(BASE)).transformer.train()
            terms[method] = DistributionMatching(teacher, networks[method])
    return DistillationObjective(
        *(load(str(BASE)).transformer.train(), teacher, SIGMAS, terms, networks),
        learning_rate=settings.learning_rate,
        network_learning_rate=settings.discriminator_learning_rate,
        weights=dict(zip(settings.method, settings.method_weights or [1.0] * len(settings.method), strict=True)),
        learns=settings.student_learns,
        velocity_weight=settings.velocity_weight,
    )


DENSITIES = {"ladd": {"mean": 1.0, "std": 1.0}, "dmd2": {"uniform_fraction": 1.0}}


def batch(count: int = 3, step: int = 0, levels: list[float] | None = None) -> dict:
    """`levels`: how often each noise level is drawn."""
    embeds, mask = prompts(*["472", "eighty-one", "trois cent six", "12"][:count])
    latents = torch.randn(count, 4, 8, 16, generator=torch.Generator().manual_seed(5))
    seeds = [11 + 100 * i for i in range(count)]
    draw = Randomness(torch.tensor(levels or [1.0] * 4, dtype=torch.float32), renoising=DENSITIES, has_r1=True)
    drawn = [draw(Draw(0, seed), latents.shape[1:], step) for seed in seeds]
    given = {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
    return {
        **{"latents": latents, "prompt_embeds": embeds, "prompt_mask": mask},
        **given,
        **{"seeds": seeds, "rows": [0] * count, "step": step},
    }
