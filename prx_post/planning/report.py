"""The plan as text: a section each, sizes in GiB, warnings last."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from prx_post.data.sizes import CacheSize
from prx_post.planning.disk import RunSize
from prx_post.planning.dry_run import DryRun
from prx_post.planning.memory import Memory
from prx_post.planning.planner import Planner

GIB, TERA = 2**30, 10**12
MARGIN = 0.1
"""Fraction of a GPU that should stay free: its context, the libraries' workspaces and fragmentation are not planned."""


def gib(size: float) -> str:
    return f"{size / GIB:9.3f} GiB" if size < GIB / 10 else f"{size / GIB:9.2f} GiB"


def settings(*parts: Any) -> list[str]:
    """Every setting as it was resolved, as YAML."""
    import yaml

    values = {name: value for part in parts for name, value in dataclasses.asdict(part).items()}
    return ["settings", *(f"  {line}" for line in yaml.safe_dump(values, sort_keys=False, width=110).splitlines()), ""]


def answer(
    planner: Planner,
    plan: Any,
    run: DryRun,
    needed: Memory,
    device: float | None,
    cache: CacheSize | str | None,
    written: RunSize,
) -> list[str]:
    """What is asked first: whether it fits, how long it takes, what it costs."""
    count, max_steps = planner.parallel.num_processes, planner.config.max_steps
    peak = gib(needed.peak).strip()
    if device is None:
        fits = f"not known: {peak} are needed; set device_memory_gib"
    else:
        fits = f"{'yes' if needed.peak <= device * GIB else 'no'}: {peak} of {device:.1f} GiB"
    work, generated = planner.stage.rollout_work(), 0.0
    if work is not None:
        generated = work.generated * run.flops_of_sample / work.steps / count / TERA
    tflop = run.flops / TERA + generated
    part = f", {generated:.3g} of them to generate" if generated else ""
    found = [f"  fits         {fits}", f"  compute      {tflop:.3g} TFLOP per step and GPU{part}; {max_steps:,} steps"]
    seconds = plan.seconds(tflop)
    if seconds is None:
        found.append("  time         not known: set seconds_per_step, or utilisation and peak_tflops")
    else:
        hours = max_steps * seconds / 3600
        how = "" if plan.seconds_per_step else f", at {plan.utilisation:.0%} of {plan.peak_tflops:g} TFLOP/s"
        found.append(
            f"  time         {hours:.3g} hours on {count} GPU{'s' * (count > 1)}: {seconds:.3g} s per step{how}"
        )
        if plan.price_per_hour:
            total = hours * count
            found.append(f"  price        {total * plan.price_per_hour:,.2f} for {total:.3g} GPU hours")
    disk = written.held * written.checkpoint + written.transformer
    more = f", and {gib(cache.total).strip()} of cache" if isinstance(cache, CacheSize) else ""
    return ["plan", *found, f"  disk         {gib(disk).strip()} in output_dir{more}", ""]


def network(planner: Planner, run: DryRun) -> list[str]:
    pipeline, policy = planner.stage.pipeline, run.averaged_parameters
    kind = f"a LoRA adapter of rank {planner.lora_rank}" if planner.lora_rank else "every weight"
    others = run.trained_parameters - policy
    return [
        f"network   {pipeline.source}, {pipeline.variant}",
        f"  parameters   {run.parameters:>15,}",
        f"  trained      {policy:>15,}   {100 * policy / run.parameters:.2f} %, {kind}",
        *([f"  and          {others:>15,}   of the methods' own networks"] if others else []),
        *([f"  frozen                         {gib(run.frozen).strip()} in other networks"] if run.frozen else []),
        "",
    ]


