"""A source that generates with the policy in training: exact when it is killed inside a rollout, on one rank or two."""

import json
import shutil
import signal

import pytest
import torch

from prx_post.engine.checkpointing import checkpoints, open_checkpoint
from tests import online_stage
from tests.faults import differences, numbers
from tests.processes import Processes, run, wait_for

MODES = ["ddp", "zero2"]


def call(mode, images, cache, output_dir, **changes):
    """Two rollouts, trained on for three steps of eight samples each."""
    zero = {"deepspeed": mode} if mode.startswith("zero") else {}
    values = {
        **{"model_name_or_path": "tiny", "dataset_name": images, "height": 32, "width": 64, "cache_dir": cache},
        **{"output_dir": output_dir, "max_steps": 6, "per_device_train_batch_size": 8 if mode == "one" else 4},
        **{"learning_rate": 1e-3, "logging_steps": 1, "save_steps": 1, "save_total_limit": 9, "sample_steps": 0},
        **{"report_to": "none", "num_inference_steps": 2, "guidance_scale": 1.0, "ema_decay": 0.9},
        **{"resume_from_checkpoint": "latest", "ddp_timeout": 60, **zero, **changes},
    }
    return ["online", *(part for name, value in values.items() for part in (f"--{name}", value))]


def start(mode, *args, **changes):
    run(1 if mode == "one" else 2, call(mode, *args, **changes), prepare=online_stage.register)


def rollouts(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")

    def get(mode):
        if not (folder / mode / "final").exists():
            start(mode, image_folder, folder / "cache", folder / mode)
        return folder / mode

    return get


def test_several_steps_train_on_each_rollout_and_the_policy_of_the_second_has_moved(runs):
    made = rollouts(runs("one"))
    assert [line["iteration"] for line in made] == [0, 1]
    assert made[0]["rewards"] != made[1]["rewards"]
    assert [line["reward"] for line in numbers(runs("one"))[:3]] == [pytest.approx(sum(made[0]["rewards"]) / 8)] * 3


@pytest.mark.parametrize("mode", ["one", *MODES])
def test_a_run_that_was_killed_inside_a_rollout_ends_with_the_same_bits_and_makes_none_twice(
    runs, mode, image_folder, tmp_path
):
    broken = tmp_path / "run"
    broken.mkdir()
    shutil.copytree(
        runs(mode) / "checkpoint-000002", broken / "checkpoint-000002"
    )  # of the first rollout's three steps
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(runs(mode) / name, broken / name)
    start(mode, image_folder, runs(mode).parent / "cache", broken)
    assert differences(broken, runs(mode)) == []
    assert [line["iteration"] for line in rollouts(broken)] == [1]
    assert rollouts(broken)[0] == rollouts(runs(mode))[1]


def test_the_rollout_is_in_the_checkpoint_each_rank_with_its_rows(runs):
    saved = open_checkpoint(runs("ddp") / "checkpoint-000002")
    assert saved.info["source"] == {"iteration": 0}
    parts = [dict(saved.of_rank(rank).under("source")) for rank in (0, 1)]
    assert [len(part["latents"]) for part in parts] == [4, 4]
    joined = saved.joined("source")
    assert joined["rewards"].tolist() == pytest.approx(rollouts(runs("ddp"))[0]["rewards"])


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_one(runs, mode):
    """The first rollout to the bit, for a group is generated whole by one rank; then sums run in another order."""
    ours, theirs = rollouts(runs(mode)), rollouts(runs("one"))
    assert ours[0] == theirs[0]
    for name in ("loss", "error", "grad_norm"):
        a, b = ([line[name] for line in numbers(runs(key))] for key in (mode, "one"))
        # losses are differences of advantages, near 0: an absolute tolerance beside the relative one
        assert a[:3] == pytest.approx(b[:3], rel=1e-4, abs=1e-6), name


def test_a_run_of_two_ranks_continues_on_one(runs, image_folder, tmp_path):
    moved = tmp_path / "run"
    moved.mkdir()
    shutil.copytree(runs("ddp") / "checkpoint-000002", moved / "checkpoint-000002")
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(runs("ddp") / name, moved / name)
    start("one", image_folder, runs("ddp").parent / "cache", moved)
    assert [line["iteration"] for line in rollouts(moved)] == [1]
    a, b = ([line["error"] for line in numbers(folder)] for folder in (moved, runs("ddp")))
    assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("reward", "the reward has failed in the middle"), ("nan", "'81' are not finite in rollout 1")],
)
def test_what_fails_on_one_rank_in_a_rollout_ends_both_at_once_with_the_state_saved(
    fault, message, runs, image_folder, tmp_path
):
    changes = {"fails_at": 1, "fault": fault, "save_steps": 0}
    arguments = call("ddp", image_folder, runs("one").parent / "cache", tmp_path / "run", **changes)
    ranks = Processes(2, arguments, online_stage.register).wait(timeout_s=50)  # ddp_timeout is 60
    assert [rank.returncode for rank in ranks] == [2, 2]
    errors = [line for rank in ranks for line in rank.output.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert message in errors[0]
    (saved,) = checkpoints(tmp_path / "run")
    assert saved.name == "checkpoint-000003"
    assert open_checkpoint(saved).joined("source")["latents"].shape == (8, 4, 8, 16)


def test_a_stop_signal_to_one_rank_saves_the_rollout(runs, image_folder, tmp_path):
    changes = {"max_steps": 100000, "steps_per_rollout": 100000, "save_steps": 0}
    arguments = call("ddp", image_folder, runs("one").parent / "cache", tmp_path / "run", **changes)
    processes = Processes(2, arguments, online_stage.register)
    wait_for(tmp_path / "run" / "metrics.jsonl")
    processes.ranks[1].send_signal(signal.SIGUSR1)
    assert [rank.returncode for rank in processes.wait(timeout_s=120)] == [75, 75]
    (saved,) = checkpoints(tmp_path / "run")
    assert torch.isfinite(open_checkpoint(saved).joined("source")["latents"]).all()
