"""Scorers of images, one per file, and judges of pairs; in process, or served to other machines (service/)."""

from typing import TYPE_CHECKING, Any

from prx_post.rewards.registry import load

if TYPE_CHECKING:
    from prx_post.rewards.reward import Reward

__all__ = ["Reward", "load"]


def __getattr__(name: str) -> Any:
    if name != "Reward":
        raise AttributeError(f"module 'prx_post.rewards' has no attribute {name!r}")
    from prx_post.rewards.reward import Reward  # imports torch, which settings that name rewards do without

    return Reward
