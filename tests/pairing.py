"""Preference pairs for tests: right numbers preferred to wrong ones, as the recipes write them."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from prx_post.recipes.pairs import Pair, write_shards
from tests.conftest import numbered_images


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def number_pairs(count: int) -> list[Pair]:
    """Prompts 100, 101, ..., each with an image of itself and one of another number."""
    right, wrong = (numbered_images(list(range(first, first + count))) for first in (100, 500))
    return [Pair(r.prompt, png(r.image), png(w.image)) for r, w in zip(right, wrong, strict=True)]


def write_pairs(pairs: Sequence[Pair], folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_shards(pairs, folder, 10**9)
    return folder


def dpo_arguments(dataset: Path | None, cache: Path, output_dir: Path, **changes: object) -> list[str]:
    """Four steps of eight pairs."""
    values = {
        **{"model_name_or_path": "tiny", "dataset_name": dataset, "height": 32, "width": 64, "cache_dir": cache},
        **{"output_dir": output_dir, "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-4},
        **{"logging_steps": 1, "save_steps": 2, "save_total_limit": 9, "sample_steps": 0, "report_to": "none"},
        **{"ema_decay": 0.5, "num_inference_steps": 2, "resume_from_checkpoint": "latest", "ddp_timeout": 60},
        **changes,
    }
    given = {name: value for name, value in values.items() if value is not None}
    return ["dpo", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]
