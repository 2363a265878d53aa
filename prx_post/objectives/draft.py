"""Direct reward gradients: DRaFT (Clark et al. 2024), ReFL (Xu et al. 2023). Scores [B]; velocities [B, C, H, W]."""

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


def reward_loss(scores: Tensor, margin: float | None = None) -> tuple[Tensor, Metrics]:
    """-mean score (DRaFT, eq. 1); with a margin mean max(0, margin - score) (ReFL, eq. 4), which images that score
    enough leave alone. fp32 scalar, and `reward`, the mean score; `satisfied`, the fraction beyond the margin.
    """
    scores = scores.float()
    metrics = {"reward": scores.detach().mean()}
    if margin is None:
        return -scores.mean(), metrics
    return torch.relu(margin - scores).mean(), {**metrics, "satisfied": (scores.detach() >= margin).float().mean()}


def drift(velocity: Tensor, reference: Tensor) -> Tensor:
    """Mean squared distance [B] of the policy's velocity from the reference's; no gradient flows to the latter."""
    return (velocity.float() - reference.detach().float()).square().flatten(1).mean(1)
