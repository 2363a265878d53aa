"""Post-training and alignment for PRX: supervised fine-tuning, distillation, preference alignment.

    import prx_post

    prx_post.train("sft", "configs/tiny/sft.yaml", output_dir="runs/mine")
    prx_post.rewards.load("hpsv2")(images, prompts)

Everything is imported when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "train": ("prx_post.api", "train"),
    "load": ("prx_post.model.checkpoint", "load"),
    "emit": ("prx_post.model.checkpoint", "emit"),
    "Trainer": ("prx_post.engine.trainer", "Trainer"),
    "rewards": ("prx_post.rewards", None),
    "flow": ("prx_post.flow", None),
    "sampling": ("prx_post.sampling", None),
    "objectives": ("prx_post.objectives", None),
}

__all__ = ["Trainer", "__version__", "emit", "flow", "load", "objectives", "rewards", "sampling", "train"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'prx_post' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)
