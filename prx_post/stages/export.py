"""`prx-post export`: the pipeline of a checkpoint that a run saved on its way."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.files import require_empty
from prx_post.base.parsing import parse
from prx_post.base.settings import check_fields, doc
from prx_post.engine.checkpointing import SavedState, checkpoints, open_checkpoint
from prx_post.engine.protocols import POLICY
from prx_post.model.checkpoint import open_pipeline
from prx_post.model.lora import with_adapter
from prx_post.stages.registry import find


@dataclass
class ExportConfig:
    """The pipeline of a checkpoint, with the averaged weights if the run averaged."""

    checkpoint: str | None = doc(
        "Folder of a checkpoint, or of a run: its newest.", None, required=("a folder", "its weights are exported")
    )
    output_dir: str | None = doc(
        "Folder for the pipeline; must be new or empty.", None, required=("a folder", "it is written there")
    )

    def __post_init__(self) -> None:
        check_fields(self)


def run(args: Sequence[str]) -> None:
    """`prx-post export`"""
    (config,) = parse([ExportConfig], args, "prx-post export")
    print(f"pipeline in {export(Path(str(config.checkpoint)).expanduser(), str(config.output_dir))}")


def export(folder: Path, output_dir: str) -> Path:
    """Write the pipeline of a checkpoint, and of an adapter's its folder beside it. Returns the pipeline's.

    Raises:
        PrxPostError: there is no checkpoint, it is damaged, or output_dir is not empty.
    """
    saved = _open(folder)
    target = require_empty(output_dir)
    saved.verify()
    settings: dict[str, Any] = saved.info["settings"]
    entry = find(saved.info["stage"])
    stage: Any = entry.stage()(*(_config(kind, settings) for kind in entry.configs()), planned=True)
    base = open_pipeline(settings["model_name_or_path"], settings["model_revision"])  # planned: without weights
    stage.pipeline = with_adapter(base, stage.model.adapter)
    if stage.model.use_peft and stage.base_digest() != saved.info["base"]:
        raise PrxPostError(
            f"{saved.folder} is an adapter for another transformer than {stage.pipeline.source} has now. Put the one "
            f"back that it was trained on."
        )
    source = settings.get("dataset_name") or settings.get("prompts_file") or "what the run was given"
    metrics = {"step": saved.step, "loss": None, "best": None}
    title = f"{saved.folder.parent.name}, step {saved.step}"
    stage.write(target, stage.card(title, settings, str(source), metrics), _weights(saved))
    return target


def _open(folder: Path) -> SavedState:
    if (folder / "state.json").is_file():
        return open_checkpoint(folder)
    inside = checkpoints(folder) if folder.is_dir() else []
    if not inside:
        raise PrxPostError(
            f"checkpoint is {str(folder)!r}, which is no checkpoint, nor a run with one. Check the path."
        )
    return open_checkpoint(inside[-1])


def _config(kind: type, settings: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in names})


def _weights(saved: SavedState) -> dict[str, Tensor]:
    """The policy's, averaged if there is an average."""
    tensors, prefix = saved.tensors(), f"{POLICY}."
    found = {name: value for name, value in tensors.under("ema") if name.startswith(prefix)}
    found = found or {name: value for name, value in tensors.under("model") if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}
