"""Samplers: plain functions over a velocity function and a list of noise levels.

The stochastic steps draw the next state from a Gaussian around what the velocity says, so a policy gradient can ask
how likely a state was. They compute in fp32; `sigma` and `sigma_next` are numbers, or tensors [B] if samples differ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

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


@torch.no_grad()
def cps_sample(
    velocity: VelocityFunction, noise: Tensor, sigmas: Tensor, fresh: Callable[[int], Tensor], noise_level: float
) -> Tensor:
    """Steps of `cps_step`: between `euler_sample`, at noise_level 0, and `renoise_sample`, at 1.

    Args:
        fresh: step number, counted from 1 -> noise like `noise`.
    """
    x = noise
    for step, (sigma, sigma_next) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True), start=1):
        t = torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
        x = cps_step(x, velocity(x, t), sigma, sigma_next, noise_level=noise_level, noise=fresh(step)).x_next
    return x


@dataclass(frozen=True)
class SDEStep:
    """A step from x_t to a state drawn from N(mean, std²).

    Attributes:
        x_next, mean: [B, C, H, W] fp32.
        std: [B] fp32; 0 where the step is deterministic.
        log_prob: ln N(x_next; mean, std²), its mean over C, H, W, [B] fp32; x_next takes no gradient. 0 where std is 0,
            for there is no density.
    """

    x_next: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor


def sde_step(
    x_t: Tensor,
    velocity: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    noise_level: float,
    sigma_max: float,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
) -> SDEStep:
    """Euler-Maruyama on the SDE that has the flow's marginals (Flow-GRPO, Liu et al. 2025, eq. 9).

    Its diffusion is s = noise_level · √(σ / (1 - σ)); see `_diffuse`.

    Args:
        noise_level: a; 0 is the ODE.
        sigma_max: what stands for σ = 1 in that 1 - σ, where s would be infinite: the grid's second noise level.
        generator: of the noise of the step; or `noise`, like x_t.
        x_next: the state whose probability is asked for; None draws one.
    """
    sigma, sigma_next = _level(sigma, x_t), _level(sigma_next, x_t)
    below_one = torch.where(sigma < 1, sigma, torch.full_like(sigma, sigma_max))
    diffusion = noise_level * (sigma / (1 - below_one)).sqrt()
    return _gaussian_step(*_diffuse(x_t, velocity, sigma, sigma_next, diffusion), generator, noise, x_next)


def dance_step(
    x_t: Tensor,
    velocity: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    noise_level: float,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
) -> SDEStep:
    """As `sde_step`, with the diffusion s = noise_level at every σ (DanceGRPO, Xue et al. 2025)."""
    sigma, sigma_next = _level(sigma, x_t), _level(sigma_next, x_t)
    diffusion = torch.full_like(sigma, noise_level)
    return _gaussian_step(*_diffuse(x_t, velocity, sigma, sigma_next, diffusion), generator, noise, x_next)


def cps_step(
    x_t: Tensor,
    velocity: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    noise_level: float,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
) -> SDEStep:
    """Coefficients-preserving sampling (Flow-CPS, Wang and Yu 2025): DDIM's stochastic step, for flows.

    With x̂0 = x - σ v, x̂1 = x + (1 - σ) v: mean = (1 - σ') x̂0 + √(σ'² - std²) x̂1, std = σ' sin(noise_level · π/2). The
    squares of the coefficients of the old noise and the new add up to σ'², whatever the size of the step.
    Differs from the published code: log_prob has the Gaussian's constants, where theirs is -(x' - mean)² alone; a clip
    range that was chosen for theirs is 1 / 2 std² times as wide here.

    Args:
        noise_level: 0 is the ODE, 1 is `renoise_step`.
    """
    sigma, sigma_next = _level(sigma, x_t), _level(sigma_next, x_t)
    x_t, velocity = x_t.float(), velocity.float()
    std, kept = (sigma_next * part(noise_level * math.pi / 2) for part in (math.sin, math.cos))
    x0, x1 = x_t - sigma * velocity, x_t + (1 - sigma) * velocity
    return _gaussian_step((1 - sigma_next) * x0 + kept * x1, std, generator, noise, x_next)


def renoise_step(
    x_t: Tensor,
    velocity: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
) -> SDEStep:
    """To x̂0 and back up with new noise, as `renoise_sample`: mean (1 - σ') x̂0, std σ'."""
    sigma, sigma_next = _level(sigma, x_t), _level(sigma_next, x_t)
    mean = (1 - sigma_next) * (x_t.float() - sigma * velocity.float())
    return _gaussian_step(mean, sigma_next, generator, noise, x_next)


def _level(sigma: Tensor | float, like: Tensor) -> Tensor:
    """[B, 1, 1, 1] fp32, so that one number for all and a tensor of equal ones give the same bits."""
    level = torch.as_tensor(sigma, dtype=torch.float32, device=like.device)
    return level.expand(len(like)).view(-1, *[1] * (like.dim() - 1))


def _diffuse(
    x_t: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, diffusion: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and std of an Euler-Maruyama step of dx = (v + s²/2σ (x + (1 - σ) v)) dσ + s dw, of diffusion s."""
    x_t, velocity, step = x_t.float(), velocity.float(), sigma_next - sigma
    drift = velocity + diffusion.square() / (2 * sigma) * (x_t + (1 - sigma) * velocity)
    return x_t + step * drift, diffusion * (-step).sqrt()


def _gaussian_step(
    mean: Tensor, std: Tensor, generator: torch.Generator | None, noise: Tensor | None, x_next: Tensor | None
) -> SDEStep:
    """`std` [B, 1, 1, 1]."""
    if x_next is None:
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        x_next = mean.detach() + std * noise
    is_random = std > 0
    scale = torch.where(is_random, std, torch.ones_like(std))
    log_density = -((x_next.detach() - mean) / scale).square() / 2 - scale.log() - math.log(2 * math.pi) / 2
    log_prob = torch.where(is_random, log_density, torch.zeros_like(log_density)).flatten(1).mean(1)
    return SDEStep(x_next, mean, std.flatten(), log_prob)
