"""The teacher beside the student's start: whether they fit, and the scheduler that is emitted."""

import inspect
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from prx_post.base.errors import ConfigError, PrxPostError
from prx_post.data.cache import fingerprint
from prx_post.flow import inference_sigmas
from prx_post.model.checkpoint import PipelineFolder, open_pipeline
from prx_post.model.scheduler import rescheduled
from prx_post.stages.distill.config import DistillConfig, TeacherConfig


def open_teacher(config: TeacherConfig, student: PipelineFolder, planned: bool = False) -> PipelineFolder:
    """The teacher, known from its JSON files: the student's own start where none is named."""
    if config.teacher_model_name_or_path is None:
        return student
    return open_pipeline(config.teacher_model_name_or_path, config.teacher_model_revision, weights=not planned)


def student_scheduler(teacher: PipelineFolder, config: DistillConfig) -> tuple[Any, Tensor]:
    """The scheduler that is emitted, and the noise levels [N + 1] that it visits in `num_inference_steps`.

    Raises:
        ConfigError: it cannot give that many.
    """
    base = teacher.load_scheduler()
    scheduler = rescheduled(base, shift_terminal=config.shift_terminal, sampler=config.sampler)
    try:
        return scheduler, inference_sigmas(scheduler, config.num_inference_steps)
    except ValueError as error:
        raise ConfigError(
            f"num_inference_steps is {config.num_inference_steps}, but the teacher's scheduler cannot give it with "
            f"shift_terminal {config.shift_terminal}: {error}. Change one of them."
        ) from error


def check_fit(student: PipelineFolder, teacher: PipelineFolder) -> None:
    """Raise PrxPostError unless both have one architecture and one VAE: the student's samples are the teacher's input.

    The text encoders are compared by their files, once there is a cache for the digests: see `check_same_encoders`.
    """
    for component in ("transformer", "vae"):
        own, other = (_described(folder, component) for folder in (student, teacher))
        for key in sorted(own.keys() | other.keys()):
            if own.get(key) != other.get(key):
                raise PrxPostError(
                    f"{student.source} has a {component} with {key} {own.get(key)}, but the teacher {teacher.source} "
                    f"has {other.get(key)}: the teacher must understand what the student reads. Choose a teacher of "
                    f"the same kind."
                )


def _described(folder: PipelineFolder, component: str) -> dict[str, Any]:
    """A component's settings, with its class's defaults for those that its file leaves out."""
    import diffusers

    kind = getattr(diffusers, folder.index[component][1])
    defaults = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items() if name != "self"}
    given = {key: value for key, value in folder.configs[component].items() if not key.startswith("_")}
    # tuples are lists in JSON
    return json.loads(json.dumps({k: v for k, v in defaults.items() if v is not inspect.Parameter.empty} | given))


def check_same_encoders(student: PipelineFolder, teacher: PipelineFolder, cache_dir: Path) -> None:
    """Raise PrxPostError unless tokenizer, text encoder and VAE are the same files.

    The student is trained on the teacher's embeddings and latents, and emitted with its own encoders.
    """
    for component in ("tokenizer", "text_encoder", "vae"):
        if fingerprint(cache_dir, student.path / component) != fingerprint(cache_dir, teacher.path / component):
            raise PrxPostError(
                f"{student.source} has another {component} than the teacher {teacher.source}, but must have the same, "
                f"because the student learns from the teacher's and is emitted with its own. Choose checkpoints of one "
                f"family."
            )
