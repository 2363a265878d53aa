"""What a run writes besides the cache: checkpoints, the emitted pipeline."""

from dataclasses import dataclass

from prx_post.engine.config import TrainConfig
from prx_post.model.checkpoint import DTYPES
from prx_post.planning.dry_run import DryRun


@dataclass(frozen=True)
class RunSize:
    """Bytes and numbers of what is written to `output_dir`.

    Attributes:
        saves: checkpoints in the whole run, without those that a signal causes.
        held: how many of them are on disk at most; a new one is complete before the oldest goes.
    """

    saves: int
    held: int
    checkpoint: int
    transformer: int


def run_size(run: DryRun, config: TrainConfig, use_peft: bool) -> RunSize:
    average = 4 * run.averaged_parameters if config.ema_decay else 0
    saves = -(-config.max_steps // config.save_steps) if config.save_steps else 0
    held = saves if config.save_total_limit is None else min(saves, config.save_total_limit + 1)
    emitted = run.parameters - (run.averaged_parameters if use_peft else 0)  # an adapter is merged
    return RunSize(
        saves=saves,
        held=held,
        checkpoint=4 * run.trained_parameters + run.optimizer + average,
        transformer=DTYPES[config.emit_dtype].itemsize * emitted,
    )
