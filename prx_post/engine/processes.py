"""The processes of a run: accelerate's object, DeepSpeed's settings, and agreement between ranks."""

import copy
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from tqdm import tqdm
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from prx_post.base.errors import ConfigError, PrxPostError
from prx_post.base.ranks import ALONE, TIMEOUT, Ranks, gathering
from prx_post.engine.config import TrainConfig, require_whole_matrices

SUPPORTED = (
    *(DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU),
    *(DistributedType.MULTI_NPU, DistributedType.DEEPSPEED),
)
"""Not FSDP, whose split weights partition.py does not know."""

ABANDONED_AFTER_S = 1800
"""Age of a build's lock from which on nobody is taken to be building."""

EXPECTED_PROCESSES = "PRX_POST_NUM_PROCESSES"
"""Environment variable in which our launcher says how many processes it was asked for."""


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's object for this run.

    Weights are fp32 everywhere and `bf16` is autocast, so accelerate itself is told no mixed precision: with DeepSpeed
    it would turn the weights to bfloat16.

    Raises:
        PrxPostError: it does not see the processes that were launched, or another number than was asked for.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and "RANK" not in os.environ:
        raise PrxPostError(
            f"WORLD_SIZE is {launched}, but RANK is not set, so processes cannot find each other. "
            f"Start them with a launcher (see --help), or unset WORLD_SIZE."
        )
    plugin = deepspeed_plugin(config)
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=list(config.report_to) or None,  # type: ignore[arg-type]
        project_config=ProjectConfiguration(str(config.folder), logging_dir=str(config.folder / "logs")),
        # Without a GPU accelerate starts processes only if told that the CPU is meant, but DeepSpeed only if it is not.
        cpu=on_cpu and plugin is None,
        deepspeed_plugin=plugin,
        kwargs_handlers=[
            InitProcessGroupKwargs(
                backend="gloo" if on_cpu and "RANK" in os.environ else None,
                timeout=timedelta(seconds=config.ddp_timeout),
            ),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    if plugin is not None:
        # accelerate tells transformers of DeepSpeed, which under ZeRO-3 would then split the frozen text encoder too
        unset_hf_deepspeed_config()
    if accelerator.distributed_type not in SUPPORTED:
        raise PrxPostError(f"{accelerator.distributed_type} is not supported. Use one process, DDP or DeepSpeed.")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no" and not config.bf16 and accelerator.is_main_process:
        tqdm.write(f"the accelerate config says mixed_precision: {asked}, but bf16 is false, so this run is fp32")
    for name, number in (("WORLD_SIZE", launched), ("num_processes", os.environ.get(EXPECTED_PROCESSES, launched))):
        if int(number) != accelerator.num_processes:
            raise PrxPostError(
                f"{name} is {number}, but accelerate runs {accelerator.num_processes} process(es), so that each would "
                f"train alone and write over the others. Check the launch command and its accelerate config."
            )
    return accelerator


def uses_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def deepspeed_plugin(config: TrainConfig) -> DeepSpeedPlugin | None:
    """DeepSpeed's settings: from `deepspeed`, else from the environment that `accelerate launch` set up, else None."""
    if config.deepspeed is None:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
            return None
        require_whole_matrices(config.optim)
        plugin = DeepSpeedPlugin(zero3_init_flag=False)
    elif config.deepspeed.endswith(".json"):
        plugin = DeepSpeedPlugin(hf_ds_config=read_deepspeed_json(config.deepspeed), zero3_init_flag=False)
    else:
        plugin = DeepSpeedPlugin(
            zero_stage=int(config.deepspeed[4]),
            offload_optimizer_device="cpu" if config.deepspeed.endswith("_offload") else "none",
            zero3_init_flag=False,
        )
    check_no_abandoned_build()
    settings = plugin.deepspeed_config
    zero = settings["zero_optimization"]
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    config.check_zero(int(zero.get("stage", 0)), offload)
    if "RANK" not in os.environ:  # a single process without a launcher: DeepSpeed still wants a process group
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    # what the loop itself decides
    settings["train_micro_batch_size_per_gpu"] = config.per_device_train_batch_size
    settings["train_batch_size"] = "auto"
    settings["gradient_accumulation_steps"] = plugin.gradient_accumulation_steps = config.gradient_accumulation_steps
    settings["gradient_clipping"] = plugin.gradient_clipping = config.max_grad_norm
    # Gradients are reduced and weights gathered in fp32, as without DeepSpeed: no module is safe for less.
    settings["torch_autocast"] = {
        "enabled": config.bf16,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    # A small weight that stays gathered would not follow when the averaged weights are swapped in.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return plugin


def check_no_abandoned_build() -> None:
    """DeepSpeed compiles what it needs at a first run; killed meanwhile, it leaves a lock later runs wait for.

    Raises:
        PrxPostError: there is such a lock, too old for a build that goes on.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.rglob("lock")):
        try:
            age_s = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # others' build ended just now
            continue
        if age_s > ABANDONED_AFTER_S:
            raise PrxPostError(
                f"{lock} is {age_s / 3600:.1f} h old: a build of that extension was killed, and DeepSpeed would wait "
                f"for it without end. Delete {lock.parent}."
            )


def split_frozen(module: Any, accelerator: Accelerator) -> Any:
    """A frozen network on this process's device; under ZeRO-3 an engine of its own holds this process's part of it."""
    if not uses_deepspeed(accelerator) or accelerator.state.deepspeed_plugin.zero_stage < 3:
        return module.to(accelerator.device)
    import deepspeed

    settings = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    settings["zero_optimization"].pop("offload_optimizer", None)  # there is none
    settings.pop("train_batch_size")  # "auto" is accelerate's word; it follows from the others
    engine, *_ = deepspeed.initialize(model=module, config=settings)
    engine.eval()
    return engine


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """A DeepSpeed configuration. Raises ConfigError for what would contradict the run's own settings."""
    file = Path(path).expanduser()
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed is {path!r}, which cannot be read: {error}. Check the path.") from error
    for section, instead in (("optimizer", "optim, learning_rate and adam_*"), ("scheduler", "lr_scheduler_type")):
        if section in settings:
            raise ConfigError(f"deepspeed file {path} has {section!r}, which belongs to {instead}. Remove it there.")
    for section in ("fp16", "bf16"):
        if settings.get(section, {}).get("enabled", False) not in (False, "auto"):
            raise ConfigError(
                f"deepspeed file {path} enables {section!r}, but the weights stay fp32. Remove it; set bf16: true."
            )
        settings.pop(section, None)
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise ConfigError(f"deepspeed file {path} has no zero_optimization with stage 1, 2 or 3. Add it.")
    if zero.get("offload_param", {}).get("device", "none") != "none":
        raise ConfigError(f"deepspeed file {path} offloads parameters, which is not supported. Remove offload_param.")
    return settings


def autocast(config: TrainConfig, accelerator: Accelerator) -> AbstractContextManager[Any]:
    """bfloat16 autocast for a forward pass. DeepSpeed brings its own, set in `deepspeed_plugin`."""
    if not config.bf16 or uses_deepspeed(accelerator):
        return nullcontext()
    return torch.autocast(accelerator.device.type, torch.bfloat16)


def ranks_of(accelerator: Accelerator) -> Ranks:
    """The run's processes, in a group of their own, which waits for hours: for one that encodes or scores."""
    if accelerator.num_processes == 1:
        return ALONE
    group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
    return gathering(accelerator.process_index, accelerator.num_processes, group)


def agreement(accelerator: Accelerator, timeout_s: int) -> Callable[[int], int]:
    """A small collective, which all processes must call: the largest of their values. It does not wait for a GPU."""
    if accelerator.num_processes == 1:
        return lambda value: value
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def largest(value: int) -> int:
        agreed = torch.tensor(value)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group)
        return int(agreed)

    return largest
