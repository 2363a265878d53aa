"""A score from an embedding by five linear layers: the head of LAION's aesthetic predictor, and of ImageReward."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from prx_post.rewards.scorers.weights import check_tensors, require_tensors

LAYERS = (0, 2, 4, 6, 7)
"""Their places in the published `layers`; dropout stands between, and no activation."""


def linear_head(tensors: Mapping[str, Tensor], width: int, path: Path) -> nn.Module:
    """[B, width] fp32 -> [B, 1].

    Args:
        tensors: `layers.0.weight`, `layers.0.bias` … `layers.7.bias`.

    Raises:
        PrxPostError: there are others, or their shapes do not follow from another.
    """
    what = f"a head for embeddings of width {width}"
    require_tensors(tensors, (f"layers.{i}.weight" for i in LAYERS), path, what)
    outputs = [1 if i == LAYERS[-1] else tensors[f"layers.{i}.weight"].shape[0] for i in LAYERS]
    inputs = [width, *outputs[:-1]]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, rows, columns in zip(LAYERS, outputs, inputs, strict=True):
        shapes |= {f"layers.{i}.weight": (rows, columns), f"layers.{i}.bias": (rows,)}
    check_tensors(tensors, shapes, path, what)
    with torch.device("meta"):
        head = nn.Sequential(*(nn.Linear(*sizes) for sizes in zip(inputs, outputs, strict=True)))
    for layer, i in zip(head, LAYERS, strict=True):
        for name in ("weight", "bias"):
            setattr(layer, name, nn.Parameter(tensors[f"layers.{i}.{name}"].float(), requires_grad=False))
    return head.eval()
