"""Encoding one at a time against batches, and a first start against a second, each pair in one run.

    python benchmarks/encoding.py [--images 256] [--rows 100000] [--rounds 3]      # about ten minutes on two cores

Encoding: the embedded pipeline's VAE and text encoder, with one thread, on JPEGs of noise of 512×512 that are resized
to 256×256, and captions of 3 to 20 words. Start: `--rows` images of 64×32 in one parquet file; what is timed is
everything from opening it to the samples, the first time, and again with the scan remembered. Caches of latents and
embeddings play no part in it.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prx_post.base.ranks import ALONE
from prx_post.data.buckets import Buckets
from prx_post.data.config import DataConfig
from prx_post.data.encoders import Cleaned, Encoders
from prx_post.data.readers import read_rows
from prx_post.data.scan import Sample
from prx_post.data.scan_memory import scanned
from prx_post.model.checkpoint import open_pipeline
from prx_post.model.text import PromptCleaner, count_tokens

CPU = torch.device("cpu")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
MODES = {"one at a time": (1, 0), "16 at a time": (16, 0), "16 at a time, 1 worker": (16, 1)}


class Files:
    """Images in memory."""

    def __init__(self, count: int) -> None:
        generator = np.random.default_rng(0)
        self._files = [_jpeg(generator.integers(0, 256, (512, 512, 3), dtype=np.uint8)) for _ in range(count)]

    def image_bytes(self, row: int) -> bytes:
        return self._files[row]


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def captions(count: int) -> list[str]:
    generator = np.random.default_rng(1)
    return [" ".join(generator.choice(WORDS, generator.integers(3, 21))) + f" {i}" for i in range(count)]


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def encoding(count: int, rounds: int) -> None:
    pipeline, cleaner, files, texts = open_pipeline("tiny"), PromptCleaner(), Files(count), captions(8 * count)
    lengths = count_tokens(pipeline.load_tokenizer(), texts)
    prompts = {text: Cleaned(text, length) for text, length in zip(texts, lengths, strict=True)}
    samples = [Sample(i, "", (256, 256), str(i), "") for i in range(count)]
    made = {
        name: Encoders(pipeline, cleaner, CPU, torch.float32, batch_size=size, num_workers=workers)
        for name, (size, workers) in MODES.items()
    }
    for one in made.values():
        one.codec, one.prompts  # loaded before the clock starts  # noqa: B018
    images: dict[str, list[float]] = {name: [] for name in MODES}
    texts_: dict[str, list[float]] = {name: [] for name in MODES}
    for _ in range(rounds):
        for name, one in made.items():
            images[name].append(seconds(lambda one=one: list(one.latents_of(samples, files))))
            texts_[name].append(seconds(lambda one=one: list(one.embeddings_of(prompts))))
    print("| encoding | images/s | against one at a time | prompts/s | against one at a time |\n|---|---|---|---|---|")
    first = next(iter(MODES))
    for name in MODES:
        image, text = statistics.median(images[name]), statistics.median(texts_[name])
        print(
            f"| {name} | {count / image:.1f} | {statistics.median(images[first]) / image:.2f} | "
            f"{len(texts) / text:.0f} | {statistics.median(texts_[first]) / text:.2f} |"
        )


def start(count: int) -> None:
    import datasets

    pipeline = open_pipeline("tiny")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        generator = np.random.default_rng(0)
        files = [_jpeg(generator.integers(0, 256, (32, 64, 3), dtype=np.uint8)) for _ in range(1000)]
        # 1,000 images, each with another end, which JPEG readers ignore: bytes, and so keys, differ
        cells = [{"bytes": files[i % 1000] + i.to_bytes(4, "big"), "path": f"{i}.jpg"} for i in range(count)]
        table = datasets.Dataset.from_dict({"image": cells, "prompt": captions(count)})
        table.cast_column("image", datasets.Image(decode=False)).to_parquet(str(folder / "set.parquet"))

        def scan() -> None:
            rows = read_rows(DataConfig(dataset_name=str(folder / "set.parquet")))
            encoders = Encoders(pipeline, PromptCleaner(), CPU, torch.float32)
            scanned(rows, Buckets(pipeline, 32, 64), encoders, False, folder / "cache", ALONE)

        read_rows(DataConfig(dataset_name=str(folder / "set.parquet")))  # `datasets` converts the file once
        first, second = seconds(scan), seconds(scan)
    print(f"\n| start on {count:,} rows | seconds | against the first |\n|---|---|---|")
    print(f"| first | {first:.1f} | 1 |\n| again | {second:.1f} | {second / first:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    encoding(given.images, given.rounds)
    start(given.rows)


if __name__ == "__main__":
    main()
