"""A stage's settings and what follows from them without training."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from prx_post.planning.dry_run import DryRun, dry_run
from prx_post.planning.memory import Memory, memory
from prx_post.planning.parallel import Parallel
from prx_post.stages.registry import Stage, find


class Planner:
    """A stage's settings and what follows from them without training.

    Args:
        configs: the stage's own, the last of which extends TrainConfig.
    """

    def __init__(self, name: str, configs: Sequence[Any], parallel: Parallel) -> None:
        self.name, self.parallel = name, parallel
        self.configs, self.config = tuple(configs), configs[-1]
        self.stage = self._open(self.config)

    def _open(self, config: Any) -> Stage:
        return find(self.name).stage()(*self.configs[:-1], config, planned=True)

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for config in self.configs for name, value in dataclasses.asdict(config).items()}

    @property
    def lora_rank(self) -> int:
        """0 if every weight is trained."""
        return self.settings["lora_r"] if self.settings.get("use_peft") else 0

    @property
    def cache_dir(self) -> str:
        return self.settings["cache_dir"]

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step, on all processes."""
        config = self.config
        return config.per_device_train_batch_size * self.parallel.num_processes * config.gradient_accumulation_steps

    @property
    def has_one_size(self) -> bool:
        return getattr(self.stage, "size", None) is not None

    @property
    def largest_size(self) -> tuple[int, int]:
        """Height and width of what a step takes at most, pixels."""
        return self.stage.largest_size

    @property
    def device(self) -> str:
        """Whose kernels are watched: a fake CUDA tensor needs a real GPU's driver."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    def dry_run(self, *, operations: bool = False, **changes: Any) -> DryRun:
        """One step of the largest batch, with `changes` to the stage's settings."""
        return dry_run(self._open, dataclasses.replace(self.config, **changes), self.device, operations)

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
        half = config.per_device_train_batch_size // 2
        if half and half % config.smallest_batch == 0:
            fewer = self.dry_run(
                per_device_train_batch_size=half,
                gradient_accumulation_steps=2 * config.gradient_accumulation_steps,
            )
            options.append((f"per_device_train_batch_size: {half}, twice the accumulation", self.memory(fewer)))
        return options
