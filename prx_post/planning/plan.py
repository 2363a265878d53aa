"""`prx-post plan --config FILE`: what a stage would train, and what it takes in memory and on disk. Nothing is trained.

No weights are loaded, and none need be there: a pipeline's JSON files are enough.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from prx_post.base.parsing import parse, setting
from prx_post.base.settings import check_fields, doc, require
from prx_post.data.sizes import CacheSize
from prx_post.engine.config import require_whole_matrices
from prx_post.planning import generation, report
from prx_post.planning.disk import run_size
from prx_post.planning.parallel import read_parallel
from prx_post.planning.planner import Planner
from prx_post.stages.inherited import inherited
from prx_post.stages.registry import find


@dataclass
class PlanConfig:
    """What is planned, and for which machine. The other settings are the stage's own."""

    stage: str = doc("Stage that is planned.", "sft")
    accelerate_config: str | None = doc(
        "As in a launch: one of TRL's (`multi_gpu`, `zero1`, `zero2`, `zero3`), or an accelerate config file.", None
    )
    num_processes: int | None = doc("Processes of the run; null: what accelerate_config says, else 1.", None, above=0)
    device_memory_gib: float | None = doc(
        "Memory of one GPU, GiB; null: of this machine's GPU. Without either, nothing is said about fitting.",
        None,
        above=0,
    )

    seconds_per_step: float | None = doc(
        "Of an optimizer step, as a run's metrics have it; for the hours.", None, above=0
    )
    utilisation: float | None = doc(
        "Fraction of peak_tflops that a step reaches, such as 0.4; for the hours, where seconds_per_step is not known.",
        None,
        between=(0, 1),
    )
    peak_tflops: float | None = doc(
        "Of one GPU in the precision of the run, TFLOP/s: of an H100 in bfloat16 989, of an A100 312.", None, above=0
    )
    price_per_hour: float | None = doc("Of one GPU, in any currency.", None, above=0)
    measure: bool = doc(
        "grpo: time the network on this machine, with random weights, for the seconds of a rollout.", False
    )

    def __post_init__(self) -> None:
        check_fields(self)
        reason, action = "a step's time is its TFLOP over both", "Set both, or seconds_per_step"
        ok = (self.utilisation is None) == (self.peak_tflops is None) and self.utilisation != 0
        require(ok, "utilisation", self.utilisation, "above 0, together with peak_tflops", reason, action)

    def seconds(self, tflop: float) -> float | None:
        """Of a step of so many TFLOP in one process; None: not known."""
        if self.seconds_per_step is not None:
            return self.seconds_per_step
        if self.utilisation is None or self.peak_tflops is None:
            return None
        return tflop / (self.utilisation * self.peak_tflops)


def run(args: Sequence[str]) -> None:
    """`prx-post plan`"""
    planner, plan = check(args)
    print("\n".join(lines(planner, plan)))


def check(args: Sequence[str]) -> tuple[Planner, PlanConfig]:
    """Read and check the settings. Raises PrxPostError as the stage itself would."""
    name = str(setting(args, "stage") or "sft")  # which says what settings there are
    kinds = find(name).configs()
    *configs, plan = parse([*kinds, PlanConfig], args, "prx-post plan", inherited(kinds, partial(setting, args)))
    config = configs[-1]
    parallel = read_parallel(config, plan.accelerate_config, plan.num_processes)
    if parallel.zero_stage:
        require_whole_matrices(config.optim)
        config.check_zero(parallel.zero_stage, parallel.offload)
    config.settle(parallel.num_processes)
    return Planner(name, configs, parallel), plan


def lines(planner: Planner, plan: PlanConfig) -> list[str]:
    """The whole report."""
    config, stage = planner.config, planner.stage
    other = planner.dry_run(gradient_checkpointing=not config.gradient_checkpointing)
    run = planner.dry_run(operations=True)
    needed = planner.memory(run)
    cache = stage.cache_size()
    length = _set_length(planner, cache)
    written = run_size(run, config, bool(planner.lora_rank))
    device = plan.device_memory_gib or _device_memory_gib()
    does_not_fit = device is not None and needed.peak > device * report.GIB
    return [
        *report.answer(planner, plan, run, needed, device, cache, written),
        *report.network(planner, run),
        *report.memory_table(planner, run, needed, other, device),
        *report.disk(planner, cache, written),
        *_rollout(planner, plan),
        *report.steps(planner, cache, written),
        *length,
        *report.warnings(planner, needed, device, planner.savings(run, other) if does_not_fit else [], cache, written),
        "",
        *report.settings(plan, *planner.configs),
    ]


def _set_length(planner: Planner, cache: CacheSize | str | None) -> list[str]:
    """Have num_train_epochs, if it is given, say how many steps there are; a line if it cannot."""
    config, entries = planner.config, cache.entries if isinstance(cache, CacheSize) else 0
    if config.num_train_epochs is None:
        return []
    if not entries:
        return [
            f"  num_train_epochs is {config.num_train_epochs:g}, but how much there is to train on is not known here"
        ]
    config.max_steps = math.ceil(config.num_train_epochs * entries / planner.global_batch_size)
    return []


def _rollout(planner: Planner, plan: PlanConfig) -> list[str]:
    work = planner.stage.rollout_work()
    if work is None:
        return []
    timing = generation.measure(planner) if plan.measure else None
    return generation.lines(work, timing, planner.parallel.num_processes)


def _device_memory_gib() -> float | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / report.GIB
