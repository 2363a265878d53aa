"""Scorers of images, one per file, and judges of pairs; in process, or served to other machines (service/)."""

from prx_post.rewards.registry import load

__all__ = ["load"]
