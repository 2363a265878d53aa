"""Losses and final weights of short runs of every stage, recorded once and compared ever after.

    python -m tests.golden check     # every run, to the bit where the machine is the recording one
    python -m tests.golden record    # write tests/golden.json anew: only with a reason, told in the changelog

A run is 20 optimizer steps of the command line on the embedded base, one thread a process.
"""

import hashlib
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.processes import run

RECORDED = Path(__file__).with_name("golden.json")
STEPS = 20
DISTILLATIONS = {
    "trajectory": ["trajectory"],
    "ladd": ["ladd"],
    "dmd2": ["dmd2"],
    "together": ["trajectory", "ladd", "dmd2"],
}
RUNS = [
    f"{stage}-{kind}-{count}"
    for stage in ("sft", *(f"distill-{name}" for name in DISTILLATIONS))
    for kind in ("full", "lora")
    for count in (1, 2)
]
"""<stage>-<full or lora>-<processes>"""
PROJECTIONS = 8


def arguments(name: str, images: Path, prompts: Path, cache: Path, output_dir: Path) -> tuple[int, list[object]]:
    """Processes and command line of the run `name`."""
    stage, kind, count = name.rsplit("-", 2)
    settings: dict[str, Any] = {
        **{"model_name_or_path": "tiny", "height": 32, "width": 64, "cache_dir": cache, "output_dir": output_dir},
        **{"max_steps": STEPS, "per_device_train_batch_size": 4 // int(count), "learning_rate": 3e-4},
        **{"lr_scheduler_type": "cosine", "warmup_steps": 4, "weight_decay": 0.01, "ema_decay": 0.9, "seed": 3},
        **{"logging_steps": 1, "save_steps": 0, "sample_steps": 0},
        "report_to": "none",
    }
    if kind == "lora":
        settings |= {"use_peft": "true", "lora_r": 4, "lora_alpha": 8}
    if stage == "sft":
        settings |= {"dataset_name": images, "num_inference_steps": 2, "gradient_accumulation_steps": 2}
    else:
        settings |= {
            **{"prompts_file": prompts, "teacher_num_inference_steps": 2, "teacher_guidance_scale": 3.0},
            **{"teacher_batch_size": 4, "num_inference_steps": 4, "trajectory_teacher_steps": 2, "head_width": 16},
        }
        methods = DISTILLATIONS[stage.removeprefix("distill-")]
        settings["method"] = methods
        if {"ladd", "dmd2"} & set(methods):  # the student waits four steps, then every second one
            settings |= {"discriminator_warmup_steps": 4, "discriminator_steps_per_generator": 2}
        if "ladd" in methods:
            settings |= {"mismatch_fraction": 0.3, "r1_weight": 1e-4}
    flags = [
        part
        for key, value in settings.items()
        for part in (f"--{key}", *(value if isinstance(value, list) else [value]))
    ]
    return int(count), [stage.split("-")[0], *flags]


def losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def digest(output_dir: Path) -> dict[str, Any]:
    """Of the emitted weights: a sha256 of their bits, and projections of their change on seeded random directions.

    The projections survive another machine's rounding, which no hash does: each is a weighted sum of how far every
    weight moved from the base, over the whole change's length, so about normal with variance 1.
    """
    found = load_file(output_dir / "final" / "transformer" / "diffusion_pytorch_model.safetensors")
    start = load_file(_base() / "transformer" / "diffusion_pytorch_model.safetensors")
    bits, moved = hashlib.sha256(), []
    for key in sorted(found):
        bits.update(found[key].numpy().tobytes())
        moved.append((found[key].double() - start[key].double()).flatten())
    change = torch.cat(moved)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(PROJECTIONS, len(change), generator=generator, dtype=torch.float64)
    length = float(change.norm())
    return {"sha256": bits.hexdigest(), "length": length, "projections": (directions @ change / length).tolist()}


def _base() -> Path:
    from prx_post.tiny import BASE

    return BASE


def measure(name: str, images: Path, prompts: Path, cache: Path, folder: Path) -> dict[str, Any]:
    count, args = arguments(name, images, prompts, cache, folder / name)
    run(count, args)
    return {"losses": losses(folder / name), **digest(folder / name)}


def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def compare(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    """Greatest relative difference of a loss, and the part of the weights' change that is another."""
    loss = max(
        abs(a - b) / abs(b) if math.isfinite(a) else math.inf
        for a, b in zip(found["losses"], expected["losses"], strict=True)
    )
    ours, theirs = (np.array(x["projections"]) * x["length"] for x in (found, expected))
    return loss, float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def main() -> None:
    from prx_post.tiny.datasets import write_folder
    from tests.conftest import numbered_images
    from tests.distilling import PROMPTS

    command, only = sys.argv[1], sys.argv[2:]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_folder(numbered_images(list(range(100, 148))), folder / "images")
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
        given = (folder / "images", folder / "prompts.jsonl", folder / "cache", folder)
        known = {} if command == "record" else recorded()
        for name in [name for name in RUNS if not only or any(part in name for part in only)]:
            found = measure(name, *given)
            if command == "record":
                known[name] = found
                print(
                    f"{name:28} {found['losses'][0]:.6f} ... {found['losses'][-1]:.6f}  {found['sha256'][:12]}",
                    flush=True,
                )
                continue
            same = found["losses"] == known[name]["losses"] and found["sha256"] == known[name]["sha256"]
            loss, weights = compare(found, known[name])
            print(f"{name:28} {'bit-identical' if same else f'loss {loss:.1e}, weights {weights:.1e}'}", flush=True)
    if command == "record":
        RECORDED.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
