"""The flow process of PRX: t = 1 is noise, t = 0 is data, and the model predicts velocity = noise - x0.

Shapes: x0, noise, x_t, velocity [B, C, H, W]; t [B] in [0, 1].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _expand(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.dim() - 1))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise, the straight path of rectified flow (Liu et al. 2022, eq. 1)."""
    t = _expand(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """dx_t/dt = noise - x0, what a flow-matching model regresses onto (Lipman et al. 2022)."""
    return noise - x0


def x0_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The clean sample that a velocity at x_t points to: x0 = x_t - t velocity."""
    return x_t - _expand(t, x_t) * velocity


def velocity_from_x0(x_t: Tensor, x0: Tensor, t: Tensor, t_min: float = 0.05) -> Tensor:
    """velocity = (x_t - x0) / max(t, t_min), how the pixel-space PRX turns its prediction into a velocity."""
    return (x_t - x0) / _expand(t, x_t).clamp_min(t_min)


def sample_timesteps(
    batch_size: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    uniform_fraction: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Training timesteps: logit-normal (Esser et al. 2024, eq. 19), a fraction of them uniform, then shifted.

    Args:
        mean, std: of the normal variable whose sigmoid is t.
        shift: t -> shift·t / (1 + (shift - 1)·t); above 1 favours noise.
        uniform_fraction: probability that a sample's t is uniform instead.

    Returns:
        t [B] fp32 on the CPU, in (0, 1).
    """
    t = torch.sigmoid(mean + std * torch.randn(batch_size, generator=generator))
    uniform = torch.rand(batch_size, generator=generator)
    is_uniform = torch.rand(batch_size, generator=generator) < uniform_fraction
    t = torch.where(is_uniform, uniform, t)
    return shift * t / (1 + (shift - 1) * t)


def inference_sigmas(scheduler: Any, num_steps: int) -> Tensor:
    """The noise levels that `scheduler` visits in `num_steps` steps, [N + 1] fp32, from noise to 0.

    A single step goes from 1 to 0, also where the scheduler's own stretching (`shift_terminal`) divides by zero.

    Raises:
        ValueError: the levels are not finite and falling, so that no sampler can follow them.
    """
    if num_steps == 1:
        return torch.tensor([1.0, 0.0])
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.to(torch.float32).cpu()
    if not (torch.isfinite(sigmas).all() and (sigmas.diff() < 0).all()):
        raise ValueError(f"the noise levels of {num_steps} steps do not fall: {[round(s, 4) for s in sigmas.tolist()]}")
    return sigmas


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """One sample of standard normal noise a seed, [len(seeds), *shape] fp32 on the CPU.

    A sample's noise depends on its seed alone, not on its neighbours, the device or the number of processes.
    torch seeds its CPU generator with the lowest 32 bits: seeds must differ in these.
    """
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
