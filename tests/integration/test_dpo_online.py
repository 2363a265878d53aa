"""`prx-post dpo` on pairs that the policy makes: in every step, and in rounds whose start is the reference."""

import json
import math
import shutil

import pytest
import torch

from prx_post.cli import main
from prx_post.engine.checkpointing import open_checkpoint
from tests.faults import differences, numbers, stopped_after
from tests.pairing import dpo_arguments
from tests.processes import run

ONLINE = {
    **{"pairs": "online", "reward": "jpeg_compressibility", "num_generations": 4},
    **{"prompts_per_round": 6, "rollout_num_inference_steps": 2, "rollout_guidance_scale": 1, "rollout_batch_size": 8},
}
ROUNDS = {**ONLINE, "steps_per_round": 2, "sync_ref_model": "true"}
STEPS = {
    **{"log_ratio": "steps", "num_inference_steps": 3, "rollout_num_inference_steps": None, "steps_per_round": 2},
    **{"save_steps": 1, "learning_rate": 1e-3},
}
LORA = {"use_peft": "true", "lora_r": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"{number}\n" for number in range(100, 116)))
    return path


def arguments(prompts, cache, output_dir, **changes):
    settings = {**ONLINE, "prompts_file": prompts, **changes}
    return dpo_arguments(None, cache, output_dir, **settings)


