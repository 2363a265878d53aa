"""From scores to what results.json holds: means, differences and win rates, of all images and of each slice."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from prx_post.evaluation.jobs import Job
from prx_post.evaluation.metrics import Estimate, mean_estimate, paired_difference, win_rate
from prx_post.evaluation.scoring import Scores

ByCheckpoint = dict[str, dict[str, Estimate]]
"""checkpoint -> reward -> estimate"""

KINDS = {"set": "prompt set", "group": "group", "language": "language", "length": "prompt length"}


@dataclass
class Slice:
    """Results of part of the images."""

    kind: str
    """`all`, or one of KINDS."""
    value: str
    num_prompts: int
    num_images: int
    means: ByCheckpoint = field(default_factory=dict)
    differences: ByCheckpoint = field(default_factory=dict)
    """Of each later checkpoint to the first, on the same prompts and noise."""
    wins: ByCheckpoint = field(default_factory=dict)
    """Fraction of images in which a later checkpoint scores higher than the first; a tie counts half."""


def slices(scores: Scores, jobs: Sequence[Job]) -> list[Slice]:
    """All images first, then the parts of each kind of slice of which there are two or more.

    A group stands under its prompt set's name too, where there are several sets.
    """
    found = [_slice("all", "all", np.ones(len(jobs), bool), scores, jobs)]
    several_sets = len({job.prompt_set for job in jobs}) > 1
    for kind in KINDS:
        values = [_label(job, kind, several_sets) for job in jobs]
        distinct = [value for value in dict.fromkeys(values) if value]
        if len(distinct) > 1:
            labels = np.array(values)
            found += [_slice(kind, value, labels == value, scores, jobs) for value in distinct]
    return found


def _label(job: Job, kind: str, several_sets: bool) -> str:
    value = job.slices.get(kind, "")
    return f"{job.prompt_set}: {value}" if value and several_sets and kind == "group" else value


def _slice(kind: str, value: str, chosen: np.ndarray, scores: Scores, jobs: Sequence[Job]) -> Slice:
    of = [job for job, is_in in zip(jobs, chosen, strict=True) if is_in]
    part = Slice(kind, value, len({(job.prompt_set, job.index) for job in of}), len(of))
    baseline = next(iter(scores))
    for name, rewards in scores.items():
        part.means[name] = {}
        for reward, values in rewards.items():
            scored = chosen & np.isfinite(values)
            if not scored.any():
                continue
            clusters = [jobs[i].cluster for i in np.flatnonzero(scored).tolist()]
            part.means[name][reward] = mean_estimate(values[scored], clusters)
            if name != baseline:
                first = scores[baseline][reward][scored]
                difference, wins = part.differences.setdefault(name, {}), part.wins.setdefault(name, {})
                difference[reward] = paired_difference(first, values[scored], clusters)
                wins[reward] = win_rate(first, values[scored], clusters)
    return part
