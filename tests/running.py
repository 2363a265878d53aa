"""Stages in this process, from their settings."""

from pathlib import Path
from typing import Any

from prx_post.stages.run import run


def train_sft(*configs: Any) -> Path:
    return run("sft", configs)


def train_distill(*configs: Any) -> Path:
    return run("distill", configs)
