"""Samplers: plain functions over a velocity function and a list of noise levels."""

from collections.abc import Callable

import torch
from torch import Tensor

VelocityFunction = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], t [B]) -> velocity [B, C, H, W]"""


def guided_velocity(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): uncond + guidance_scale · (cond - uncond); 1 is no guidance."""
    return uncond + guidance_scale * (cond - uncond)


def euler_step(x_t: Tensor, velocity: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """One Euler step of dx/dsigma = velocity, from `sigma` to `sigma_next`, computed in fp32."""
    return (x_t.float() + (sigma_next - sigma) * velocity.float()).to(x_t.dtype)


@torch.no_grad()
def euler_sample(velocity: VelocityFunction, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Integrate the flow ODE from `noise` at sigmas[0] to data at sigmas[-1]; as FlowMatchEulerDiscreteScheduler."""
    x = noise
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        t = torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
        x = euler_step(x, velocity(x, t), sigma, sigma_next)
    return x


@torch.no_grad()
def renoise_sample(velocity: VelocityFunction, noise: Tensor, sigmas: Tensor, fresh: Callable[[int], Tensor]) -> Tensor:
    """Multi-step re-noising (consistency models, Song et al. 2023, alg. 1; the sampler of LADD).

    Each step goes all the way to x0 and back up to the next level with noise of its own; as
    FlowMatchEulerDiscreteScheduler with `stochastic_sampling`.

    Args:
        fresh: step number, counted from 1 -> noise like `noise`.
    """
    x = noise
    for step, (sigma, sigma_next) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True), start=1):
        t = torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
        x0 = euler_step(x, velocity(x, t), sigma, 0.0)
        x = x0 if sigma_next == 0 else (1 - sigma_next) * x0 + sigma_next * fresh(step)
    return x
