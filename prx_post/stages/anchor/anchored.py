"""An objective and its source with a distillation's losses and data beside their own.

The distillation is the stage `prx-post distill` with the policy for its student. Its batch of an optimizer step comes
whole with the first micro-batch.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from torch import Tensor

from prx_post.base.errors import ConfigError, PrxPostError
from prx_post.data.cache import content_key
from prx_post.engine.protocols import Batch, Objective, ParamGroup, Source
from prx_post.engine.run import Run
from prx_post.stages.anchor.config import AnchorConfig
from prx_post.stages.compatibility import check_same_encoders
from prx_post.stages.inherited import read_settings
from prx_post.stages.registry import find

PREFIX = "anchor/"
"""Before the names of what belongs to the distillation, in batches and in metrics."""


class Anchored(Objective):
    """`own`'s loss and, with a batch of the distillation, that one's.

    Args:
        own: the objective that is held.
        anchor: a distillation of the same policy; has `idle`, a loss that changes nothing.
        weight: of the distillation's loss.
        accumulation: micro-batches of an optimizer step, whose losses are averaged.
    """

    def __init__(self, own: Objective, anchor: Any, weight: float, accumulation: int) -> None:
        super().__init__()
        self.own, self.anchor, self.scale = own, anchor, weight * accumulation

    @property
    def policy(self) -> Any:  # type: ignore[override]
        return self.own.policy

    @property
    def learning_rate_factor(self) -> float:
        return self.own.learning_rate_factor

    def groups(self) -> list[ParamGroup]:
        return [*self.own.groups(), *self.anchor.groups()[1:]]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: that of `own`, and in some micro-batches the distillation's, its names after PREFIX."""
        theirs = {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
        loss, metrics = self.own({name: value for name, value in batch.items() if not name.startswith(PREFIX)})
        if not theirs:
            return loss + self.anchor.idle(), metrics
        held, of_anchor = self.anchor(theirs)
        of_anchor = {f"{PREFIX}{name}": value for name, value in {"loss": held.detach(), **of_anchor}.items()}
        return loss + self.scale * held, metrics | of_anchor

    def kept(self) -> dict[str, Tensor]:
        return self.own.kept()

    def after_step(self, step: int, weights: Callable[[], dict[str, Tensor]]) -> None:
        self.own.after_step(step, weights)


class AnchoredSource:
    """The micro-batches of `own`, the first of each step with the distillation's."""

    def __init__(self, own: Source, anchor: Source) -> None:
        self.own, self.anchor, self.online = own, anchor, own.online

    def batches(self, step: int) -> Iterator[Batch]:
        (theirs,) = self.anchor.batches(step)
        more = with_prefix(theirs)
        for batch in self.own.batches(step):
            yield {**batch, **more}
            more = {}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self.own.state()

    def load_state(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.own.load_state(info, tensors)


def with_prefix(batch: Batch) -> Batch:
    return {f"{PREFIX}{name}": value for name, value in batch.items()}


class Anchor:
    """A distillation beside a stage.

    Raises:
        ConfigError: its file is not one of a distillation, or its student visits other noise levels than the emitted
            sampler.
    """

    def __init__(self, stage: Any, planned: bool) -> None:
        config: AnchorConfig = stage.config
        self.owner, self.config, self.file = stage, stage.config, str(config.anchor_config)
        entry, own = find("distill"), stage.config
        changed = {
            "output_dir": str(own.folder / "anchor"),
            "max_steps": own.max_steps,
            "per_device_train_batch_size": config.anchor_batch_size or own.per_device_train_batch_size,
            **{"gradient_accumulation_steps": 1, "eval_steps": 0, "sample_steps": 0},
            **{name: getattr(own, name) for name in ("seed", "bf16", "gradient_checkpointing", "torch_compile")},
        }
        try:
            self.configs = read_settings(entry.configs(), self.file, changed, "the anchor")
            opened: Any = entry.stage()(*self.configs, planned=planned)
        except ConfigError as error:
            raise ConfigError(f"anchor_config is {self.file!r}: {error}") from error
        self.stage = opened
        here, there = (grid.tolist() for grid in (stage.grid(own.num_inference_steps), opened.sigmas))
        if len(here) != len(there) or any(abs(a - b) > 1e-4 for a, b in zip(here, there, strict=True)):
            raise ConfigError(
                f"anchor_config is {self.file!r}, whose student visits the noise levels {_listed(there)}, but the "
                f"emitted sampler visits {_listed(here)}. Set num_inference_steps and shift_terminal as they are there."
            )
        self.data: Any = None

    def prepare(self, run: Run) -> None:
        """Its data: the teacher's latents, missing ones generated, and real images. A collective."""
        pipelines, cache_dir = (self.owner.pipeline, self.stage.teacher_pipeline), self.stage.cache_dir
        run.ranks.on_main(lambda: check_same_encoders(*pipelines, "anchor's teacher", cache_dir))
        run.ranks.on_main(lambda: self.stage.config.folder.mkdir(parents=True, exist_ok=True))
        self.data = self.stage.data(self._own(run))

    def identity(self, run: Run) -> str:
        """Digest of its settings, data and teacher. Raises PrxPostError if a run is resumed with others."""
        samples = [(sample.image_key, sample.prompt_key) for sample in self.data.samples]
        settings = [asdict(part) for part in self.configs]
        for part in settings:
            for name in ("output_dir", "max_steps", "cache_dir", "gradient_checkpointing", "torch_compile"):
                part.pop(name, None)
        base = run.ranks.on_main(self.stage.base_digest)
        digest = content_key(json.dumps([settings, samples, base]))
        if run.saved is not None and run.saved.info.get("anchor") != digest:
            raise PrxPostError(
                f"anchor_config is {self.file!r}, but {run.saved.folder} was trained beside another distillation, or "
                f"other data or another teacher of it. Set them back, or start a new run from the emitted pipeline."
            )
        return digest

    def join(self, run: Any, own: Objective, source: Source) -> tuple[Objective, Source]:
        """Objective and source of the stage with those of the distillation beside them."""
        joined = self.objective(run, own, self.data)
        return joined, AnchoredSource(source, self.stage.source(self._own(run), self.data, joined.anchor))

    def objective(self, run: Any, own: Objective, data: Any) -> Anchored:
        anchor = self.stage.objective_for(own.policy, self._own(run), data)
        return Anchored(own, anchor, self.config.anchor_weight, self.config.gradient_accumulation_steps)

    def example(self, run: Any) -> tuple[Any, Batch]:
        """Stand-ins for its data, and for its part of a micro-batch."""
        data, batch = self.stage.example(self._own(run))
        return data, with_prefix(batch)

    def _own(self, run: Any) -> Any:
        """The same run, with the distillation's settings."""
        own = copy.copy(run)
        own.config = self.stage.config
        own.config.max_steps = self.config.max_steps  # which follows from num_train_epochs only once the data are there
        return own


def _listed(levels: list[float]) -> str:
    return ", ".join(f"{level:.3f}" for level in levels)