def test_fresh_pairs_in_every_step_are_compared_with_the_start(prompts, warm_cache, tmp_path):
    assert main(arguments(prompts, warm_cache, tmp_path / "run")) == 0
    lines = numbers(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert lines[-1]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    for line in lines:
        assert line["rollout_gap"] > 0
        assert line["rollout_pairs"] == 1
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "its own images of the 16 prompts of prompts.txt, ranked by jpeg_compressibility" in card


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_round_begins_with_the_policy_as_its_reference(prompts, warm_cache, tmp_path, kind):
    changes = {**ROUNDS, "max_steps": 4, "learning_rate": 1e-3, **(LORA if kind == "lora" else {})}
    assert main(arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 0
    losses = [line["loss"] for line in numbers(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[2] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[1] != pytest.approx(math.log(2), abs=1e-3)
    made = [line for line in numbers(tmp_path / "run") if "rollout_score" in line]
    assert [line["step"] for line in made] == [1, 3]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("step", [2, 3])
def test_it_resumes_inside_a_round_and_between_two_to_the_bit(prompts, warm_cache, tmp_path, kind, step):
    changes = {**ROUNDS, "save_steps": 1, **(LORA if kind == "lora" else {})}
    assert main(arguments(prompts, warm_cache, tmp_path / "whole", **changes)) == 0
    broken = stopped_after(tmp_path / "whole", step, tmp_path / "broken")
    assert main(arguments(prompts, warm_cache, broken, **changes)) == 0
    assert differences(broken, tmp_path / "whole") == []


def test_a_rounds_adapter_is_a_reference_under_bfloat16_too(prompts, warm_cache, tmp_path):
    """Autocast keeps the casts of weights, which must not be those of the reference when the policy is asked."""
    changes = {**ROUNDS, **LORA, "bf16": "true", "learning_rate": 1e-2, "max_steps": 6, "steps_per_round": 3}
    assert main(arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 0
    lines = numbers(tmp_path / "run")
    for first in (0, 3):
        assert lines[first]["margin"] == 0
        assert abs(lines[first + 1]["margin"]) > 1e-3
        assert abs(lines[first + 2]["margin"]) > 1e-3


def test_a_round_whose_last_step_is_skipped_still_makes_the_policy_the_reference(
    prompts, warm_cache, tmp_path, monkeypatch
):
    from prx_post.engine.stepper import Stepper

    backward, calls = Stepper.backward, []

    def broken(self, loss):
        backward(self, loss)
        calls.append(loss)
        if len(calls) == 3:  # the last step of the first round
            self.grad_norm = math.nan

    monkeypatch.setattr(Stepper, "backward", broken)
    changes = {**ROUNDS, "steps_per_round": 3, "max_steps": 4, "learning_rate": 1e-3}
    assert main(arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 0
    losses = {line["step"]: line["loss"] for line in numbers(tmp_path / "run")}
    assert (tmp_path / "run" / "nonfinite.jsonl").is_file()
    assert losses[2] != pytest.approx(math.log(2), abs=1e-3)
    assert losses[4] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("changes", [{}, {**LORA, "sync_ref_model": "true"}, {"rollout_sampler": "renoise"}])
def test_the_steps_of_trajectories_begin_at_no_difference_and_resume_to_the_bit(prompts, warm_cache, tmp_path, changes):
    changes = {**STEPS, **changes}
    assert main(arguments(prompts, warm_cache, tmp_path / "whole", **changes)) == 0
    lines = numbers(tmp_path / "whole")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[1]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    states = open_checkpoint(tmp_path / "whole" / "checkpoint-000001").joined("source")["latents"]
    assert states.shape == (12, 3, 4, 8, 16), "of six pairs, at each noise level but 0"
    broken = stopped_after(tmp_path / "whole", 1, tmp_path / "broken")
    assert main(arguments(prompts, warm_cache, broken, **changes)) == 0
    assert differences(broken, tmp_path / "whole") == []


def test_all_pairs_of_a_prompt_keep_each_image_once(prompts, warm_cache, tmp_path):
    changes = {"pairs_per_prompt": "all", "max_steps": 1, "save_steps": 1}
    assert main(arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 0
    saved = open_checkpoint(tmp_path / "run" / "checkpoint-000001")
    latents = saved.joined("source")["latents"]
    assert len(latents) == 6 * 4
    made = saved.info["source"]["pairs"]
    assert 6 * 5 < len(made) <= 6 * 6  # two images may score alike
    assert {place for pair in made for place in pair[1:3]} == set(range(24))
    for _, _, _, _, _, better, worse in made:
        assert better > worse


@pytest.mark.parametrize("changes", [{"sync_ref_model": "false"}, {"steps_per_round": 4}])
def test_rounds_may_not_change_on_resuming(prompts, warm_cache, tmp_path, capsys, changes):
    assert main(arguments(prompts, warm_cache, tmp_path / "run", **ROUNDS)) == 0
    (tmp_path / "run" / "final").rename(tmp_path / "final")
    assert main(arguments(prompts, warm_cache, tmp_path / "run", **{**ROUNDS, **changes, "max_steps": 6})) == 2
    assert next(iter(changes)) in capsys.readouterr().err


@pytest.fixture(scope="module")
def of_one(prompts, warm_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for name, changes in (("full", {}), ("lora", LORA)):
        assert main(arguments(prompts, warm_cache, folder / name, **ROUNDS, **changes)) == 0
    return {name: numbers(folder / name) for name in ("full", "lora")}


@pytest.mark.parametrize(("mode", "kind"), [("ddp", "full"), ("zero2", "full"), ("zero2", "lora")])
def test_two_processes_make_the_same_pairs_and_compute_the_same(prompts, warm_cache, tmp_path, of_one, mode, kind):
    changes = {**ROUNDS, **(LORA if kind == "lora" else {}), "per_device_train_batch_size": 4}
    changes |= {"deepspeed": mode} if mode != "ddp" else {}
    run(2, arguments(prompts, warm_cache, tmp_path / "run", **changes))
    ours, theirs = numbers(tmp_path / "run"), of_one[kind]
    for name in ("loss", "grad_norm", "margin"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=2e-3, abs=2e-3)
    for name in ("rollout_score", "rollout_gap"):
        assert [line[name] for line in ours if name in line] == pytest.approx(
            [line[name] for line in theirs if name in line], rel=1e-4
        )


def test_a_checkpoint_of_two_processes_goes_on_with_one(prompts, warm_cache, tmp_path, of_one):
    changes = {**ROUNDS, "save_steps": 3}
    run(2, arguments(prompts, warm_cache, tmp_path / "run", **changes, per_device_train_batch_size=4))
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-000004")
    assert main(arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 0
    ours = {line["step"]: line["loss"] for line in numbers(tmp_path / "run")}
    theirs = {line["step"]: line["loss"] for line in of_one["full"]}
    assert ours[4] == pytest.approx(theirs[4], rel=2e-3)


def test_a_reward_that_scores_all_alike_is_an_error_that_counts_them(prompts, warm_cache, tmp_path, capsys):
    (tmp_path / "taste.py").write_text("def alike(images, prompts):\n    return [1.0] * len(images)\n")
    call = arguments(prompts, warm_cache, tmp_path / "run", reward=f"{tmp_path / 'taste.py'}:alike")
    assert main(call) == 2
    said = capsys.readouterr().err
    assert "no two images of a prompt differ by more than min_gap (0) in round 1" in said
    assert "of 6 prompts, the images of 6 all score alike" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts_file": "nowhere.txt"}, "prompts_file is 'nowhere.txt'"),
        ({"prompts_file": None}, "prompts_file is None, but must be a file because online pairs are made of prompts"),
        ({"reward": None}, "reward is None, but must be set if judge_url is null"),
        ({"loss_type": "kto"}, "pairs is 'online', but must be 'dataset' because loss_type is 'kto'"),
        ({"precompute_ref_errors": 2}, "precompute_ref_errors is 2, but must be 0"),
        ({"sync_ref_model": "true", "reference_free": "true"}, "reference_free is True, but must be False"),
        ({"deepspeed": "zero3"}, "deepspeed is 'zero3', but must be zero1 or zero2"),
        ({"dataset_name": "a/b"}, "dataset_name is 'a/b', but must be left out because the policy makes its own pairs"),
        ({"pairs": "dataset"}, "num_generations is 4, but must be left out because pairs is 'dataset'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(prompts, warm_cache, tmp_path, capsys, changes, message):
    assert main(arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "final").exists()


def test_prompts_that_the_reward_cannot_score_are_refused_before_anything_is_loaded(warm_cache, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("100\na cat\n")
    assert main(arguments(path, warm_cache, tmp_path / "run", reward="ocr_graded")) == 2
    assert "a cat" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_stop_while_pairs_are_made_keeps_what_was_trained(prompts, warm_cache, tmp_path, monkeypatch):
    """The signal comes in round 2; the run goes on from there."""
    from prx_post.stages.dpo.online import OnlinePairs

    make = OnlinePairs._make

    def stopped(self, number):
        if number == 1:
            self.run.signals.received = 15
        return make(self, number)

    monkeypatch.setattr(OnlinePairs, "_make", stopped)
    call = arguments(prompts, warm_cache, tmp_path / "run", **{**ROUNDS, "save_steps": 0})
    assert main(call) == 75
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-000002"]
    monkeypatch.setattr(OnlinePairs, "_make", make)
    assert main(call) == 0
    assert main(arguments(prompts, warm_cache, tmp_path / "whole", **{**ROUNDS, "save_steps": 0})) == 0
    ours, theirs = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("run", "whole")
    )
    assert ours["loss"] == theirs["loss"]
    assert torch.isfinite(torch.tensor(ours["loss"]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [({}, "of other networks"), (LORA, "a LoRA adapter of rank 4"), (STEPS, "of other networks")],
)
def test_it_is_planned(prompts, warm_cache, tmp_path, capsys, changes, says):
    given = {**ROUNDS, **changes, "guidance_scale": 1}
    assert main(["plan", "--stage", *arguments(prompts, warm_cache, tmp_path / "run", **given)]) == 0
    said = capsys.readouterr().out
    assert says in said
    assert "of images nothing is cached: the policy makes them" in said
