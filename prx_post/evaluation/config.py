"""Settings of `prx-post eval`: checkpoints × prompt sets × scorers."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from prx_post.base.errors import ConfigError
from prx_post.base.settings import doc, require, require_one_of
from prx_post.evaluation.features import NEEDS_REFERENCE, MetricSpec
from prx_post.model.config import DTYPE_NAMES, GENERATION_SAMPLERS, DrawConfig, noise_level_of
from prx_post.rewards.registry import parse_specs

SETTINGS: dict[str, Callable[[str], Any]] = {
    "num_inference_steps": int,
    "guidance_scale": float,
    "shift_terminal": float,
    "sampler": str,
    "noise_level": float,
    "adapter": str,
}
"""What may differ from checkpoint to checkpoint, and its type."""


PROMPTS = "prompts"
"""What the set of the configuration's own prompts is called."""


@dataclass(frozen=True)
class CheckpointSpec:
    """A checkpoint as it is written in a configuration: `name=folder or Hub id?num_inference_steps=8&...`."""

    name: str
    source: str
    num_inference_steps: int | None
    """None, as of guidance: the checkpoint's own, of which the specification alone does not know."""
    guidance_scale: float | None
    shift_terminal: float | None = None
    """Last noise level before 0, in place of the scheduler's own; 0: as its shift alone puts it."""
    sampler: str | None = None
    """One of GENERATION_SAMPLERS, in place of the scheduler's own."""
    noise_level: float | None = None
    """Of `cps`; None for other samplers."""
    adapter: str | None = None
    """Folder of a LoRA adapter."""

    @property
    def scheduler_changes(self) -> dict[str, Any]:
        """What differs from the checkpoint's own scheduler."""
        changes = {"shift_terminal": self.shift_terminal, "sampler": self.sampler}
        return {name: value for name, value in changes.items() if value is not None}

    @classmethod
    def parse(cls, text: str, num_inference_steps: int | None, guidance_scale: float | None) -> "CheckpointSpec":
        """Without a name, a path's last part, or the one before it if that is `final`.

        Raises ConfigError for a setting that is unknown or out of range.
        """
        located, _, query = text.partition("?")
        named = re.fullmatch(r"([\w-][\w.-]*)=(.+)", located)
        name, source = (named[1], named[2]) if named else (_name_of(located), located)
        spec = cls(name, source, num_inference_steps, guidance_scale)
        for key, value in parse_qsl(query, keep_blank_values=True):
            require_one_of(f"a setting of checkpoint {name}", key, tuple(SETTINGS))
            try:
                changed: dict[str, Any] = {key: SETTINGS[key](value)}
            except ValueError as error:
                raise ConfigError(f"{key} of checkpoint {name} is {value!r}, but must be a number.") from error
            spec = replace(spec, **changed)
        guidance, steps = spec.guidance_scale, spec.num_inference_steps
        reason, action = "the pipeline refuses less", "Set guidance_scale to 1 to sample without guidance"
        require(guidance is None or guidance >= 1, "guidance_scale", guidance, "1 or more", reason, action)
        reason, action = "it counts something", "Set it to 8, for instance"
        require(steps is None or steps > 0, "num_inference_steps", steps, "above 0", reason, action)
        if spec.sampler is not None:
            require_one_of(f"sampler of checkpoint {name}", spec.sampler, GENERATION_SAMPLERS)
        level = spec.noise_level
        in_range = level is None or 0 <= level <= 1
        require(in_range, "noise_level", level, "between 0 and 1", "it is a fraction", "Set it to 0.5, for instance")
        spec = replace(spec, noise_level=noise_level_of(spec.sampler, level))
        last = spec.shift_terminal
        if last is not None:
            action = "Set it to 0.3, or to 0 for the scheduler's plain shift"
            require(0 <= last < 1, "shift_terminal", last, "from 0 to below 1", "it is a noise level", action)
        return spec


def _name_of(path: str) -> str:
    parts = [part for part in Path(path).parts if part != "final"]
    return parts[-1] if parts else "final"