def memory_table(planner: Planner, run: DryRun, needed: Memory, other: DryRun, device: float | None) -> list[str]:
    config, parallel = planner.config, planner.parallel
    height, width = planner.largest_size
    frozen = "fp32, the frozen ones too" if planner.lora_rank else "fp32"
    one_of = f"one of {parallel.num_processes} processes, {parallel.name}" if parallel.num_processes > 1 else "one GPU"
    if parallel.num_processes == 1 and parallel.zero_stage:
        one_of += f", {parallel.name}"
    on, off = ("on", "off") if config.gradient_checkpointing else ("off", "on")
    kernels = {"cuda": "this GPU's", "cpu": "the CPU's, as there is no GPU here; a GPU's may keep more or less"}
    rows = [
        ("weights", needed.weights, f"{frozen}, {gib(run.frozen).strip()} of other networks" if run.frozen else frozen),
        ("gradients", needed.gradients, "fp32"),
        (
            "optimizer",
            needed.optimizer,
            config.optim + (", with its copy of the weights" if _has_copy(planner) else ""),
        ),
        ("EMA", needed.ema, ""),
        ("activations", needed.activations, f"gradient_checkpointing {on}; {off}: {gib(other.activations).strip()}"),
    ]
    if needed.buffers:
        rows.append(("ZeRO buffers", needed.buffers, "buckets" + (", gathered weights" * (parallel.zero_stage == 3))))
    if run.step_temporaries:
        rows.append(("step", run.step_temporaries, "what the optimizer needs in passing"))
    largest = "" if planner.has_one_size else ", the largest bucket"
    tokens = planner.stage.pipeline.max_prompt_tokens
    peak = "not all at one time" if needed.peak < sum(size for _, size, _ in rows) else ""
    return [
        f"memory   of {one_of}",
        *(_row(*row) for row in rows),
        _row("peak", needed.peak, "; ".join(filter(None, (peak, f"of {device:.1f} GiB" if device else "")))),
        _row("host", needed.host, "while a checkpoint is written" + (", and the optimizer" * parallel.offload)),
        f"  {config.per_device_train_batch_size} samples of {height}x{width} px{largest}, {tokens} text tokens each",
        f"  kernels: {kernels[planner.device]}{'; torch_compile is not counted' if config.torch_compile else ''}",
        "  not counted: the GPU's context, libraries' workspaces, encoding and sampling",
        "",
    ]


def _has_copy(planner: Planner) -> bool:
    return planner.parallel.zero_stage > 0 and not planner.parallel.offload


def _row(name: str, size: int, note: str = "") -> str:
    return f"  {name:13}{gib(size)}   {note}".rstrip()


def disk(planner: Planner, cache: CacheSize | str | None, written: RunSize) -> list[str]:
    config, result = planner.config, ["disk"]
    if cache is None:
        result.append("  cache        none: encoded on the fly")
    elif isinstance(cache, str):
        result.append(f"  cache        unknown: {cache}")
    else:
        how = "" if cache.looked_at == cache.rows else f"; estimated from {cache.looked_at:,} of them"
        result.append(
            _row("cache", cache.total, f"{cache.rows:,} rows{how}; less what is in {planner.cache_dir} already")
        )
        result.append(f"    latents {gib(cache.latents).strip()}, embeddings {gib(cache.embeddings).strip()}")
    each = f"{written.held} of {gib(written.checkpoint).strip()}, one more than are kept while it is written"
    result.append(_row("checkpoints", written.held * written.checkpoint, each if written.saves else "none"))
    return [
        *result,
        _row("final", written.transformer, f"transformer in {config.emit_dtype}, and the base's encoders"),
        "",
    ]


def steps(planner: Planner, cache: CacheSize | str | None, written: RunSize) -> list[str]:
    config, parallel, batch = planner.config, planner.parallel, planner.global_batch_size
    seen = batch * config.max_steps
    epochs = f"   {seen / cache.entries:.2f} epochs of {cache.entries:,}" if isinstance(cache, CacheSize) else ""
    return [
        "steps",
        f"  optimizer    {config.max_steps:>9,}   of {batch:,} samples: {config.per_device_train_batch_size} a device"
        f" x {parallel.num_processes} x {config.gradient_accumulation_steps} accumulated",
        f"  samples      {seen:>9,}{epochs}",
        f"  checkpoints  {written.saves:>9,}",
    ]


def warnings(
    planner: Planner,
    needed: Memory,
    device: float | None,
    savings: list[tuple[str, Memory]],
    cache: CacheSize | str | None,
    written: RunSize,
) -> list[str]:
    """What will not fit, and what would help; empty if there is nothing to say."""
    found = []
    if device is None:
        found.append("whether it fits is not known: there is no GPU here. Set device_memory_gib.")
    elif needed.peak > device * GIB:
        found.append(f"does not fit: {gib(needed.peak).strip()} are needed, and a GPU has {device:.1f} GiB.")
        for change, then in sorted(savings, key=lambda saving: saving[1].peak):
            if then.peak < needed.peak:
                fits = "fits" if then.peak <= device * GIB else "not enough alone"
                saved = gib(needed.peak - then.peak).strip()
                found.append(f"  {change} saves {saved}: {gib(then.peak).strip()}, {fits}")
    elif needed.peak > (1 - MARGIN) * device * GIB:
        found.append(f"leaves less than {MARGIN:.0%} of the GPU's {device:.1f} GiB for what is not counted.")
    places = [(Path(planner.config.output_dir), written.held * written.checkpoint + written.transformer, "output_dir")]
    if isinstance(cache, CacheSize):
        places.append((Path(planner.cache_dir), cache.total, "cache_dir"))
    for folder, size, name in places:
        there = next(p for p in (folder.expanduser().absolute(), *folder.expanduser().absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        if size > free:
            found.append(f"{name} {folder} has {gib(free).strip()} free, but {gib(size).strip()} may be written.")
    return ["", *(line if line.startswith("  ") else f"warning: {line}" for line in found)] if found else []
