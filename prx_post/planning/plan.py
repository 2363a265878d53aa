"""`prx-post plan --config FILE`: what a stage would train, and what it takes in memory and on disk. Nothing is trained.

No weights are loaded, and none need be there: a pipeline's JSON files are enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from prx_post.base.parsing import parse, setting
from prx_post.base.settings import check_fields, doc
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

    measure: bool = doc(
        "grpo: time the network on this machine, with random weights, for the seconds of a rollout.", False
    )

    def __post_init__(self) -> None:
        check_fields(self)


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
    run = planner.dry_run()
    needed = planner.memory(run)
    cache = stage.cache_size()
    written = run_size(run, config, bool(planner.lora_rank))
    device = plan.device_memory_gib or _device_memory_gib()
    does_not_fit = device is not None and needed.peak > device * report.GIB
    return [
        *report.settings(plan, *planner.configs),
        *report.network(planner, run),
        *report.memory_table(planner, run, needed, other, device),
        *report.disk(planner, cache, written),
        *_rollout(planner, plan),
        *report.steps(config, planner.parallel, cache, written),
        *report.warnings(planner, needed, device, planner.savings(run, other) if does_not_fit else [], cache, written),
    ]


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
