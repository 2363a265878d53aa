"""Losses: tensors in, (loss, metrics) out."""

from prx_post.objectives import distillation, dpo, flow_matching, ladd

__all__ = ["distillation", "dpo", "flow_matching", "ladd"]
