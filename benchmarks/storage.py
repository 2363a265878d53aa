"""What a checkpoint costs the training loop, and how fast the cache gives back what encoding would make anew.

python benchmarks/storage.py [--rounds 5] [--state_gib 2] [--images 400]
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from prx_post.data.buckets import Buckets
from prx_post.data.config import DataConfig
from prx_post.data.encoders import Encoders
from prx_post.data.encoding import EncodedCache, fill_cache
from prx_post.data.readers import read_rows
from prx_post.data.scan import scan
from prx_post.engine.checkpointing import CheckpointWriter
from prx_post.model.checkpoint import open_pipeline
from prx_post.model.text import PromptCleaner
from tests.conftest import numbered_images


def checkpoint(root: Path, state_gib: float) -> dict[str, float]:
    """Seconds for each part of saving `state_gib` of weights, moments and averages."""
    state = {f"model/{i}": torch.randn(16 * 2**20) for i in range(int(state_gib * 16))}  # 64 MiB each
    began = time.perf_counter()
    copies = {key: value.clone() for key, value in state.items()}
    copied = time.perf_counter()
    writer = CheckpointWriter(root, rank=0, world_size=1, keep=1, timeout_s=600)
    writer.save(copies, {"step": 1})
    returned = time.perf_counter()
    writer.join()
    writer.check()
    return {"copy": copied - began, "start": returned - copied, "write": time.perf_counter() - returned}


def reading(root: Path, images: int) -> dict[str, float]:
    """Images a second: read from the cache, first (with its checksum) and again; decoded and encoded anew."""
    from prx_post.tiny.datasets import write_folder

    folder = root / "images"
    if not folder.exists():
        write_folder(numbered_images([100 + i % 800 for i in range(images)]), folder)
    pipeline, cleaner = open_pipeline("tiny"), PromptCleaner()
    encoders = Encoders(pipeline, cleaner, torch.device("cpu"), torch.float32)
    rows = read_rows(DataConfig(dataset_name=str(folder)))
    samples, _ = scan(rows, Buckets(pipeline, 32, 64), cleaner, decode_all=False)
    fill_cache(EncodedCache.open(root / "cache", pipeline, torch.float32), samples, rows, [""], encoders)
    cache = EncodedCache.open(root / "cache", pipeline, torch.float32)
    rates = {}
    for name in ("first", "again"):
        began = time.perf_counter()
        for sample in samples:
            cache.latents[sample.image_key].sum()
            cache.embeddings[sample.prompt_key].sum()
        rates[name] = len(samples) / (time.perf_counter() - began)
    began = time.perf_counter()
    for sample in samples:
        encoders.latents(rows.image_bytes(sample.row), sample.size)
        encoders.prompts(sample.prompt)
    return {**rates, "encode": len(samples) / (time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--state_gib", type=float, default=2.0)
    parser.add_argument("--images", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        saves, reads = [], []
        for i in range(options.rounds):
            run = root / f"run-{i}"
            run.mkdir()
            saves.append(checkpoint(run, options.state_gib))
            (run / "checkpoint-000001" / "rank-00000.safetensors").unlink()
            reads.append(reading(root, options.images))
            print({k: round(v, 2) for k, v in (saves[-1] | reads[-1]).items()}, flush=True)

    def median(found: list[dict[str, float]], name: str) -> float:
        return statistics.median(each[name] for each in found)

    copy, start, write = (median(saves, name) for name in ("copy", "start", "write"))
    share = statistics.median((s["copy"] + s["start"]) / sum(s.values()) for s in saves)
    print(f"\nSaving {options.state_gib:g} GiB: training waits {copy + start:.2f} s for the copy, ", end="")
    print(f"then {write:.2f} s of hashing, writing and flushing go on beside it; it waits for {100 * share:.0f} %.\n")
    print("| source of latents and embeddings | images/s | against encoding |\n|---|---|---|")
    for name, label in (
        ("encode", "decode and encode"),
        ("first", "cache, first read"),
        ("again", "cache, later reads"),
    ):
        ratio = statistics.median(each[name] / each["encode"] for each in reads)
        print(f"| {label} | {median(reads, name):.0f} | {ratio:.1f}× |")
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds.")


if __name__ == "__main__":
    main()
