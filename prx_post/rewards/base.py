"""What a reward is, and how one is found by name."""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from prx_post.config import PrxPostError, require_one_of


class Reward(Protocol):
    """Scores pictures against their prompts."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """Scores [B] fp32, higher is better, of `images[i]` for `prompts[i]`; each independent of the others."""

    def check(self, prompts: Sequence[str]) -> None:
        """Raise PrxPostError for a prompt that cannot be scored. Called before any picture is made."""


REGISTRY = {
    "ocr_exact": ("prx_post.rewards.ocr", "exact_match"),
    "ocr_graded": ("prx_post.rewards.ocr", "graded"),
    "judge_exact": ("prx_post.rewards.number_judge", "exact_match"),
    "judge_graded": ("prx_post.rewards.number_judge", "graded"),
}
"""name -> (module, factory); modules load when a reward is asked for."""


def load(name: str, **kwargs: Any) -> Reward:
    """A reward by name. Raises PrxPostError if there is none of that name or its library is not installed."""
    require_one_of("rewards", name, tuple(REGISTRY))
    module, factory = REGISTRY[name]
    return getattr(importlib.import_module(module), factory)(**kwargs)


def check_counts(images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    if len(images) != len(prompts):
        raise PrxPostError(f"a reward got {len(images)} pictures, but must get as many as prompts ({len(prompts)}).")
