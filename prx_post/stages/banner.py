"""What a run is about to do, in a few lines before its first step."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from prx_post.engine.protocols import Objective
from prx_post.engine.run import Run


def banner(run: Run, steps_per_epoch: float, objective: Objective) -> str:
    """Its length, what is trained, the batch, and where to look while it trains."""
    config = run.config
    epochs = config.max_steps / steps_per_epoch
    lines = {
        "steps": f"{config.max_steps:,}, which is {epochs:,.3g} epoch{'' if epochs == 1 else 's'} of "
        f"{steps_per_epoch:,.4g} steps",
        "trains": _trained(objective),
        "batch": f"{run.global_batch_size:,} in a step: {config.per_device_train_batch_size} on each of "
        f"{run.ranks.world} device{'' if run.ranks.world == 1 else 's'}, {config.gradient_accumulation_steps} times",
        "cache": run.settings["cache_dir"] if run.settings.get("cache") != "none" else "none: encoded on the fly",
        "output": f"{run.output_dir}, a checkpoint every {config.save_steps:,} steps"
        if config.save_steps
        else f"{run.output_dir}, no checkpoints (save_steps: 0)",
    }
    if "tensorboard" in config.report_to:
        lines["watch"] = f"tensorboard --logdir {run.output_dir / 'logs'}"
    return "\n".join(f"  {name:<7} {line}" for name, line in lines.items())


def _trained(objective: Any) -> str:
    policy = objective.policy
    ours = {id(parameter) for parameter in policy.parameters()}
    others = _count(p for p in objective.parameters() if p.requires_grad and id(p) not in ours)
    trained, whole = _count(p for p in policy.parameters() if p.requires_grad), _count(policy.parameters())
    text = f"{trained:,} parameters" if trained == whole else f"{trained:,} of {whole:,} parameters"
    return text + (f", and {others:,} of networks beside the policy" if others else "")


def _count(parameters: Iterable[nn.Parameter]) -> int:
    """Elements, of whole parameters where DeepSpeed has split them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
