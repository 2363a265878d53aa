"""Settings that a stage takes from the checkpoint it starts from, unless they are given. Imports nothing heavy."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from prx_post.base.errors import ConfigError
from prx_post.base.parsing import check_known, parse, read_yaml
from prx_post.model.inference import SIZE, Inference

START, TEACHER = "model_name_or_path", "teacher_model_name_or_path"
LOG_RATIO = "log_ratio"
SAMPLING = ("num_inference_steps", "guidance_scale")


def inherited(kinds: Sequence[type], given: Callable[[str], Any]) -> dict[str, Any]:
    """By name, what of a local checkpoint's inference.json the settings `kinds` have and are not `given`.

    A distillation's is its teacher, which has settings of its own for the number of steps and the guidance. Online
    pairs of a student of few steps are compared on its own steps.
    """
    names = {f.name for kind in kinds for f in dataclasses.fields(kind)}
    has_teacher = TEACHER in names
    path = (given(TEACHER) if has_teacher else None) or given(START)
    own = Inference.of(str(path)) if path else None
    if own is None:
        return {}
    prefix = "teacher_" if has_teacher else ""
    values = {f"{prefix}{name}" if name in SAMPLING else name: value for name, value in vars(own).items()}
    if own.is_of_few_steps and given("pairs") == "online":
        values[LOG_RATIO] = "steps"
    if any(given(name) is not None for name in SIZE):
        values = {name: value for name, value in values.items() if name not in SIZE}
    return {n: value for n, value in values.items() if n in names and value is not None and given(n) is None}


def read_settings(kinds: Sequence[type], file: str | Path, settings: Mapping[str, Any], prog: str) -> tuple[Any, ...]:
    """A file's settings, as one instance of each of `kinds`.

    Args:
        settings: by name; they win over the file's.

    Raises:
        ConfigError: as of `parse`.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"config is {str(file)!r}, but there is no such file. Check the path.")
    values = read_yaml(path)
    known = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    check_known({key: f"in {path}" for key in values if key != "env"}, known)
    # what the file lacks may be among the settings, so they are completed before anything is checked
    with TemporaryDirectory() as folder:
        whole = Path(folder) / path.name
        whole.write_text(yaml.safe_dump({**values, **settings}, allow_unicode=True), encoding="utf-8")
        return parse(kinds, ["--config", str(whole)], prog, inherited(kinds, (values | dict(settings)).get))
