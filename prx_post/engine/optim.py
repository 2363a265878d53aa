"""Optimizers, schedules and parameter groups; torch and transformers do the work."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from prx_post.engine.config import TrainConfig
from prx_post.engine.protocols import POLICY, Objective, ParamGroup

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


def named_parameters(groups: Iterable[ParamGroup]) -> dict[str, nn.Parameter]:
    """The weights in training by `<group>.<name in its module>`."""
    return {
        f"{group.name}.{name}": parameter
        for group in groups
        for name, parameter in group.module.named_parameters()
        if parameter.requires_grad
    }


def group_of(name: str) -> str:
    """The group of a weight's name."""
    return name.split(".", 1)[0]


def check_groups(objective: Objective, groups: Sequence[ParamGroup]) -> None:
    """Raise ValueError unless every trained weight is in exactly one group, and the first is the policy's."""
    names = [group.name for group in groups]
    if names[:1] != [POLICY] or len(set(names)) < len(names) or any("." in name for name in names):
        raise ValueError(f"parameter groups are {names}, but must be {POLICY!r} and others, different and without dots")
    if groups[0].module is not objective.policy:
        raise ValueError("the first parameter group must be the objective's policy")
    grouped = [id(p) for p in named_parameters(groups).values()]
    trained = {id(p) for p in objective.parameters() if p.requires_grad}
    if len(set(grouped)) < len(grouped) or set(grouped) != trained:
        raise ValueError("every weight of the objective that is trained must be in exactly one parameter group")


def build_optimizer(groups: Sequence[ParamGroup], config: TrainConfig) -> Optimizer:
    """AdamW (fused), or Muon for the blocks' 2-D weights with AdamW for the rest.

    A torch group for each parameter group (two with Muon), whose `name` it carries.
    Muon's update is rescaled to AdamW's typical RMS (Liu et al. 2025), so that one learning rate suits both.
    """
    named = named_parameters(groups)
    rates = {group.name: group.lr for group in groups}

    def adamw(chosen: NamedParameters) -> AdamW:
        return AdamW(
            _torch_groups(chosen, rates),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=all(p.device.type in ("cpu", "cuda") for _, p in chosen),
        )

    if config.optim == "adamw":
        return adamw(list(named.items()))
    matrices = [(name, p) for name, p in named.items() if is_muon_parameter(name, p)]
    rest = [(name, p) for name, p in named.items() if not is_muon_parameter(name, p)]
    chosen = _torch_groups(matrices, rates)
    muon = Muon(chosen, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, adamw(rest)) if rest else muon


def _torch_groups(named: NamedParameters, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Those that are not empty, in the order of the parameters."""
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        members.setdefault(group_of(name), []).append(parameter)
    return [{"params": params, "lr": rates[name], "name": name} for name, params in members.items()]


class Schedule:
    """The learning rate of each group at each step, a function of the step alone, so that resuming needs no state.

    A group's warm-up and decay count its own updates: one that waits 200 steps begins its warm-up then.
    """

    def __init__(self, groups: Sequence[ParamGroup], config: TrainConfig) -> None:
        self._groups = {group.name: group for group in groups}
        self._done: dict[str, list[int]] = {}
        self._factors: dict[str, Callable[[int], float]] = {}
        for group in groups:
            counts = [0]
            for step in range(config.max_steps):
                counts.append(counts[-1] + bool(group.updates(step)))
            self._done[group.name] = counts
            self._factors[group.name] = learning_rate_factor(config, max(1, counts[-1]))

    def updates_before(self, name: str, step: int) -> int:
        """How many updates the group has had when step `step`, counted from 0, begins."""
        return self._done[name][step]

    def waiting(self, step: int) -> tuple[str, ...]:
        """The groups that do not learn in this step."""
        return tuple(name for name, group in self._groups.items() if not group.updates(step))

    def rate(self, name: str, step: int) -> float:
        """0 for a group that waits."""
        group = self._groups[name]
        return group.lr * self._factors[name](self._done[name][step]) if group.updates(step) else 0.0


def learning_rate_factor(config: TrainConfig, num_updates: int) -> Callable[[int], float]:
    """What the peak rate is multiplied with at an update, counted from 0: a schedule by its name in transformers."""
    from transformers import get_scheduler

    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = get_scheduler(config.lr_scheduler_type, stand_in, config.warmup_steps, num_updates)
    return schedule.lr_lambdas[0]
