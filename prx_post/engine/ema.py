"""Exponential moving average of the trained weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from prx_post.engine.partition import local_part


class EMA:
    """Averages parameters in fp32: average = decay · average + (1 - decay) · parameter.

    The decay is warmed up as min(decay, (1 + n) / (10 + n)) after n updates, so that a short run's average is not
    mostly its starting point. decay = 0 means no average: `swapped_in` leaves the parameters as they are.
    Under ZeRO-3 every process averages its own part of each weight.
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float, update_steps: int = 1) -> None:
        self._parameters = list(parameters)
        self._position = {id(p): i for i, p in enumerate(self._parameters)}
        self.decay, self.update_steps = decay, update_steps
        self.num_updates = 0
        self.averages: list[Tensor] = [t.detach().float().clone() for t in self._tensors()] if decay else []

    def of(self, parameter: Parameter) -> Tensor | None:
        """The average of one of the parameters (this process's part of it); None if it has none."""
        if not self.averages or id(parameter) not in self._position:
            return None
        return self.averages[self._position[id(parameter)]]

    def _tensors(self) -> list[Tensor]:
        return [local_part(p) for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call after update number `step` of the weights, counted from 1."""
        if not self.averages or step % self.update_steps:
            return
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.averages, [t.detach().float() for t in self._tensors()], 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the parameters hold the averages; afterwards they hold the trained values again."""
        if not self.averages:
            yield
            return
        trained = [t.detach().clone() for t in self._tensors()]
        self._set(self.averages)
        try:
            yield
        finally:
            self._set(trained)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors(), values, strict=True):
            tensor.copy_(value)
