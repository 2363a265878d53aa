"""Where the points, lines and ticks of the report's line charts stand. Pure arithmetic on results."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prx_post.evaluation.features import NEEDS_REFERENCE
from prx_post.evaluation.metrics import Estimate

WIDTH, HEIGHT = 300, 190
TOP, BOTTOM, RIGHT = 8, 150, 292
"""Edges of the plot in that box; its left edge depends on the labels of the y axis."""
INSET = 14
"""Room between the plot's sides and the first and last points."""
CHARACTER = 6.3
"""Width of a digit at the labels' size, in the same units."""
DODGE = 5
"""Between points of equal NFE, which would otherwise hide one another's intervals."""


@dataclass(frozen=True)
class Series:
    """Checkpoints that differ in their number of steps alone."""

    label: str
    names: list[str]
    """Checkpoints by NFE."""


@dataclass(frozen=True)
class Point:
    title: str
    x: float
    y: float
    low: float | None
    """y of the interval's ends; None where there is no interval."""
    high: float | None


@dataclass(frozen=True)
class Line:
    """Of one series in one chart."""

    series: int
    """Its position among all series."""
    points: list[Point]

    @property
    def polyline(self) -> str:
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass(frozen=True)
class Tick:
    at: float
    label: str
    """Empty where there is no room for it."""


@dataclass(frozen=True)
class Chart:
    title: str
    lower_is_better: bool
    left: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]


def series_of(checkpoints: Mapping[str, Mapping[str, Any]]) -> list[Series]:
    """Checkpoints of one source, guidance_scale and way of sampling, named by what their names begin with in common.

    Labels that coincide get the guidance_scale behind them, or give way to a checkpoint's whole name.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, result in checkpoints.items():
        sampling = ("shift_terminal", "sampler", "noise_level")
        key = (result["source"], result["guidance_scale"], *(result.get(name) for name in sampling))
        groups.setdefault(key, []).append(name)
    labels = [_common_start(names) for names in groups.values()]
    guided = [f"{label}, guidance {key[1]:g}" for label, key in zip(labels, groups, strict=True)]
    found = []
    for label, with_guidance, names in zip(labels, guided, groups.values(), strict=True):
        if Counter(labels)[label] > 1:
            label = with_guidance if Counter(guided)[with_guidance] == 1 else names[0]
        found.append(Series(label, sorted(names, key=lambda name: checkpoints[name]["num_network_evaluations"])))
    return found


def _common_start(names: Sequence[str]) -> str:
    """The parts between separators that all names begin with; the first name where there are none."""
    split = [re.split("[@_.-]", name) for name in names]
    number = 0
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        number += 1
    return names[0][: len("-".join(split[0][:number]))] or names[0]


def quality_charts(summary: Mapping[str, Any]) -> tuple[list[Series], list[Chart]]:
    """Every reward and metric against network evaluations; nothing unless checkpoints differ in these.

    Args:
        summary: what results.json holds, with Estimates.
    """
    checkpoints = summary["checkpoints"]
    evaluations = sorted({result["num_network_evaluations"] for result in checkpoints.values()})
    if len(evaluations) < 2:
        return [], []
    series = series_of(checkpoints)
    charts = []
    for kind in ("rewards", "metrics"):
        for title in dict.fromkeys(key for result in checkpoints.values() for key in result[kind]):
            values = {name: result[kind].get(title) for name, result in checkpoints.items()}
            known = {name: e for name, e in values.items() if e is not None and math.isfinite(e.value)}
            if known:
                lower_is_better = kind == "metrics" and title in NEEDS_REFERENCE
                charts.append(_chart(title, lower_is_better, known, checkpoints, evaluations, series))
    return series, charts


def _chart(
    title: str,
    lower_is_better: bool,
    known: Mapping[str, Estimate],
    checkpoints: Mapping[str, Mapping[str, Any]],
    evaluations: Sequence[int],
    series: Sequence[Series],
) -> Chart:
    ends = [end for e in known.values() for end in (e.value, e.low, e.high) if end is not None]
    low, high = _padded(min(ends), max(ends))
    y_values, y_labels = axis_ticks(low, high)
    left = max(34.0, 12 + CHARACTER * max(map(len, y_labels)))

    def x_of(number: int) -> float:
        fraction = math.log2(number / evaluations[0]) / math.log2(evaluations[-1] / evaluations[0])
        return left + INSET + fraction * (RIGHT - left - 2 * INSET)

    def y_of(value: float) -> float:
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    order = [name for one in series for name in one.names if name in known]
    number_of = {name: checkpoints[name]["num_network_evaluations"] for name in order}
    beside = {name: [other for other in order if number_of[other] == number_of[name]] for name in order}

    def point(name: str) -> Point:
        e = known[name]
        place = beside[name].index(name) - (len(beside[name]) - 1) / 2
        gap = min(DODGE, 2 * INSET / len(beside[name]))
        return Point(
            f"{name}, NFE {number_of[name]}: {e.text()}",
            x_of(number_of[name]) + gap * place,
            y_of(e.value),
            None if e.low is None else y_of(e.low),
            None if e.high is None else y_of(e.high),
        )

    lines = [Line(i, [point(name) for name in one.names if name in known]) for i, one in enumerate(series)]
    return Chart(
        title,
        lower_is_better,
        left,
        _spaced([(x_of(number), str(number)) for number in evaluations]),
        [Tick(y_of(value), label) for value, label in zip(y_values, y_labels, strict=True)],
        [line for line in lines if line.points],
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(low) or 0.5
    return low - margin, high + margin


def axis_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Two to six round values from `low` to `high`, 1, 2 or 5 times a power of ten apart, and their labels."""
    power = math.floor(math.log10((high - low) / 5))
    step = next(times * 10.0**power for times in (1, 2, 5, 10) if (high - low) / (times * 10.0**power) <= 5)
    exponent = math.floor(math.log10(step) + 1e-9)
    values = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    top = max(map(abs, values))
    if step >= 1e-4 and top < 1e6:
        return values, [f"{value:.{max(0, -exponent)}f}" for value in values]
    digits = max(0, math.floor(math.log10(top)) - exponent)
    return values, [f"{value:.{digits}e}" if value else "0" for value in values]


def _spaced(ticks: Sequence[tuple[float, str]]) -> list[Tick]:
    """The last label and, from the first on, each that has room beside those already there."""

    def half(label: str) -> float:
        return CHARACTER * (len(label) + 1) / 2

    last, last_label = ticks[-1]
    taken, found = -math.inf, []
    for x, label in ticks[:-1]:
        fits = x - half(label) >= taken and x + half(label) <= last - half(last_label)
        taken = x + half(label) if fits else taken
        found.append(Tick(x, label if fits else ""))
    return [*found, Tick(last, last_label)]
