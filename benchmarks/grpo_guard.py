"""A reward that can be hacked, with and without the guard's remedies, each on one budget of optimizer steps.

    python benchmarks/grpo_guard.py --steps 160 --output runs/grpo-guard        # after make demo

`jpeg`: the demo's SFT checkpoint is rewarded for small JPEG files, which empty paper has. `fast`: for legibility alone,
at ten times the shipped learning rate. Neither is held to the start (beta 0), as the shipped configuration is. The
held-out reader judges; where it falls while the reward rises, the guard acts. Every run's report.html shows where.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
REWARDS = {
    "jpeg": ["--reward_funcs", "jpeg_compressibility"],
    "fast": ["--learning_rate", "1e-3"],
}
HELD = {"jpeg": ["--guard_rewards", "ocr_graded"], "fast": ["--guard_rewards", "jpeg_compressibility"]}
GUARDS = ("warn", "stop", "lower_lr", "regularize")


def train(folder: Path, reward: str, guard: str, steps: int, processes: int) -> dict:
    """The last evaluation, the best, and the steps at which the guard acted."""
    settings = [
        *("--guard", guard, "--max_steps", steps, "--eval_steps", max(1, steps // 10), "--report_to", "none"),
        *("--eval_rewards", "judge_exact", "ocr_exact", "--lr_scheduler_type", "constant", "--save_steps", 0),
        *("--beta", 0, "--ref_guidance_scale", "null"),
        *("--ema_decay", 0.9, *REWARDS[reward], *(HELD[reward] if guard == "regularize" else [])),
    ]
    if not (folder / "final").exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "prx_post.cli", "grpo", "--config", "configs/tiny/grpo.yaml"]
        command += ["--output_dir", folder, "--num_processes", processes, *settings]
        subprocess.run([str(part) for part in command], check=True, cwd=ROOT, env=environment)
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    page = (folder / "report.html").read_text()
    acted = page.partition("acted at step ")[2].partition(":")[0] if "acted at step" in page else "never"
    values = [line["eval/judge_exact/4_steps"] for line in lines]
    return {"last": lines[-1], "best": lines[values.index(max(values))], "acted": acted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/grpo-guard")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rewards", nargs="*", default=list(REWARDS))
    given = parser.parse_args()
    print("| reward | guard | acted at step | judge, best | at step | judge, last | at step | diversity, last |")
    print("|---|---|---|---|---|---|---|---|")
    for reward in given.rewards:
        for guard in GUARDS:
            run = train(given.output / f"{reward}-{guard}", reward, guard, given.steps, given.processes)
            name = "eval/judge_exact/4_steps"
            best, last = run["best"], run["last"]
            print(
                f"| {reward} | {guard} | {run['acted']} | {best[name]:.3f} | {best['step']} | {last[name]:.3f} | "
                f"{last['step']} | {last['eval/diversity/4_steps']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
