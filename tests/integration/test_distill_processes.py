"""Distillation in two processes: student and discriminator get the gradients that one process computes."""

import json
import shutil

import pytest
import torch

from prx_post.engine.checkpointing import open_checkpoint
from tests.distilling import BY_LEVEL, arguments
from tests.faults import differences, numbers
from tests.processes import Processes, run

MODES = ["ddp", "zero1", "zero2"]
GAME = {
    "method": ["ladd", "trajectory"],
    "discriminator_warmup_steps": 1,
    "discriminator_steps_per_generator": 2,
    "save_steps": 1,
    "save_total_limit": 9,
    "max_steps": 6,
    # plain sums of gradients, so that a checkpoint's weights show them: no momentum, no division
    "adam_beta1": 0.0,
}


def call(mode, prompts_file, cache, output_dir, **changes):
    batch = {"per_device_train_batch_size": 4 if mode == "one" else 2}
    zero = {"deepspeed": mode} if mode.startswith("zero") else {}
    return arguments(prompts_file, cache, output_dir, **{**GAME, **batch, **zero, **changes})


@pytest.fixture(scope="module")
def runs(prompts_file, tmp_path_factory):
    """A finished run in each mode, made when first asked for."""
    folder = tmp_path_factory.mktemp("modes")

    def get(mode):
        if not (folder / mode / "final").exists():
            run(1 if mode == "one" else 2, call(mode, prompts_file, folder / "cache", folder / mode))
        return folder / mode

    return get


def test_methods_by_level_and_own_states_are_those_of_one_process(prompts_file, tmp_path):
    """Also where a process has no sample of a method, in one step or in all."""
    for count, mode in ((1, "one"), (2, "ddp")):
        waits = {"discriminator_warmup_steps": 0, "discriminator_steps_per_generator": 1, "max_steps": 4}
        run(count, call(mode, prompts_file, tmp_path / "cache", tmp_path / mode, **waits, **BY_LEVEL))
    ours, theirs = numbers(tmp_path / "ddp"), numbers(tmp_path / "one")
    assert len(theirs) == 4
    for mine, yours in zip(ours[:3], theirs[:3], strict=True):
        assert mine.keys() == yours.keys()
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(yours[name], rel=1e-3), name
    seen = {name for line in theirs for name in ("trajectory_mse", "generator_loss") if name in line}
    assert seen == {"trajectory_mse", "generator_loss"}


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradient_norms_are_those_of_one_process(runs, mode):
    ours, theirs = numbers(runs(mode)), numbers(runs("one"))
    names = ["loss", "grad_norm", "discriminator_loss"]
    names += [] if mode.startswith("zero") else ["grad_norm/ladd"]
    for name in names:
        # the first steps alone: later ones start from weights that rounding has moved
        assert [line[name] for line in ours[:3]] == pytest.approx([line[name] for line in theirs[:3]], rel=1e-3), name
    waits = [True, True, False]  # the heads' warm-up, and their extra step
    assert ["grad_norm/policy" not in line for line in theirs[:3]] == waits
    assert theirs[2]["grad_norm/policy"] > 0
    if mode == "ddp":
        assert ours[2]["grad_norm/policy"] == pytest.approx(theirs[2]["grad_norm/policy"], rel=1e-3)


def second_moments(folder, step):
    """(1 - 0.999) · gradient² of the only step that counts so far; both groups, by name."""
    tensors = open_checkpoint(folder / f"checkpoint-{step:06d}").tensors()
    return {key: value for key, value in tensors.under("optimizer") if key.endswith("/exp_avg_sq")}


@pytest.mark.parametrize("mode", MODES)
def test_student_and_head_gradients_are_those_of_one_process(runs, mode):
    """Read from Adam's second moments: after step 4 the student has had one step (the third), the heads four."""
    ours, theirs = (second_moments(runs(name), 4) for name in (mode, "one"))
    for prefix in ("policy.", "ladd."):
        names = [name for name in theirs if name.startswith(prefix)]
        assert names
        a, b = (torch.cat([moments[name].flatten() for name in names]) for moments in (ours, theirs))
        assert b.sum() > 0
        # squares of gradients that were summed in another order, after heads that rounding has moved
        assert (a - b).abs().sum() < 1e-2 * b.sum(), prefix