@dataclass
class EvalConfig(DrawConfig):
    """Checkpoints, prompts and scorers. The first checkpoint is what the others are compared with."""

    checkpoints: list[str] = doc(
        "`name=folder or Hub id`, one or more; the first is the baseline. Settings of one alone follow a question "
        "mark: `student=runs/student?num_inference_steps=8&guidance_scale=1`; `shift_terminal` and `sampler` (`euler`, "
        "`renoise`, or `cps` with its `noise_level`), too, in place of its scheduler's; and `adapter`, "
        "a folder with one for it.",
        [],
    )
    prompts: list[str] = doc("Prompts; a set of that name.", [])
    prompts_file: list[str] = doc(
        "Prompt sets, `name=file` each: text with a prompt on each line, or .jsonl, .json, .csv, .tsv with `prompt` "
        "and, optionally, `group`, `language`, and `target` or `scene` (what prompts that are not independent share).",
        [],
    )
    num_prompts: int | None = doc("Use this many prompts of each set, spread evenly over it; null: all.", None, above=0)
    rewards: list[str] = doc(
        "Scorers: names, `module.py:function`, or addresses of a reward server; `label=...` names one.",
        [],
    )
    reward_batch_size: int = doc("Images that a scorer with a model takes at a time.", 16, above=0)
    reward_dtype: str = doc("Precision of the scorers' and encoders' models: `float32` or `bfloat16`.", "float32")
    metrics: list[str] = doc(
        "Of all images together: `fid`, `cmmd`, `dino_mmd` against reference_dir, and `diversity` within a prompt; "
        "`fid=ENCODER` names another encoder (`judge`, the embedded one; `inception`; a folder or Hub id of a CLIP or "
        "DINOv2 model).",
        [],
    )
    reference_dir: str | None = doc("Real images, which fid, cmmd and dino_mmd compare with.", None)
    long_prompt_words: int = doc("Prompts of this many words or more are reported apart, as long.", 40, above=0)
    trajectory_prompts: int = doc("Prompts of which every checkpoint's image is shown at each step.", 2, at_least=0)

    def __post_init__(self) -> None:
        for name in ("prompts", "prompts_file", "checkpoints", "rewards", "metrics"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        super().__post_init__()
        reason = "an evaluation needs it"
        require(bool(self.checkpoints), "checkpoints", self.checkpoints, "set", reason, "Set checkpoints")
        has_prompts, action = bool(self.prompts or self.prompts_file), "Set it, or prompts"
        require(has_prompts, "prompts_file", self.prompts_file, "set", reason, action)
        require_one_of("reward_dtype", self.reward_dtype, DTYPE_NAMES)
        parse_specs(self.rewards)
        self._check_metrics()
        _require_distinct("checkpoints", [spec.name for spec in self.checkpoint_specs()])
        _require_distinct("prompts_file", [name for name, _ in self.prompt_sets()])

    def _check_metrics(self) -> None:
        specs = self.metric_specs()
        _require_distinct("metrics", [spec.metric for spec in specs])
        comparing = [spec.metric for spec in specs if spec.metric in NEEDS_REFERENCE]
        if comparing and self.reference_dir is None:
            raise ConfigError(f"metrics has {comparing[0]!r}, which compares with real images. Set reference_dir.")
        if self.reference_dir is not None and not comparing:
            listed = ", ".join(NEEDS_REFERENCE)
            raise ConfigError(f"reference_dir is set, but no metric uses it. Add one of {listed} to metrics.")
        if any(spec.metric == "diversity" for spec in specs) and len(set(self.seeds)) < 2:
            raise ConfigError(f"metrics has 'diversity', but seeds is {self.seeds}. Give two seeds or more.")

    def checkpoint_specs(self) -> list[CheckpointSpec]:
        return [CheckpointSpec.parse(text, self.num_inference_steps, self.guidance_scale) for text in self.checkpoints]

    def prompt_sets(self) -> list[tuple[str, str]]:
        """(name, file) of each; without a name, the file's without its ending. `prompts` are a set without a file."""
        pairs = [(PROMPTS, "")] if self.prompts else []
        for given in self.prompts_file:
            named = re.fullmatch(r"([\w-][\w.-]*)=(.+)", given)
            pairs.append((named[1], named[2]) if named else (Path(given).stem, given))
        return pairs

    def metric_specs(self) -> list[MetricSpec]:
        return [MetricSpec.parse(text) for text in self.metrics]


def _require_distinct(field: str, names: Sequence[str]) -> None:
    action = "Write them as name=... with different names"
    require(len(set(names)) == len(names), field, list(names), "distinctly named", "names label results", action)
