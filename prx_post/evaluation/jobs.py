"""What is generated: prompts × seeds, and how results are grouped."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prx_post.base.errors import PrxPostError
from prx_post.base.files import existing_file
from prx_post.data.prompts import read_prompt_file
from prx_post.evaluation.config import EvalConfig

SEED_STRIDE = 100_000
"""Noise seed of prompt i under seed s is s·SEED_STRIDE + i: no two images of an evaluation share their noise."""


@dataclass(frozen=True)
class Job:
    """One image, to be made by every checkpoint."""

    prompt_set: str
    index: int
    """Of the prompt in its file."""
    prompt: str
    seed: int
    noise_seed: int
    cluster: str
    """What images that are not independent share: `target` or `scene` of the prompt's row, or the prompt."""
    slices: dict[str, str]
    """How results are reported apart: kind of slice -> this image's part of it."""
    columns: dict[str, Any]
    """The prompt's row; rewards of TRL's form are given it."""

    @property
    def file(self) -> Path:
        """The image's, inside a checkpoint's folder."""
        return Path(self.prompt_set) / f"{self.index:05d}-seed{self.seed}.png"


def read_jobs(config: EvalConfig) -> list[Job]:
    """Prompts × seeds. Raises PrxPostError if a file is missing, empty, or a line is no prompt."""
    jobs: list[Job] = []
    offset = 0
    for name, file in config.prompt_sets():
        rows = [{"prompt": prompt} for prompt in config.prompts]
        if file:
            rows = read_prompt_file(existing_file("prompts_file", file))
        if not rows:
            raise PrxPostError(f"prompts_file is {file!r}, which has no prompts. Choose another file.")
        for i, row in enumerate(rows):
            if not row["prompt"].strip():
                raise PrxPostError(f"{file or 'prompts'}, prompt {i + 1} is empty. Remove it.")
        chosen = spread_over_groups(rows, config.num_prompts or len(rows))
        jobs += [_job(name, i, rows[i], seed, offset, config) for seed in dict.fromkeys(config.seeds) for i in chosen]
        offset += len(rows)
    if offset > SEED_STRIDE:
        raise PrxPostError(f"prompts_file has {offset} prompts in all, but may have {SEED_STRIDE}. Split it.")
    return jobs


def _job(prompt_set: str, index: int, row: dict[str, Any], seed: int, offset: int, config: EvalConfig) -> Job:
    prompt = row["prompt"]
    is_long = len(prompt.split()) >= config.long_prompt_words
    slices = {"set": prompt_set, "group": str(row.get("group", "")), "language": str(row.get("language", ""))}
    slices["length"] = "long" if is_long else "short"
    cluster = str(row.get("target", row.get("scene", prompt)))
    return Job(prompt_set, index, prompt, seed, seed * SEED_STRIDE + offset + index, cluster, slices, row)


def spread_over_groups(rows: list[dict[str, Any]], count: int) -> list[int]:
    """Positions of `count` rows: equally many of each `group` (as far as it divides), evenly spread over each.

    Groups begin at different places, so that lists which ask for the same things in turn (numbers in several
    languages) give different ones: more things asked for are more independent evidence.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(str(row.get("group", "all")), []).append(i)
    chosen: list[int] = []
    left = min(count, len(rows))
    for position, members in enumerate(sorted(groups.values(), key=len)):
        taken = min(len(members), left // (len(groups) - position))
        places = (np.arange(taken) + position / len(groups)) * len(members) / max(taken, 1)
        chosen += [members[int(place)] for place in places]
        left -= taken
    return sorted(chosen)
