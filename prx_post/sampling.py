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
