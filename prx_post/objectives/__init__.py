"""Losses: tensors in, (loss, metrics) out."""

from prx_post.objectives import distillation, flow_matching, ladd

__all__ = ["distillation", "flow_matching", "ladd"]
