"""The source of batches alone, on the shapes of the real model: how many samples a second reach the training loop.

    python benchmarks/source.py [--threads 2] [--batch 32] [--rounds 5]

Latents 16×64×64 fp32 and embeddings of 20 to 256 tokens, 2304 wide, bfloat16, in the cache's own files; each batch is
read, padded and given its noise. The first pass checks every tensor's checksum.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from prx_post.data.cache import TensorCache
from prx_post.data.encoding import EncodedCache
from prx_post.data.plan import DrawPlan
from prx_post.data.scan import Sample
from prx_post.data.source import LatentSource
from prx_post.engine.prefetch import Prefetched
from prx_post.stages.sft.objective import timestep_and_noise

SAMPLES, LATENTS, WIDTH, TOKENS = 512, (16, 64, 64), 2304, (20, 257)


def make_cache(folder: Path) -> EncodedCache:
    generator = torch.Generator().manual_seed(0)
    latents, embeddings = TensorCache(folder / "latents"), TensorCache(folder / "embeddings")
    latents.write((f"i{i}", torch.randn(LATENTS, generator=generator)) for i in range(SAMPLES))
    lengths = torch.randint(*TOKENS, (SAMPLES,), generator=generator).tolist()
    embeddings.write((f"p{i}", torch.randn(n, WIDTH, generator=generator).bfloat16()) for i, n in enumerate(lengths))
    return EncodedCache(TensorCache(folder / "latents"), TensorCache(folder / "embeddings"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = SAMPLES // options.batch
    with tempfile.TemporaryDirectory() as name:
        cache = make_cache(Path(name))
        samples = [Sample(i, "", (512, 512), f"i{i}", f"p{i}") for i in range(SAMPLES)]
        encoders: Any = SimpleNamespace(cleaner=lambda text: text)
        plan = DrawPlan(["all"] * SAMPLES, options.batch, 0, (options.rounds + 1) * steps)
        randomness = partial(timestep_and_noise, mean=0.0, std=1.0)
        source = LatentSource(
            *(samples, None, cache, encoders, plan), micro_batch_size=options.batch, randomness=randomness
        )
        speeds = []
        for round_ in range(options.rounds + 1):
            began = time.perf_counter()
            for step in range(round_ * steps, (round_ + 1) * steps):
                list(source.batches(step))
            speeds.append(SAMPLES / (time.perf_counter() - began))
        with Prefetched(source, plan_steps := (options.rounds + 1) * steps) as ahead:
            list(ahead.batches(plan_steps - steps))
            time.sleep(1.0)  # a training step, in which the next ones are made
            began = time.perf_counter()
            list(ahead.batches(plan_steps - steps + 1))
            waited_ms = 1000 * (time.perf_counter() - began)
    print("| | samples/s |\n|---|---|")
    print(f"| first read, with its checksums | {speeds[0]:.0f} |")
    print(f"| later reads (median of {options.rounds} rounds) | {statistics.median(speeds[1:]):.0f} |")
    print(f"\nA loop whose step takes a second waits {waited_ms:.2f} ms for a batch that was read ahead.")
    print(f"Batch {options.batch}, {options.threads} threads, torch {torch.__version__}.")


if __name__ == "__main__":
    main()
