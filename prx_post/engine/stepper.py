"""One optimizer over an objective's parameter groups, whichever engine runs it: torch, DDP or ZeRO."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from prx_post.engine.config import TrainConfig
from prx_post.engine.optim import Schedule, build_optimizer, check_groups, named_parameters
from prx_post.engine.partition import Partition
from prx_post.engine.processes import autocast
from prx_post.engine.protocols import Objective


class Stepper:
    """Accumulates gradients, clips them by their common norm, and steps the groups that learn in a step.

    Attributes:
        objective: as the engine has wrapped it.
        grad_norm: of the step under way, before clipping; nan until it is known.
        group_norms: the same for each group, where torch has the gradients.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, config: TrainConfig) -> None:
        groups = objective.groups()
        check_groups(objective, groups)
        self.schedule = Schedule(groups, config)
        self._accelerator, self._config = accelerator, config
        named = named_parameters(groups)
        optimizer = build_optimizer(groups, config)
        self.objective, self._optimizer = accelerator.prepare(objective, optimizer)
        self.partition = Partition(named, self._optimizer)
        self.grad_norm, self.group_norms = math.nan, dict[str, Tensor]()
        self._waiting: tuple[str, ...] = ()
        self._put_moments_back: Callable[[], None] = lambda: None

    def begin(self, step: int, factor: float = 1.0) -> None:
        """Set the learning rates of optimizer step `step`, counted from 0, times `factor`."""
        self._waiting = self.schedule.waiting(step)
        for group in self._optimizer.param_groups:
            group["lr"] = factor * self.schedule.rate(group["name"], step)
        self._put_moments_back = self.partition.moments_of(self._waiting)
        self.grad_norm, self.group_norms = math.nan, {}

    def micro_batch(self) -> AbstractContextManager[Any]:
        """Around a forward and backward pass; gradients are reduced in the step's last one."""
        return self._accelerator.accumulate(self.objective)

    def autocast(self) -> AbstractContextManager[Any]:
        """Around a forward pass."""
        return autocast(self._config, self._accelerator)

    def backward(self, loss: Tensor) -> None:
        """With DeepSpeed the last one of a step also clips, steps and zeroes."""
        self._accelerator.backward(loss)
        if self._accelerator.sync_gradients:
            weights, limit = list(self.partition.parameters.values()), self._config.max_grad_norm or math.inf
            norms = self.partition.gradient_norms()
            self.group_norms = {name: norm for name, norm in norms.items() if name not in self._waiting}
            # the one place where a step waits for the device: whether it is skipped must be known before it is done
            self.grad_norm = float(self._accelerator.clip_grad_norm_(weights, limit))

    def step(self) -> bool:
        """Step; False, and nothing changes, if the gradient is not finite. Every process has the same norm."""
        is_finite = math.isfinite(self.grad_norm)
        if is_finite:
            self.partition.drop_gradients(self._waiting)
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._put_moments_back()
        return is_finite
