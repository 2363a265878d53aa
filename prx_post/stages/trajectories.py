"""Images of groups, by a sampler some of whose steps are random, with what is needed to train these steps later."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from prx_post.data.plan import stream
from prx_post.flow import seeded_noise
from prx_post.sampling import (
    SDEStep,
    VelocityFunction,
    cps_step,
    dance_step,
    euler_step,
    renoise_step,
    sde_step,
)

Transition = Callable[..., SDEStep]
"""(x_t, velocity, sigma, sigma_next, noise= or x_next=) -> SDEStep"""


def transition_of(sampler: str, noise_level: float, sigmas: Tensor) -> Transition | None:
    """The random step of a sampler by its name; None for the ODE.

    Args:
        noise_level: of sde, cps and dance.
        sigmas: the grid, [N + 1].
    """
    if sampler == "sde":
        return partial(sde_step, noise_level=noise_level, sigma_max=float(sigmas[1]))
    if sampler == "renoise":
        return renoise_step
    steps = {"cps": cps_step, "dance": dance_step}
    return partial(steps[sampler], noise_level=noise_level) if sampler in steps else None


@dataclass(frozen=True)
class Window:
    """Steps of a trajectory of N, counted from 0. The last, N - 1, is never random.

    Attributes:
        random: whose noise is drawn; the others follow the ODE.
        trained: those of them whose log-probability is kept.
        shares_noise: whether a group has the same noise at random steps that are not trained.
        branch: the step at which the images of a group part; before it they are one. None: each has noise of its own.
    """

    random: tuple[int, ...]
    trained: tuple[int, ...]
    shares_noise: bool = False
    branch: int | None = None


def every_random_step(num_steps: int) -> Window:
    """All steps but the last, of a trajectory of so many."""
    steps = tuple(range(num_steps - 1))
    return Window(steps, steps)


@dataclass(frozen=True)
class Seeded:
    """An image to be: the seed of its own noise, and that of its group, which is known by id, never by its prompt."""

    own: int
    group: int


@dataclass
class Trajectories:
    """Of B images. The lists have an entry a trained step, in order.

    Attributes:
        x0, x_last: clean latents, and the state that the last step began at, [B, C, H, W] fp32.
        x_t, x_next, mean: [B, C, H, W] fp32 each; log_prob: [B] each.
    """

    x0: Tensor
    x_last: Tensor
    x_t: list[Tensor] = field(default_factory=list)
    x_next: list[Tensor] = field(default_factory=list)
    mean: list[Tensor] = field(default_factory=list)
    log_prob: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def sample_trajectories(
    velocity_of: Callable[[Sequence[int]], VelocityFunction],
    seeds: Sequence[Seeded],
    sigmas: Tensor,
    transition: Transition | None,
    window: Window,
    shape: Sequence[int],
    device: torch.device,
) -> Trajectories:
    """Generate images of noise that depends on their seeds alone.

    Args:
        velocity_of: of the images at these places of `seeds`.
        sigmas: the grid, [N + 1], from noise to 0.
        transition: of the random steps; None: all steps follow the ODE.
        shape: of one latent.
    """
    random = window.random if transition is not None else ()
    branch = window.branch if transition is not None else None
    x = _start(velocity_of, seeds, sigmas, branch, shape, device)
    result = Trajectories(x, x)
    velocity = velocity_of(range(len(seeds)))
    for step in range(branch or 0, len(sigmas) - 1):
        sigma, sigma_next = (sigmas[i].expand(len(seeds)).to(device) for i in (step, step + 1))
        predicted, result.x_last = velocity(x, sigma), x
        if step not in random:
            x = euler_step(x, predicted, sigma.view(-1, 1, 1, 1), sigma_next.view(-1, 1, 1, 1))
            continue
        assert transition is not None
        is_trained = step in window.trained
        shared = window.shares_noise and not is_trained
        noise = seeded_noise([stream(s.group if shared else s.own, step + 1) for s in seeds], shape).to(device)
        made = transition(x, predicted, sigma, sigma_next, noise=noise)
        if is_trained:
            result.x_t.append(x)
            result.x_next.append(made.x_next)
            result.mean.append(made.mean)
            result.log_prob.append(made.log_prob)
        x = made.x_next
    result.x0 = x
    return result


def _start(
    velocity_of: Callable[[Sequence[int]], VelocityFunction],
    seeds: Sequence[Seeded],
    sigmas: Tensor,
    branch: int | None,
    shape: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Where step `branch` begins, after the steps before it of one image a group; None: the noise of each image."""
    if branch is None:
        return seeded_noise([s.own for s in seeds], shape).to(device)
    groups = list(dict.fromkeys(s.group for s in seeds))
    firsts = [next(i for i, s in enumerate(seeds) if s.group == group) for group in groups]
    x, velocity = seeded_noise(groups, shape).to(device), velocity_of(firsts)
    for step in range(branch):
        sigma, sigma_next = (sigmas[i].expand(len(groups)).to(device) for i in (step, step + 1))
        x = euler_step(x, velocity(x, sigma), sigma.view(-1, 1, 1, 1), sigma_next.view(-1, 1, 1, 1))
    return x[[groups.index(s.group) for s in seeds]]
