"""Students of few steps in the embedded world: how they are distilled, what matters in that, and how they are aligned.

    python benchmarks/students.py --only NAME ... [--seeds 0 1 2] [--output runs/students]    # after make demo; --list

Each variant is a shipped configuration with some settings changed, run as two processes of one thread; one that needs
another's student makes that first, and one that is there already is kept. All are judged on the test prompts at their
own steps, 2 × 360 images, beside the SFT checkpoint at 28 guided steps; FID is to real handwriting, in the judge's
features.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
SFT = "runs/demo/sft/final"


@dataclass(frozen=True)
class Variant:
    """A run.

    Attributes:
        config: of configs/tiny. changes: of its settings; None leaves one out.
        start: the variant whose student is trained further; None: the configuration's own checkpoint.
        steps, sampler: with which it is judged; "" is the emitted pipeline's own.
    """

    command: str
    config: str
    steps: int
    changes: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    sampler: str = ""


REGRESSION = {
    **dict.fromkeys(("trajectory_levels", "ladd_levels", "real_timestep_weights", "real_fraction", "dataset_name")),
    **{"method": ["trajectory"], "method_weights": [10.0], "timestep_weights": [1, 1, 1, 1, 1, 1, 0.67, 0.67]},
    **dict.fromkeys(("mismatch_fraction", "discriminator_learning_rate")),
}
EVERYWHERE = {
    **dict.fromkeys(("trajectory_levels", "ladd_levels", "timestep_weights", "real_timestep_weights")),
    "own_state_levels": [0, *[0.5] * 7],
}


NO_ANCHOR = dict.fromkeys(("anchor_config", "anchor_weight", "anchor_batch_size"))
EXACT = {"reward": "ocr_exact", "min_gap": 0.5}  # any right image against any wrong one
ANCHOR = {"anchor_config": "configs/tiny/distill-renoise-8.yaml", "anchor_weight": 0.002, "anchor_batch_size": 16}
OF_EULER = {"rollout_sampler": "ode"}
WATCHED = {
    **{"eval_prompts_file": "runs/demo/data/prompts-validation.jsonl", "eval_num_prompts": 60},
    **{"eval_rewards": ["judge_exact", "ocr_exact"], "eval_encoder": "judge"},
}
ROUNDS = {
    **{"rollout_num_inference_steps": None, "rollout_guidance_scale": 1.0, "guidance_scale": 1.0, **WATCHED},
    **{"prompts_per_round": 512, "steps_per_round": 60, "max_steps": 240, "eval_steps": 60, "beta": 500.0},
    "per_device_train_batch_size": 16,
}
RENOISED = {"rollout_sampler": "renoise", "noise_level": None}
JUDGE = {"reward_funcs": ["judge_graded"]}  # has a gradient; OCR is held out
STEPS = {"rollout_num_inference_steps": None, "shift_terminal": None, "guard": "off"}
SUBSET = {**STEPS, "window": "subset", "window_size": 2, "learning_rate": 3e-5, "eval_steps": 50}


def aligned(config: str, start: str, steps: int, **changes: Any) -> Variant:
    changes = {"num_inference_steps": steps, **changes}
    return Variant("dpo" if config.startswith("dpo") else "grpo", config, steps, changes, start)


def distilled(config: str, steps: int, sampler: str = "", **changes: Any) -> Variant:
    return Variant("distill", config, steps, changes, sampler=sampler)


def polished(start: str) -> Variant:
    """LADD alone, on real images, at the levels where an aligned student has left their distribution."""
    changes = {"method": ["ladd"], "teacher_model_name_or_path": SFT, "real_fraction": 1.0, "max_steps": 100}
    changes |= {"timestep_weights": [0, 0, 0, 0, 1, 1, 1, 1], "real_timestep_weights": None, "ladd_levels": None}
    changes |= dict.fromkeys(("trajectory_teacher_steps", "trajectory_levels"))
    return Variant("distill", "distill-renoise-8", 8, changes, start)


def regressed(weight: float, dmd2_levels: list[float]) -> Variant:
    """DMD2 at both of two levels, and the teacher's path at the first."""
    path = {"trajectory_teacher_steps": 6, "trajectory_levels": [weight, 0.0]}
    return distilled("distill-2", 2, method=["trajectory", "dmd2"], **path, dmd2_levels=dmd2_levels, max_steps=200)


