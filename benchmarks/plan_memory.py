"""`prx-post plan`'s estimate of peak memory against what real training steps take.

    python benchmarks/plan_memory.py [--cases full lora ...] [--hidden 640] [--depth 6] [--batch 8]

Every case is `prx-post sft` of a network with random weights, four optimizer steps in fresh processes. Measured is the
peak during the loop less what the process held before the network was loaded, after a step of a small one: torch's own
peak where there is a GPU, otherwise the resident set (VmHWM, which Linux lets a process reset).
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, accumulation 2": {"gradient_accumulation_steps": 2},
    "full, checkpointing": {"gradient_checkpointing": True},
    "full, bf16": {"bf16": True},
    "full, bf16, checkpointing": {"bf16": True, "gradient_checkpointing": True},
    "full, Muon": {"optim": "muon"},
    "LoRA": {"use_peft": True},
    "LoRA, bf16, checkpointing": {"use_peft": True, "bf16": True, "gradient_checkpointing": True},
    "DDP": {"processes": 2},
    "ZeRO-1": {"processes": 2, "zero": 1},
    "ZeRO-2": {"processes": 2, "zero": 2},
    "ZeRO-2, accumulation 2": {"processes": 2, "zero": 2, "gradient_accumulation_steps": 2},
    "ZeRO-3": {"processes": 2, "zero": 3},
}
SIDE = 128
"""Height and width of the images, pixels: 256 tokens."""
BUCKET = 4_000_000
"""Elements of DeepSpeed's reduction bucket. Its default of 5e8 would be memory that a CPU run never touches."""


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(root: Path, settings: dict[str, Any]) -> None:
    """Train in this process and write {"baseline", "peak"} to root/measured-<rank>.json."""
    import torch

    from prx_post.cli import main as prx_post
    from prx_post.engine.run import Run
    from prx_post.engine.trainer import Trainer
    from prx_post.model.checkpoint import load

    on_gpu, seen = torch.cuda.is_available(), {}
    transformer, fit = Run.transformer, Trainer.fit

    def watched_transformer(run: Run, *args: Any) -> Any:
        if not seen:
            warm_up(load("tiny").transformer, bf16=bool(settings.get("bf16")))
            seen["baseline"] = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
        return transformer(run, *args)

    def watched_fit(trainer: Trainer) -> dict[str, Any]:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        metrics = fit(trainer)
        seen["peak"] = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
        rank = trainer.run.ranks.rank
        (root / f"measured-{rank}.json").write_text(json.dumps(seen))
        os._exit(0)  # what follows, emitting, is not what is measured
        return metrics

    Run.transformer, Trainer.fit = watched_transformer, watched_fit  # type: ignore[assignment]
    sys.exit(prx_post(["sft", *arguments(settings)]))


def warm_up(transformer: Any, bf16: bool) -> None:
    """One small step, so that the code and the buffers of torch's libraries are there before the baseline is taken."""
    import torch

    from prx_post.model.denoiser import predict_velocity

    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformer.to(device).train()
    text = torch.randn(2, 24, transformer.config.context_in_dim, device=device)
    mask = torch.ones(2, 24, dtype=torch.bool, device=device)
    x_t, t = torch.randn(2, transformer.config.in_channels, 8, 16, device=device), torch.rand(2, device=device)
    optimizer = torch.optim.AdamW(transformer.parameters(), fused=True)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss = predict_velocity(transformer, x_t, t, text, mask).float().square().mean()
    loss.backward()
    optimizer.step()


def arguments(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def make_pipeline(folder: Path, hidden: int, depth: int) -> None:
    """The embedded base with another transformer, of random weights."""
    import torch
    from diffusers import PRXTransformer2DModel

    from prx_post.tiny import BASE

    shutil.copytree(BASE, folder)
    shutil.rmtree(folder / "transformer")
    torch.manual_seed(0)
    config = json.loads((BASE / "transformer" / "config.json").read_text())
    config |= {"hidden_size": hidden, "num_heads": hidden // 64, "depth": depth, "axes_dim": [32, 32]}
    PRXTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")


def make_data(folder: Path, count: int, words: int) -> None:
    """Images of noise, with captions that fill the text length."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "prompt": "seven " * words + str(i)} for i in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings_of(root: Path, case: dict[str, Any], batch: int, name: str) -> dict[str, Any]:
    settings = {
        "model_name_or_path": root / "pipeline",
        "dataset_name": root / "data",
        "cache_dir": root / "cache",
        "output_dir": root / name,
        **{"height": SIDE, "width": SIDE, "max_steps": 4, "per_device_train_batch_size": batch},
        **{"sample_steps": 0, "save_steps": 0, "logging_steps": 1},
        **{key: value for key, value in case.items() if key not in ("processes", "zero")},
    }
    if "zero" in case:
        file = root / f"zero{case['zero']}.json"
        zero = {"stage": case["zero"], "reduce_bucket_size": BUCKET}
        file.write_text(json.dumps({"zero_optimization": zero}))
        settings["deepspeed"] = file
    return settings


def start(root: Path, settings: dict[str, Any], count: int) -> list[dict[str, int]]:
    """Run `measure` in `count` processes; returns what each found."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # Freed blocks go back to the system at once, so that the resident set is what is alive.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    if count > 1:
        env |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--measure", json.dumps([str(root), settings], default=str)]
    logs = [root / f"log-{rank}.txt" for rank in range(count)]
    processes = []
    for rank, log in enumerate(logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} if count > 1 else {}
        with log.open("w") as output:
            processes.append(subprocess.Popen(command, env=env | own, stdout=output, stderr=output))
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"exit codes {codes}\n" + "\n".join(log.read_text()[-3000:] for log in logs))
    return [json.loads((root / f"measured-{rank}.json").read_text()) for rank in range(count)]


def estimate(settings: dict[str, Any], count: int) -> Any:
    from prx_post.planning.plan import check

    planner, _ = check([*arguments(settings), "--num_processes", str(count)])
    return planner.memory(planner.dry_run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        root, settings = json.loads(options.measure)
        measure(Path(root), settings)
        return
    from prx_post.model.checkpoint import open_pipeline

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_pipeline(root / "pipeline", options.hidden, options.depth)
        make_data(root / "data", 4 * options.batch, open_pipeline("tiny").max_prompt_tokens)
        print("| run | estimate, MiB | measured, MiB | estimate / measured |\n|---|---|---|---|", flush=True)
        for number, case in enumerate(options.cases):
            settings, count = (
                settings_of(root, CASES[case], options.batch, str(number)),
                CASES[case].get("processes", 1),
            )
            found = start(root, settings, count)
            measured = max(one["peak"] - one["baseline"] for one in found)
            planned = estimate(settings, count).peak
            print(f"| {case} | {planned / 2**20:.0f} | {measured / 2**20:.0f} | {planned / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
