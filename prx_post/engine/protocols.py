"""What a stage gives to the trainer, which knows no stage."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Any]
"""Tensors [B, ...]; `seeds` and `rows`, lists of B ints; `step`, of the optimizer, counted from 0; optionally
`metrics`, scalar tensors that the source itself measured."""
Prompts = tuple[Tensor, Tensor]
"""Embeddings [B, L, E] and mask [B, L] bool."""
POLICY = "policy"
"""The parameter group that is averaged and emitted."""


class Source(Protocol):
    """This rank's micro-batches of each optimizer step.

    Offline sources are pure functions of the step and have no state. An online source generates with the policy in
    training: all ranks call it alike, nothing is read ahead, and its tensors are in the checkpoint.
    """

    online: bool

    def batches(self, step: int) -> Iterator[Batch]:
        """Exactly `gradient_accumulation_steps` micro-batches of optimizer step `step`, counted from 0."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint must hold: JSON values, alike on all ranks, and this rank's tensors [rows, ...]."""

    def load_state(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Put `state` back. `tensors` are those of all ranks that saved, joined along the first axis in rank order."""


class OfflineSource:
    """What offline sources have in common: nothing to keep."""

    online = False

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {}

    def load_state(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """There is none."""


def always(step: int) -> bool:
    return True


@dataclass(frozen=True)
class ParamGroup:
    """Weights that learn together.

    Attributes:
        name: in checkpoints and metrics; the first is POLICY.
        lr: peak learning rate.
        updates: whether the group learns in an optimizer step; at others its weights and moments stay as they are.
    """

    name: str
    module: nn.Module
    lr: float
    updates: Callable[[int], bool] = always


class Objective(nn.Module):
    """The trainable modules and the algorithm: `forward(batch) -> (loss, metrics)`.

    The loss is computed inside `forward`, so that DDP and every ZeRO stage wrap one module. Frozen networks are held,
    never registered. Metrics are detached scalars on the device; nothing in `forward` may wait for the device.
    """

    policy: nn.Module

    @property
    def learning_rate_factor(self) -> float:
        """What all groups' learning rates are multiplied by; alike on all ranks, and found again on resuming."""
        return 1.0

    def groups(self) -> list[ParamGroup]:
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def kept(self) -> dict[str, Tensor]:
        """Tensors besides weights and buffers that a checkpoint must hold, alike on all ranks; put back in place."""
        return {}

    def after_step(self, step: int, weights: Callable[[], dict[str, Tensor]]) -> None:
        """Called on all ranks after optimizer step `step`, counted from 0, also if it was skipped.

        Args:
            weights: gives the policy's trained weights, whole, by name; a collective under ZeRO.
        """


class Reference(Protocol):
    """A frozen network that answers: a teacher, or the policy as it was."""

    def velocity(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """fp32, without a gradient; x_t [B, C, H, W], t [B]."""


class Monitor(Protocol):
    """Validation while training. All ranks call it alike, with the averaged weights in place."""

    @property
    def keeps_best(self) -> bool:
        """Whether the best weights, not the last, are emitted."""

    def is_due(self, step: int) -> bool: ...

    def validate(self, step: int) -> dict[str, float]:
        """Metrics, alike on all ranks. Raises StopTraining with its reason; or StopEarly, which is no failure."""

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        """Look at a logged line. Raises StopTraining with its reason."""

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether these are the best so far; the trainer then keeps the weights, for it knows how they are split."""

    def resume(self, evaluations: list[dict[str, Any]], logged: list[dict[str, Any]]) -> None:
        """Take up what earlier evaluations and logged metrics, a line each, have come to."""

    def forget_best(self) -> None:
        """The best weights are lost: the next evaluation is the best so far."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
