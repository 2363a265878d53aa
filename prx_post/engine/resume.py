"""What of a run goes into a checkpoint, and how it is put back."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.settings import Rules
from prx_post.engine.checkpointing import SavedState
from prx_post.engine.config import TrainConfig
from prx_post.engine.ema import EMA
from prx_post.engine.partition import Partition, join, split


def check_settings(saved: SavedState, settings: dict[str, Any], rules: dict[str, Rules]) -> list[str]:
    """Lines on settings that differ from the checkpoint's. Raises PrxPostError for one that must not."""
    changed = {
        name: (before, settings[name])
        for name, before in saved.info["settings"].items()
        if name in settings and settings[name] != before and rules.get(name, Rules()).resume != "free"
    }
    before, now = saved.info["settings"]["ema_decay"], settings["ema_decay"]
    if (before == 0) != (now == 0):
        raise PrxPostError(
            f"ema_decay is {now}, but must be {'0' if before == 0 else 'above 0'} because {saved.folder} "
            f"{'holds no' if before == 0 else 'resumes with its'} average. Set it back, or start a new run."
        )
    for name, (before, now) in changed.items():
        if rules.get(name, Rules()).resume == "fixed":
            raise PrxPostError(
                f"{name} is {now!r}, but must be {before!r} because {saved.folder} was saved with it. "
                f"Set it back, or start a new run from the emitted pipeline."
            )
    return [f"resuming with {name} {now!r}; it was {before!r}" for name, (before, now) in changed.items()]


def keep_global_batch(config: TrainConfig, saved: SavedState, world_size: int) -> str | None:
    """Set gradient_accumulation_steps so that a step still takes as many samples. Returns a line if it changed.

    Raises:
        PrxPostError: no whole number does that.
    """
    wanted, per_micro_step = saved.info["global_batch_size"], config.per_device_train_batch_size * world_size
    if per_micro_step * config.gradient_accumulation_steps == wanted:
        return None
    if wanted % per_micro_step:
        raise PrxPostError(
            f"per_device_train_batch_size is {config.per_device_train_batch_size} on {world_size} process(es), but "
            f"must divide the {wanted} samples per step of {saved.folder}, which are kept. "
            f"Choose a divisor of {wanted / world_size:g}."
        )
    config.gradient_accumulation_steps = wanted // per_micro_step
    return (
        f"gradient_accumulation_steps is now {config.gradient_accumulation_steps}, which keeps the {wanted} samples a "
        f"step of {saved.folder.name} on {world_size} process(es)"
    )


def collect(
    partition: Partition,
    ema: EMA,
    buffers: Mapping[str, Tensor],
    of_this_rank: Mapping[str, Tensor],
    rank: int,
    world_size: int,
) -> dict[str, Tensor]:
    """This rank's part of the state, copied to the CPU. A collective under ZeRO.

    Args:
        buffers: of the trained modules, alike on all ranks.
        of_this_rank: by key; other ranks have other tensors under the same keys.
    """
    part: dict[str, Tensor] = {}
    for i, (name, parameter) in enumerate(partition.parameters.items()):
        average = ema.of(parameter)
        whole = {f"model/{name}": partition.weight(name)}
        whole |= {f"optimizer/{name}/{key}": value for key, value in partition.optimizer_state(name).items()}
        if average is not None:
            whole[f"ema/{name}"] = join(parameter, average)
        if i % world_size == rank:
            part |= {key: _copy(value) for key, value in whole.items()}
    if rank == 0:
        part |= {f"buffers/{name}": _copy(value) for name, value in buffers.items()}
    mine = random_state() | dict(of_this_rank)
    return part | {key: _copy(value) for key, value in mine.items()}


def _copy(value: Tensor) -> Tensor:
    """On the CPU, and no longer touched by training."""
    return value.detach().contiguous().to("cpu", copy=True)


def restore(partition: Partition, ema: EMA, buffers: Mapping[str, Tensor], saved: SavedState) -> None:
    """Put back weights, optimizer state, averages and buffers.

    Raises:
        PrxPostError: the checkpoint is of another model.
    """
    tensors = saved.tensors()
    shapes = {
        name: tuple(p.ds_shape if hasattr(p, "ds_shape") else p.shape) for name, p in partition.parameters.items()
    }
    found = tensors.shapes("model")
    if found != shapes:
        odd = sorted(found.items() ^ shapes.items())[0][0]
        raise PrxPostError(
            f"{saved.folder} holds other weights than are trained here: {odd} is {found.get(odd, 'absent')} there and "
            f"{shapes.get(odd, 'absent')} here. Resume with the model and LoRA settings of that run."
        )
    states: dict[str, dict[str, Tensor]] = {name: {} for name in shapes}
    for key, value in tensors.under("optimizer"):
        name, _, part = key.rpartition("/")
        states[name][part] = value
    if any(states.values()):
        partition.set_optimizer_state(states)
    del states
    for name, parameter in partition.parameters.items():
        partition.set_weight(name, tensors[f"model/{name}"])
        average = ema.of(parameter)
        if average is not None:
            average.copy_(split(parameter, tensors[f"ema/{name}"].to(average.device)))
    for name, buffer in buffers.items():
        buffer.copy_(tensors[f"buffers/{name}"])


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators (CPU and this process's GPU), Python's and numpy's."""
    _, python_words, python_gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    state = {
        "rng/cpu": torch.get_rng_state(),
        "rng/python": torch.tensor(python_words, dtype=torch.int64),
        "rng/numpy": torch.tensor([*numpy_state[1].tolist(), numpy_state[2]], dtype=torch.int64),
        # the second normal variate that each keeps back, or nan
        "rng/gauss": torch.tensor(
            [torch.nan if python_gauss is None else python_gauss, numpy_state[4] if numpy_state[3] else torch.nan],
            dtype=torch.float64,
        ),
    }
    if torch.cuda.is_available():
        state["rng/cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(saved: SavedState, rank: int) -> None:
    """Put back `random_state` of the same rank."""
    state = saved.of_rank(rank)
    torch.set_rng_state(state["rng/cpu"])
    python_gauss, numpy_gauss = state["rng/gauss"].tolist()
    random.setstate((3, tuple(state["rng/python"].tolist()), None if np.isnan(python_gauss) else python_gauss))
    words = state["rng/numpy"].tolist()
    has_gauss = not np.isnan(numpy_gauss)
    key = np.array(words[:-1], dtype=np.uint32)
    np.random.set_state(("MT19937", key, words[-1], int(has_gauss), numpy_gauss if has_gauss else 0.0))
    if torch.cuda.is_available() and "rng/cuda" in state:
        torch.cuda.set_rng_state(state["rng/cuda"])
