"""Can the evaluation's intervals be trusted, and what does its drawing gain over a plain loop?

    python benchmarks/evaluation.py [--checkpoint runs/demo/sft/final] [--trials 100] [--rounds 3]
    python benchmarks/evaluation.py --simulate [--data_sets 10000]

A/A: the base against itself. Each trial gives every prompt two different noise seeds at random, one for either side,
and asks whether the bootstrap's 95 % interval of the difference leaves out 0, which at best happens in 5 % of trials.
A/B: the base against --checkpoint on the same seeds, a random one a prompt and trial. Speed: the evaluation's batches
against PRXPipeline called once an image, in turn, the same prompts, noise, steps and guidance.

--simulate draws no images: data sets of random differences without an effect, every prompt with two seeds that share
what makes it easier for one side, and asks the same of each.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from prx_post.base.ranks import Ranks
from prx_post.evaluation.config import EvalConfig
from prx_post.evaluation.gallery import Gallery, fill
from prx_post.evaluation.jobs import Job, read_jobs
from prx_post.evaluation.metrics import paired_difference
from prx_post.evaluation.scoring import open_rewards, score
from prx_post.model.checkpoint import open_pipeline
from prx_post.tiny.datasets import prompt_set, write_prompts

REWARDS = ["ocr_exact", "ocr_graded", "judge_exact", "judge_graded"]


def settings(folder: Path, checkpoints: list[str], seeds: int, num_prompts: int, batch_size: int) -> EvalConfig:
    write_prompts(prompt_set("test"), folder / "prompts.jsonl")
    return EvalConfig(
        checkpoints=checkpoints,
        prompts_file=[str(folder / "prompts.jsonl")],
        num_prompts=num_prompts,
        seeds=list(range(seeds)),
        rewards=REWARDS,
        num_inference_steps=28,
        guidance_scale=4.0,
        height=32,
        width=64,
        batch_size=batch_size,
        trajectory_prompts=0,
        output_dir=str(folder / "out"),
    )


def galleries_of(config: EvalConfig) -> list[Gallery]:
    found = []
    for spec in config.checkpoint_specs():
        gallery = Gallery.open(spec, config, Path(str(config.output_dir)))
        gallery.claim(config)
        found.append(gallery)
    return found


def by_prompt(values: np.ndarray, jobs: list[Job], seeds: int) -> np.ndarray:
    """Scores [prompts, seeds]."""
    order = sorted(range(len(jobs)), key=lambda i: (jobs[i].index, jobs[i].seed))
    return values[order].reshape(-1, seeds)


def intervals(folder: Path, checkpoint: str | None, seeds: int, trials: int) -> None:
    config = settings(folder, ["base=tiny", *([f"other={checkpoint}"] if checkpoint else [])], seeds, 120, 60)
    jobs = read_jobs(config)
    galleries = galleries_of(config)
    for gallery in galleries:
        fill(gallery, jobs, config, Ranks())
    scores = score(galleries, jobs, *open_rewards(config, jobs), Path(str(config.output_dir)), Ranks())
    clusters = [job.cluster for job in sorted(jobs, key=lambda job: job.index) if job.seed == 0]
    rng = np.random.default_rng(0)
    rows = np.arange(len(clusters))
    pairs = [rng.permuted(np.tile(np.arange(seeds), (len(rows), 1)), axis=1)[:, :2] for _ in range(trials)]
    print(f"\n{len(rows)} prompts, {seeds} seeds, {trials} trials\n")
    print("| reward | A/A: trials that find a difference |" + (" A/B: the same |" if checkpoint else ""))
    print("|---|---|" + ("---|" if checkpoint else ""))
    for reward in REWARDS:
        base = by_prompt(scores["base"][reward], jobs, seeds)
        same = [paired_difference(base[rows, a], base[rows, b], clusters) for a, b in (pair.T for pair in pairs)]
        cells = [reward, f"{sum(d.is_significant for d in same)} of {trials}"]
        if checkpoint:
            other = by_prompt(scores["other"][reward], jobs, seeds)
            found = [paired_difference(base[rows, a], other[rows, a], clusters) for a in (pair[:, 0] for pair in pairs)]
            cells.append(f"{sum(d.is_significant for d in found)} of {trials}")
        print("| " + " | ".join(cells) + " |")


def right_or_wrong(rng: np.random.Generator, prompts: int) -> np.ndarray:
    """Differences [prompts, 2] of -1, 0 or 1: each side is right on a prompt with its own chance, drawn uniformly."""
    chances = rng.random((2, prompts, 1))
    first, second = rng.random((2, prompts, 2)) < chances
    return second.astype(float) - first


def heavy_tails(rng: np.random.Generator, prompts: int) -> np.ndarray:
    """Differences [prompts, 2]: a prompt's part plus an image's, both Student's t with 2.5 degrees of freedom."""
    return rng.standard_t(2.5, (prompts, 1)) + rng.standard_t(2.5, (prompts, 2))


def simulate(data_sets: int) -> None:
    columns = {"−1, 0 or 1": right_or_wrong, "Student's t with 2.5 degrees of freedom": heavy_tails}
    print("| prompts | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for prompts in (20, 60, 120):
        clusters = np.repeat(np.arange(prompts), 2).tolist()
        cells = [str(prompts)]
        for draw_differences in columns.values():
            found = 0
            for seed in range(data_sets):
                differences = draw_differences(np.random.default_rng((prompts, seed)), prompts).ravel()
                found += paired_difference(np.zeros_like(differences), differences, clusters, seed=seed).is_significant
            cells.append(f"{100 * found / data_sets:.1f} %")
        print("| " + " | ".join(cells) + " |", flush=True)


def speed(root: Path, rounds: int, images: int) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(open_pipeline("tiny").path)
    pipeline.set_progress_bar_config(disable=True)
    batched, plain = [], []
    for i in range(rounds):
        folder = root / f"speed-{i}"
        folder.mkdir()
        config = settings(folder, ["base=tiny"], 1, images, 30)
        jobs = read_jobs(config)
        (gallery,) = galleries_of(config)
        fill(gallery, jobs, config, Ranks())
        timing = gallery.timing()
        assert timing is not None
        batched.append(timing["images_per_second"])
        began = time.perf_counter()
        for job in jobs:
            pipeline(
                job.prompt,
                generator=torch.Generator().manual_seed(job.noise_seed),
                num_inference_steps=28,
                guidance_scale=4.0,
                height=32,
                width=64,
                use_resolution_binning=False,
            )
        plain.append(images / (time.perf_counter() - began))
    ratio = statistics.median(a / b for a, b in zip(batched, plain, strict=True))
    print("\n| | images/s |\n|---|---|")
    print(f"| PRXPipeline, one image a call | {statistics.median(plain):.2f} |")
    print(f"| eval, batches of 30 | {statistics.median(batched):.2f} |\n\nratio {ratio:.2f}, {rounds} rounds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=None, help="what A/B compares with the base")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--simulate", action="store_true", help="only the table of simulated differences")
    parser.add_argument("--data_sets", type=int, default=10_000, help="how many --simulate makes for each cell")
    options = parser.parse_args()
    if options.simulate:
        simulate(options.data_sets)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "intervals"
        folder.mkdir()
        intervals(folder, options.checkpoint, options.seeds, options.trials)
        speed(Path(temporary), options.rounds, options.images)


if __name__ == "__main__":
    main()
