"""What DPO gains in the embedded world over three seeds, and what it must not gain: two controls.

    python benchmarks/dpo_controls.py [--seeds 0 1 2] [--processes 2]      # after `make demo`, in its folder

Each seed makes its own pairs, as configs/tiny/make-pairs.yaml does, and trains on them as configs/tiny/dpo.yaml. The
controls train on seed 0's pairs: `swapped` prefers what was rejected, `shuffled` decides by a coin for each pair. What
is there already is not made again, so an interrupted call goes on.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets

RUNS = Path("runs/dpo-controls")
SFT = "runs/demo/sft/final"
PAIRS_PER_STEP = 32


def prx_post(*args: object, threads: int) -> None:
    call = [sys.executable, "-m", "prx_post.cli", *(str(arg) for arg in args)]
    subprocess.run(call, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def make_pairs(seed: int, processes: int) -> Path:
    folder = RUNS / f"pairs-{seed}"
    config = ("--config", "configs/tiny/make-pairs.yaml")
    options = ("--output_dir", folder, "--seed", seed, "--num_processes", processes)
    prx_post("data", "make-pairs", *config, *options, threads=1)
    return folder


def shuffle(pairs: Path) -> Path:
    """The same pairs, each turned round or not by a coin."""
    folder, coin = RUNS / "pairs-shuffled", random.Random(0)
    if folder.exists():
        return folder
    rows = datasets.load_dataset("parquet", data_dir=str(pairs), split="train").select_columns(
        ["prompt", "chosen", "rejected"]
    )

    def turned(row: dict) -> dict:
        return {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if coin.random() < 0.5 else row

    folder.mkdir(parents=True)
    rows.map(turned).to_parquet(str(folder / "train-00000.parquet"))
    return folder


def train(name: str, pairs: Path, processes: int, *options: object) -> None:
    folder = RUNS / name
    if (folder / "final").exists():
        return
    common = ("--config", "configs/tiny/dpo.yaml", "--dataset_name", pairs, "--output_dir", folder, "--sample_steps", 0)
    split = ("--num_processes", processes, "--per_device_train_batch_size", PAIRS_PER_STEP // processes)
    prx_post("dpo", *common, *split, "--resume_from_checkpoint", "latest", *options, threads=1)


def report(names: Sequence[str], seeds: Sequence[int]) -> None:
    results = json.loads((RUNS / "eval" / "results.json").read_text())
    print("| | exact, OCR | exact, judge | wins by the judge | FID |\n|---|---|---|---|---|")

    def row(name: str) -> list[float]:
        found = results["checkpoints"][name]
        wins = 0.5 if name == "sft" else results["wins"][name]["judge_graded"]["value"]
        exact = [found["rewards"][reward]["value"] for reward in ("ocr_exact", "judge_exact")]
        return [*exact, wins, found["metrics"]["fid"]["value"]]

    for name in ("sft", *names):
        exact_ocr, exact_judge, wins, fid = row(name)
        print(f"| {name} | {exact_ocr:.3f} | {exact_judge:.3f} | {wins:.3f} | {fid:.1f} |")
    columns = list(zip(*(row(f"seed-{seed}") for seed in seeds), strict=True))
    digits = (3, 3, 3, 1)
    means = [f"{statistics.mean(c):.{n}f} ± {statistics.pstdev(c):.{n}f}" for c, n in zip(columns, digits, strict=True)]
    print(f"| mean ± standard deviation of {len(seeds)} seeds | {' | '.join(means)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="that make pairs, train and evaluate")
    options = parser.parse_args()
    for seed in options.seeds:
        train(f"seed-{seed}", make_pairs(seed, options.processes), options.processes, "--seed", seed)
    first = RUNS / f"pairs-{options.seeds[0]}"
    train("swapped", first, options.processes, "--chosen_column", "rejected", "--rejected_column", "chosen")
    train("shuffled", shuffle(first), options.processes)
    names = [*(f"seed-{seed}" for seed in options.seeds), "swapped", "shuffled"]
    checkpoints = [f"sft={SFT}", *(f"{name}={RUNS / name / 'final'}" for name in names)]
    config = ("--config", "configs/tiny/eval-dpo.yaml", "--output_dir", RUNS / "eval")
    prx_post("eval", *config, "--checkpoints", *checkpoints, "--num_processes", options.processes, threads=1)
    report(names, options.seeds)


if __name__ == "__main__":
    main()
