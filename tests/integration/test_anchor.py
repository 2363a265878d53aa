"""A distillation trained beside an alignment: its losses, its data, its own networks, and what it must fit."""

import json
import shutil

import pytest
import torch
import yaml

from prx_post.cli import main
from prx_post.engine.checkpointing import open_checkpoint
from tests.faults import differences, numbers, stopped_after
from tests.processes import run as launch
from tests.rolling import grpo_arguments

GRID = {"num_inference_steps": 3, "shift_terminal": 0.3}
DMD2 = {"method": ["trajectory", "dmd2"], "trajectory_teacher_steps": 2}
LADD = {"method": ["ladd"], "ladd_levels": [0, 1, 1], "timestep_weights": [0, 1, 1], "own_state_levels": [0, 0.5, 0.5]}
ALIGNED = {**GRID, "rollout_num_inference_steps": None}
LORA = {"use_peft": "true", "lora_r": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n), "wanted": n}) + "\n" for n in range(100, 106)))
    return path


@pytest.fixture(scope="module")
def written(prompts, warm_cache, tmp_path_factory):
    """Writes the file of a distillation."""
    folder = tmp_path_factory.mktemp("anchors")

    def of(name="anchor", **changes):
        values = {
            **{"model_name_or_path": "tiny", "prompts_file": str(prompts), "height": 32, "width": 64},
            **{"cache_dir": str(warm_cache), "output_dir": "unused", "max_steps": 999, "eval_steps": 0},
            **{"teacher_num_inference_steps": 3, "teacher_guidance_scale": 3.0, **GRID, **DMD2, **changes},
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return of


METHODS = {
    "cps": {"rollout_sampler": "cps", "window": "subset", "window_size": 1},
    "dgpo": {"method": "dgpo", "rollout_sampler": "ode", "epsilon": None},
    "lora": {**LORA, "beta": 0.01},
}


@pytest.mark.parametrize("name", METHODS)
def test_it_is_trained_along_in_every_step_and_resumes_to_the_bit(prompts, warm_cache, written, tmp_path, name):
    changes = {**ALIGNED, **METHODS[name], "anchor_config": written(), "anchor_batch_size": 4}
    changes = {key: value for key, value in changes.items() if value is not None}
    if name == "dgpo":
        changes["epsilon"] = 1e-2
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "whole", **changes)) == 0
    for line in numbers(tmp_path / "whole"):
        assert line["anchor/trajectory_mse"] > 0
        assert line["anchor/fake_score_loss"] > 0
        assert line["grad_norm/dmd2"] > 0
    broken = stopped_after(tmp_path / "whole", 6, tmp_path / "broken")
    shutil.rmtree(broken / "anchor", ignore_errors=True)
    assert main(grpo_arguments(prompts, warm_cache, broken, **changes)) == 0
    assert differences(broken, tmp_path / "whole") == []


def test_its_networks_are_in_the_checkpoint_and_not_in_what_is_emitted(prompts, warm_cache, written, tmp_path):
    changes = {**ALIGNED, "anchor_config": written("ladd", **LADD, method_weights=[0.5]), "max_steps": 4}
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 0
    saved = open_checkpoint(tmp_path / "run" / "checkpoint-000004")
    groups = {name.split(".")[0] for name, _ in saved.tensors().under("model")}
    assert groups == {"policy", "ladd"}
    first = open_checkpoint(tmp_path / "run" / "checkpoint-000002")
    before, after = (dict(state.tensors().under("model")) for state in (first, saved))
    assert any(not torch.equal(before[name], after[name]) for name in after if name.startswith("ladd."))
    assert len(list((tmp_path / "run" / "final" / "transformer").glob("*.safetensors"))) == 1


