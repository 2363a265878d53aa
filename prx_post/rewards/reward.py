"""What a reward is, and how several make one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.settings import require


class Reward(Protocol):
    """Scores images against their prompts.

    Making one checks what it needs (libraries, weight files) and loads nothing; a model loads at the first call.
    """

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores [B] fp32 on the CPU, higher is better, of `images[i]` for `prompts[i]`; independent of each other."""

    def check(self, prompts: Sequence[str]) -> None:
        """Raise PrxPostError for a prompt that cannot be scored. Called before any image is made."""

    @property
    def identity(self) -> str:
        """What a score depends on besides image and prompt (weights, version, precision); the cache's key."""


def check_counts(images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    if len(images) != len(prompts):
        raise PrxPostError(f"a reward got {len(images)} images, but must get as many as prompts ({len(prompts)}).")


def checked(scores: Tensor, name: str, count: int) -> Tensor:
    """`scores` as fp32 on the CPU. Raises PrxPostError unless they are `count` finite numbers."""
    if scores.shape != (count,):
        shape = tuple(scores.shape)
        raise PrxPostError(f"the reward {name} gave scores of shape {shape} for {count} images. Fix the reward.")
    scores = scores.detach().float().cpu()
    if not torch.isfinite(scores).all():
        first = int((~torch.isfinite(scores)).nonzero()[0])
        raise PrxPostError(
            f"the reward {name} gave {scores[first].item()} for image {first} of {count}, but must give finite "
            f"numbers. Fix the reward."
        )
    return scores


@dataclass(frozen=True)
class Statistics:
    """Of one reward's scores."""

    mean: float
    std: float
    """Population standard deviation."""
    min: float
    max: float


def statistics(scores: Tensor) -> Statistics:
    """Of scores [B]."""
    return Statistics(scores.mean().item(), scores.std(correction=0).item(), scores.min().item(), scores.max().item())


class WeightedSum:
    """Several rewards as one: the sum of weight · score."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Sequence[float]) -> None:
        """Raises ConfigError if weights and rewards differ in number, or a weight is not finite."""
        count = len(rewards)
        reason, action = "each reward has one", "Give as many weights as rewards"
        require(len(weights) == count > 0, "reward_weights", list(weights), f"{count} numbers", reason, action)
        for weight in weights:
            require(math.isfinite(weight), "reward_weights", weight, "finite", "it scales a score", "Correct it")
        self._rewards, self._weights = dict(rewards), dict(zip(rewards, weights, strict=True))

    @property
    def identity(self) -> str:
        return " + ".join(f"{self._weights[name]} * ({part.identity})" for name, part in self._rewards.items())

    def check(self, prompts: Sequence[str]) -> None:
        for reward in self._rewards.values():
            reward.check(prompts)

    def parts(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each reward's own scores [B], by name; for statistics, and for `combine`."""
        return {name: checked(reward(images, prompts), name, len(images)) for name, reward in self._rewards.items()}

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum [B] of what `parts` returned."""
        return torch.stack([self._weights[name] * scores for name, scores in parts.items()]).sum(0)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.combine(self.parts(images, prompts))
