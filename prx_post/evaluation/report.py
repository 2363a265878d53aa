"""The evaluation's HTML page: one file, no network, everything user-made escaped."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

GRID_ROWS = 24
EXTREME_ROWS = 8
MAX_SIDE = 512
"""Pictures are scaled down to this for the page, pixels."""


def data_uri(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(
    path: Path,
    summary: dict[str, Any],
    jobs: Sequence[Any],
    pictures: dict[str, list[Image.Image]],
    scores: dict[str, dict[str, np.ndarray]],
) -> None:
    """Render the page.

    Args:
        summary: what results.json holds.
        jobs: what every checkpoint drew, with `prompt`, `group` and `noise_seed`.
        pictures, scores: by checkpoint; in the order of `jobs`.
    """
    names = list(pictures)
    ranking = next(iter(scores[names[0]]))

    def row(index: int) -> dict[str, Any]:
        cells = [
            {"uri": data_uri(pictures[name][index]), "score": scores[name][ranking][index], "name": name}
            for name in names
        ]
        job = jobs[index]
        return {"prompt": job.prompt, "group": job.group, "seed": job.noise_seed, "cells": cells}

    spread = np.unique(np.linspace(0, len(jobs) - 1, min(GRID_ROWS, len(jobs))).round().astype(int))
    sections = [{"title": "Side by side", "note": "Evenly spread over the prompts.", "rows": [row(i) for i in spread]}]
    if len(names) > 1:
        change = scores[names[-1]][ranking] - scores[names[0]][ranking]
        order = change.argsort(kind="stable")
        better = [int(i) for i in order[::-1][:EXTREME_ROWS] if change[i] > 0]
        worse = [int(i) for i in order[:EXTREME_ROWS] if change[i] < 0]
        for title, chosen in ((f"Where {names[-1]} gains most", better), (f"Where {names[-1]} loses most", worse)):
            note = f"By {ranking}, against {names[0]}. {len(chosen)} shown."
            sections.append({"title": title, "note": note, "rows": [row(i) for i in chosen]})
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(summary=summary, names=names, rewards=list(scores[names[0]]), sections=sections, ranking=ranking)
    )
    path.write_text(page)


def _environment() -> Environment:
    loader = PackageLoader("prx_post", "evaluation")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["interval"] = lambda e, sign="": f"{e.value:{sign}.3f} [{e.low:{sign}.3f}, {e.high:{sign}.3f}]"
    return environment
