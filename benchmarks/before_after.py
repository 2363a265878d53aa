"""Two checkouts side by side: how long `--help` and a typo take, and a step of SFT and of LADD.

    python benchmarks/before_after.py --before FOLDER [--rounds 5] [--steps 60] [--stages sft distill]

FOLDER is another checkout of this project, such as `git worktree add FOLDER COMMIT` makes. Both run under this Python,
one after the other in every round, with one thread; ratios are taken within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent.parent
COMMON = ["--model_name_or_path", "tiny", "--height", "32", "--width", "64", "--sample_steps", "0", "--save_steps", "0"]


def command(checkout: Path, *args: str, ok: tuple[int, ...] = (0,)) -> float:
    """Seconds that `prx-post <args>` takes."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "prx_post.cli", *args], cwd=checkout, env=env, capture_output=True, text=True
    )
    if done.returncode not in ok:
        sys.exit(done.stderr[-3000:])
    return time.perf_counter() - began


def step_ms(checkout: Path, stage: list[str], root: Path, steps: int, name: str) -> float:
    """Milliseconds per step, by the run's own metrics; the first window is left out."""
    folder = root / name
    window = max(1, steps // 6)
    lengths = ["--max_steps", str(steps), "--logging_steps", str(window), "--report_to", "none", "--num_threads", "1"]
    where = ["--output_dir", str(folder), "--cache_dir", str(root / f"cache-{checkout.name}")]
    command(checkout, *stage, *COMMON, *lengths, *where, "--per_device_train_batch_size", "32")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    return 1000 * 32 / statistics.median(line["images_per_second"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--stages", nargs="+", default=["sft", "distill"], choices=["sft", "distill"])
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve(), "after": HERE}
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        command(HERE, "tiny", "data", "--output_dir", str(root / "data"))
        teacher = ["--teacher_num_inference_steps", "2", "--teacher_guidance_scale", "4"]
        stages = {
            "step of sft, ms": ["sft", "--dataset_name", str(root / "data" / "curated")],
            "step of distill (ladd), ms": [
                *("distill", "--method", "ladd", "--prompts_file", str(root / "data" / "prompts-validation.jsonl")),
                *teacher,
            ],
        }
        stages = {what: stage for what, stage in stages.items() if stage[0] in options.stages}
        for round_ in range(options.rounds):
            for label, checkout in checkouts.items():

                def note(what: str, value: float, label: str = label) -> None:
                    found.setdefault(what, {}).setdefault(label, []).append(value)

                note("`prx-post sft --help`, s", command(checkout, "sft", "--help"))
                note("`prx-post sft` with a typo, s", command(checkout, "sft", "--lerning_rate", "1", ok=(2,)))
                for what, stage in stages.items():
                    run = f"{label}-{what.split()[2]}-{round_}"
                    note(what, step_ms(checkout, stage, root, options.steps, run))
            print({what: {k: round(v[-1], 2) for k, v in each.items()} for what, each in found.items()}, flush=True)
    print("| | before | after | after / before |\n|---|---|---|---|")
    for what, each in found.items():
        ratio = statistics.median(a / b for a, b in zip(each["after"], each["before"], strict=True))
        before, after = statistics.median(each["before"]), statistics.median(each["after"])
        print(f"| {what} | {before:.2f} | {after:.2f} | {ratio:.2f}× |")


if __name__ == "__main__":
    main()
