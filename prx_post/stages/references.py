"""The policy as it was: which of the frozen networks holds it, for a run's kind of training."""

from typing import Any

import torch

from prx_post.engine.protocols import Reference
from prx_post.engine.run import Run
from prx_post.model.checkpoint import PipelineFolder
from prx_post.model.frozen import AdapterOff, EarlierSelf, FrozenCopy, SlowAverage


def earlier_policy(
    run: Run, pipeline: PipelineFolder, policy: Any, *, is_adapter: bool, follows: bool, dtype: torch.dtype
) -> Reference:
    """The policy as it is now.

    Args:
        pipeline: that it started from.
        is_adapter: whether it is a PeftModel, which then is its own reference and needs no second network.
        follows: whether it is to be brought up to date later, by `follow`.
        dtype: of a copy.
    """
    if is_adapter:
        is_held = follows and not run.is_planned  # a plan has no weights to remember
        return EarlierSelf(policy, run.device) if is_held else AdapterOff(policy)
    network = run.transformer(pipeline, dtype)
    return SlowAverage(run.place(network)) if follows else FrozenCopy(run.frozen(network))
