"""Optimizers and schedules; torch and transformers do the work."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from prx_post.engine.config import TrainConfig

NamedParameters = list[tuple[str, nn.Parameter]]


class MuonWithAdamW(Optimizer):
    """torch's Muon for some parameters and AdamW for the others, behind one optimizer's face.

    `param_groups` are the two optimizers' own groups, so a schedule that sets `lr` in them reaches both.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.muon, self.adamw = muon, adamw
        self.parts: list[Optimizer] = [muon, adamw]
        groups = muon.param_groups + adamw.param_groups
        super().__init__([{**group} for group in groups], {"lr": groups[0]["lr"]})
        self.param_groups = groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = self.muon.param_groups + self.adamw.param_groups


def is_muon_parameter(name: str, parameter: nn.Parameter) -> bool:
    """The blocks' 2-D weights. Embeddings, the final layer, biases and norms stay with AdamW (Jordan et al. 2024)."""
    return parameter.ndim == 2 and ".blocks." in f".{name}"


def build_optimizer(named_parameters: NamedParameters, config: TrainConfig) -> Optimizer:
    """AdamW (fused), or Muon for the blocks' 2-D weights with AdamW for the rest.

    A parameter group for each of `config.learning_rates()`, whose `prefix` it carries.
    Muon's update is rescaled to AdamW's typical RMS (Liu et al. 2025), so that one learning rate suits both.
    """
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]

    def adamw(named: NamedParameters) -> AdamW:
        return AdamW(
            parameter_groups(named, config),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=all(p.device.type in ("cpu", "cuda") for _, p in named),
        )

    if config.optim == "adamw":
        return adamw(trainable)
    matrices = [(name, p) for name, p in trainable if is_muon_parameter(name, p)]
    rest = [(name, p) for name, p in trainable if not is_muon_parameter(name, p)]
    groups = parameter_groups(matrices, config)
    muon = Muon(groups, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, adamw(rest)) if rest else muon


def group_of(name: str, prefixes: Iterable[str]) -> str:
    """The prefix of a parameter's group: the longest that its name begins with."""
    return max((prefix for prefix in prefixes if name.startswith(prefix)), key=len)


def parameter_groups(named: NamedParameters, config: TrainConfig) -> list[dict[str, Any]]:
    """Those that are not empty, in the order of the parameters."""
    rates = config.learning_rates()
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        groups.setdefault(group_of(name, rates), []).append(parameter)
    return [{"params": members, "lr": rates[prefix], "prefix": prefix} for prefix, members in groups.items()]


def learning_rate_factor(config: TrainConfig) -> Callable[[int], float]:
    """What the learning rate is multiplied with at a step, counted from 0: a schedule by its name in transformers.

    A function of the step, so that resuming needs no state and it does not matter who holds the optimizer.
    """
    from transformers import get_scheduler

    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = get_scheduler(config.lr_scheduler_type, stand_in, config.warmup_steps, config.max_steps)
    return schedule.lr_lambdas[0]
