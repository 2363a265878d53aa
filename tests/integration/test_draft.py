"""`prx-post draft` from beginning to end."""

import re
import shutil

import pytest
import torch
from diffusers import PRXPipeline
from safetensors.torch import load_file

from prx_post.cli import main
from prx_post.engine.checkpointing import open_checkpoint
from tests.faults import numbers
from tests.processes import run as launch


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"{number}\n" for number in range(100, 108)))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def arguments(prompts, cache, output_dir, command="draft", **changes):
    values = {
        **{"method": "draft", "model_name_or_path": "tiny", "prompts_file": prompts, "height": 32, "width": 64},
        **{"cache_dir": cache, "output_dir": output_dir, "max_steps": 4, "learning_rate": 1e-4},
        **{"per_device_train_batch_size": 4, "reward_funcs": "judge_graded", "num_inference_steps": 3},
        **{"guidance_scale": 1, "shift_terminal": 0.3, "logging_steps": 1, "save_steps": 2, "save_total_limit": 9},
        **{"sample_steps": 0, "report_to": "none", "ema_decay": 0.5, "ddp_timeout": 60},
        **changes,
    }
    lists = {name: value if isinstance(value, list | tuple) else [value] for name, value in values.items()}
    return [command, *(str(part) for name, value in lists.items() for part in (f"--{name}", *value))]


def train(*given, **changes):
    assert main(arguments(*given, **changes)) == 0
    return given[2]


def test_the_reward_rises_and_stock_diffusers_loads_what_is_emitted(prompts, cache, tmp_path):
    folder = train(prompts, cache, tmp_path / "run", max_steps=30, per_device_train_batch_size=8, learning_rate=3e-4)
    rewards = [line["reward/judge_graded"] for line in numbers(folder)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5, "natural logarithms, of a digit's probability"
    pipe = PRXPipeline.from_pretrained(folder / "final")
    assert pipe.scheduler.config.shift_terminal == 0.3
    image = pipe("105", height=32, width=64, num_inference_steps=3, guidance_scale=1.0, use_resolution_binning=False)
    assert image.images[0].size == (64, 32)
    assert "judge_graded" in (folder / "final" / "README.md").read_text()


VARIANTS = {
    "draft-2": {"gradient_steps": 2, "beta": 0.1},
    "refl": {"refl_steps": 2, "reward_margin": -0.1, "guidance_scale": 2},
    "lora": {"use_peft": "true", "lora_r": 4, "beta": 0.1, "gradient_checkpointing": "true"},
    "bf16": {"bf16": "true"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_is_bit_identical(prompts, cache, tmp_path, changes):
    whole, broken = train(prompts, cache, tmp_path / "whole", **changes), tmp_path / "broken"
    broken.mkdir()
    for name in ("checkpoint-000002", "samples.jsonl", "metrics.jsonl"):
        copy = shutil.copytree if name.startswith("checkpoint") else shutil.copy
        copy(whole / name, broken / name)
    train(prompts, cache, broken, resume_from_checkpoint="latest", **changes)
    ours, theirs = (open_checkpoint(folder / "checkpoint-000004").tensors() for folder in (broken, whole))
    keys = [f"{part}/{key}" for part in ("model", "optimizer", "ema") for key, _ in theirs.under(part)]
    assert keys
    assert all(torch.equal(ours[key], theirs[key]) for key in keys)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    ours, theirs = (load_file(folder / "final" / weights) for folder in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("deepspeed", [None, "zero2"])
def test_two_processes_compute_what_one_does(prompts, cache, tmp_path, deepspeed):
    found = []
    for count in (1, 2):
        more = {"deepspeed": deepspeed} if deepspeed and count == 2 else {}
        output, size = tmp_path / str(count), 8 // count
        launch(count, arguments(prompts, cache, output, per_device_train_batch_size=size, gradient_steps=2, **more))
        found.append(numbers(output))
    for ours, theirs in zip(*found, strict=True):
        for name in ("loss", "grad_norm", "reward/judge_graded"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3), name


@pytest.mark.parametrize("command", ["dpo", "grpo"])
def test_other_commands_of_alignment_say_that_they_run_it(prompts, cache, tmp_path, command, capsys):
    assert main(arguments(prompts, cache, tmp_path / "run", command=command, max_steps=1)) == 0
    assert "prx-post draft" in capsys.readouterr().out
    assert (tmp_path / "run" / "final" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_funcs": "ocr_graded"}, "'ocr_graded', which has no gradient to climb. Take one of"),
        ({"reward_funcs": ["judge_graded", "judge_exact"]}, "'judge_exact', which has no gradient"),
        ({"reward_funcs": "hpsv2=absent"}, "absent"),
    ],
)
def test_what_cannot_be_climbed_is_refused_before_anything_loads(prompts, cache, tmp_path, changes, message, capsys):
    assert main(arguments(prompts, cache, tmp_path / "run", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_reward_is_refused_on_resuming(prompts, cache, tmp_path, monkeypatch, capsys):
    folder = train(prompts, cache, tmp_path / "run", max_steps=2)
    again = {"resume_from_checkpoint": "latest", "max_steps": 4}
    monkeypatch.setattr("prx_post.rewards.scorers.number_judge.file_sha256", lambda path: "other weights")
    assert main(arguments(prompts, cache, folder, **again)) == 2
    assert "was trained with others, or with other weights of theirs" in capsys.readouterr().err


def test_it_is_planned_with_its_decoder(prompts, cache, tmp_path, capsys):
    peaks = []
    for size in (1, 8):
        _, *given = arguments(prompts, cache, tmp_path / "run", per_device_train_batch_size=size)
        assert main(["plan", "--stage", "draft", *given]) == 0
        printed = capsys.readouterr().out
        peaks.append(float(re.search(r"activations +([\d.]+)", printed)[1]))
    assert peaks[1] > 4 * peaks[0]
