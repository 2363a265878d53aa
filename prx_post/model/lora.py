"""LoRA adapters on a PRX transformer: attach, save, merge. peft does the work."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prx_post.base.errors import PrxPostError
from prx_post.model.checkpoint import PipelineFolder
from prx_post.model.config import ModelConfig

TARGET_MODULES = ["img_qkv_proj", "txt_kv_proj", "to_out.0", "gate_proj", "up_proj", "down_proj"]
"""Every attention and MLP projection of a block."""


def attach(transformer: torch.nn.Module, config: ModelConfig) -> Any:
    """Freeze the transformer and add a fresh adapter, whose output is zero. Returns the PeftModel."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or TARGET_MODULES,
    )
    model: Any = get_peft_model(transformer, settings)  # type: ignore[arg-type]
    model.peft_config["default"].base_model_name_or_path = config.model_name_or_path
    return model


def check_targets(pipeline: PipelineFolder, targets: list[str] | None) -> None:
    """Raise PrxPostError for a target that is no linear layer of the transformer; no weights are loaded."""
    missing = _missing_target(pipeline, targets or TARGET_MODULES)
    if missing is not None:
        raise PrxPostError(
            f"lora_target_modules is {targets}, but {missing!r} is no linear layer of the transformer. "
            f"Choose from {', '.join(TARGET_MODULES)}."
        )


def _missing_target(pipeline: PipelineFolder, targets: Iterable[str]) -> str | None:
    from diffusers import PRXTransformer2DModel

    with torch.device("meta"):
        transformer = PRXTransformer2DModel.from_config(pipeline.configs["transformer"])
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    return next((t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)), None)


def with_adapter(pipeline: PipelineFolder, path: str | None) -> PipelineFolder:
    """The pipeline, a saved LoRA adapter merged into its transformer when that is loaded; no weights are loaded now.

    Args:
        path: the adapter's folder; None: of none.

    Raises:
        PrxPostError: there is none, or it is for another network.
    """
    if path is None:
        return pipeline
    folder = Path(path).expanduser()
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config.is_file() or not weights.is_file():
        raise PrxPostError(
            f"adapter is {path!r}, but must be a folder with adapter_config.json and adapter_model.safetensors, such "
            f"as a run's final-adapter. Check the path."
        )
    beside = folder.with_name(folder.name.removesuffix("-adapter"))
    if beside != folder and beside.resolve() == pipeline.path.resolve():
        raise PrxPostError(
            f"adapter is {path!r}, but {pipeline.path} has it merged already. Take the pipeline that it was trained on."
        )
    try:
        targets = json.loads(config.read_text(encoding="utf-8")).get("target_modules") or []
        with safe_open(weights, framework="pt"):
            pass
    except (ValueError, AttributeError, OSError, SafetensorError) as error:
        raise PrxPostError(f"adapter is {path!r}, which cannot be read: {error}. Copy it again.") from error
    missing = _missing_target(pipeline, [targets] if isinstance(targets, str) else targets)
    if missing is not None:
        raise PrxPostError(f"adapter is {path!r}, which is for {missing!r}, no linear layer of {pipeline.source}.")
    return dataclasses.replace(pipeline, adapter=folder)


def save_adapter(peft_model: Any, folder: Path, card: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as `peft.PeftModel.from_pretrained` reads them.

    peft's own README.md would hold a local path as a Python object; `card` takes its place.
    """
    peft_model.save_pretrained(folder, save_embedding_layers=False)  # there are none; peft would ask the Hub
    (folder / "README.md").write_text(card)
