"""Runs that are killed, starved and resumed. Children are forked from a server that has already imported everything."""

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from prx_post.engine.checkpointing import checkpoints
from tests.processes import FORK


def sft_arguments(images: Path, cache: Path, output_dir: Path, **changes: object) -> list[str]:
    """A short run of `prx-post sft` that saves every second step."""
    values = {
        "model_name_or_path": "tiny",
        "dataset_name": images,
        "height": 32,
        "width": 64,
        "cache_dir": cache,
        "output_dir": output_dir,
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 3,
        "save_steps": 2,
        "sample_steps": 0,
        "num_inference_steps": 2,
        "lr_scheduler_type": "cosine",
        "ema_decay": 0.9,
        "ddp_timeout": 60,
        "resume_from_checkpoint": "latest",
        **changes,
    }
    return ["sft", *(part for name, value in values.items() for part in (f"--{name}", str(value)))]


@dataclass(frozen=True)
class Limits:
    """What a child suffers: its own SIGKILL at the n-th flush of a file to disk; a largest size of files, bytes."""

    dies_at_flush: int | None = None
    largest_file: int | None = None


def _child(arguments: list[str], log: Path, limits: Limits) -> None:
    from prx_post import cli
    from prx_post.base import files
    from prx_post.engine import checkpointing

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores, in all that it starts
    flushes, flush = 0, files.flush

    def counted(path: Path) -> None:
        nonlocal flushes
        flushes += 1
        if flushes == limits.dies_at_flush:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    checkpointing.flush = files.flush = counted
    if limits.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.largest_file, limits.largest_file))
    code = cli.main(arguments)
    os._exit(code)


@dataclass
class Outcome:
    """How a child ended: its exit code (negative: killed by that signal) and what it printed."""

    returncode: int
    output: str


def run_child(
    arguments: list[str],
    log: Path,
    limits: Limits | None = None,
    kill_after_s: float | None = None,
    signal_when: tuple[int, Callable[[], bool]] | None = None,
    timeout_s: float = 1800,
) -> Outcome:
    """Run the command line in a child to its end, or to its SIGKILL after `kill_after_s` seconds.

    Args:
        signal_when: a signal, and the condition under which it is sent once.
    """
    log.unlink(missing_ok=True)
    child = FORK.Process(target=_child, args=(arguments, log, limits or Limits()))
    child.start()
    deadline = time.monotonic() + timeout_s
    try:
        child.join(kill_after_s if kill_after_s is not None else 0)
        if kill_after_s is not None:
            child.kill()
        while child.is_alive():
            assert time.monotonic() < deadline, f"the child did not end: {log.read_text()[-3000:]}"
            if signal_when and signal_when[1]():
                os.kill(child.pid, signal_when[0])
                signal_when = None
            child.join(0.02)
    finally:
        child.kill()
        child.join()
    return Outcome(child.exitcode, log.read_text() if log.exists() else "")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "transformer" / "diffusion_pytorch_model.safetensors")


def numbers(run: Path) -> list[dict[str, float]]:
    """The metrics of a run that do not depend on the machine."""
    clock = ("time", "images_per_second", "data_wait_fraction", "peak_memory_gib")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock and "seconds/" not in k} for line in lines]


def stopped_after(run: Path, step: int, folder: Path) -> Path:
    """A run's folder as it would be had `run`, which is left alone, been stopped with the checkpoint of `step`."""
    folder.mkdir(exist_ok=True)
    name = f"checkpoint-{step:06d}"
    shutil.copytree(run / name, folder / name)
    for file in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(run / file, folder / file)
    return folder


def differences(run: Path, reference: Path) -> list[str]:
    """Names of what is not bit-identical in two finished runs: weights, and `metrics`."""
    ours, theirs = weights(run), weights(reference)
    assert ours.keys() == theirs.keys()
    odd = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    return odd + (["metrics"] if numbers(run) != numbers(reference) else [])


@dataclass
class Reliability:
    """What many killed runs came to. `resumed`: how many of their starts found a checkpoint to go on from."""

    trials: int = 0
    kills: int = 0
    kills_in_a_save: int = 0
    resumed: int = 0
    lost_or_changed: int = 0


def kill_trials(images: Path, cache: Path, folder: Path, trials: int, seed: int = 0) -> Reliability:
    """Kill a run up to three times, then let it end, and compare with one never killed; `trials` times.

    Every second trial is killed at a random moment, every other at a random flush of a save.
    """
    reference = folder / "reference"
    whole_run_s = 0.0
    for name in ("fills-the-cache", "reference"):
        began = time.monotonic()
        outcome = run_child(sft_arguments(images, cache, folder / name), folder / "log")
        assert outcome.returncode == 0, outcome.output[-3000:]
        whole_run_s = time.monotonic() - began
    total = Reliability()
    for trial in range(trials):
        rng, run = random.Random(seed * 1000 + trial), folder / f"trial-{trial}"
        arguments = sft_arguments(images, cache, run)
        for _ in range(rng.randint(1, 3)):
            total.resumed += bool(checkpoints(run))
            if trial % 2:
                outcome = run_child(arguments, folder / "log", Limits(dies_at_flush=rng.randint(1, 20)))
            else:
                outcome = run_child(arguments, folder / "log", kill_after_s=rng.uniform(0, whole_run_s))
            if outcome.returncode == 0:
                break  # it was quicker than its killer
            assert outcome.returncode == -signal.SIGKILL, outcome.output[-3000:]
            total.kills += 1
            total.kills_in_a_save += any(run.glob(".checkpoint-*")) if run.exists() else 0
        total.resumed += bool(checkpoints(run))
        outcome = run_child(arguments, folder / "log")
        total.trials += 1
        total.lost_or_changed += outcome.returncode != 0 or bool(differences(run, reference))
        shutil.rmtree(run)
    return total
