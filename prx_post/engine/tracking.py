"""Where a run's numbers and pictures go: metrics.jsonl, accelerate's trackers, a progress bar, sample grids."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate.tracking import get_available_trackers
from PIL import Image
from tqdm import tqdm

from prx_post.config import PrxPostError


def _to_tensorboard(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")


def _to_wandb(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.log_images({name: [image]}, step=step)


LOG_PICTURE = {"tensorboard": _to_tensorboard, "wandb": _to_wandb}
"""How each tracker that takes pictures takes them."""


NAMED_RUNS = ("wandb", "trackio")
"""Trackers that take the run's name apart from the project's."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise PrxPostError for a tracker that is not installed; accelerate would leave it out without a word."""
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in installed:
            raise PrxPostError(
                f"report_to is {name!r}, which is not installed here. pip install {name}, or choose from "
                f"{', '.join(installed) or 'none'}."
            )


class RunLog:
    """config.yaml, metrics.jsonl (one line a logged step), the trackers of `report_to`, and the progress bar."""

    def __init__(
        self, accelerator: Any, output_dir: Path, run_name: str, config: dict[str, Any], max_steps: int
    ) -> None:
        self.accelerator, self.output_dir = accelerator, output_dir
        self.is_main = accelerator.is_main_process
        self.path = output_dir / "metrics.jsonl"
        self.bar = tqdm(total=max_steps, desc=run_name, unit="step", disable=not self.is_main)
        if self.is_main:
            (output_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        flat = {k: v if isinstance(v, int | float | str | bool) else json.dumps(v) for k, v in config.items()}
        named = {name: {"name": run_name} for name in NAMED_RUNS}
        accelerator.init_trackers("prx-post", config=flat, init_kwargs=named)

    def advance(self) -> None:
        self.bar.update(1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record `metrics` for optimizer step `step`; the bar shows the loss and images/s."""
        if self.is_main:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
            shown = {"loss": f"{metrics['loss']:.4f}", "images/s": f"{metrics['images_per_second']:.1f}"}
            self.bar.set_postfix(shown)
        self.accelerator.log(metrics, step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> Path:
        """Save a PNG under samples/ and hand it to the trackers that take pictures."""
        folder = self.output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{step:06d}.png"
        image.save(path)
        for tracker in self.accelerator.trackers:
            if tracker.name in LOG_PICTURE:
                LOG_PICTURE[tracker.name](tracker, name, image, step)
        return path

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()


def grid(images: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Put pictures of one size in rows of `columns`, `gap` pixels apart."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (200, 200, 200))
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet
