"""A stage's settings and what follows from them without training."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prx_post.data.buckets import Buckets, Size
from prx_post.data.config import DataConfig
from prx_post.model import lora
from prx_post.model.checkpoint import PipelineFolder, open_pipeline
from prx_post.model.config import ModelConfig
from prx_post.planning.dry_run import DryRun, dry_run
from prx_post.planning.memory import Memory, memory
from prx_post.planning.parallel import Parallel
from prx_post.stages.sft import FlowMatchingObjective, SFTConfig


@dataclass(frozen=True)
class Stage:
    """What `plan` has to know of a stage: its settings, the last of which extends TrainConfig, and its objective."""

    configs: tuple[type, ...]
    objective: Callable[[Any, Any], nn.Module]


def _flow_matching(network: Any, config: SFTConfig) -> nn.Module:
    # the assignment of noises needs values, and no memory to speak of
    return FlowMatchingObjective(network, dataclasses.replace(config, immiscible=False))


STAGES = {"sft": Stage((ModelConfig, DataConfig, SFTConfig), _flow_matching)}


@dataclass
class Planner:
    """A stage's settings and what follows from them without training."""

    stage: Stage
    model: ModelConfig
    data: DataConfig
    config: Any
    parallel: Parallel
    pipeline: PipelineFolder = dataclasses.field(init=False)
    buckets: Buckets = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.pipeline = open_pipeline(str(self.model.model_name_or_path), self.model.model_revision, weights=False)
        self.buckets = Buckets(self.pipeline, self.data.height, self.data.width)
        if self.model.use_peft:
            lora.check_targets(self.pipeline, self.model.lora_target_modules)

    @property
    def device(self) -> str:
        """Whose kernels are watched: a fake CUDA tensor needs a real GPU's driver."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def largest_size(self) -> Size:
        """Height and width of the bucket with the most pixels."""
        if self.buckets.fixed is not None:
            return self.buckets.fixed
        sizes = [(int(height), int(width)) for height, width in self.buckets.ratios.values()]
        return max(sizes, key=lambda size: size[0] * size[1])

    def dry_run(self, **changes: Any) -> DryRun:
        """One step of the largest batch, with `changes` to the stage's settings."""
        config = dataclasses.replace(self.config, **changes)
        tokens = self.pipeline.max_prompt_tokens
        return dry_run(self.pipeline, self.model, config, self.stage.objective, self.largest_size, tokens, self.device)

    def memory(self, run: DryRun, parallel: Parallel | None = None) -> Memory:
        return memory(run, parallel or self.parallel, bool(self.config.ema_decay))

    def savings(self, run: DryRun, other: DryRun) -> list[tuple[str, Memory]]:
        """Other settings that train the same, and what they would take.

        Args:
            run, other: a step as configured, and with gradient checkpointing the other way.
        """
        config, parallel = self.config, self.parallel
        options = [] if config.gradient_checkpointing else [("gradient_checkpointing: true", self.memory(other))]
        if parallel.zero_stage < 3 and config.optim == "adamw":
            count = parallel.num_processes if parallel.num_processes > 1 else 4
            for stage in range(max(2, parallel.zero_stage + 1), 4):
                split = dataclasses.replace(parallel, num_processes=count, zero_stage=stage, offload=False)
                options.append((f"deepspeed: zero{stage} on {count} GPUs", self.memory(run, split)))
        if config.per_device_train_batch_size > 1:
            half = config.per_device_train_batch_size // 2
            fewer = self.dry_run(
                per_device_train_batch_size=half,
                gradient_accumulation_steps=2 * config.gradient_accumulation_steps,
            )
            options.append((f"per_device_train_batch_size: {half}, twice the accumulation", self.memory(fewer)))
        return options
