"""Distillation losses other than the adversarial one: regression on the teacher's path, distribution matching.

Shapes: x_t, x_next, x0 and velocities [B, C, H, W]; t [B].
"""

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


def path_velocity(x_t: Tensor, x_next: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """The constant velocity that takes x_t to x_next in one Euler step from t to t_next < t, fp32.

    Progressive distillation's target (Salimans & Ho 2022, algorithm 2, in the flow's variables): where the teacher got
    to in several steps, with guidance (Meng et al. 2023), the student shall get in one, without.
    """
    shape = (-1, *[1] * (x_t.dim() - 1))
    return (x_t.float() - x_next.float()) / (t - t_next).view(shape)


def trajectory_loss(velocity: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """Mean squared error of the student's velocity to `path_velocity`; loss and `trajectory_mse`.

    Args:
        weight: [B], of each sample in the loss; None: 1.
    """
    error = (velocity.float() - target.float()).square()
    return weighted_mean(error, weight), {"trajectory_mse": error.detach().mean()}


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over everything of values [B, ...], each sample's times its weight, [B]."""
    return values.mean() if weight is None else (values.flatten(1).mean(1) * weight).mean()


def distribution_matching_loss(
    x0: Tensor, real_x0: Tensor, fake_x0: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """Distribution matching distillation (Yin et al. 2024, eq. 7 and 8, in x0 form).

    x0 is pulled along fake_x0 - real_x0, the difference of what two denoisers see in the re-noised x0, divided per
    sample by the mean distance |x0 - real_x0|. Written as a regression onto a detached target, whose gradient that is.

    Args:
        x0: the student's samples, with a graph.
        real_x0, fake_x0: the teacher's (guided) and the fake-score network's denoised samples; no gradient flows there.
        weight: [B], of each sample in the loss; None: 1.

    Returns:
        loss (fp32 scalar), metrics with `dmd_gradient`, the mean size of the pull.
    """
    with torch.no_grad():
        x0_now, real, fake = x0.float(), real_x0.float(), fake_x0.float()
        distance = (x0_now - real).abs().flatten(1).mean(1).clamp_min(1e-6)
        pull = (fake - real) / distance.view(-1, *[1] * (x0.dim() - 1))
        target = x0_now - pull
    return 0.5 * weighted_mean((x0.float() - target).square(), weight), {"dmd_gradient": pull.abs().mean()}
