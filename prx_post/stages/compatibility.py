"""Whether two pipelines can work side by side: a student and its teacher, a policy and its reference."""

import inspect
import json
from pathlib import Path
from typing import Any

from prx_post.base.errors import PrxPostError
from prx_post.data.cache import fingerprint
from prx_post.model.checkpoint import PipelineFolder


def check_fit(own: PipelineFolder, other: PipelineFolder, role: str) -> None:
    """Raise PrxPostError unless both have one architecture and one VAE: what the one is trained on, the other is asked.

    Args:
        role: what the other is to the first: "teacher" or "reference".

    The text encoders are compared by their files, once there is a cache for the digests: see `check_same_encoders`.
    """
    for component in ("transformer", "vae"):
        here, there = (_described(folder, component) for folder in (own, other))
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) != there.get(key):
                raise PrxPostError(
                    f"{own.source} has a {component} with {key} {here.get(key)}, but the {role} {other.source} has "
                    f"{there.get(key)}: it must understand what the first reads. Choose a {role} of the same kind."
                )


def _described(folder: PipelineFolder, component: str) -> dict[str, Any]:
    """A component's settings, with its class's defaults for those that its file leaves out."""
    import diffusers

    kind = getattr(diffusers, folder.index[component][1])
    defaults = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items() if name != "self"}
    given = {key: value for key, value in folder.configs[component].items() if not key.startswith("_")}
    # tuples are lists in JSON
    return json.loads(json.dumps({k: v for k, v in defaults.items() if v is not inspect.Parameter.empty} | given))


def check_same_encoders(own: PipelineFolder, other: PipelineFolder, role: str, cache_dir: Path) -> None:
    """Raise PrxPostError unless tokenizer, text encoder and VAE are the same files.

    Both get the same embeddings and latents, and what is trained is emitted with its own encoders.
    """
    for component in ("tokenizer", "text_encoder", "vae"):
        if fingerprint(cache_dir, own.path / component) != fingerprint(cache_dir, other.path / component):
            raise PrxPostError(
                f"{own.source} has another {component} than the {role} {other.source}, but must have the same, because "
                f"both get the same embeddings and latents. Choose checkpoints of one family."
            )
