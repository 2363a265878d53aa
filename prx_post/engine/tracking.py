"""Where a run's numbers and images go: metrics.jsonl, accelerate's trackers, a progress bar, sample grids."""

import json
import math
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate.tracking import get_available_trackers
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from prx_post.base.errors import PrxPostError
from prx_post.base.files import CONFIG, json_line, write_bytes, write_jsonl
from prx_post.engine.run import Run


def _to_tensorboard(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")


def _to_wandb(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.log_images({name: [image]}, step=step)


LOG_IMAGE = {"tensorboard": _to_tensorboard, "wandb": _to_wandb}
"""How each tracker that takes images takes them."""


EVALUATIONS, METRICS = "evaluations.jsonl", "metrics.jsonl"
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


def _own_id(folder: Path) -> str:
    """By which W&B knows the run in a folder, also when it is resumed."""
    path = folder / "wandb_id"
    if not path.exists():
        write_bytes(path, uuid.uuid4().hex.encode())
    return path.read_text()


class RunLog:
    """config.yaml, metrics.jsonl (one line a logged step), the trackers of `report_to`, and the progress bar."""

    def __init__(self, run: Run) -> None:
        accelerator, config = run.accelerator, run.config
        self.accelerator, self.output_dir = accelerator, run.output_dir
        self.is_main = accelerator.is_main_process
        self.path = run.output_dir / METRICS
        name, first_step = config.run_name or run.output_dir.name, run.saved.step if run.saved else 0
        self.bar = tqdm(total=config.max_steps, desc=name, unit="step", disable=run.ranks.hides_progress)
        self._max_steps, self._is_terminal = config.max_steps, sys.stderr.isatty()
        if self.is_main:
            text = yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True)
            (run.output_dir / CONFIG).write_text(text)
        flat = {k: v if isinstance(v, int | float | str | bool) else json.dumps(v) for k, v in run.settings.items()}
        settings: dict[str, dict[str, Any]] = {tracker: {"name": name} for tracker in NAMED_RUNS}
        if "wandb" in config.report_to and self.is_main:
            settings["wandb"] |= {"id": _own_id(run.output_dir), "resume": "allow", "entity": config.entity}
        if first_step:
            settings["tensorboard"] = {"purge_step": first_step + 1}  # what a killed run logged is logged again
        accelerator.init_trackers(config.project, config=flat, init_kwargs=settings)

    def keep_until(self, step: int, *files: str) -> dict[str, Any]:
        """Drop the lines of `files` after `step`, which a killed run had written and a resumed one writes again.

        Returns the last line that is left in the last of them; one whose loss is None if there is none.
        """
        kept: list[dict[str, Any]] = []
        for path in (self.output_dir / name for name in files):
            text = path.read_text() if path.exists() else ""
            lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]  # or was cut
            kept = [line for line in lines if line["step"] <= step]
            if self.is_main and text:
                write_jsonl(path, kept)
        return kept[-1] if kept else {"loss": None}

    def say(self, line: str) -> None:
        if self.is_main:
            self.bar.write(line)

    def advance(self, steps: int = 1) -> None:
        self.bar.update(steps)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record `metrics` of optimizer step `step`. The bar, or off a terminal a line, shows the loss and images/s."""
        if self.is_main:
            known = {name: None if math.isnan(value) else value for name, value in metrics.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "time": round(time.time(), 3), **known}) + "\n")
            shown = {"loss": f"{metrics['loss']:.4f}", "images/s": f"{metrics['images_per_second']:.1f}"}
            self.bar.set_postfix(shown)
            if not self._is_terminal:
                self.say(f"step {step} of {self._max_steps}: " + ", ".join(f"{n} {v}" for n, v in shown.items()))
        self.accelerator.log(metrics, step=step)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record what the monitor measured, and say it in one line; on the main process."""
        with (self.output_dir / EVALUATIONS).open("a") as file:
            file.write(json_line({"step": step, **metrics}))
        shown = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
        self.say(f"step {step}: {shown}")
        self.accelerator.log(metrics, step=step)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What a file of lines has recorded."""
        path = self.output_dir / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def image(self, step: int, name: str, image: Image.Image, info: PngInfo | None = None) -> None:
        """Save a PNG under samples/ and hand it to the trackers that take images; on the main process."""
        folder = self.output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{step:06d}.png"
        image.save(path, pnginfo=info)
        for tracker in self.accelerator.trackers:
            if tracker.name in LOG_IMAGE:
                LOG_IMAGE[tracker.name](tracker, name, image, step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the trackers.

        Not accelerator.end_training(), which also destroys the process group: what still refers to it, DDP's reducer,
        would then end it while holding Python's lock, for which the group's own thread may be waiting.
        """
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
