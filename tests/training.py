"""The smallest thing that can be trained: two weights, each with a gradient that a batch states outright."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prx_post.engine.config import TrainConfig
from prx_post.engine.processes import build_accelerator
from prx_post.engine.run import Run
from prx_post.engine.tracking import RunLog
from prx_post.engine.trainer import Trainer


class TwoWeights(nn.Module):
    """loss = mean(x) · policy + mean(y) · head, so the gradients are mean(x) and mean(y). Both weights start at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ParameterDict({"w": nn.Parameter(torch.ones(()))})
        self.head = nn.ParameterDict({"w": nn.Parameter(torch.ones(()))})

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch["x"].mean(), batch["y"].mean()
        return x * self.transformer["w"] + y * self.head["w"], {"x": x}


class ListSource:
    """Micro-batches from a list of (x, y) lists, one of them an optimizer step."""

    def __init__(self, steps: list[list[tuple[float, float]]]) -> None:
        self.steps, self.step = steps, 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def __iter__(self):
        for step in range(self.step, len(self.steps)):
            for i, (x, y) in enumerate(self.steps[step]):
                self.step = step + (i == len(self.steps[step]) - 1)
                yield {"x": torch.tensor([x]), "y": torch.tensor([y]), "seeds": [step], "rows": [10 * step + i]}


class Config(TrainConfig):
    head_rate: float | None = None
    head_learns_every = 1

    def learning_rates(self) -> dict[str, float]:
        return {"": self.learning_rate, **({"head.": self.head_rate} if self.head_rate else {})}

    def waiting(self, step: int) -> tuple[str, ...]:
        return () if (step + 1) % self.head_learns_every == 0 else ("head.",)


def config(output_dir: Path, steps: int, **changes: Any) -> Config:
    """Adam without memory and with an offset of 1: a weight moves by rate · g / (|g| + 1)."""
    head = {name: changes.pop(name) for name in ("head_rate", "head_learns_every") if name in changes}
    made = Config(
        **{
            **{"output_dir": str(output_dir), "max_steps": steps, "per_device_train_batch_size": 1},
            **{"learning_rate": 0.1, "adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 1.0},
            **{"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "ema_decay": 0.0, "logging_steps": 1},
            **{"report_to": [], "save_steps": 0, "sample_steps": 0},
            **changes,
        }
    )
    for name, value in head.items():
        setattr(made, name, value)
    return made


def trainer(settings: Config, steps: list[list[tuple[float, float]]]) -> Trainer:
    accelerator = build_accelerator(settings)
    folder = Path(str(settings.output_dir))
    folder.mkdir(exist_ok=True)
    run = Run(accelerator, folder, {"ema_decay": settings.ema_decay}, None, False)
    log = RunLog(accelerator, run, settings)
    identity = {"stage": "test", "settings": run.settings, "data": "", "base": ""}
    return Trainer(settings, accelerator, TwoWeights(), ListSource(steps), log, lambda step: None, identity)


def weights(trained: Trainer) -> tuple[float, float]:
    """The policy's and the head's."""
    objective: Any = trained.objective
    return objective.transformer["w"].item(), objective.head["w"].item()


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]
