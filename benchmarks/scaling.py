"""Step time and peak memory: one process, two with DDP, two with ZeRO-1, 2 and 3; and what a checkpoint costs.

    python benchmarks/scaling.py [--rounds 3] [--steps 20] [--batch 64]

All modes take the same global batch and the same number of threads in all. They run in turn, round after round, so
that a machine's drift falls on all alike; medians over rounds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.conftest import numbered_images
from tests.faults import sft_arguments
from tests.processes import run

MODES = {
    "1 process": (1, {}),
    "2 × DDP": (2, {}),
    "2 × ZeRO-1": (2, {"deepspeed": "zero1"}),
    "2 × ZeRO-2": (2, {"deepspeed": "zero2"}),
    "2 × ZeRO-3": (2, {"deepspeed": "zero3"}),
}
SKIPPED = 2
"""Logged windows at the start of a run that are not counted."""


def measure(root: Path, name: str, steps: int, batch: int, save_steps: int) -> tuple[float, float]:
    """Milliseconds a step, wall clock with saves included, and the peak resident memory of rank 0, GiB."""
    count, changes = MODES[name]
    folder = Path(tempfile.mkdtemp(dir=root))
    arguments = sft_arguments(
        root / "images",
        root / "cache",
        folder,
        max_steps=steps + 2 * SKIPPED,
        logging_steps=2,
        save_steps=save_steps,
        per_device_train_batch_size=batch // count,
        ddp_timeout=600,
        **changes,
    )
    run(count, arguments, OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // count)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][SKIPPED - 1 :]
    elapsed = lines[-1]["time"] - lines[0]["time"]
    return 1000 * elapsed / (lines[-1]["step"] - lines[0]["step"]), lines[-1]["peak_memory_gib"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    from prx_post.tiny.datasets import write_folder

    times: dict[str, list[float]] = defaultdict(list)
    memory: dict[str, float] = {}
    saves: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_folder(numbered_images([100 + i % 800 for i in range(400)]), root / "images")
        measure(root, "1 process", 2, options.batch, save_steps=0)  # fills the cache
        for _ in range(options.rounds):
            for name in MODES:
                step_ms, memory[name] = measure(root, name, options.steps, options.batch, save_steps=0)
                times[name].append(step_ms)
                # one save in the counted steps, and one at the end
                with_save, _ = measure(root, name, options.steps, options.batch, save_steps=options.steps)
                saves[name].append((with_save - step_ms) * options.steps)
                print(f"{name}: {step_ms:.0f} ms a step, {saves[name][-1]:.0f} ms for a save", flush=True)
    print("\n| | step, ms | against 1 process | peak resident memory a process | time lost to a save, ms |")
    print("|---|---|---|---|---|")
    for name in MODES:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["1 process"], strict=True))
        step, save = statistics.median(times[name]), statistics.median(saves[name])
        print(f"| {name} | {step:.0f} | {ratio:.2f}× | {memory[name]:.2f} GiB | {save:.0f} |")


if __name__ == "__main__":
    main()
