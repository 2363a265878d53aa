"""LADD's combined update against the alternating schedule: cost of a step, and quality at equal wall time.

    python benchmarks/ladd_update.py cost [--model tiny] [--hidden_size 640] [--batch 32] [--rounds 7] [--steps 6]
    python benchmarks/ladd_update.py quality --teacher FOLDER --student FOLDER --prompts FILE --eval_prompts FILE
        --cache_dir FOLDER [--seconds 240] [--seeds 0 1]

The combined update has the student's and the discriminator's losses in one forward and one backward pass. The
alternating one, as usually written, draws the student's samples once for the discriminator's step, without gradient,
and again for the student's, each with a backward pass and an optimizer of its own. Both see the same batches.

cost: the two, and a step of SFT, run in turn in one process, round after round; ratios are taken within a round.
quality: both train from one student for the same seconds on the same machine, one after the other; the averaged
students, of two steps, are then compared on held-out prompts.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import PRXTransformer2DModel
from torch import nn

from prx_post.base.ranks import ALONE
from prx_post.data.cache import content_key
from prx_post.data.encoders import Encoders
from prx_post.data.plan import MixedPlan
from prx_post.data.source import LatentSource
from prx_post.engine.ema import EMA
from prx_post.engine.protocols import Batch
from prx_post.engine.signals import StopSignals
from prx_post.evaluation.monitor import ImageMonitor
from prx_post.model.checkpoint import load, open_pipeline
from prx_post.model.config import ModelConfig
from prx_post.model.heads import DiscriminatorHeads, check_blocks
from prx_post.model.sampler import Sampler
from prx_post.objectives import ladd
from prx_post.stages.base import Encoded
from prx_post.stages.distill.config import DistillConfig, TeacherConfig
from prx_post.stages.distill.latents import teacher_latents
from prx_post.stages.distill.objective import DistillationObjective, Teacher
from prx_post.stages.distill.pipelines import student_scheduler
from prx_post.stages.distill.stage import Distill
from prx_post.stages.distill.terms import Adversarial
from prx_post.stages.sft.objective import FlowMatchingObjective

CPU = torch.device("cpu")
Step = Callable[[Batch], None]


def build_objective(student: str, teacher: str, null: torch.Tensor, config: DistillConfig) -> DistillationObjective:
    folder = open_pipeline(teacher)
    shape = folder.configs["transformer"]
    torch.manual_seed(config.seed)
    blocks = check_blocks(config.head_blocks, shape["depth"])
    heads = DiscriminatorHeads(blocks, shape["hidden_size"], shape["context_in_dim"], config.head_width)
    frozen = Teacher(load(teacher).transformer, null, guidance_scale=4.0, patch_size=shape["patch_size"])
    _, sigmas = student_scheduler(folder, config)
    terms = {"ladd": Adversarial(frozen, heads, mismatch_fraction=config.mismatch_fraction)}
    return DistillationObjective(
        *(load(student).transformer.train(), frozen, sigmas, terms, {"ladd": heads}),
        learning_rate=config.learning_rate,
        network_learning_rate=config.discriminator_learning_rate,
        weights={"ladd": 1.0},
        learns=config.student_learns,
    )


def adamw(module: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.0, 0.99), weight_decay=0.0, fused=True)


def combined(model: DistillationObjective) -> Step:
    """One optimizer of two groups."""
    optimizer = torch.optim.AdamW(
        [{"params": group.module.parameters(), "lr": group.lr} for group in model.groups()],
        betas=(0.0, 0.99),
        weight_decay=0.0,
        fused=True,
    )

    def step(batch: Batch) -> None:
        model(batch)[0].backward()
        if not model.learns(batch["step"]):
            model.policy.zero_grad()
        optimizer.step()
        optimizer.zero_grad()

    return step


def alternating(model: DistillationObjective) -> Step:
    """The discriminator's step, then the student's."""
    term: Any = model.terms["ladd"]
    heads = term.heads
    of_student, of_heads = adamw(model.policy, model.learning_rate), adamw(heads, model.network_learning_rate)

    def fake_logits(step: Any, sample: torch.Tensor) -> torch.Tensor:
        t, noise = step.drawn["ladd_t"], step.drawn["ladd_noise"]
        x_t = (1 - t.view(-1, 1, 1, 1)) * sample + t.view(-1, 1, 1, 1) * noise
        tokens = model.teacher.tokens(heads.blocks, x_t, t, step.prompts)
        return heads(tokens, t, *step.prompts, model.teacher.grid(sample))

    def step(batch: Batch) -> None:
        with torch.no_grad():
            drawn = model.student_step(batch)
        _, loss, _ = term(_waiting(drawn))
        loss.backward()
        of_heads.step()
        of_heads.zero_grad()
        if not model.learns(batch["step"]):
            return
        drawn = model.student_step(batch)
        heads.requires_grad_(False)
        ladd.generator_loss(fake_logits(drawn, drawn.sample)).backward()
        heads.requires_grad_(True)
        of_student.step()
        of_student.zero_grad()

    return step


def _waiting(step: Any) -> Any:
    import dataclasses

    return dataclasses.replace(step, learns=False)


def sft_step(model: str) -> Step:
    objective = FlowMatchingObjective(load(model).transformer.train(), 1e-6)
    optimizer = adamw(objective, 1e-6)

    def step(batch: Batch) -> None:
        objective(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def wider(hidden_size: int, folder: Path) -> str:
    """The embedded pipeline with a transformer of random weights and another width, made in `folder`."""
    tiny = open_pipeline("tiny")
    shutil.copytree(tiny.path, folder)
    heads = hidden_size // 32
    torch.manual_seed(0)
    config = {**tiny.configs["transformer"], "hidden_size": hidden_size, "num_heads": heads}
    PRXTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    return str(folder)


def cost(options: argparse.Namespace) -> None:
    if options.hidden_size:
        with tempfile.TemporaryDirectory() as name:
            options.model = wider(options.hidden_size, Path(name) / "pipeline")
            options.hidden_size = None
            return cost(options)
    folder = open_pipeline(options.model)
    config = DistillConfig(output_dir="unused", method=["ladd"], learning_rate=1e-6, discriminator_learning_rate=1e-6)
    null = torch.randn(2, folder.configs["transformer"]["context_in_dim"])
    steps = {
        "sft": sft_step(options.model),
        "combined": combined(build_objective(options.model, options.model, null, config)),
        "alternating": alternating(build_objective(options.model, options.model, null, config)),
    }
    shape = folder.latent_shape(
        *folder.resolve_size(32, 64) if options.model == "tiny" else folder.resolve_size(None, None)
    )
    batch = {
        "latents": torch.randn(options.batch, *shape),
        "prompt_embeds": torch.randn(options.batch, 16, null.shape[1]),
        "prompt_mask": torch.ones(options.batch, 16, dtype=torch.bool),
        "level": torch.zeros(options.batch, dtype=torch.int64),
        **{name: torch.rand(options.batch) for name in ("t", "ladd_t")},
        **{name: torch.randn(options.batch, *shape) for name in ("noise", "ladd_noise")},
        "seeds": list(range(options.batch)),
        "rows": list(range(options.batch)),
        "step": 0,
    }
    for step in steps.values():
        step(batch)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(options.steps):
                step(batch)
            times[name].append((time.perf_counter() - began) / options.steps)
        print({name: round(1000 * values[-1]) for name, values in times.items()}, "ms", flush=True)

    def ratio(a: str, b: str) -> str:
        return f"{statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)):.2f}"

    print(f"combined / alternating: {ratio('combined', 'alternating')}")
    print(f"in SFT steps: combined {ratio('combined', 'sft')}, alternating {ratio('alternating', 'sft')}")
    print(
        f"batch {options.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds"
    )


def quality(options: argparse.Namespace) -> None:
    print("| schedule | seed | updates | ocr_exact | judge_exact | FID to the teacher | \n|---|---|---|---|---|---|")
    for seed in options.seeds:
        for name, schedule in (("combined", combined), ("alternating", alternating)):
            updates, found = train_for(options, schedule, seed)
            cells = [f"{found[f'eval/{metric}/2_steps']:.3f}" for metric in ("ocr_exact", "judge_exact", "fid")]
            print(f"| {name} | {seed} | {updates} | {' | '.join(cells)} |", flush=True)


def train_for(options: argparse.Namespace, schedule: Callable[..., Step], seed: int) -> tuple[int, dict[str, float]]:
    """Updates that fit in `seconds`, and the evaluation of the averaged student after them."""
    teacher = TeacherConfig(
        *(options.teacher, None, 28, 4.0, 60, options.prompts), height=32, width=64, cache_dir=options.cache_dir
    )
    config = DistillConfig(
        output_dir="unused",
        method=["ladd"],
        max_steps=100_000,
        per_device_train_batch_size=64,
        num_inference_steps=2,
        timestep_weights=[2, 1],
        learning_rate=options.learning_rate,
        discriminator_learning_rate=options.discriminator_learning_rate,
        discriminator_warmup_steps=60,
        mismatch_fraction=0.4,
        seed=seed,
        eval_steps=1,
        eval_prompts_file=options.eval_prompts,
        eval_num_prompts=180,
        eval_rewards=["ocr_exact", "judge_exact"],
        eval_encoder="judge",
        eval_num_inference_steps=[2],
    )
    stage = Distill(ModelConfig(model_name_or_path=options.student), teacher, config)
    folder, shown = stage.teacher_pipeline, stage.shown_prompts()
    encoders = Encoders(folder, stage.cleaner, CPU, torch.float32)
    frozen = load(options.teacher)
    shape = folder.latent_shape(32, 64)
    sampler = Sampler(frozen.transformer.eval(), frozen.scheduler, 28, 4.0, shape, CPU, folder.max_prompt_tokens)
    samples, cache = teacher_latents(teacher, stage.prompts, encoders, (32, 64), lambda: sampler, ALONE, shown)
    model = build_objective(options.student, options.teacher, cache.embeddings[content_key("")], config)
    plan = MixedPlan(len(samples), 0, 0.0, 64, seed, config.max_steps)
    source = LatentSource(*(samples, None, cache, encoders, plan), micro_batch_size=64, randomness=stage.randomness())
    ema = EMA(model.policy.parameters(), 0.99)
    step, updates = schedule(model), 0
    ends = time.monotonic() + options.seconds
    while time.monotonic() < ends:
        (batch,) = source.batches(updates)
        step(batch)
        updates += 1
        ema.update(updates)
    output = Path(options.cache_dir) / "benchmark"
    output.mkdir(parents=True, exist_ok=True)
    run: Any = SimpleNamespace(ranks=ALONE, signals=StopSignals(), device=CPU, output_dir=output, log=None)
    student = Sampler(model.policy.eval(), stage.scheduler, 2, 1.0, shape, CPU, folder.max_prompt_tokens)
    data = Encoded(samples, None, cache, encoders, str, "")
    monitor = ImageMonitor(run, config, student, data, stage.judges, [], reference=sampler, reference_name="teacher")
    with ema.swapped_in():
        return updates, monitor.validate(0)


def arguments() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "--model", {"default": "tiny"}
    yield "--hidden_size", {"type": int}
    yield "--batch", {"type": int, "default": 32}
    yield "--rounds", {"type": int, "default": 7}
    yield "--steps", {"type": int, "default": 6}
    for name in ("teacher", "student", "prompts", "eval_prompts", "cache_dir"):
        yield f"--{name}", {}
    yield "--seconds", {"type": float, "default": 240.0}
    yield "--seeds", {"type": int, "nargs": "+", "default": [0, 1]}
    yield "--learning_rate", {"type": float, "default": 4e-5}
    yield "--discriminator_learning_rate", {"type": float, "default": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cost", "quality"))
    for name, settings in arguments():
        parser.add_argument(name, **settings)
    options = parser.parse_args()
    {"cost": cost, "quality": quality}[options.part](options)


if __name__ == "__main__":
    main()
