"""One optimizer step on fake tensors, and the greatest sum of what was alive at a time.

The network, the objective, the optimizer and autograd are the real ones; torch's FakeTensorMode makes every operation
compute shapes alone. So what is kept for the backward pass, what gradient checkpointing throws away and computes
again, and what an optimizer needs in passing is observed, not estimated.
"""

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from prx_post.base.ranks import ALONE
from prx_post.engine.config import TrainConfig
from prx_post.engine.optim import build_optimizer, group_of, named_parameters
from prx_post.engine.protocols import POLICY, Batch
from prx_post.model.checkpoint import PipelineFolder
from prx_post.model.denoiser import predict_velocity
from prx_post.stages.registry import Stage


class StorageWatch(TorchDispatchMode):
    """Inside, counts the bytes of the storages that operations make, until they are let go of.

    Args:
        ignored: tensors that were there before and do not count.

    Attributes:
        live: bytes alive now; `gradients` of them are parameters' gradients.
        peak, peak_without_gradients: the greatest so far of live, and of live without gradients.
    """

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self._bytes_of: dict[int, int] = {}
        self._gradients: dict[int, int] = {}
        self._ignored = {t.untyped_storage()._cdata for t in ignored}
        self.live = self.gradients = 0
        self.forget_peaks()

    def forget_peaks(self) -> None:
        self.peak, self.peak_without_gradients = self.live, self.live - self.gradients

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value)
        self._raise_peaks()
        return result

    def mark_gradient(self, parameter: nn.Parameter) -> None:
        """A hook for `register_post_accumulate_grad_hook`."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key not in self._gradients:
            self._gradients[key] = self._bytes_of[key]
            self.gradients += self._bytes_of[key]

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ignored or key in self._bytes_of:
            return
        self._bytes_of[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._bytes_of.pop(key)
        self.gradients -= self._gradients.pop(key, 0)

    def _raise_peaks(self) -> None:
        self.peak = max(self.peak, self.live)
        self.peak_without_gradients = max(self.peak_without_gradients, self.live - self.gradients)


@dataclass(frozen=True)
class DryRun:
    """What one step takes in one process that splits nothing, bytes unless it says parameters.

    Attributes:
        parameters: of the network that is emitted.
        trained_parameters: of all groups; `policy_parameters` of them are averaged and emitted.
        weights: of everything that is held, frozen networks too; `frozen` of them are other networks', of which ZeRO-3
            splits `frozen_split`.
        activations: the peak of forward and backward pass without gradients: what autograd keeps, the gradients of
            activations, one batch.
        activations_and_gradients: the same with the gradients that exist at that moment.
        step_temporaries: what the optimizer needs in passing, beyond gradients and its state.
        accumulates: whether a step has several micro-batches.
        flops: floating-point operations of a step's matrix products, those of recomputed activations included; 0: not
            counted.
        flops_of_sample: of one forward pass of the policy on one sample.
    """

    parameters: int
    trained_parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    activations_and_gradients: int
    step_temporaries: int
    accumulates: bool = False
    frozen: int = 0
    frozen_split: int = 0
    policy_parameters: int | None = None
    flops: int = 0
    flops_of_sample: int = 0

    @property
    def averaged_parameters(self) -> int:
        return self.trained_parameters if self.policy_parameters is None else self.policy_parameters


class PlannedRun:
    """A Run without processes or values: its networks have the right shapes, on tensors that hold nothing."""

    is_planned = True

    def __init__(self, config: Any, device: str) -> None:
        self.config, self.device, self.ranks = config, torch.device(device), ALONE
        self.made: list[nn.Module] = []
        self.split: list[nn.Module] = []
        """Of those, frozen ones that ZeRO-3 splits as it does the trained."""

    @property
    def global_batch_size(self) -> int:
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    def transformer(self, pipeline: PipelineFolder, dtype: torch.dtype = torch.float32) -> Any:
        from diffusers import PRXTransformer2DModel

        network = PRXTransformer2DModel.from_config(pipeline.configs["transformer"])
        if dtype != torch.float32:
            network = network.to(dtype)
        self.made.append(network)
        return network

    def vae(self, pipeline: PipelineFolder) -> Any:
        import diffusers

        network = getattr(diffusers, pipeline.index["vae"][1]).from_config(pipeline.configs["vae"])
        self.made.append(network.eval().requires_grad_(False))
        return network

    def frozen(self, module: nn.Module) -> nn.Module:
        self.split.append(module)
        return module.requires_grad_(False)

    def place(self, module: nn.Module) -> nn.Module:
        return module


def dry_run(open_stage: Callable[[Any], Stage], config: Any, device: str, operations: bool = False) -> DryRun:
    """Observe one optimizer step of a stage.

    Args:
        open_stage: makes the stage of its own configuration.
        config: that one; its optimizer, accumulation, autocast and gradient checkpointing are followed.
        operations: whether they are counted, too.
        device: whose kernels are meant; `cuda` needs a torch that was built for it, and a GPU.
    """
    stage = open_stage(dataclasses.replace(config, torch_compile=False))  # compiled code cannot be watched
    run: Any = PlannedRun(stage.config, device)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)  # such as the noise levels of a grid
    with fakes:
        data, batch = stage.example(run)
        held, of_anchor = (None, {}) if stage.anchor is None else stage.anchor.example(run)
    batch |= of_anchor
    with torch.device("meta"):  # outside, for peft moves an adapter to its layer's device, which fakes refuse
        objective = stage.objective(run, data)
        if stage.anchor is not None:
            objective = stage.anchor.objective(run, objective, held)
    with fakes:
        for module in (objective, *run.made):
            _move(module, run.device)
        groups = objective.groups()
        named = named_parameters(groups)
        held = {id(p): p for module in (objective, *run.made) for p in module.parameters()}
        buffers = [b for module in (objective, *run.made) for b in module.buffers()]
        watch = StorageWatch([*held.values(), *buffers])
        flops, of_sample = _count_flops(objective, batch, stage.config) if operations else (0, 0)
        for parameter in named.values():
            parameter.register_post_accumulate_grad_hook(watch.mark_gradient)
        with watch:
            _micro_steps(objective, batch, stage.config)
            peaks = watch.peak_without_gradients, watch.peak
            optimizer = build_optimizer(groups, stage.config)
            optimizer.step()  # makes its state
            watch.forget_peaks()
            before = watch.live
            optimizer.step()
    state = sum(
        value.nbytes
        for part in getattr(optimizer, "parts", [optimizer])
        for values in part.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    )
    ours = {id(p) for p in objective.parameters()}
    policy = [p for name, p in named.items() if group_of(name) == POLICY]
    return DryRun(
        parameters=sum(p.numel() for p in objective.policy.parameters()),
        trained_parameters=sum(p.numel() for p in named.values()),
        weights=sum(p.nbytes for p in held.values()),
        gradients=watch.gradients,
        optimizer=state,
        activations=peaks[0],
        activations_and_gradients=peaks[1],
        step_temporaries=watch.peak - before,
        accumulates=stage.config.gradient_accumulation_steps > 1,
        frozen=sum(p.nbytes for key, p in held.items() if key not in ours),
        frozen_split=sum(p.nbytes for module in run.split for p in module.parameters()),
        policy_parameters=sum(p.numel() for p in policy),
        flops=flops,
        flops_of_sample=of_sample,
    )


def _move(network: nn.Module, device: torch.device) -> None:
    """Replace meta tensors by fake ones of `device`. (`Module.to` would swap them, which fakes refuse.)"""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:  # not one that another module shares and that was moved there
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(module, name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def _count_flops(objective: Any, batch: Batch, config: TrainConfig) -> tuple[int, int]:
    """Of an optimizer step, and of one forward pass of the policy on one sample.

    In passes of their own, for a counter keeps tensors alive.
    """
    latents = batch["latents"]
    with flop_counter() as of_forward, torch.no_grad(), _autocast(latents.device.type, config):
        t = torch.ones(len(latents), device=latents.device)
        predict_velocity(objective.policy, latents, t, batch["prompt_embeds"], batch["prompt_mask"])
    with flop_counter() as of_step:
        _micro_steps(objective, batch, dataclasses.replace(config, gradient_accumulation_steps=1))
    for parameter in objective.parameters():
        parameter.grad = None
    return of_step.get_total_flops() * config.gradient_accumulation_steps, of_forward.get_total_flops() // len(latents)


def flop_counter() -> FlopCounterMode:
    """Of matrix products and attention; torch's own has no formula for the CPU's attention."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


def _autocast(device: str, config: TrainConfig) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=config.bf16)


def _micro_steps(objective: nn.Module, batch: Batch, config: TrainConfig) -> None:
    """One forward and backward pass, or with accumulation two: in the second the gradients are there already."""
    objective.train()
    device = batch["latents"].device.type
    for _ in range(min(config.gradient_accumulation_steps, 2)):
        with _autocast(device, config):
            loss, metrics = objective(batch)
        del metrics
        (loss / config.gradient_accumulation_steps).backward()
        del loss
