"""The embedded world's data sets, written as a user's own would be: parquet, or PNGs with a metadata.jsonl."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from prx_post.rewards.scorers.numbers import FORMS, NUMBERS, caption
from prx_post.tiny.handwriting import write_number
from prx_post.tiny.world import split_of_numbers

PRETRAIN_SIZE = 24_000
PRETRAIN_WRONG_CAPTIONS = 0.5
"""Fraction of pretraining captions with a wrong digit. Web captions are wrong too; it makes the base mediocre."""
CURATED_SIZE = 2_000
CURATED_CANDIDATES = 4_000
REFERENCE_SIZE = 1_000


@dataclass(frozen=True)
class CaptionedImage:
    image: Image.Image
    number: int
    """The number that the image shows."""
    prompt: str


def pretraining_images(seed: int) -> Iterator[CaptionedImage]:
    """Training numbers with the captions of the web: in any form, and often with one digit wrong."""
    rng = np.random.default_rng([seed, 10])
    for _ in range(PRETRAIN_SIZE):
        number = int(rng.choice(split_of_numbers()["train"]))
        told = _another_train_number(number, rng) if rng.random() < PRETRAIN_WRONG_CAPTIONS else number
        yield CaptionedImage(write_number(number, "generator", rng), number, caption(told, str(rng.choice(FORMS))))


def _another_train_number(number: int, rng: np.random.Generator) -> int:
    """A training number that differs from `number` in one digit."""
    digits = str(number)
    while True:
        place = int(rng.integers(len(digits)))
        changed = int(digits[:place] + str(rng.integers(10)) + digits[place + 1 :])
        if changed != number and changed in _train_numbers():
            return changed


def _train_numbers() -> frozenset[int]:
    return frozenset(split_of_numbers()["train"])


def curated_images(seed: int) -> list[CaptionedImage]:
    """The most legible of many candidates, by OCR log-probability, each with a right caption. Training numbers only."""
    from prx_post.rewards import registry as base

    rng = np.random.default_rng([seed, 11])
    candidates = []
    for _ in range(CURATED_CANDIDATES):
        number = int(rng.choice(split_of_numbers()["train"]))
        text = caption(number, str(rng.choice(FORMS)))
        candidates.append(CaptionedImage(write_number(number, "generator", rng), number, text))
    scores = base.load("ocr_graded")([c.image for c in candidates], [str(c.number) for c in candidates])
    return [candidates[i] for i in scores.argsort(descending=True)[:CURATED_SIZE].sort().values.tolist()]


def reference_images(seed: int) -> list[CaptionedImage]:
    """Real images of any number, written with digits that no model of this world was trained on: FID's reference."""
    rng = np.random.default_rng([seed, 12])
    numbers = [int(rng.choice(NUMBERS)) for _ in range(REFERENCE_SIZE)]
    return [CaptionedImage(write_number(n, "reference", rng), n, str(n)) for n in numbers]


def prompt_set(split: str) -> list[dict[str, str]]:
    """Every number of a split in every form: `prompt`, the number to be read (`target`), and the form (`group`)."""
    numbers = split_of_numbers()[split]
    return [{"prompt": caption(n, form), "target": str(n), "group": form} for n in numbers for form in FORMS]


def write_parquet(images: Iterator[CaptionedImage], path: Path) -> None:
    """Columns `image` (PNG bytes, a datasets Image) and `prompt`."""
    import datasets

    def png(image: Image.Image) -> dict[str, bytes]:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return {"bytes": buffer.getvalue()}

    rows = [{"image": png(p.image), "prompt": p.prompt} for p in images]
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def write_folder(images: list[CaptionedImage], folder: Path) -> None:
    """An image folder: NNNNN.png and metadata.jsonl with `file_name` and `prompt`."""
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as metadata:
        for i, image in enumerate(images):
            name = f"{i:05d}.png"
            image.image.save(folder / name)
            metadata.write(json.dumps({"file_name": name, "prompt": image.prompt}, ensure_ascii=False) + "\n")


def write_prompts(rows: list[dict[str, str]], path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_all(folder: Path, seed: int = 0) -> None:
    """curated/ (for SFT), reference/ (real images for FID), and prompts-*.jsonl of train, validation and test."""
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(curated_images(seed), folder / "curated")
    write_folder(reference_images(seed), folder / "reference")
    for split in ("train", "validation", "test"):
        write_prompts(prompt_set(split), folder / f"prompts-{split}.jsonl")
