"""What of a transformer is trained: every weight, or an adapter; and the trained weights put back into a pipeline."""

from typing import Any

import torch
from torch import Tensor

from prx_post.engine.config import TrainConfig
from prx_post.model import lora
from prx_post.model.config import ModelConfig


def make_trainable(transformer: Any, model: ModelConfig, config: TrainConfig) -> Any:
    """The transformer with what is to be trained unfrozen: itself, or a PeftModel around it."""
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if config.torch_compile:
        for block in transformer.blocks:
            block.compile()
    if model.use_peft:
        return lora.attach(transformer, model)
    return transformer.train().requires_grad_(True)


@torch.no_grad()
def with_weights(transformer: Any, model: ModelConfig, weights: dict[str, Tensor]) -> Any:
    """A fresh transformer, or a PeftModel around it, with trained `weights` by name.

    Fresh, because the network in training may be split, compiled or wrapped.
    """
    network = lora.attach(transformer, model) if model.use_peft else transformer
    named = dict(network.named_parameters())
    for name, value in weights.items():
        named[name].copy_(value)
    return network
