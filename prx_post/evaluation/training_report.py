"""The page of a run that is watched by a guard: what is optimised against what is held out, and the same images through
training. One file, no network, everything user-made escaped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from prx_post.base.files import write_bytes
from prx_post.base.pages import data_uri, page_template
from prx_post.evaluation.charts import BOTTOM, HEIGHT, RIGHT, TOP, WIDTH, Tick, axis_ticks

FILM = "film"
"""Folder of a run with an image per evaluation: its images below each other."""
MAX_FRAMES = 24
"""More evaluations than these show every second, third, ... of theirs, and the last."""
LEFT = 46
EVALUATED, LOGGED = "evaluations", "training"


@dataclass(frozen=True)
class TrainingReport:
    """What the page shows.

    Attributes:
        points: (step, optimised rewards as one, held-out judgement) of each evaluation, higher being better.
        held_out: the judgement's name.
        acted: steps at which the guard acted.
        guard: what it does.
        prompts: of the film's rows.
        evaluations, metrics: lines with a `step` each.
    """

    title: str
    points: Sequence[tuple[int, float | None, float]]
    held_out: str
    acted: Sequence[int]
    guard: str
    prompts: Sequence[str]
    evaluations: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Curve:
    """One quantity over steps, as it stands in a box of WIDTH × HEIGHT."""

    title: str
    points: list[tuple[float, float, str]]
    """x, y and what is said of the point."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[float]
    """Where the guard acted."""
    last: str

    @property
    def polyline(self) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in self.points)


def write_training_report(folder: Path, path: Path, report: TrainingReport) -> None:
    """Render the page of the run in `folder`."""
    end = max([line["step"] for line in (*report.evaluations, *report.metrics)], default=1)
    main = [curve(title, points, report.acted, end) for title, points in _main(report)]
    others = {
        EVALUATED: _curves(report.evaluations, report.acted, end, skip=("step",)),
        LOGGED: _curves(report.metrics, report.acted, end, skip=("step", "time")),
    }
    page = page_template("evaluation/training.html.j2").render(
        report=report,
        main=main,
        others=others,
        box=(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM),
        film=_film(folder, report),
    )
    write_bytes(path, page.encode("utf-8", "replace"))


def _main(report: TrainingReport) -> list[tuple[str, list[tuple[int, float]]]]:
    optimised = [(step, value) for step, value, _ in report.points if value is not None]
    held_out = [(step, value) for step, _, value in report.points]
    return [("optimised rewards, as fractions of their range", optimised)] * bool(optimised) + [
        (f"held-out judgement: {report.held_out}", held_out)
    ]


def _curves(lines: Sequence[Mapping[str, Any]], acted: Sequence[int], end: int, skip: Sequence[str]) -> list[Curve]:
    found = []
    for name in sorted({key for line in lines for key in line if key not in skip}):
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        if len({value for _, value in points}) > 1:
            found.append(curve(name.removeprefix("eval/"), points, acted, end))
    return found


def curve(title: str, points: Sequence[tuple[int, float]], acted: Sequence[int], end: int) -> Curve:
    """Points (step, value), not all nan, with steps from 0 to `end`."""
    points = [(step, value) for step, value in points if math.isfinite(value)]
    low, high = (f(value for _, value in points) for f in (min, max))
    margin = 0.05 * (high - low) or 0.05 * abs(low) or 0.5
    low, high = low - margin, high + margin
    values, labels = axis_ticks(low, high)

    def x_of(step: float) -> float:
        return LEFT + step / max(end, 1) * (RIGHT - LEFT)

    def y_of(value: float) -> float:
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    return Curve(
        title,
        [(x_of(step), y_of(value), f"step {step}: {value:.4g}") for step, value in points],
        [Tick(x_of(step), f"{step:g}") for step in (0, end)],
        [Tick(y_of(value), label) for value, label in zip(values, labels, strict=True)],
        [x_of(step) for step in acted],
        f"{points[-1][1]:.4g}",
    )


def _film(folder: Path, report: TrainingReport) -> list[tuple[str, list[tuple[str, str]]]]:
    """A row per prompt: (label, [(step, image)]). Frames of steps that were run again later are left out."""
    steps = {line["step"] for line in report.evaluations}
    frames = [path for path in sorted((folder / FILM).glob("*.png")) if int(path.stem) in steps]
    if not frames:
        return []
    every = math.ceil(len(frames) / MAX_FRAMES)
    chosen = frames if every == 1 else [*frames[:-1:every], frames[-1]]
    rows: list[list[tuple[str, str]]] = []
    for path in chosen:
        with Image.open(path) as whole:
            count = min(len(report.prompts), _rows_of(whole, len(report.prompts)))
            height = whole.height // count
            for i in range(count):
                part = whole.crop((0, i * height, whole.width, (i + 1) * height))
                if i == len(rows):
                    rows.append([])
                rows[i].append((f"step {int(path.stem)}", data_uri(part, 192)))
    return list(zip(report.prompts, rows, strict=False))


def _rows_of(frame: Image.Image, most: int) -> int:
    """How many images stand in a frame: it was written with that number."""
    return int(frame.info.get("rows", most))
