"""A step of DPO in steps of SFT, and its memory, by reference; beside a plain loop as in the usual diffusers examples.

    python benchmarks/dpo.py [--hidden_size 640 --depth 8] [--batch 16] [--rounds 7] [--steps 4]

Time: all run in turn in one process, round after round; ratios are taken within a round and their median is reported.
Memory: the peak of a process of its own for each, less that of one that only holds the encoders' latents.

The plain loop decodes both images, encodes them and the prompt in every step, has a second network as its reference,
which it asks with gradients off, and trains all weights.
"""

import argparse
import io
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import PRXPipeline, PRXTransformer2DModel
from PIL import Image
from torch.nn.functional import logsigmoid

from prx_post.engine.protocols import Batch
from prx_post.model.checkpoint import open_pipeline
from prx_post.model.config import ModelConfig
from prx_post.model.frozen import AdapterOff, FrozenCopy
from prx_post.model.lora import attach
from prx_post.stages.dpo.objective import PairObjective, pair_errors
from prx_post.stages.sft.objective import FlowMatchingObjective
from prx_post.tiny.handwriting import write_number

BETA = 500.0
KINDS = ("sft", "sft LoRA", "adapter off", "frozen copy", "computed before", "plain loop")
Step = Callable[[], None]


def network(options: argparse.Namespace) -> Any:
    """The embedded transformer, or one of its kind of another size with random weights."""
    torch.manual_seed(0)
    if options.hidden_size is None:
        return open_pipeline("tiny").load_transformer(torch.float32)
    config = dict(open_pipeline("tiny").configs["transformer"])
    heads = options.hidden_size // (config["hidden_size"] // config["num_heads"])
    config |= {"hidden_size": options.hidden_size, "num_heads": heads, "depth": options.depth}
    return PRXTransformer2DModel.from_config(config)


def a_batch(size: int) -> Batch:
    pipeline = open_pipeline("tiny")
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    latents, width = pipeline.latent_shape(32, 64), pipeline.configs["transformer"]["context_in_dim"]
    return {
        "latents": noise(size, *latents),
        "rejected": noise(size, *latents),
        "noise": noise(size, *latents),
        "t": torch.rand(size, generator=generator),
        "prompt_embeds": noise(size, 8, width),
        "prompt_mask": torch.ones(size, 8, dtype=torch.bool),
        "seeds": list(range(size)),
        "rows": list(range(size)),
        "step": 0,
    }


def build(kind: str, options: argparse.Namespace) -> Step:
    """One optimizer step of a kind."""
    if kind == "plain loop":
        return plain_loop(options)
    policy, batch = network(options), a_batch(options.batch)
    if kind in ("adapter off", "sft LoRA"):
        policy = attach(policy, ModelConfig(model_name_or_path="tiny", use_peft=True, lora_r=16))
    policy.train()
    objective: Any
    if kind.startswith("sft"):
        objective = FlowMatchingObjective(policy, 1e-5)
    else:
        if kind == "computed before":
            batch["ref_errors"] = pair_errors(FrozenCopy(network(options)).velocity, batch)
        kept = {"adapter off": lambda: AdapterOff(policy), "frozen copy": lambda: FrozenCopy(network(options))}
        objective = PairObjective(policy, 1e-5, kept[kind]() if kind in kept else None, beta=BETA)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        objective(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_loop(options: argparse.Namespace) -> Step:
    pipe = PRXPipeline.from_pretrained(open_pipeline("tiny").path)
    policy, reference = network(options).train(), network(options).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    import numpy as np

    rng = np.random.default_rng(0)
    files = []
    for number in range(100, 100 + 2 * options.batch):
        buffer = io.BytesIO()
        write_number(number, "generator", rng).save(buffer, "PNG")
        files.append(buffer.getvalue())
    prompts = [str(number) for number in range(100, 100 + options.batch)]

    def step() -> None:
        pixels = pipe.image_processor.preprocess([Image.open(io.BytesIO(data)).convert("RGB") for data in files])
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.sample()
            latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
            embeds, mask, _, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
        noise = torch.randn_like(latents[: options.batch]).repeat(2, 1, 1, 1)
        t = torch.sigmoid(torch.randn(options.batch)).repeat(2)
        x_t = (1 - t.view(-1, 1, 1, 1)) * latents + t.view(-1, 1, 1, 1) * noise
        conditions = embeds.repeat(2, 1, 1), mask.repeat(2, 1)
        target = noise - latents

        def losses(transformer: Any) -> tuple[torch.Tensor, torch.Tensor]:
            predicted = transformer(x_t, t, *conditions, return_dict=False)[0]
            win, lose = (predicted - target).square().mean((1, 2, 3)).chunk(2)
            return win, lose

        win, lose = losses(policy)
        with torch.no_grad():
            ref_win, ref_lose = losses(reference)
        loss = -logsigmoid(-0.5 * BETA * ((win - lose) - (ref_win - ref_lose))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_mib(kind: str, options: argparse.Namespace) -> float:
    """Of a process that does three steps; `none`: that only imports and makes a batch."""
    call = [sys.executable, __file__, "--only", kind, "--batch", str(options.batch), "--depth", str(options.depth)]
    call += [] if options.hidden_size is None else ["--hidden_size", str(options.hidden_size)]
    return float(subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=None, help="random weights of this width")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="pairs; images for SFT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        step = (lambda: None) if options.only == "none" else build(options.only, options)
        for _ in range(3):
            step()
        status = Path("/proc/self/status").read_text()  # ru_maxrss would be that of the parent, too
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    steps = {kind: build(kind, options) for kind in KINDS}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for kind, step in steps.items():
            began = time.perf_counter()
            for _ in range(options.steps):
                step()
            seconds[kind].append((time.perf_counter() - began) / options.steps)
    empty = peak_mib("none", options)
    parameters = sum(p.numel() for p in network(options).parameters())
    print("| step | in SFT steps | of the plain loop | peak memory, MiB |\n|---|---|---|---|")
    for kind in KINDS:
        of_sft, of_plain = (
            statistics.median(a / b for a, b in zip(seconds[kind], seconds[base], strict=True))
            for base in ("sft", "plain loop")
        )
        print(f"| {kind} | {of_sft:.2f} | {of_plain:.2f} | {peak_mib(kind, options) - empty:.0f} |", flush=True)
    print(
        f"\n{parameters / 1e6:.1f}M parameters, {options.batch} pairs (SFT: as many images), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.rounds} rounds."
    )


if __name__ == "__main__":
    main()
