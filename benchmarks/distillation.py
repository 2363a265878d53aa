"""Ways to few steps on one budget: every method, and what matters within them, in the embedded world.

    python benchmarks/distillation.py --teacher runs/demo/sft/final --data runs/demo/data --work runs/methods
        [--budget_s 240] [--only NAME ...] [--threads 1]

Each variant is a run of `prx-post distill` with as many optimizer steps as fit in the budget, by its own speed over its
first steps; evaluations and the teacher's latents, which all share, are not counted. Finished variants are kept in
the folder, so that a interrupted benchmark goes on. The last averaged student of each draws 2 × 180 images of held-out
validation numbers, without guidance: how often OCR reads the number asked for, the held-out judge's word, and the
Fréchet distance (judge features) to the teacher's images of the same prompts.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

LADD = {
    "method": ["ladd"],
    "learning_rate": 4e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "adam_beta1": 0.0,
    "discriminator_learning_rate": 1e-3,
    "discriminator_warmup_steps": 60,
    "mismatch_fraction": 0.4,
    "timestep_weights": [3, 3, 2, 2, 2, 1, 1, 1],
}
DMD2 = {"method": ["dmd2"], "learning_rate": 4e-5, "adam_beta1": 0.0, "discriminator_learning_rate": 4e-5}
AFTER_TRAJECTORY = {"start": "trajectory", "learning_rate": 1e-5}

VARIANTS: dict[str, dict[str, Any]] = {
    # methods, all from the teacher
    "trajectory": {"method": ["trajectory"], "learning_rate": 2e-4},
    "ladd": LADD,
    "dmd2": DMD2,
    # from the student of `trajectory`, with a budget of their own
    "ladd after trajectory": {**LADD, **AFTER_TRAJECTORY},
    # the grid
    "trajectory, grid with the idle step": {"method": ["trajectory"], "learning_rate": 2e-4, "shift_terminal": 0},
    # ladd's parts
    "ladd, no mismatched prompts": {**LADD, "mismatch_fraction": 0.0},
    "ladd, real images": {**LADD, "real": True},
    "ladd, a head on the last block alone": {**LADD, "head_blocks": [5]},
    "ladd, renoise sampler": {**LADD, "sampler": "renoise"},
}


def command(options: argparse.Namespace, name: str, output_dir: Path, **changes: Any) -> list[str]:
    variant = {**VARIANTS[name], **changes}
    data = Path(options.data)
    start = variant.pop("start", None)
    values: dict[str, Any] = {
        "model_name_or_path": options.work / _slug(start) / "final" if start else options.teacher,
        "teacher_model_name_or_path": options.teacher,
        "teacher_num_inference_steps": 28,
        "teacher_guidance_scale": 4.0,
        "teacher_batch_size": 60,
        "prompts_file": data / "prompts-train.jsonl",
        "height": 32,
        "width": 64,
        "cache_dir": options.cache_dir or options.work / "cache",
        "output_dir": output_dir,
        "per_device_train_batch_size": 64,
        "trajectory_teacher_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "adam_beta2": 0.99,
        "ema_decay": 0.99,
        "sample_steps": 0,
        "save_steps": 0,
        "report_to": "none",
        "num_threads": options.threads,
        "min_diversity": 0.0,
        "max_discriminator_accuracy": 1.0,
        **variant,
    }
    if values.pop("real", False):
        values |= {"real_fraction": 1.0, "dataset_name": data / "curated"}
    if not values.get("shift_terminal", 0.3):
        values["shift_terminal"] = "null"
    return [sys.executable, "-m", "prx_post.cli", "distill", *_flags(values)]


def _flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return flags


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace(",", "").replace("+", "and")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_variant(options: argparse.Namespace, name: str) -> dict[str, Any]:
    folder = options.work / _slug(name)
    mark = folder.with_suffix(".json")
    if mark.exists():
        return json.loads(mark.read_text())
    trial = folder.with_name(f"{folder.name}-trial")
    if not (trial / "final").exists():
        # the warm-up of a discriminator is quicker than what follows, so that it is left out of the trial
        warmup = {"discriminator_warmup_steps": 0} if "discriminator_warmup_steps" in VARIANTS[name] else {}
        subprocess.run(command(options, name, trial, max_steps=12, logging_steps=2, **warmup), check=True)
    rates = [line["images_per_second"] for line in _lines(trial / "metrics.jsonl")[1:]]
    steps = max(60, round(options.budget_s * statistics.mean(rates) / 64))
    evaluation = {
        "eval_steps": steps,
        "eval_prompts_file": Path(options.data) / "prompts-validation.jsonl",
        "eval_num_prompts": 180,
        "eval_num_inference_steps": [8, 4, 2, 1],
        "eval_rewards": ["ocr_exact", "judge_exact"],
        "eval_encoder": "judge",
    }
    subprocess.run(command(options, name, folder, max_steps=steps, logging_steps=10, **evaluation), check=True)
    curve = _lines(folder / "evaluations.jsonl")
    found = {"name": name, "steps": steps, **curve[-1], "curve": curve}
    mark.write_text(json.dumps(found))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| variant | updates | 8 steps: OCR, judge, FID | 4 steps | 2 steps | 1 step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for n in (8, 4, 2, 1):
            ocr, judge, fid = (row[f"eval/{metric}/{n}_steps"] for metric in ("ocr_exact", "judge_exact", "fid"))
            cells.append(f"{ocr:.3f}, {judge:.3f}, {fid:.1f}")
        lines.append(f"| {row['name']} | {row['steps']} | {' | '.join(cells)} |")
    first = rows[0]["curve"][0]
    untrained = [
        ", ".join(
            f"{first[f'eval/{m}/{n}_steps']:.{d}f}" for m, d in (("ocr_exact", 3), ("judge_exact", 3), ("fid", 1))
        )
        for n in (8, 4, 2, 1)
    ]
    lines.append(f"| the teacher without guidance, untrained | 0 | {' | '.join(untrained)} |")
    guided = f"{first['eval/ocr_exact/teacher']:.3f}, {first['eval/judge_exact/teacher']:.3f}"
    lines.append(f"| the teacher, 28 guided steps | | {guided} | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "data", "work"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--cache_dir")
    parser.add_argument("--budget_s", type=float, default=240)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.work = Path(options.work)
    rows = [run_variant(options, name) for name in options.only]
    print(table(rows))


if __name__ == "__main__":
    main()
