"""One optimizer step on tensors without memory, and the greatest sum of what was alive at a time.

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

from prx_post.engine.config import TrainConfig
from prx_post.engine.optim import build_optimizer
from prx_post.engine.protocols import Batch
from prx_post.model.checkpoint import PipelineFolder
from prx_post.model.config import ModelConfig
from prx_post.stages.common import prepare_network


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
        activations: the peak of forward and backward pass without gradients: what autograd keeps, the gradients of
            activations, one batch.
        activations_and_gradients: the same with the gradients that exist at that moment.
        step_temporaries: what the optimizer needs in passing, beyond gradients and its state.
        accumulates: whether a step has several micro-batches.
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


def dry_run(
    pipeline: PipelineFolder,
    model: ModelConfig,
    config: Any,
    objective: Callable[[Any, Any], nn.Module],
    size: tuple[int, int],
    prompt_tokens: int,
    device: str,
) -> DryRun:
    """Observe one optimizer step of a stage.

    Args:
        config: the stage's; its optimizer, accumulation, autocast and gradient checkpointing are followed.
        objective: makes the stage's objective from the network and `config`.
        size: height and width of the pictures, pixels.
        device: whose kernels are meant; `cuda` needs a torch that was built for it, and a GPU.
    """
    from diffusers import PRXTransformer2DModel

    config = dataclasses.replace(config, torch_compile=False)  # compiled code cannot be watched
    with torch.device("meta"):
        network = prepare_network(PRXTransformer2DModel.from_config(pipeline.configs["transformer"]), model, config)
    with FakeTensorMode():
        _move(network, device)
        weights = list(network.parameters())
        trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        watch = StorageWatch([*weights, *network.buffers()])
        for _, parameter in trained:
            parameter.register_post_accumulate_grad_hook(watch.mark_gradient)
        with watch:
            _micro_steps(objective(network, config), _batch(pipeline, config, size, prompt_tokens, device), config)
            peaks = watch.peak_without_gradients, watch.peak
            optimizer = build_optimizer(trained, config)
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
    return DryRun(
        parameters=sum(p.numel() for p in weights),
        trained_parameters=sum(p.numel() for _, p in trained),
        weights=sum(p.nbytes for p in weights),
        gradients=watch.gradients,
        optimizer=state,
        activations=peaks[0],
        activations_and_gradients=peaks[1],
        step_temporaries=watch.peak - before,
        accumulates=config.gradient_accumulation_steps > 1,
    )


def _move(network: nn.Module, device: str) -> None:
    """Replace meta tensors by fake ones of `device`. (`Module.to` would swap them, which fakes refuse.)"""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(fake, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def _micro_steps(objective: nn.Module, batch: Batch, config: TrainConfig) -> None:
    """One forward and backward pass, or with accumulation two: in the second the gradients are there already."""
    objective.train()
    device = batch["latents"].device.type
    for _ in range(min(config.gradient_accumulation_steps, 2)):
        with torch.autocast(device, torch.bfloat16, enabled=config.bf16):
            loss, metrics = objective(batch)
        del metrics
        (loss / config.gradient_accumulation_steps).backward()
        del loss


def _batch(
    pipeline: PipelineFolder, config: TrainConfig, size: tuple[int, int], prompt_tokens: int, device: str
) -> Batch:
    samples = config.per_device_train_batch_size
    width = pipeline.configs["transformer"]["context_in_dim"]
    text_dtype = torch.bfloat16 if config.bf16 else torch.float32
    return {
        "latents": torch.empty(samples, *pipeline.latent_shape(*size), device=device),
        "prompt_embeds": torch.empty(samples, prompt_tokens, width, dtype=text_dtype, device=device),
        "prompt_mask": torch.ones(samples, prompt_tokens, dtype=torch.bool, device=device),
        "seeds": list(range(samples)),
        "rows": list(range(samples)),
    }
