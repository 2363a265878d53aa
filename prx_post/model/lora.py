"""LoRA adapters on a PRX transformer: attach, save, merge. peft does the work."""

from pathlib import Path
from typing import Any

import torch

from prx_post.config import ModelConfig, PrxPostError

TARGET_MODULES = ["img_qkv_proj", "txt_kv_proj", "to_out.0", "gate_proj", "up_proj", "down_proj"]
"""Every attention and MLP projection of a block."""


def attach(transformer: torch.nn.Module, config: ModelConfig) -> Any:
    """Freeze the transformer and add a fresh adapter, whose output is zero. Returns the PeftModel.

    Raises:
        PrxPostError: a target module does not exist.
    """
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules or TARGET_MODULES
    names = [name for name, _ in transformer.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise PrxPostError(
                f"lora_target_modules is {targets}, but {target!r} is no module of the transformer. "
                f"Choose from {', '.join(TARGET_MODULES)}."
            )
    settings = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets
    )
    return get_peft_model(transformer, settings)  # type: ignore[arg-type]


def save_adapter(peft_model: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as `peft.PeftModel.from_pretrained` reads them."""
    peft_model.save_pretrained(folder)


def merge(peft_model: Any) -> Any:
    """Fold the adapter into the weights and return the plain transformer. The adapter is gone afterwards."""
    return peft_model.merge_and_unload()
