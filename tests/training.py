"""The smallest thing that can be trained: two weights, each with a gradient that a batch states outright."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prx_post.base.ranks import ALONE
from prx_post.engine.config import TrainConfig
from prx_post.engine.processes import build_accelerator
from prx_post.engine.protocols import POLICY, Objective, ParamGroup, always
from prx_post.engine.run import Run
from prx_post.engine.signals import StopSignals
from prx_post.engine.tracking import RunLog
from prx_post.engine.trainer import Trainer


class TwoWeights(Objective):
    """loss = mean(x) · policy + mean(y) · head, so the gradients are mean(x) and mean(y). Both weights start at 1."""

    def __init__(
        self, rate: float, head_rate: float | None = None, head_learns: Callable[[int], bool] = always
    ) -> None:
        super().__init__()
        self.policy = nn.ParameterDict({"w": nn.Parameter(torch.ones(()))})
        self.head = nn.ParameterDict({"w": nn.Parameter(torch.ones(()))})
        self.rate, self.head_rate, self.head_learns = rate, head_rate or rate, head_learns

    def groups(self) -> list[ParamGroup]:
        return [
            ParamGroup(POLICY, self.policy, self.rate),
            ParamGroup("head", self.head, self.head_rate, self.head_learns),
        ]

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch["x"].mean(), batch["y"].mean()
        return x * self.policy["w"] + y * self.head["w"], {"x": x}


class ListSource:
    """Micro-batches from a list of (x, y) lists, one of them an optimizer step."""

    online = False

    def __init__(self, steps: list[list[tuple[float, float]]]) -> None:
        self.steps = steps

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {}

    def load_state(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        assert (info, tensors) == ({}, {})

    def batches(self, step: int) -> Iterator[dict[str, Any]]:
        for i, (x, y) in enumerate(self.steps[step]):
            yield {"x": torch.tensor([x]), "y": torch.tensor([y]), "seeds": [step], "rows": [10 * step + i]}


class NoMonitor:
    """Never looks; a test may give it functions that do."""

    keeps_best = True

    def __init__(self, **functions: Any) -> None:
        vars(self).update(functions)

    def is_due(self, step: int) -> bool:
        return False

    def validate(self, step: int) -> dict[str, float]:
        return {}

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def is_best(self, metrics: dict[str, float]) -> bool:
        return False

    def forget_best(self) -> None:
        pass

    def resume(self, evaluations: list[dict[str, Any]], logged: list[dict[str, Any]]) -> None:
        pass


def config(output_dir: Path, steps: int, **changes: Any) -> TrainConfig:
    """Adam without memory and with an offset of 1: a weight moves by rate · g / (|g| + 1)."""
    return TrainConfig(
        **{
            **{"output_dir": str(output_dir), "max_steps": steps, "per_device_train_batch_size": 1},
            **{"learning_rate": 0.1, "adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 1.0},
            **{"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "ema_decay": 0.0, "logging_steps": 1},
            **{"report_to": [], "save_steps": 0, "sample_steps": 0},
            **changes,
        }
    )


def trainer(
    settings: TrainConfig, steps: list[list[tuple[float, float]]], monitor: Any = None, source: Any = None, **rates: Any
) -> Trainer:
    accelerator = build_accelerator(settings)
    settings.folder.mkdir(exist_ok=True)
    run = Run(
        settings, accelerator, {"ema_decay": settings.ema_decay}, None, False, StopSignals(), ALONE, lambda value: value
    )
    objective = TwoWeights(settings.learning_rate, **rates)
    identity = {"stage": "test", "data": "", "base": ""}
    return Trainer(run, objective, source or ListSource(steps), monitor or NoMonitor(), RunLog(run), identity)


def weights(trained: Trainer) -> tuple[float, float]:
    """The policy's and the head's."""
    objective: Any = trained.objective
    return objective.policy["w"].item(), objective.head["w"].item()


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]
