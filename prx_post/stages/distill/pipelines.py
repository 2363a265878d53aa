"""The teacher beside the student's start: whether they fit, and the scheduler that is emitted."""

from typing import Any

from torch import Tensor

from prx_post.base.errors import ConfigError
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
