"""What an online method's rollout costs: network evaluations, seconds, and where these go.

    python benchmarks/grpo.py            # the embedded base, one process of one thread; about six minutes

Every case has 8 prompts × 8 images a rollout and is given 6 rollouts, of which the median of the last five counts.
"against passes" divides its seconds by what its forward and backward passes alone take, timed in the same run as
`prx-post plan` does.
The last table gives a reward that sleeps for a known time, with and without waiting for it.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
ROLLOUTS = 6
COMMON = {
    **{"model_name_or_path": "tiny", "height": 32, "width": 64, "prompts_per_rollout": 8, "num_generations": 8},
    **{"per_device_train_batch_size": 32, "steps_per_generation": 2, "learning_rate": 1e-5, "guard": "off"},
    **{"rollout_num_inference_steps": 8, "num_inference_steps": 8, "guidance_scale": 1, "sample_steps": 0},
    **{"save_steps": 0, "report_to": "none", "num_threads": 1, "reward_funcs": ["ocr_probability"]},
}
STEPS = {"method": "grpo", "rollout_sampler": "cps"}
IMAGES = {"rollout_sampler": "ode"}
CASES = {
    "grpo, all steps": STEPS,
    "grpo, fast (2 steps)": {**STEPS, "window": "fast"},
    "grpo, mix (4 steps)": {**STEPS, "window": "mix"},
    "grpo, subset (2 steps)": {**STEPS, "window": "subset"},
    "nft": {**IMAGES, "method": "nft"},
    "dgpo": {**IMAGES, "method": "dgpo"},
    "dgpo, no clip": {**IMAGES, "method": "dgpo", "epsilon": None},
}
DELAY_S = 1.0


def arguments(folder: Path, prompts: Path, changes: dict) -> list[str]:
    values = {**COMMON, **changes, "prompts_file": prompts, "cache_dir": folder.parent / "cache", "output_dir": folder}
    settings = folder.with_suffix(".yaml")
    settings.write_text(yaml.safe_dump({k: str(v) if isinstance(v, Path) else v for k, v in values.items()}))
    return ["--config", str(settings)]


def train(folder: Path, prompts: Path, changes: dict) -> dict:
    """Medians over rollouts: seconds, and of these in generation, decoding and waiting for scores."""
    settings = {"max_steps": 2 * ROLLOUTS, "logging_steps": 2, **changes}
    run(["grpo", *arguments(folder, prompts, settings)])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [b["time"] - a["time"] for a, b in itertools.pairwise(lines)]
    parts = {
        name: statistics.median(line[f"seconds/{name}"] for line in lines[1:])
        for name in ("rollout", "decode", "scoring", "scoring_wait")
    }
    return {"total": statistics.median(seconds), **parts}


def run(parts: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "prx_post.cli", *parts]
    return subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True).stdout


def planned(folder: Path, prompts: Path, changes: dict) -> dict[str, float]:
    """The plan's numbers of a rollout, by their names; `time`, seconds, of passes timed just now."""
    text = run(["plan", "--stage", "grpo", *arguments(folder, prompts, changes), "--measure", "true"])
    section = text[text.index("\nrollout\n") :].splitlines()[2:]
    found = {}
    for line in section[:6]:
        name, value, *_ = line.split()
        if name in ("generated", "trained", "frozen", "time"):
            found[name] = float(value.replace(",", ""))
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prompts = folder / "prompts.txt"
        prompts.write_text("".join(f"{number}\n" for number in range(100, 180)))
        print("| method | network evaluations | seconds | against passes | rollout | decode | waiting | update |")
        print("|---|---|---|---|---|---|---|---|")
        for i, (name, changes) in enumerate(CASES.items()):
            plan = planned(folder / f"{i}-plan", prompts, changes)
            took = train(folder / str(i), prompts, changes)
            evaluations = plan["generated"] + plan["trained"] + plan["frozen"]
            update = took["total"] - took["rollout"] - took["decode"] - took["scoring_wait"]
            parts = [took["rollout"], took["decode"], took["scoring_wait"], update]
            shown = " | ".join(f"{part / took['total']:.0%}" for part in parts)
            ratio = took["total"] / plan["time"]
            print(f"| {name} | {evaluations:,.0f} | {took['total']:.2f} | {ratio:.2f} | {shown} |", flush=True)
        print(f"\n| a reward that sleeps {DELAY_S:g} s per 32 images | seconds | against waiting |\n|---|---|---|")
        reward = folder / "slow.py"
        reward.write_text(
            "import time\n\n\ndef score(images, prompts):\n"
            f"    time.sleep({DELAY_S} * len(images) / 32)\n"
            "    return [float(sum(image.resize((1, 1)).getpixel((0, 0)))) for image in images]\n"
        )
        waited = None
        for mode in ("off", "batch", "rollout"):
            slow = {**STEPS, "window": "subset", "reward_funcs": [f"{reward}:score"], "async_rewards": mode}
            total = train(folder / mode, prompts, slow)["total"]
            waited = waited or total
            print(f"| async_rewards: {mode} | {total:.2f} | {total / waited:.2f} |", flush=True)


if __name__ == "__main__":
    main()
