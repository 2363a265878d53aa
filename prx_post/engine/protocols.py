"""What a stage gives to the trainer."""

from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]
"""latents [B, C, H, W], prompt_embeds [B, L, D], prompt_mask [B, L] bool, seeds and rows: lists of B ints; step: of the
optimizer, counted from 0"""


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
