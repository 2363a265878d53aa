"""Schedulers of a pipeline's kind with another grid of noise levels or another way to step along it."""

from typing import Any


def rescheduled(scheduler: Any, **changes: Any) -> Any:
    """A copy of a FlowMatchEulerDiscreteScheduler with `changes` to its configuration.

    Args:
        changes: `shift_terminal`, the last noise level before 0 (None or 0: as the shift alone puts it);
            `sampler`, one of SAMPLERS; the names of diffusers for anything else.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if "sampler" in changes:
        changes["stochastic_sampling"] = changes.pop("sampler") == "renoise"
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **changes)
