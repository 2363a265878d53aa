"""Rewards of latents that can be climbed: through the reward's network and the decoder."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prx_post.base.errors import PrxPostError
from prx_post.objectives.draft import reward_loss
from prx_post.rewards.registry import REGISTRY, RewardSpec
from prx_post.rewards.reward import DifferentiableReward, has_gradient

Metrics = dict[str, Tensor]
Score = Callable[[Tensor, Sequence[str]], Tensor]
"""(pixels [B, 3, H, W], prompts) -> scores [B], as `DifferentiableReward.of_pixels`"""


class LatentReward:
    """The loss of clean latents whose rewards are to rise.

    Args:
        decode: latents -> pixels [B, 3, H, W] in about -1..1, with a gradient.
        rewards: by label, scores of pixels in 0..1, with a gradient.
        weights: of their scores, by label.
        margin: images that score this or more in all are left alone; None: none are.
        recomputes: whether the decoder's activations are computed again in the backward pass.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        rewards: Mapping[str, Score],
        weights: Mapping[str, float],
        *,
        margin: float | None = None,
        recomputes: bool = False,
    ) -> None:
        self.decode, self.rewards, self.weights = decode, dict(rewards), weights
        self.margin, self.recomputes = margin, recomputes

    def __call__(self, x0: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Metrics]:
        """Of latents [B, C, H, W]; fp32 scalar, and metrics of `reward_loss` and of every reward."""
        with torch.autocast(x0.device.type, enabled=False):
            pixels = self._pixels(x0.float())
            scores = {name: score(pixels, prompts) for name, score in self.rewards.items()}
        total = torch.stack([self.weights[name] * score for name, score in scores.items()]).sum(0)
        loss, metrics = reward_loss(total, self.margin)
        return loss, metrics | {f"reward/{name}": score.detach().mean() for name, score in scores.items()}

    def _pixels(self, x0: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1."""
        pixels = checkpoint(self.decode, x0, use_reentrant=False) if self.recomputes else self.decode(x0)
        return (pixels.float() * 0.5 + 0.5).clamp(0, 1)


def brightness(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """Stands for a reward in plans, which have no weights to load."""
    return pixels.flatten(1).mean(1)


def differentiable(spec: RewardSpec, name: str, instead: str) -> DifferentiableReward:
    """A reward that can be climbed.

    Args:
        name: of the setting that `spec` stands in; instead: what to do with a reward that cannot.

    Raises:
        PrxPostError: it has no gradient, or is not installed.
    """
    reward: Any = spec.load()
    if not has_gradient(reward):
        having = [other for other, entry in REGISTRY.items() if entry.has_weights or other == "judge_graded"]
        raise PrxPostError(
            f"{name} has {spec.label!r}, which has no gradient to climb. Take one of {', '.join(having)}, or {instead}."
        )
    return reward
