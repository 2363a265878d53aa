"""Whole tensors out of, and into, weights and optimizer state that ZeRO has split among processes.

A checkpoint holds every weight and every moment whole and by name, whatever the number of processes and the ZeRO stage
that made them; so it can be resumed with others. The functions here are collectives: every process calls them, in the
same order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import Parameter

from prx_post.engine.optim import group_of

State = dict[str, Tensor]
"""One parameter's optimizer state: tensors of its shape, and scalars such as `step`."""


def is_split(parameter: Parameter) -> bool:
    """Whether this process holds only a part of the weight itself (ZeRO-3)."""
    return hasattr(parameter, "ds_tensor")


def local_part(parameter: Parameter) -> Tensor:
    """What of the weight lives in this process: all of it, or ZeRO-3's flat part."""
    return getattr(parameter, "ds_tensor", parameter)


def join(parameter: Parameter, part: Tensor) -> Tensor:
    """A whole tensor like `parameter` from every process's part of it."""
    if not is_split(parameter):
        return part
    world = torch.distributed.get_world_size()
    flat = part.new_empty(world * part.numel())
    torch.distributed.all_gather_single(flat, part.contiguous())
    return flat[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]


def split(parameter: Parameter, whole: Tensor) -> Tensor:
    """This process's part of a whole tensor like `parameter`."""
    if not is_split(parameter):
        return whole
    size = local_part(parameter).numel()
    flat = whole.new_zeros(size * torch.distributed.get_world_size())  # ZeRO-3 pads to equal parts
    flat[: whole.numel()] = whole.flatten()
    return flat.narrow(0, size * torch.distributed.get_rank(), size)


