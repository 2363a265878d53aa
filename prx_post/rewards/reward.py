"""What a reward is, and how several make one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


class DifferentiableReward(Reward, Protocol):
    """A reward that can be climbed: its score has a gradient with respect to the pixels."""

    gradient: bool
    """True; a reward without the attribute has none."""

    def of_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] fp32 of pixels [B, 3, H, W] in 0..1, on their device and with a graph to them.

        They are those of the images but for what has no gradient: rounding to 256 values, and the filter that images
        are resized with, where a library does it.
        """


def has_gradient(reward: Reward) -> bool:
    return bool(getattr(reward, "gradient", False))


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


def check_rows(reward: Reward, name: str, rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise PrxPostError for a prompt that cannot be scored, or a row that lacks a column which the reward reads.

    Args:
        rows: a `prompt` each, and other columns; `where`: the setting that they come from.
    """
    reward.check([row["prompt"] for row in rows])
    needed: frozenset[str] = getattr(reward, "required_columns", frozenset())
    for row in rows:
        if absent := sorted(needed - row.keys()):
            raise PrxPostError(
                f"the reward {name} reads {', '.join(absent)}, which {where} lacks for the prompt {row['prompt']!r}. "
                f"Add it to the file's rows, or choose another reward."
            )


def score_rows(reward: Reward, name: str, images: Sequence[Image.Image], rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Scores [B] of `images[i]` for `rows[i]`, whose other columns a reward of TRL's form is given. As `checked`."""
    prompts = [row["prompt"] for row in rows]
    if not getattr(reward, "takes_columns", False):
        return checked(reward(images, prompts), name, len(images))
    names = set().union(*rows) - {"prompt"}
    columns = {column: [row.get(column) for row in rows] for column in names}
    return checked(reward(images, prompts, columns), name, len(images))  # type: ignore[call-arg]


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