@pytest.mark.parametrize("mode", ["one", *MODES])
def test_a_student_that_waits_keeps_its_weights_and_moments_in_every_mode(runs, mode):
    """Steps 1 and 2 are the heads' alone; step 4 is, too, after the student has moments."""
    states = {n: open_checkpoint(runs(mode) / f"checkpoint-{n:06d}").tensors() for n in (2, 3, 4, 6)}
    for part in ("model", "optimizer", "ema"):
        of_student = [f"{part}/{key}" for key, _ in states[3].under(part) if key.startswith("policy.")]
        assert of_student
        assert all(torch.equal(states[3][key], states[4][key]) for key in of_student), part
    moved = [key for key, value in states[3].under("model") if not torch.equal(value, states[4][f"model/{key}"])]
    assert moved
    assert all(key.startswith("ladd.") for key in moved)
    name = "policy.img_in.weight"
    moments = f"optimizer/{name}/exp_avg_sq"
    assert moments not in states[2] or not states[2][moments].any()
    # one step of the student in each of the pairs 3-4 and 5-6: its own count says so
    steps = [int(states[n][f"optimizer/{name}/step"]) for n in (4, 6)]
    assert steps == [1, 2]
    heads = next(key for key, _ in states[6].under("optimizer") if key.startswith("ladd.") and key.endswith("/step"))
    assert int(states[6][f"optimizer/{heads}"]) == 6


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_bit_identical(runs, mode, prompts_file, tmp_path):
    broken = tmp_path / "run"
    broken.mkdir()
    shutil.copytree(runs(mode) / "checkpoint-000004", broken / "checkpoint-000004")
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(runs(mode) / name, broken / name)
    changes = {"resume_from_checkpoint": "latest"}
    run(2, call(mode, prompts_file, runs(mode).parent / "cache", broken, **changes))
    assert differences(broken, runs(mode)) == []


def test_evaluations_in_two_processes_are_those_of_one(prompts_file, tmp_path):
    common = {
        "eval_steps": 2,
        "eval_num_prompts": 3,
        "eval_prompts_file": str(prompts_file),
        "eval_rewards": ["judge_graded"],
        "eval_encoder": "judge",
        "min_diversity": 0.0,
        "eval_num_inference_steps": [4],
        "method": ["trajectory"],
        "max_steps": 2,
        "discriminator_warmup_steps": 0,
        "discriminator_steps_per_generator": 1,
    }
    for mode in ("one", "ddp"):
        run(1 if mode == "one" else 2, call(mode, prompts_file, tmp_path / "cache", tmp_path / mode, **common))
    texts = [(tmp_path / mode / "evaluations.jsonl").read_text().splitlines() for mode in ("one", "ddp")]
    ours, theirs = ([json.loads(line) for line in lines] for lines in texts)
    # before any step; on some processors an image's last bits depend on how many are made at a time
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert ours[1]["eval/judge_graded/4_steps"] == pytest.approx(theirs[1]["eval/judge_graded/4_steps"], rel=1e-2)


def test_a_stop_is_said_once_and_saved_by_both_processes(prompts_file, tmp_path):
    changes = {"max_discriminator_accuracy": 0.01, "saturation_patience": 2, "save_steps": 0}
    ranks = Processes(2, call("ddp", prompts_file, tmp_path / "cache", tmp_path / "run", **changes)).wait()
    assert [rank.returncode for rank in ranks] == [2, 2]
    errors = [line for rank in ranks for line in rank.output.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "the discriminator told real from fake" in errors[0]
    open_checkpoint(tmp_path / "run" / "checkpoint-000003").verify()