class Partition:
    """The trained weights and their optimizer, however they are split.

    Args:
        named_parameters: the weights in training, by name.
        optimizer: what `accelerator.prepare` returned.
    """

    def __init__(self, named_parameters: dict[str, Parameter], optimizer: Any) -> None:
        self.parameters = named_parameters
        inner = optimizer.optimizer  # accelerate's wrapper
        self._zero = (
            inner if hasattr(inner, "single_partition_of_fp32_groups") or hasattr(inner, "fp16_groups") else None
        )
        self._optimizer: torch.optim.Optimizer = inner.optimizer if self._zero is not None else inner

    def weight(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        if self._zero is None:
            return parameter.detach()
        return safe_get_full_fp32_param(parameter)

    def set_weight(self, name: str, value: Tensor) -> None:
        parameter = self.parameters[name]
        value = value.to(parameter.device)
        part = split(parameter, value)
        if is_split(parameter):
            safe_set_local_fp32_param(parameter, part)
        elif self._zero is not None:
            safe_set_full_fp32_param(parameter, value)
        with torch.no_grad():
            local_part(parameter).copy_(part)

    def moments_of(self, groups: Sequence[str]) -> Callable[[], None]:
        """A function that puts the moments of these groups back to what they are now; their rate must be 0 meanwhile.

        For ZeRO (1 and 2), whose flat tensors always have a gradient. For torch, which skips a weight without gradient,
        see `drop_gradients`.
        """
        if not groups or self._zero is None:
            return lambda: None
        flats = zip(self._optimizer.param_groups, self._zero_flats(), strict=True)
        states = [self._optimizer.state[flat] for group, flat in flats if group["name"] in groups]
        before = [{k: v.clone() for k, v in state.items()} for state in states]

        def put_back() -> None:
            for state, saved in zip(states, before, strict=True):  # in place: DeepSpeed keeps views of these tensors
                for key, value in state.items():
                    value.copy_(saved[key]) if saved else value.zero_()

        return put_back

    def drop_gradients(self, groups: Sequence[str]) -> None:
        """So that torch's next step leaves these groups as they are. Under ZeRO there is nothing to drop."""
        for group in self._optimizer.param_groups if self._zero is None else []:
            if group["name"] in groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def gradient_norms(self) -> dict[str, Tensor]:
        """By group, if there are several and torch has the gradients (ZeRO has split and used them by then)."""
        gradients: dict[str, list[Tensor]] = {}
        for group in self._optimizer.param_groups if self._zero is None else []:  # Muon and AdamW may share a name
            found = [p.grad for p in group["params"] if p.grad is not None]
            gradients.setdefault(group["name"], []).extend(found)
        if len(gradients) < 2:
            return {}
        return {name: torch.nn.utils.get_total_norm(found) for name, found in gradients.items()}

    def optimizer_state(self, name: str) -> State:
        """Empty before the first step."""
        parameter = self.parameters[name]
        if self._zero is None:
            return {k: torch.as_tensor(v) for k, v in self._state_of(parameter).items()}
        self._link()
        scalars, keys = self._zero_keys(self._flat_of(name))
        state = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
        return {**state, **scalars}

    def set_optimizer_state(self, states: dict[str, State]) -> None:
        """Put back what `optimizer_state` gave, for all parameters at once."""
        if self._zero is None:
            parts = getattr(self._optimizer, "parts", [self._optimizer])
            for optimizer in parts:
                _load(optimizer, self.parameters, states)
            # loading made new groups, and the learning rate is set through these
            self._optimizer.param_groups = [group for optimizer in parts for group in optimizer.param_groups]
            return
        tensors = {k for state in states.values() for k, v in state.items() if v.ndim}
        some = next(state for state in states.values() if state)
        fresh = {k: torch.zeros_like(v) for k, v in some.items()}  # of a group that has not stepped yet
        for flat in self._zero_flats():
            # where torch's own first step would put them
            at = flat.device if self._optimizer.param_groups[0].get("fused") else torch.device("cpu")
            of_group = next((s for name, s in states.items() if s and self._flat_of(name) is flat), None)
            chosen = of_group or (some if self._has_subgroups else fresh)
            scalars = {k: v.clone().to(at) for k, v in chosen.items() if k not in tensors}
            moments = {k: torch.zeros_like(flat) for k in sorted(tensors)}
            self._optimizer.state[flat] = _like_the_optimizers_own(self._optimizer, {**scalars, **moments})
        self._link()
        _replay_count(self._optimizer, int(some["step"]) if "step" in some else 0)
        for name, state in ((name, state) for name, state in states.items() if state):
            parameter = self.parameters[name]
            for key in sorted(tensors):
                value = state[key].to(parameter.device)
                if is_split(parameter):
                    safe_set_local_optimizer_state(parameter, split(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _state_of(self, parameter: Parameter) -> dict[str, Any]:
        for optimizer in getattr(self._optimizer, "parts", [self._optimizer]):
            if parameter in optimizer.state:
                return optimizer.state[parameter]
        return {}

    def _zero_flats(self) -> list[Tensor]:
        """The flat tensors that ZeRO's inner optimizer works on."""
        zero: Any = self._zero
        return getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_partitioned_groups_flat

    @property
    def _has_subgroups(self) -> bool:
        """Whether flat tensors are parts of a parameter group (ZeRO-3), not one for each group."""
        return len(self._zero_flats()) != len(self._optimizer.param_groups)

    def _flat_of(self, name: str) -> Tensor:
        """The flat tensor of a weight's parameter group."""
        flats, groups = self._zero_flats(), self._optimizer.param_groups
        if self._has_subgroups:
            return flats[0]
        return flats[[group["name"] for group in groups].index(group_of(name))]

    def _link(self) -> None:
        """Show DeepSpeed every group's moments; it looks for them once, after the first group's first step."""
        zero: Any = self._zero
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _zero_keys(self, flat: Tensor) -> tuple[State, list[str]]:
        state = self._optimizer.state.get(flat, {})
        tensors = [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == flat.shape]
        return {k: torch.as_tensor(v).clone() for k, v in state.items() if k not in tensors}, sorted(tensors)


def _load(optimizer: torch.optim.Optimizer, parameters: dict[str, Parameter], states: dict[str, State]) -> None:
    name_of = {id(p): name for name, p in parameters.items()}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    current = optimizer.state_dict()
    current["state"] = {i: states[name_of[id(p)]] for i, p in enumerate(order) if states[name_of[id(p)]]}
    optimizer.load_state_dict(current)


def _replay_count(optimizer: Any, steps: int) -> None:
    """DeepSpeedCPUAdam keeps beta^step in C++ as a running product, whose last bit a power would miss: multiply it up.

    Its update is called on a weight of one element that nobody uses.
    """
    if type(optimizer).__name__ != "DeepSpeedCPUAdam":
        return
    group, unused = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            *(optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"]), *unused
        )


def _like_the_optimizers_own(optimizer: torch.optim.Optimizer, state: State) -> dict[str, Any]:
    """DeepSpeedCPUAdam counts steps in a Python int, torch in a tensor."""
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return {k: int(v) if v.ndim == 0 else v for k, v in state.items()}
    return dict(state)
