"""SFT images/s: with the cache, encoding on the fly, and a plain diffusers loop as a newcomer would write it.

    python benchmarks/sft_throughput.py [--model tiny] [--rounds 5] [--steps 30] [--batch 64]

The three run in turn in one process, round after round, so that a machine's drift falls on all alike; ratios are taken
within a round and their median is reported. Also: the share of a step spent outside forward, backward and optimizer.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader

from prx_post.data.config import DataConfig
from prx_post.data.readers import read_rows
from prx_post.model.checkpoint import open_pipeline
from prx_post.model.config import ModelConfig
from prx_post.stages.run import run
from prx_post.stages.sft.config import SFTConfig
from prx_post.stages.sft.objective import FlowMatchingObjective

HEIGHT, WIDTH = 32, 64
WARMUP = 5
"""Steps of a run that are not counted."""


def prx_post_run(model: str, data: Path, cache: str, steps: int, batch: int, folder: Path) -> float:
    """Images/s of `prx-post sft`, from its own metrics.jsonl."""
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=steps + WARMUP,
        per_device_train_batch_size=batch,
        logging_steps=WARMUP,
        sample_steps=0,
        report_to=[],
    )
    source = DataConfig(
        dataset_name=str(data), height=HEIGHT, width=WIDTH, cache=cache, cache_dir=str(data.parent / "cache")
    )
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        run("sft", (ModelConfig(model_name_or_path=model), source, config))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[1:])


def newcomer_run(model: str, data: Path, steps: int, batch: int) -> float:
    """A loop as in the usual diffusers examples: decode, VAE and text encoder on every batch, AdamW, MSE."""
    from diffusers import PRXPipeline

    pipe = PRXPipeline.from_pretrained(open_pipeline(model).path)
    transformer, vae = pipe.transformer.train(), pipe.vae
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-5)
    rows = read_rows(DataConfig(dataset_name=str(data), height=HEIGHT, width=WIDTH))

    def collate(indices: list[int]) -> tuple[torch.Tensor, list[str]]:
        images = [Image.open(io.BytesIO(rows.image_bytes(i))).convert("RGB") for i in indices]
        return pipe.image_processor.preprocess(images), [str(rows.prompts[i]) for i in indices]

    def batches() -> Iterator[tuple[torch.Tensor, list[str]]]:
        while True:
            yield from DataLoader(range(len(rows)), batch, shuffle=True, drop_last=True, collate_fn=collate)

    stream, began = batches(), 0.0
    for step in range(steps + WARMUP):
        if step == WARMUP:
            began = time.perf_counter()
        pixels, prompts = next(stream)
        with torch.no_grad():
            latents = (vae.encode(pixels).latent_dist.sample() - vae.config.shift_factor) * vae.config.scaling_factor
            embeds, mask, _, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        noise = torch.randn_like(latents)
        t = torch.sigmoid(torch.randn(len(prompts)))
        x_t = (1 - t.view(-1, 1, 1, 1)) * latents + t.view(-1, 1, 1, 1) * noise
        prediction = transformer(x_t, t, embeds, mask, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction, noise - latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return steps * batch / (time.perf_counter() - began)


def overhead_share(model: str, data: Path, steps: int, batch: int, folder: Path) -> float:
    """Fraction of the loop's time outside the objective's forward, backward, clipping and the optimizer's step."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - began
            return result

        return wrapper

    from prx_post.engine.trainer import Trainer

    patches = [
        (FlowMatchingObjective, "forward"),
        (Accelerator, "backward"),
        (Accelerator, "clip_grad_norm_"),
        (torch.optim.AdamW, "step"),
        (Trainer, "fit"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name in patches]
    for owner, name, original in originals:
        setattr(owner, name, timed(name, original))
    try:
        prx_post_run(model, data, "disk", steps, batch, folder)
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
    total = spent.pop("fit")
    return 1 - sum(spent.values()) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    import numpy as np

    from prx_post.rewards.scorers.numbers import caption
    from prx_post.tiny.datasets import CaptionedImage, write_folder
    from prx_post.tiny.handwriting import write_number
    from prx_post.tiny.world import split_of_numbers

    rng = np.random.default_rng(0)
    numbers = [int(n) for n in rng.choice(split_of_numbers()["train"], size=1000)]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = root / "images"
        write_folder([CaptionedImage(write_number(n, "generator", rng), n, caption(n, "en")) for n in numbers], data)
        speeds: dict[str, list[float]] = defaultdict(list)
        shares = []
        prx_post_run(options.model, data, "disk", WARMUP, options.batch, root / "warm")  # fills the cache
        for i in range(options.rounds):
            for cache in ("disk", "none"):
                folder = root / f"{cache}-{i}"
                speeds[cache].append(prx_post_run(options.model, data, cache, options.steps, options.batch, folder))
            speeds["newcomer"].append(newcomer_run(options.model, data, options.steps, options.batch))
            shares.append(overhead_share(options.model, data, options.steps, options.batch, root / f"timed-{i}"))
            print({k: round(v[-1], 1) for k, v in speeds.items()}, f"overhead {shares[-1]:.3f}", flush=True)
    print("| loop | images/s (median) | cached run is faster by |\n|---|---|---|")
    for key, label in (
        ("disk", "prx-post, cached"),
        ("none", "prx-post, `cache: none`"),
        ("newcomer", "plain diffusers loop"),
    ):
        ratio = statistics.median(a / b for a, b in zip(speeds["disk"], speeds[key], strict=True))
        print(f"| {label} | {statistics.median(speeds[key]):.0f} | {ratio:.2f}× |")
    print(f"\nOutside forward, backward, clipping and optimizer: {100 * statistics.median(shares):.1f} % of a step.")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, batch {options.batch}, {options.rounds} rounds."
    )


if __name__ == "__main__":
    main()
