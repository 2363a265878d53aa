"""Flow matching (Lipman et al. 2022, eq. 9) and two optional variations on it."""

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


def flow_matching_loss(velocity: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """Mean squared velocity error.

    Args:
        velocity, target: [B, C, H, W]; any float type, the error is taken in fp32.
        weight: [B], multiplies each sample's error; None is 1.

    Returns:
        loss (fp32 scalar), metrics with `velocity_mse`, the unweighted error.
    """
    error = (velocity.float() - target.float()).square().flatten(1).mean(1)
    loss = error.mean() if weight is None else (weight * error).mean()
    return loss, {"velocity_mse": error.mean().detach()}


def min_snr_weight(t: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) on the x0 error (Hang et al. 2023, eq. 8), as a weight on the velocity error. [B].

    The x0 error is t² times the velocity error and SNR is ((1 - t) / t)², so the weight is min((1 - t)², gamma·t²).
    """
    return torch.minimum((1 - t).square(), gamma * t.square())


def contrastive_term(velocity: Tensor, target: Tensor) -> Tensor:
    """Squared error to *another* sample's target (contrastive flow matching, Stoica et al. 2025, eq. 8); subtract it.

    The other sample is the batch's previous one. Raises ValueError for a batch of one, which has no other sample.
    """
    if velocity.shape[0] < 2:
        raise ValueError("the contrastive term needs at least two samples in a batch")
    return (velocity.float() - target.float().roll(1, 0)).square().mean()