VARIANTS: dict[str, Variant] = {
    # the shipped students
    "ladd-8": distilled("distill-ladd-8", 8),
    "ladd-4": distilled("distill-ladd-4", 4),
    "ladd-8, re-noising": distilled("distill-renoise-8", 8),
    "ladd-4, re-noising": distilled("distill-renoise-4", 4),
    "ladd-2": distilled("distill-ladd-2", 2),
    "dmd-2": distilled("distill-2", 2),
    # each choice of ladd-8 taken back
    "ladd-8, the teacher's latents as reals": distilled(
        "distill-ladd-8",
        8,
        **dict.fromkeys(("real_fraction", "dataset_name", "real_timestep_weights", "timestep_weights")),
    ),
    "ladd-8, no own states": distilled("distill-ladd-8", 8, own_state_levels=None),
    "ladd-8, both methods at every level": distilled(
        "distill-ladd-8", 8, **{**EVERYWHERE, "method_weights": [10.0, 0.3]}
    ),
    "ladd-8, no mismatched prompts": distilled("distill-ladd-8", 8, mismatch_fraction=0.0),
    "regression on the same inputs": distilled("distill-ladd-8", 8, **REGRESSION),
    "ladd alone": distilled(
        "distill-ladd-8", 8, **{**EVERYWHERE, "method": ["ladd"], "trajectory_teacher_steps": None}
    ),
    # variety at two steps
    "dmd-2 with regression": regressed(10.0, [0.3, 1.0]),
    "dmd-2 with little regression": regressed(2.0, [1.0, 1.0]),
    # of an aligned teacher: after make dpo
    "ladd-8 of the DPO checkpoint": distilled("distill-ladd-8", 8, model_name_or_path="runs/demo/dpo/final"),
    "ladd-8, re-noising, of the DPO checkpoint": distilled(
        "distill-renoise-8", 8, model_name_or_path="runs/demo/dpo/final"
    ),
    "aligned 8, of the DPO checkpoint": aligned(
        "dpo-student-8", "ladd-8, re-noising, of the DPO checkpoint", 8, max_steps=180
    ),
    # aligned as shipped, and what holds them
    "aligned 8": aligned("dpo-student-8", "ladd-8, re-noising", 8),
    "aligned 8, six rounds": aligned("dpo-student-8", "ladd-8, re-noising", 8, max_steps=360),
    "dpo 8, re-noising, noised images": aligned(
        "dpo-student-8", "ladd-8, re-noising", 8, log_ratio="noised", rollout_sampler=None
    ),
    "dpo 8, re-noising, exact": aligned("dpo-student-8", "ladd-8, re-noising", 8, max_steps=360, **EXACT),
    "dpo 8, re-noising, anchor": aligned("dpo-student-8", "ladd-8, re-noising", 8, max_steps=360, **ANCHOR),
    "dgpo 8, re-noising, anchor": aligned("grpo-student-8-anchor", "ladd-8, re-noising", 8),
    "dgpo 8, re-noising": aligned("grpo-student-8-anchor", "ladd-8, re-noising", 8, **NO_ANCHOR),
    "nft 8, re-noising": aligned("grpo-student-8", "ladd-8, re-noising", 8),
    "nft 8, re-noising, 60 steps": aligned("grpo-student-8", "ladd-8, re-noising", 8, max_steps=60),
    "nft 8, re-noising, anchor": aligned("grpo-student-8", "ladd-8, re-noising", 8, **ANCHOR),
    "nft 8, re-noising, then LADD": polished("nft 8, re-noising"),
    "grpo 8, re-noising": aligned("grpo-flow", "ladd-8, re-noising", 8, **SUBSET, **RENOISED),
    "grpo 8, re-noising, anchor": aligned("grpo-flow", "ladd-8, re-noising", 8, **SUBSET, **RENOISED, **ANCHOR),
    "grpo 8, re-noising, judge": aligned("grpo-flow", "ladd-8, re-noising", 8, **SUBSET, **RENOISED, **JUDGE),
    "grpo 8, re-noising, judge, last step": aligned(
        "grpo-flow", "ladd-8, re-noising", 8, **SUBSET, **RENOISED, **JUDGE, last_step_reward_weight=0.1
    ),
    "aligned 2": aligned("grpo-student-2", "ladd-2", 2),
    "aligned 2, 240 steps": aligned("grpo-student-2", "ladd-2", 2, max_steps=240, eval_steps=80),
    "dpo 2": aligned("dpo-iterated", "ladd-2", 2, **ROUNDS, log_ratio="noised"),
    "dpo 2, steps": aligned("dpo-iterated", "ladd-2", 2, **ROUNDS, log_ratio="steps", rollout_sampler="cps"),
    "aligned 4": aligned("dpo-student-8", "ladd-4, re-noising", 4),
    "aligned 1, dmd": aligned("grpo-student-2", "dmd-2", 1, max_steps=240, eval_steps=80),
    "aligned 2, dmd": aligned("grpo-student-2", "dmd-2", 2, max_steps=480, eval_steps=80),
    # the student of 8 Euler steps: methods that noise its images anew, and those of its own steps
    "dgpo 8": aligned("grpo-student-8-anchor", "ladd-8", 8, **NO_ANCHOR, **OF_EULER, max_steps=480),
    "dgpo 8, anchor": aligned(
        *("grpo-student-8-anchor", "ladd-8", 8),
        **{**OF_EULER, "anchor_config": "configs/tiny/distill-ladd-8.yaml", "anchor_weight": 0.01},
    ),
    "dgpo 8, beta": aligned("grpo-student-8-anchor", "ladd-8", 8, **NO_ANCHOR, **OF_EULER, beta=0.05),
    "nft 8": aligned("grpo-student-8", "ladd-8", 8, **OF_EULER),
    "dpo 8": aligned("dpo-iterated", "ladd-8", 8, **ROUNDS, log_ratio="noised"),
    "dpo 8, steps": aligned("dpo-iterated", "ladd-8", 8, **ROUNDS, log_ratio="steps", rollout_sampler="cps"),
    "grpo 8": aligned("grpo-flow", "ladd-8", 8, **SUBSET),
    "nft 2": aligned("grpo-student-2-legible", "dmd-2", 2),
}


