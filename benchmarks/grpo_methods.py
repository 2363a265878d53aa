"""Every online method on one budget of wall time: each shipped configuration from the demo's SFT checkpoint.

    python benchmarks/grpo_methods.py --minutes 6 --output runs/grpo-methods        # after make demo

A method's seconds per optimizer step are taken from a few rollouts of its own first, then it is given as many steps as
fit. All are judged on the test prompts, at the steps of their rollouts, without guidance, against the SFT checkpoint.
methods.svg in the output shows their rewards over time.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
CONFIGS = {
    "dgpo": "grpo",
    "flow-grpo (cps)": "grpo-flow",
    "pref-grpo": "grpo-pref",
    "nft": "grpo-nft",
    "awm": "grpo-awm",
}
SDE = ("flow-grpo (sde)", "grpo-flow", ["--rollout_sampler", "sde", "--noise_level", "0.7"])
PROBE = 3
"""Rollouts whose steps are timed, the first not counted."""
REWARD, LOW = "reward/ocr_probability", 0.1
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
QUIET = ["--report_to", "none", "--save_steps", "0", "--guard", "off", "--eval_steps", "0"]


def command(*parts: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-m", "prx_post.cli", *map(str, parts)], check=True, cwd=ROOT, env=environment)


def last_time(folder: Path, first: int) -> tuple[float, int]:
    """Seconds between the metrics of step `first` and the last, and the steps between them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    began = next(line for line in lines if line["step"] >= first)
    return lines[-1]["time"] - began["time"], lines[-1]["step"] - began["step"]


def train(name: str, config: str, extra: list[str], output: Path, minutes: float, processes: int) -> dict:
    folder = output / name.replace(" ", "-").replace("(", "").replace(")", "")
    base = ["grpo", "--config", f"configs/tiny/{config}.yaml", "--num_processes", processes, *QUIET, *extra]
    given = yaml.safe_load((ROOT / f"configs/tiny/{config}.yaml").read_text())
    per_rollout = given["steps_per_generation"] * given.get("num_iterations", 1)
    if not (folder / "final").exists():
        probe = folder.with_name(folder.name + "-probe")
        if not (probe / "final").exists():
            command(*base, "--output_dir", probe, "--max_steps", PROBE * per_rollout, "--logging_steps", 1)
        seconds, steps = last_time(probe, per_rollout)
        count = per_rollout * max(1, round(60 * minutes / (seconds / steps) / per_rollout))
        command(*base, "--output_dir", folder, "--max_steps", count)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    began = lines[0]["time"]
    return {
        "folder": str(folder),
        "steps": lines[-1]["step"],
        "minutes": (lines[-1]["time"] - began) / 60,
        "curve": [((line["time"] - began) / 60, line[REWARD]) for line in lines if line.get(REWARD) is not None],
    }


def plot(curves: dict[str, list[tuple[float, float]]], minutes: float) -> str:
    """The reward of rollouts over minutes, as SVG."""
    width, height, left, bottom = 640, 320, 44, 36
    place = (
        lambda x: left + (width - left - 150) * x / minutes,
        lambda y: height - bottom - (height - bottom - 12) * (y - LOW) / (1 - LOW),
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">'
    ]
    parts.append(f'<rect width="{width}" height="{height}" fill="#fff"/>')
    for tick in (0.2, 0.4, 0.6, 0.8, 1.0):
        y = place[1](tick)
        parts.append(f'<line x1="{left}" x2="{width - 150}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{tick:g}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(f"{place[0](x):.1f},{place[1](y):.1f}" for x, y in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<text x="{width - 140}" y="{24 + 18 * i}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{left}" y="{height - 10}" fill="#555">0</text>')
    parts.append(
        f'<text x="{width - 150}" y="{height - 10}" text-anchor="end" fill="#555">{minutes:.1f} minutes</text>'
    )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/grpo-methods")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of methods")
    given = parser.parse_args()
    runs = [*((name, config, []) for name, config in CONFIGS.items()), SDE]
    runs = [run for run in runs if not given.only or run[0] in given.only]
    found = {
        name: train(name, config, extra, given.output, given.minutes, given.processes) for name, config, extra in runs
    }
    names = {name: name.split(" ")[0] + ("-sde" if "sde" in name else "") for name in found}
    grid = "num_inference_steps=4&guidance_scale=1&shift_terminal=0.3"
    checkpoints = [f"sft=runs/demo/sft/final?{grid}"]
    checkpoints += [f"{names[name]}={run['folder']}/final?{grid}" for name, run in found.items()]
    evaluated = given.output / "eval"
    command("eval", "--config", "configs/tiny/eval-grpo.yaml", "--output_dir", evaluated, "--checkpoints", *checkpoints)
    results = json.loads((evaluated / "results.json").read_text())["checkpoints"]
    print("| method | steps | minutes | OCR | judge | FID | diversity |\n|---|---|---|---|---|---|---|")
    for name in ("sft", *found):
        result = results[names.get(name, name)]
        rewards, metrics = result["rewards"], result["metrics"]
        values = [rewards["ocr_exact"], rewards["judge_exact"], metrics["fid"], metrics["diversity"]]
        shown = [value["value"] if isinstance(value, dict) else value for value in values]
        run = found.get(name, {"steps": 0, "minutes": 0.0})
        print(
            f"| {name} | {run['steps']} | {run['minutes']:.1f} | {shown[0]:.3f} | {shown[1]:.3f} | {shown[2]:.1f} | "
            f"{shown[3]:.4f} |"
        )
    curves = {name: run["curve"] for name, run in found.items() if run["curve"]}
    longest = max(run["minutes"] for run in found.values())
    (given.output / "methods.svg").write_text(plot(curves, longest))


if __name__ == "__main__":
    main()
