"""The stages there are. A new one is a folder and a line here: the command line, plan, launching and resuming follow.

Imports nothing heavy: a stage's settings load when it is named, and its code only when it runs.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from prx_post.base.settings import require_one_of

if TYPE_CHECKING:
    from prx_post.engine.protocols import Batch, Monitor, Objective, Source
    from prx_post.engine.run import Run
    from prx_post.model.checkpoint import PipelineFolder


@dataclass(frozen=True)
class RolloutWork:
    """What a stage that generates its own training images does from one rollout to the next, on all processes.

    Attributes:
        images: of a rollout; `described` says of what they are made.
        steps: optimizer steps that are made of it.
        generated: network evaluations of one image that made them.
        trained: forward and backward passes of one image; frozen: forward passes of frozen networks.
    """

    images: int
    steps: int
    described: str
    generated: int
    trained: int
    frozen: int


class Stage(Protocol):
    """What a stage does, in the order in which it is done."""

    name: ClassVar[str]
    configs: ClassVar[tuple[type, ...]]
    """Dataclasses, the last of which extends TrainConfig; importing them must not import torch."""
    config: Any
    """The last of them, with its values."""
    pipeline: "PipelineFolder"
    """What is post-trained and emitted."""
    largest_size: Any
    """Height and width of the largest images, pixels."""
    anchor: Any
    """A distillation that is trained along (`stages.anchor`), or None."""

    def __init__(self, *configs: Any, planned: bool = False) -> None:
        """Opens JSON files and raises every error that can be known now; if only planned, data need not be there."""

    def data(self, run: "Run") -> Any:
        """Collective: encodes or generates what is missing."""

    def identity(self, run: "Run", data: Any) -> dict[str, str]:
        """Digests of what the run depends on. Raises PrxPostError if a run is resumed with others."""

    def steps_per_epoch(self, run: "Run", data: Any) -> float:
        """Optimizer steps in which everything is trained on once."""

    def objective(self, run: "Run", data: Any) -> "Objective": ...

    def source(self, run: "Run", data: Any, objective: "Objective") -> "Source": ...

    def monitor(self, run: "Run", data: Any, objective: "Objective") -> "Monitor": ...

    def emit(self, run: "Run", data: Any, weights: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Main process: `run.final`, a complete pipeline with its card."""

    def example(self, run: "Run") -> "tuple[Any, Batch]":
        """For `prx-post plan`: stand-ins for the data, and for a micro-batch of the largest shape, on `run.device`."""

    def cache_size(self) -> Any:
        """For `prx-post plan`: a data.sizes.CacheSize, why it is not known, or None if nothing is cached."""

    def rollout_work(self) -> RolloutWork | None:
        """For `prx-post plan`: None if the stage generates nothing that it trains on."""


@dataclass(frozen=True)
class Entry:
    """A registered stage."""

    summary: str
    configs: Callable[[], tuple[type, ...]]
    stage: Callable[[], type[Stage]]


def _own(name: str, summary: str) -> Entry:
    package = f"prx_post.stages.{name}"
    return Entry(
        summary,
        lambda: importlib.import_module(f"{package}.config").CONFIGS,
        lambda: importlib.import_module(f"{package}.stage").STAGE,
    )


REGISTRY: dict[str, Entry] = {
    "sft": _own("sft", "supervised fine-tuning: full or LoRA, flow matching"),
    "distill": _own("distill", "few-step students: trajectory regression, LADD, DMD2"),
    "dpo": _own("dpo", "preference optimisation from pairs of images: DPO, IPO, hinge; full or LoRA"),
    "draft": _own("draft", "direct reward gradients: DRaFT, ReFL; full or LoRA"),
    "grpo": _own("grpo", "online alignment: Flow-GRPO, Pref-GRPO, DiffusionNFT, DGPO, AWM; full or LoRA"),
}


ALIGNING = {"grpo": "grpo.settings", "draft": "draft.config"}
"""Stages that other commands of alignment stand for by a `method` of theirs, and where those are named."""


def meant(name: str, method: Any) -> str:
    """The stage that a command stands for: `dpo` and `grpo`, which align too, with the `method` of another is that."""
    for other, module in ALIGNING.items():
        if name in ("dpo", "grpo") and method in importlib.import_module(f"prx_post.stages.{module}").METHODS:
            return other
    return name


def find(name: str) -> Entry:
    """Raises ConfigError, with the nearest name, if there is no such stage."""
    require_one_of("stage", name, tuple(REGISTRY))
    return REGISTRY[name]