def settings_of(name: str, seed: int, folder: Path) -> dict[str, Any]:
    variant = VARIANTS[name]
    values = yaml.safe_load((ROOT / f"configs/tiny/{variant.config}.yaml").read_text())
    quiet = {"report_to": "none", "sample_steps": 0, "save_steps": 0, "seed": seed, "output_dir": str(folder)}
    if variant.command == "distill":
        quiet |= {"eval_steps": 0, "per_device_train_batch_size": values["per_device_train_batch_size"] // 2}
    values |= {**variant.changes, **quiet}
    if variant.start is not None:
        values["model_name_or_path"] = str(folder_of(variant.start, seed, folder.parent) / "final")
    return {key: value for key, value in values.items() if value is not None}


def folder_of(name: str, seed: int, output: Path) -> Path:
    return output / f"{''.join(c if c.isalnum() or c == '-' else '-' for c in name).replace('--', '-')}-seed{seed}"


def command(*parts: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-m", "prx_post.cli", *map(str, parts)], check=True, cwd=ROOT, env=environment)


def train(name: str, seed: int, output: Path) -> Path:
    """The run's folder."""
    variant, folder = VARIANTS[name], folder_of(name, seed, output)
    if variant.start is not None:
        train(variant.start, seed, output)
    if not (folder / "final").exists():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(settings_of(name, seed, folder)))
        command(variant.command, "--config", path, "--num_processes", 2, "--resume_from_checkpoint", "latest")
    return folder


def minutes_of(folder: Path) -> float:
    """From the first logged step to the last, what stood between them included."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (logged[-1]["time"] - logged[0]["time"]) / 60


def row(name: str, minutes: float | None, results: list[dict[str, Any]]) -> str:
    """A table's row: means over `results`, one of each seed."""
    values = [{**result["rewards"], **result["metrics"]} for result in results]
    ocr, judge, fid, diversity, edges = (
        statistics.mean(value[metric]["value"] for value in values)
        for metric in ("ocr_exact", "judge_exact", "fid", "diversity", "edge_energy")
    )
    seconds = statistics.mean(result["timing"]["seconds_per_image"] for result in results)
    return (
        f"| {name} | {'' if minutes is None else f'{minutes:.1f}'} | {results[0]['num_inference_steps']} | {ocr:.3f} | "
        f"{judge:.3f} | {fid:.1f} | {diversity:.4f} | {edges:.2f} | {seconds:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs/students")
    parser.add_argument("--list", action="store_true", help="the names of the variants")
    given = parser.parse_args()
    if given.list:
        print("\n".join(VARIANTS))
        return
    folders = {name: [train(name, seed, given.output) for seed in given.seeds] for name in given.only}
    checkpoints = [f"sft={SFT}"]
    for name, of_seeds in folders.items():
        variant = VARIANTS[name]
        sampler = f"&sampler={variant.sampler}" if variant.sampler else ""
        at = f"num_inference_steps={variant.steps}&guidance_scale=1{sampler}"
        checkpoints += [f"{folder.name}={folder}/final?{at}" for folder in of_seeds]
    evaluated = given.output / "eval"
    shared = ["--config", "configs/tiny/eval-ladd.yaml", "--metrics", "fid=judge", "diversity=judge", "edge_energy"]
    command("eval", *shared, "--output_dir", evaluated, "--checkpoints", *checkpoints, "--num_processes", 2)
    results = json.loads((evaluated / "results.json").read_text())["checkpoints"]
    print("| | minutes | steps | OCR | judge | FID | diversity | edge energy | s/image |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(row("SFT, guidance 4", None, [results["sft"]]))
    for name, of_seeds in folders.items():
        minutes = [minutes_of(folder) for folder in of_seeds]
        of_name = [results[folder.name] for folder in of_seeds]
        if len(of_seeds) > 1:
            for seed, spent, result in zip(given.seeds, minutes, of_name, strict=True):
                print(row(f"{name}, seed {seed}", spent, [result]))
        print(row(name, statistics.mean(minutes), of_name))


if __name__ == "__main__":
    main()
