"""Which steps of a rollout are random, and which of them are trained: a function of the rollout's number."""

import numpy as np

from prx_post.stages.grpo.config import GRPOConfig
from prx_post.stages.trajectories import Window, every_random_step

WINDOW = 8
"""Key of the windows' random stream."""


def window_of(config: GRPOConfig, rollout: int) -> Window:
    """Of all groups of rollout `rollout`, counted from 0."""
    return KINDS[config.window](config, rollout)


def _all(config: GRPOConfig, rollout: int) -> Window:
    return every_random_step(config.rollout_steps)


def _fast(config: GRPOConfig, rollout: int) -> Window:
    """Flow-GRPO-Fast: a few steps next to each other, at a random place; the group branches at the first."""
    size = config.trained_steps
    first = int(_random(config, rollout).integers(config.rollout_steps - size))
    steps = tuple(range(first, first + size))
    return Window(steps, steps, branch=first)


def _mix(config: GRPOConfig, rollout: int) -> Window:
    """MixGRPO (Li et al. 2025): a few next to each other, from the noisiest to the last, and again."""
    size = config.trained_steps
    first = rollout // config.window_rollouts % (config.rollout_steps - size)
    steps = tuple(range(first, first + size))
    return Window(steps, steps)


def _subset(config: GRPOConfig, rollout: int) -> Window:
    """All are random, a few at random places are trained; noise that no step is trained for does not tell images
    apart."""
    random = tuple(range(config.rollout_steps - 1))
    chosen = _random(config, rollout).choice(len(random), size=config.trained_steps, replace=False)
    return Window(random, tuple(sorted(int(step) for step in chosen)), shares_noise=True)


def _random(config: GRPOConfig, rollout: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, WINDOW, rollout])


KINDS = {"all": _all, "fast": _fast, "mix": _mix, "subset": _subset}
