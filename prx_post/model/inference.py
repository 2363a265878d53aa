"""How a checkpoint is meant to be sampled: written where it is emitted, and the default of whoever samples it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from prx_post.base.errors import PrxPostError
from prx_post.base.files import FINAL
from prx_post.model.config import EMBEDDED

FILE = "inference.json"
"""Beside model_index.json. Stock diffusers leaves it alone; what the sampler is, scheduler/ says."""
INDEX = "model_index.json"
"""What a pipeline's folder has."""
SIZE = ("height", "width")
FEW_STEPS = range(3, 9)
SAID = {"height": "size", "num_inference_steps": "steps", "guidance_scale": "guidance"}


@dataclass(frozen=True)
class Inference:
    """Settings of sampling; as they stand here, PRX's own.

    Attributes:
        height, width: pixels; None: the pipeline's default_sample_size.
        skip_text_cleaning: whether prompts had light cleaning alone in training.
    """

    num_inference_steps: int = 28
    guidance_scale: float = 5.0
    height: int | None = None
    width: int | None = None
    skip_text_cleaning: bool = False

    @property
    def num_network_evaluations(self) -> int:
        """How often the transformer runs for an image: with guidance, twice a step."""
        return self.num_inference_steps * (2 if self.guidance_scale > 1 else 1)

    @property
    def is_of_few_steps(self) -> bool:
        """Whether a student is meant that knows its own steps and not what lies between them: 3 to 8."""
        return self.guidance_scale == 1 and self.num_inference_steps in FEW_STEPS

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def of(cls, path_or_id: str) -> "Inference | None":
        """Of `tiny` or a local checkpoint; None if it does not say, or lies on the Hub."""
        return cls.read(EMBEDDED / "base" if path_or_id == "tiny" else pipeline_in(Path(path_or_id).expanduser()))

    @classmethod
    def read(cls, folder: Path) -> "Inference | None":
        """None if the folder has none. Raises PrxPostError if the file does not hold such settings."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            found = cls(**{f.name: value for f in fields(cls) if (value := _object(path).get(f.name)) is not None})
            sizes = [size for size in (found.height, found.width) if size is not None]
            is_usable = (
                all(type(number) is int and number > 0 for number in (found.num_inference_steps, *sizes))
                and found.guidance_scale >= 1
                and isinstance(found.skip_text_cleaning, bool)
            )
        except (ValueError, TypeError):
            is_usable = False
        if not is_usable:
            raise PrxPostError(f"{path} does not hold settings of sampling. Correct it, or remove it.")
        return found


def pipeline_in(folder: Path) -> Path:
    """The folder of the pipeline that is meant: that of a run means what it has emitted."""
    is_run = not (folder / INDEX).exists() and (folder / FINAL / INDEX).is_file()
    return folder / FINAL if is_run else folder


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(path)
    return value


def choose(given: Inference | Any, own: Inference | None) -> tuple[Inference, list[str]]:
    """What is asked for, and for what is None the checkpoint's own, if it has any, else PRX's.

    Args:
        given: has Inference's attributes, each of which may be None. Height and width are taken together.

    Returns:
        The settings, and the names of those that are the checkpoint's.
    """
    asked = {f.name: getattr(given, f.name) for f in fields(Inference)}
    has_size = asked["height"] is not None or asked["width"] is not None
    left = [name for name, value in asked.items() if value is None and not (has_size and name in SIZE)]
    chosen = replace(own or Inference(), **{name: value for name, value in asked.items() if name not in left})
    return chosen, [name for name in left if own is not None and getattr(own, name) is not None]


def describe(
    size: tuple[int, int], settings: Inference, sampler: str, own: Sequence[str], noise_level: float | None = None
) -> str:
    """One line, such as `64x32, 8 steps, guidance 1 (from the checkpoint)`; width first, as images are named."""
    steps = settings.num_inference_steps
    counted = f"{steps} step{'' if steps == 1 else 's'}"
    parts = [f"{size[1]}x{size[0]}", counted, f"guidance {settings.guidance_scale:g}"]
    if sampler != "euler":
        parts.append(f"sampler {sampler}{'' if noise_level is None else f' {noise_level:g}'}")
    if settings.skip_text_cleaning:
        parts.append("light text cleaning")
    from_it = [word for name, word in SAID.items() if name in own]
    origin = "" if len(from_it) == len(SAID) else f"{', '.join(from_it)} "
    return f"{', '.join(parts)}{f' ({origin}from the checkpoint)' if from_it else ''}"
