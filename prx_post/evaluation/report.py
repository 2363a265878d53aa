"""The evaluation's HTML page: one file, no network, everything user-made escaped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prx_post.base.files import write_bytes
from prx_post.base.pages import data_uri, page_template
from prx_post.evaluation import charts
from prx_post.evaluation.features import MEANINGS, NEEDS_REFERENCE
from prx_post.evaluation.gallery import Gallery
from prx_post.evaluation.jobs import Job
from prx_post.evaluation.scoring import Scores
from prx_post.evaluation.summary import KINDS, Slice
from prx_post.rewards.registry import RewardSpec, meaning

GRID_ROWS = 24
EXTREME_ROWS = 8
MAX_STRIP_SIDE = 128
BINS = 24


def write_report(
    path: Path,
    summary: dict[str, Any],
    parts: Sequence[Slice],
    jobs: Sequence[Job],
    galleries: Sequence[Gallery],
    scores: Scores,
) -> None:
    """Render the page.

    Args:
        summary: what results.json holds.
        parts: all images first, then each slice.
        jobs: what every checkpoint generated; `scores` are in their order.
    """
    names = [gallery.spec.name for gallery in galleries]
    rewards = list(scores[names[0]])
    specs = [(text, RewardSpec.parse(text)) for text in summary["settings"]["rewards"]]
    tables = [(title, [part for part in parts if part.kind == kind]) for kind, title in KINDS.items()]
    series, quality = charts.quality_charts(summary)
    page = page_template("evaluation/report.html.j2").render(
        summary=summary,
        names=names,
        rewards=rewards,
        metrics=list(summary["checkpoints"][names[0]]["metrics"]),
        meanings={**{spec.label: meaning(text) for text, spec in specs}, **MEANINGS},
        lower_is_better=NEEDS_REFERENCE,
        overall=parts[0],
        tables=[(title, part) for title, part in tables if part],
        quality=quality,
        labels=[one.label for one in series],
        box=charts,
        histograms=[histogram(reward, scores) for reward in rewards],
        sections=[section for section in _sections(jobs, galleries, scores) if section["rows"]],
        strips=_strips(jobs[: summary["settings"]["trajectory_prompts"]], galleries),
    )
    write_bytes(path, page.encode("utf-8", "replace"))


def histogram(reward: str, scores: Scores) -> dict[str, Any]:
    """Fractions of images by score, over bins that all checkpoints use; `curves` holds BINS fractions each."""
    finite = {name: by_reward[reward][np.isfinite(by_reward[reward])] for name, by_reward in scores.items()}
    together = np.concatenate(list(finite.values()))
    low, high = float(together.min()), float(together.max())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    curves = {name: np.histogram(values, edges)[0] / len(values) for name, values in finite.items()}
    peak = max(float(curve.max()) for curve in curves.values())
    ends = {"low": f"{round(low, 3) + 0.0:.4g}", "high": f"{round(high, 3) + 0.0:.4g}"}
    return {"reward": reward, "peak": peak, "curves": curves, "outline": _outline(curves, peak), **ends}


def _outline(curves: dict[str, np.ndarray], peak: float) -> dict[str, str]:
    """Each curve as the points of a stepped polyline in a box of 240 × 80, the origin at its top left."""
    points = {}
    for name, curve in curves.items():
        corners = [(0.0, 80.0)]
        for i, fraction in enumerate(curve):
            height = 80 * (1 - float(fraction) / peak)
            corners += [(240 * i / BINS, height), (240 * (i + 1) / BINS, height)]
        points[name] = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*corners, (240.0, 80.0)])
    return points


def _sections(jobs: Sequence[Job], galleries: Sequence[Gallery], scores: Scores) -> list[dict[str, Any]]:
    """Groups of prompts side by side: an even choice; then, by the first reward, the extremes."""
    names = [gallery.spec.name for gallery in galleries]
    ranking = next(iter(scores[names[0]]), None)

    def section(title: str, note: str, chosen: Sequence[int]) -> dict[str, Any]:
        rows = [_row(jobs[i], i, galleries, scores, ranking) for i in chosen]
        return {"title": title, "note": note, "rows": rows, "ranking": ranking}

    spread = np.unique(np.linspace(0, len(jobs) - 1, min(GRID_ROWS, len(jobs))).round().astype(int)).tolist()
    sections = [section("Side by side", "Evenly spread over the prompts.", spread)]
    if ranking is None:
        return sections
    last = scores[names[-1]][ranking]
    if len(names) > 1:
        change = last - scores[names[0]][ranking]
        for title, chosen in (("gains", _extremes(change, 1)), ("loses", _extremes(change, -1))):
            note = f"By {ranking}, against {names[0]}."
            sections.append(section(f"Where {names[-1]} {title} most", note, chosen))
    for title, sign in (("Best", 1), ("Worst", -1)):
        chosen = _extremes(last - np.nanmean(last), sign)
        sections.append(section(f"{title} of {names[-1]}", f"By {ranking}.", chosen))
    return sections


def _extremes(values: np.ndarray, sign: int) -> list[int]:
    """Positions of the EXTREME_ROWS largest values above 0 (`sign` 1), or of the smallest below it (-1)."""
    signed = np.where(np.isfinite(values), sign * values, -np.inf)
    return [int(i) for i in np.argsort(-signed, kind="stable")[:EXTREME_ROWS] if signed[i] > 0]


def _row(job: Job, index: int, galleries: Sequence[Gallery], scores: Scores, ranking: str | None) -> dict[str, Any]:
    cells = []
    for gallery in galleries:
        name = gallery.spec.name
        value = float(scores[name][ranking][index]) if ranking else float("nan")
        known = {reward: float(of[index]) for reward, of in scores[name].items() if np.isfinite(of[index])}
        cells.append(
            {
                "uri": data_uri(gallery.image(job)),
                "file": gallery.path(job).relative_to(gallery.output_dir).as_posix(),
                "score": value if np.isfinite(value) else None,
                "scores": ", ".join(f"{reward} {value:.3f}" for reward, value in known.items()),
                "name": name,
            }
        )
    labels = [job.slices["group"], job.slices["language"], f"{job.prompt_set} {job.index}", f"seed {job.seed}"]
    return {"prompt": job.prompt, "seed": job.seed, "labels": [label for label in labels if label], "cells": cells}


def _strips(jobs: Sequence[Job], galleries: Sequence[Gallery]) -> list[dict[str, Any]]:
    """Trajectories, by prompt and checkpoint: an image for every sampler step."""
    strips = []
    for job in jobs:
        for gallery in galleries:
            uris = []
            for path in gallery.trajectory(job):
                with Image.open(path) as image:
                    uris.append(data_uri(image, MAX_STRIP_SIDE))
            strips.append({"name": gallery.spec.name, "prompt": job.prompt, "seed": job.seed, "uris": uris})
    return strips