def test_a_great_weight_pulls_the_policy_to_the_teachers_path(prompts, warm_cache, written, tmp_path):
    """With hardly any reward the run is a distillation, so the distance to the teacher's path falls."""
    held = {"anchor_config": written("path", method=["trajectory"], trajectory_teacher_steps=2)}
    changes = {**ALIGNED, "max_steps": 16, "learning_rate": 3e-4, "epsilon": 1e-8, "anchor_batch_size": 16}
    found = {}
    for weight in (1e-6, 10.0):
        folder = tmp_path / str(weight)
        given = {**changes, **held, "anchor_weight": weight, "max_grad_norm": 1.0}
        assert main(grpo_arguments(prompts, warm_cache, folder, **given)) == 0
        found[weight] = [line["anchor/trajectory_mse"] for line in numbers(folder)]
    assert found[10.0][0] == pytest.approx(found[1e-6][0], rel=1e-5), "the same batch, before anything has moved"
    assert sum(found[10.0][-4:]) < 0.9 * sum(found[1e-6][-4:])


@pytest.mark.parametrize("deepspeed", [None, "zero2"])
def test_two_processes_compute_what_one_does(prompts, warm_cache, written, tmp_path, deepspeed):
    found = []
    for count in (1, 2):
        changes = {**ALIGNED, "anchor_config": written(), "anchor_batch_size": 4 // count, "max_steps": 4}
        if deepspeed and count == 2:
            changes["deepspeed"] = deepspeed
        size = 8 // count
        arguments = grpo_arguments(
            prompts, warm_cache, tmp_path / str(count), per_device_train_batch_size=size, **changes
        )
        launch(count, arguments)
        found.append(numbers(tmp_path / str(count)))
    for ours, theirs in zip(*found, strict=True):
        for name in ("loss", "anchor/loss", "anchor/trajectory_mse", "anchor/fake_score_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3), (ours["step"], name)


def test_its_length_is_the_runs_which_epochs_may_say(prompts, warm_cache, written, tmp_path):
    """Six prompts, four of them a rollout of four steps: six steps an epoch, and 14 in all."""
    given = {**ALIGNED, "anchor_config": written("path", method=["trajectory"]), "anchor_batch_size": 2}
    arguments = grpo_arguments(prompts, warm_cache, tmp_path / "run", **given, max_steps=3, num_train_epochs=2.2)
    assert main(arguments) == 0
    lines = numbers(tmp_path / "run")
    assert len(lines) == 14
    assert all(line["anchor/trajectory_mse"] > 0 for line in lines)


def test_a_plan_counts_its_networks(prompts, warm_cache, written, tmp_path, capsys):
    peaks = []
    for changes in ({}, {"anchor_config": written()}):
        arguments = grpo_arguments(prompts, warm_cache, tmp_path / "run", **ALIGNED, **changes)
        assert main(["plan", "--stage", *arguments]) == 0
        peaks.append(capsys.readouterr().out)
    assert "GiB in other networks" not in peaks[0]
    assert "GiB in other networks" in peaks[1]


@pytest.mark.parametrize(
    ("changes", "of_anchor", "said"),
    [
        ({"anchor_weight": 0.5, "anchor_config": None}, {}, "anchor_weight is 0.5, but must be 1.0 because"),
        ({"anchor_config": "nowhere.yaml"}, {}, "anchor_config is 'nowhere.yaml': config is 'nowhere.yaml'"),
        ({"num_inference_steps": 2}, {}, "whose student visits the noise levels 1.000"),
        ({"shift_terminal": 0.1}, {}, "Set num_inference_steps and shift_terminal as they are there"),
        ({}, {"trajectory_step": 2}, "trajectory_step in"),
        ({}, {"method": ["laddd"]}, "Did you mean 'ladd'"),
        ({}, {"prompts_file": "nowhere.txt"}, "nowhere.txt"),
        ({"deepspeed": "zero3"}, {}, "deepspeed is 'zero3', but must be zero1 or zero2"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_made(
    prompts, warm_cache, written, tmp_path, capsys, changes, of_anchor, said
):
    given = {**ALIGNED, "anchor_config": written("odd", **of_anchor), **changes}
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **given)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_distillation(prompts, warm_cache, written, tmp_path, capsys):
    given = {**ALIGNED, "max_steps": 4, "anchor_config": written("kept")}
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **given)) == 0
    written("kept", trajectory_teacher_steps=3)
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **{**given, "max_steps": 6})) == 2
    assert "was trained beside another distillation" in capsys.readouterr().err
