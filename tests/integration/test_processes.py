"""Two gloo processes against one: DDP and every ZeRO stage train, save, resume and emit alike."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from prx_post.base.errors import ConfigError
from prx_post.cli import split_launch_flags
from prx_post.engine.checkpointing import checkpoints, open_checkpoint
from tests.faults import differences, numbers, sft_arguments, weights
from tests.processes import Child, Processes, free_port, kill_group, run, wait_for

MODES = ["ddp", "zero1", "zero2", "zero3", "zero2_offload"]
NEEDS_A_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeed compiles its CPU optimizer, which needs g++"
)


def arguments(mode, images, cache, output_dir, **changes):
    """Four steps of 16 samples, in one process or two."""
    batch = {"per_device_train_batch_size": 16 if mode == "one" else 8}
    zero = {"deepspeed": mode} if mode.startswith("zero") else {}
    common = {"max_steps": 4, "logging_steps": 1, "save_total_limit": 9}
    return sft_arguments(images, cache, output_dir, **{**common, **batch, **zero, **changes})


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """A finished run in each mode, made when first asked for."""
    folder = tmp_path_factory.mktemp("modes")

    def get(mode: str) -> Path:
        if not (folder / mode / "final").exists():
            run(1 if mode == "one" else 2, arguments(mode, image_folder, folder / "cache", folder / mode))
        return folder / mode

    return get


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    saved = open_checkpoint(checkpoint)
    saved.verify()
    tensors = saved.tensors()
    return {f"{part}/{k}": v for part in ("model", "optimizer", "ema") for k, v in tensors.under(part)}


def params(modes):
    return [pytest.param(mode, marks=NEEDS_A_COMPILER if "offload" in mode else ()) for mode in modes]


@pytest.mark.parametrize("mode", params(MODES))
def test_two_processes_compute_what_one_does(runs, mode):
    """The same 16 samples a step, noise and timesteps; sums run in another order, so fp32 rounding remains."""
    ours, theirs = numbers(runs(mode)), numbers(runs("one"))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    assert [line["grad_norm"] for line in ours] == pytest.approx([line["grad_norm"] for line in theirs], rel=1e-5)
    # AdamW divides by the gradient's size: where that is nearly nothing, rounding moves a weight by up to a step of
    # the learning rate, 1e-3. Elsewhere they agree to rounding, and so does their mean.
    a, b = weights(runs(mode)), weights(runs("one"))
    assert a.keys() == b.keys()
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-3
    assert sum((a[k] - b[k]).abs().mean().item() for k in a) / len(a) < 1e-6


@pytest.mark.parametrize("mode", ["zero1", "zero2", "zero3"])
def test_zero_splits_state_but_computes_what_ddp_does(runs, mode):
    """Every weight, moment and average."""
    ours, theirs = (state(runs(name) / "checkpoint-000004") for name in (mode, "ddp"))
    assert ours.keys() == theirs.keys()
    # gradients are clipped by a norm that is summed in another order
    assert all(torch.allclose(ours[k].float(), theirs[k].float(), rtol=1e-4, atol=1e-7) for k in ours)


@pytest.mark.parametrize("mode", params(["one", *MODES]))
def test_a_resumed_run_is_bit_identical_in_every_mode(runs, mode, image_folder, tmp_path):
    broken = tmp_path / "run"
    broken.mkdir()
    for name in ("checkpoint-000002", "metrics.jsonl", "samples.jsonl"):
        copy = shutil.copytree if name.startswith("checkpoint") else shutil.copy
        copy(runs(mode) / name, broken / name)
    count = 1 if mode == "one" else 2
    (first, *_) = run(count, arguments(mode, image_folder, runs(mode).parent / "cache", broken))
    assert "resuming from" in first.output
    assert differences(broken, runs(mode)) == []
    ours, theirs = (state(folder / "checkpoint-000004") for folder in (broken, runs(mode)))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize(("before", "after"), [("zero3", "one"), ("one", "zero2"), ("ddp", "zero3")])
def test_another_number_of_processes_goes_on_with_the_same_global_batch(runs, before, after, image_folder, tmp_path):
    goes_on = tmp_path / "run"
    goes_on.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(runs(before) / name, goes_on / name)
    shutil.copytree(runs(before) / "checkpoint-000002", goes_on / "checkpoint-000002")
    changes = {"per_device_train_batch_size": 8}
    call = arguments(after, image_folder, runs(before).parent / "cache", goes_on, **changes)
    (first, *_) = run(1 if after == "one" else 2, call)
    assert ("gradient_accumulation_steps is now 2" in first.output) == (after == "one")
    ours, theirs = ([line["loss"] for line in numbers(folder)] for folder in (goes_on, runs("one")))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("bf16", ["false", "true"])
def test_lora_with_accumulation_and_checkpointing_agrees_between_ddp_and_zero3(image_folder, tmp_path, bf16):
    changes = {"use_peft": "true", "lora_r": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": "true"}
    changes |= {"bf16": bf16, "max_steps": 2, "save_steps": 0}
    for mode in ("ddp", "zero3"):
        run(2, arguments(mode, image_folder, tmp_path / "cache", tmp_path / mode, **changes))
        assert (tmp_path / mode / "final-adapter" / "adapter_model.safetensors").exists()
    ours, theirs = ([line["loss"] for line in numbers(tmp_path / mode)] for mode in ("zero3", "ddp"))
    # ZeRO-3 brings its own linear layer, which rounds to bfloat16 (8 bits: 4e-3) at other places
    assert ours == pytest.approx(theirs, rel=1e-5 if bf16 == "false" else 4e-3)
    a, b = weights(tmp_path / "zero3"), weights(tmp_path / "ddp")
    # where a gradient is nearly nothing, its sign and so AdamW's first step of 1e-3 may differ; few weights are so
    assert sum((a[k] - b[k]).abs().mean().item() for k in b) / len(b) < (1e-7 if bf16 == "false" else 1e-4)


def test_every_rank_gets_its_own_random_state_and_unlogged_sums_back(image_folder, tmp_path):
    """Dropout draws on both ranks, and the checkpoint of step 2 lies within a window of three logged steps."""
    changes = {"use_peft": "true", "lora_r": 4, "lora_dropout": 0.3, "logging_steps": 3, "max_steps": 4}
    for name in ("whole", "broken"):
        call = arguments("ddp", image_folder, tmp_path / "cache", tmp_path / name, **changes)
        if name == "broken":
            (tmp_path / "broken").mkdir()
            shutil.copytree(tmp_path / "whole" / "checkpoint-000002", tmp_path / "broken" / "checkpoint-000002")
            shutil.copy(tmp_path / "whole" / "samples.jsonl", tmp_path / "broken")
        run(2, call)
    assert differences(tmp_path / "broken", tmp_path / "whole") == []
    ranks = [open_checkpoint(tmp_path / "whole" / "checkpoint-000002").of_rank(rank) for rank in (0, 1)]
    assert not torch.equal(*(rank["rng/cpu"] for rank in ranks))
    assert ranks[0]["sums/loss"] != ranks[1]["sums/loss"]


def test_a_cache_that_not_every_process_sees_is_an_error_on_all(image_folder, tmp_path):
    """As when cache_dir is on each machine's own disk."""

    def of_rank(rank):
        return arguments("ddp", image_folder, tmp_path / f"cache-{rank}", tmp_path / "run")

    ranks = Processes(2, of_rank).wait()
    assert [rank.returncode for rank in ranks] == [2, 2]
    errors = [line for rank in ranks for line in rank.output.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "does not see there what other processes encoded" in errors[0]


def test_prx_post_launches_trls_accelerate_configs_by_name(runs, image_folder, tmp_path, prx_post):
    """`--accelerate_config zero3 --num_processes 2`, with a sample grid drawn by weights that are split."""
    plain = arguments("ddp", image_folder, tmp_path / "cache", tmp_path / "run", sample_steps=4)
    flags = ["--accelerate_config", "zero3", "--num_processes", "2", "--main_process_port", free_port()]
    prx_post(*plain, "--sample_prompts", "472", *flags, check=True)
    assert differences(tmp_path / "run", runs("zero3")) == []
    assert (tmp_path / "run" / "samples" / "grid-000004.png").exists()


def test_torchrun_starts_the_same_command(runs, image_folder, tmp_path):
    plain = arguments("ddp", image_folder, tmp_path / "cache", tmp_path / "run")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [sys.executable, *torchrun, "-m", "prx_post.cli", *map(str, plain)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert differences(tmp_path / "run", runs("ddp")) == []


def test_a_signal_to_the_launcher_reaches_the_processes_which_save(image_folder, tmp_path):
    """SIGUSR1, which torchrun by itself would die of, leaving the processes behind."""
    changes = {"max_steps": 100000, "save_steps": 0}
    plain = arguments("ddp", image_folder, tmp_path / "cache", tmp_path / "run", **changes)
    launcher = Child([*plain, "--num_processes", 2, "--main_process_port", free_port()], tmp_path / "log")
    try:
        wait_for(tmp_path / "run" / "metrics.jsonl")
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(timeout=200) == 75
    finally:
        kill_group(launcher)
    (saved,) = checkpoints(tmp_path / "run")
    open_checkpoint(saved).verify()


def test_fewer_processes_than_asked_for_are_an_error(image_folder, tmp_path, prx_post):
    """accelerate starts one process, whatever it is asked, when its config says distributed_type: NO."""
    single = tmp_path / "single.yaml"
    single.write_text(yaml.safe_dump({"distributed_type": "NO", "num_processes": 1, "use_cpu": True}))
    plain = arguments("ddp", image_folder, tmp_path / "cache", tmp_path / "run")
    result = prx_post(*plain, "--accelerate_config", single, "--num_processes", "2")
    assert result.returncode != 0
    assert "num_processes is 2, but accelerate runs 1 process" in result.stderr


def test_what_is_wrong_is_said_once_whoever_launches(image_folder, tmp_path, prx_post):
    plain = arguments("ddp", image_folder, tmp_path / "cache", tmp_path / "run")
    for flags, message in (
        (["--accelerate_config", "zero4"], "accelerate_config is 'zero4'"),
        (["--num_processes", "2", "--max_steps", "0"], "max_steps is 0, but must be above 0"),
        (["--num_processes"], "--num_processes is without a value"),
        (["--accelerate_config", "zero2", "--num_processes", "2", "--optim", "muon"], "optim is 'muon', but must be"),
    ):
        result = prx_post(*plain, *flags)
        assert result.returncode == 2, result.stderr
        assert [message in line for line in result.stderr.splitlines() if line.startswith("error")] == [True]
    assert not (tmp_path / "run").exists()


def test_launch_flags_are_told_from_the_commands_own():
    args = ["--config", "a.yaml", "--num_processes=2", "--seed", "1", "--machine_rank", "0"]
    flags, own = split_launch_flags(args)
    assert flags == {"num_processes": "2", "machine_rank": "0"}
    assert own == ["--config", "a.yaml", "--seed", "1"]
    with pytest.raises(ConfigError, match="--machine_rank is without a value"):
        split_launch_flags(["--machine_rank", "--seed"])
