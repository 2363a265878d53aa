"""The guard in a run: a reward that rises by construction, a judgement that falls."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from prx_post.cli import main
from tests.faults import numbers
from tests.rolling import grpo_arguments

REWARDS = """
calls = {"rises": 0, "falls": 0}

def brightness(image):
    return sum(image.resize((1, 1)).getpixel((0, 0))) / 1000

def rises(images, prompts):
    calls["rises"] += 1
    return [calls["rises"] + brightness(image) for image in images]

def falls(images, prompts):
    calls["falls"] += 1
    return [float(-calls["falls"])] * len(images)
"""
RATE = 1e-4


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(100, 106)))
    return path


def arguments(prompts, cache, folder, **changes):
    """A rollout a step, an evaluation after each; by the second that is worse than the start the guard acts."""
    rewards = folder / "rewards.py"
    rewards.write_text(REWARDS)
    settings = {
        **{"reward_funcs": f"{rewards}:rises", "steps_per_generation": 1, "num_iterations": 1, "max_steps": 6},
        **{"per_device_train_batch_size": 16, "eval_steps": 1, "eval_prompts_file": prompts, "eval_num_prompts": 2},
        **{"eval_rewards": f"{rewards}:falls", "metric_for_best_model": "falls", "learning_rate": RATE},
        **{"save_steps": 1, "async_rewards": "off", **changes},
    }
    return grpo_arguments(prompts, cache, folder / "run", **settings)


def rates(run):
    return [line["learning_rate"] / RATE for line in numbers(run)]


def test_lower_lr_lowers_it_each_time_and_remembers_it_on_resuming(prompts, warm_cache, tmp_path, capsys):
    given = arguments(prompts, warm_cache, tmp_path, guard="lower_lr", load_best_model_at_end="true")
    assert main(given) == 0
    run = tmp_path / "run"
    assert rates(run) == pytest.approx([1, 1, 0.3, 0.3, 0.09, 0.09])
    said = capsys.readouterr()
    assert "rises went from 1" in said.out + said.err
    assert "but falls, which is held out, from -1 to -3" in said.out + said.err
    assert "acted at step 2, 4, 6" in (run / "report.html").read_text()
    # killed after step 4, and the best weights with it
    shutil.rmtree(run / "final")
    for name in ("checkpoint-000005", "checkpoint-000006"):
        shutil.rmtree(run / name)
    (run / "best.safetensors").unlink()
    assert main(given) == 0
    assert rates(run)[:5] == pytest.approx([1, 1, 0.3, 0.3, 0.3])  # step 4 is evaluated again, by a new counter


def test_evaluations_say_how_sharp_and_rich_images_are(prompts, warm_cache, tmp_path):
    assert main(arguments(prompts, warm_cache, tmp_path, guard="warn", max_steps=1)) == 0
    run = tmp_path / "run"
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    for line in evaluations:  # the film's frames hold all four images, below each other
        with Image.open(run / "film" / f"{line['step']:06d}.png") as frame:
            parts = np.asarray(frame.convert("L"), dtype=np.float64).reshape(4, -1, frame.width)
        edges = np.mean([(abs(np.diff(part, axis=0)).mean() + abs(np.diff(part)).mean()) / 2 for part in parts])
        assert line["eval/edge_energy/2_steps"] == pytest.approx(edges, rel=1e-5)
        assert 0 < line["eval/entropy/2_steps"] < 6


def test_stop_emits_the_best_by_the_judgement(prompts, warm_cache, tmp_path, capsys):
    assert main(arguments(prompts, warm_cache, tmp_path, guard="stop")) == 0
    run = tmp_path / "run"
    assert [line["step"] for line in numbers(run)] == [1, 2]
    said = capsys.readouterr()
    assert "stopped by the guard: since step 0 rises went from" in said.out + said.err
    assert json.loads((run / "best.json").read_text())["step"] == 0
    assert "of step 0" in (run / "final" / "README.md").read_text()


def test_a_stop_before_which_the_run_was_killed_is_made_good(prompts, warm_cache, tmp_path):
    given = arguments(prompts, warm_cache, tmp_path, guard="stop")
    assert main(given) == 0
    run = tmp_path / "run"
    shutil.rmtree(run / "final")
    assert main(given) == 0
    assert len(numbers(run)) <= 3
    assert (run / "final").is_dir()


def test_regularize_holds_suspicious_images_from_then_on(prompts, warm_cache, tmp_path):
    changes = {"guard": "regularize", "guard_rewards": "jpeg_compressibility", "guard_fraction": 0.5}
    given = arguments(prompts, warm_cache, tmp_path, **changes, guard_sync_rollouts=2)
    assert main(given) == 0
    lines = numbers(tmp_path / "run")
    assert ["suspicious" in line for line in lines] == [False, False, True, True, True, True]
    assert 0 < lines[2]["suspicious"] <= 0.5
    assert lines[2]["divergence"] > 0
    # the policy became the reference after the fourth rollout
    assert lines[4]["divergence"] < lines[3]["divergence"]
    assert {path.name for path in (tmp_path / "run" / "film").iterdir()} == {f"{n:06d}.png" for n in range(7)}
