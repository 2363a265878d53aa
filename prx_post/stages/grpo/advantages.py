"""What a rollout's scores teach: each image's advantage, its weight, and whether it is held to the reference."""

from collections.abc import Mapping

import torch
from torch import Tensor

from prx_post.objectives.grpo import (
    diverse_advantages,
    group_advantages,
    most_suspicious,
    suspicion,
    varies,
)
from prx_post.stages.grpo.config import GRPOConfig
from prx_post.stages.grpo.guard import Guard


def compute_advantages(
    config: GRPOConfig,
    guard: Guard,
    combined_PG: Tensor,
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    features_PGD: Tensor | None,
) -> dict[str, Tensor]:
    """Of every image of a rollout, [P, G] each.

    Args:
        combined_PG: the rewards as one.
        scores: every reward's, [P, G]; those in `weights` are optimised.
        features_PGD: for the weight of diversity.

    Returns:
        `advantages`; `weight`, 0 in groups whose images score alike, and a mean of 1 over the images of an optimizer
        step; while the guard regularizes `kl_weight`, 1 for suspicious images and 0 for others.
    """
    scale = "none" if guard.regularizes else config.scale_rewards
    advantages_PG = group_advantages(combined_PG, scale=scale, clip=config.advantage_clip)
    targets = {"weight": _weight(varies(combined_PG), config.steps_per_generation, combined_PG.shape[1])}
    if guard.regularizes:
        if features_PGD is not None:
            advantages_PG = diverse_advantages(advantages_PG, features_PGD)
        others = [value.flatten() for name, value in scores.items() if name not in weights]
        doubt = suspicion(_over_all(scores, weights).flatten(), others)
        targets["kl_weight"] = most_suspicious(doubt, config.guard_fraction).float().view_as(advantages_PG)
    return {"advantages": advantages_PG, **targets}


def _weight(varies_P: Tensor, steps: int, size: int) -> Tensor:
    """[P, G]."""
    kept = varies_P.float().view(steps, -1)
    weight = kept / kept.mean(1, keepdim=True).clamp_min(1e-8)
    return weight.view(-1, 1).expand(-1, size)


def _over_all(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The optimised rewards as one that can be compared between prompts: each in standard deviations of all images."""
    parts = [weight * scores[name] / scores[name].std().clamp_min(1e-8) for name, weight in weights.items()]
    return torch.stack(parts).sum(0)
