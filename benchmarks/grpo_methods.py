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
from plotting import lines

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
QUIET = ["--report_to", "none", "--save_steps", "0", "--guard", "off", "--eval_steps", "0"]


def command(*parts: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-m", "prx_post.cli", *map(str, parts)], check=True, cwd=ROOT, env=environment)


def last_time(folder: Path, first: int) -> tuple[float, int]:
    """Seconds between the metrics of step `first` and the last, and the steps between them."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    began = next(line for line in logged if line["step"] >= first)
    return logged[-1]["time"] - began["time"], logged[-1]["step"] - began["step"]


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
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    began = logged[0]["time"]
    return {
        "folder": str(folder),
        "steps": logged[-1]["step"],
        "minutes": (logged[-1]["time"] - began) / 60,
        "curve": [((line["time"] - began) / 60, line[REWARD]) for line in logged if line.get(REWARD) is not None],
    }


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
    (given.output / "methods.svg").write_text(lines(curves, (0.0, longest), LOW, ("0", f"{longest:.1f} minutes")))


if __name__ == "__main__":
    main()
