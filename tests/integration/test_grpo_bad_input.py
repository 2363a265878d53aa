"""What `prx-post grpo` refuses: in one line, before a model loads or a folder is made; later with the state kept."""

import pytest

from prx_post.cli import main
from tests.faults import numbers
from tests.rolling import grpo_arguments

FORWARD = {"method": "dgpo", "rollout_sampler": "ode"}
EVALUATED = {"eval_steps": 2, "eval_rewards": "ocr_exact", "guard": "warn"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"{number}\n" for number in range(100, 106)))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_generations": 1}, "num_generations is 1, but must be 2 or more"),
        ({"prompts_per_rollout": 3}, "prompts_per_rollout is 3, but must be a multiple of steps_per_generation, 2"),
        ({"per_device_train_batch_size": 6}, "per_device_train_batch_size is 6, but must be a divisor of 8"),
        (
            {**FORWARD, "per_device_train_batch_size": 2},
            "per_device_train_batch_size is 2, but must be a multiple of num_generations, 4",
        ),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps is 3, but must be left out, or 2"),
        ({"window": "mix", "window_size": 3}, "window_size is 3, but must be at most 2 because of 3 rollout steps"),
        ({"window_size": 1}, "window_size is 1, but must be null because window is 'all'"),
        ({"rollout_num_inference_steps": 1}, "rollout_num_inference_steps is 1, but must be 2 or more"),
        ({"rollout_sampler": "ode"}, "rollout_sampler is 'ode', but must be one whose steps are random"),
        ({"rollout_sampler": "renoise", "noise_level": 0.5}, "noise_level is 0.5, but must be null"),
        ({"noise_level": 1.0}, "noise_level is 1.0, but must be below 1 for cps"),
        ({**FORWARD, "window": "fast"}, "window is 'fast', but must be 'all' because method is 'dgpo'"),
        (
            {"last_step_reward_weight": 0.1},
            "last_step_reward_weight is 0.1, but must be 0 because none of jpeg_compressibility (reward_funcs) has",
        ),
        ({"last_step_reward_margin": 1}, "last_step_reward_margin is 1.0, but must be None because last_step_reward"),
        ({**FORWARD, "last_step_reward_weight": 1}, "last_step_reward_weight is 1.0, but must be 0.0 because method"),
        ({"nft_beta": 0.5}, "nft_beta is 0.5, but must be 1.0 because method is 'grpo'"),
        ({"normalise_ratio": "true", "max_divergence": 1e-6}, "max_divergence is 1e-06, but must be null"),
        ({"sync_ref_model": "true"}, "sync_ref_model is True, but must be false because beta is 0"),
        ({"reward_funcs": None}, "reward_funcs is [], but must be one reward or more"),
        ({"reward_weights": [1, 2]}, "reward_weights is [1.0, 2.0], but must be 1 numbers"),
        ({"reward_funcs": "jpeg_compressability"}, "Did you mean 'jpeg_compressibility'"),
        ({"pairwise_reward": "ocr"}, "pairwise_reward is 'ocr', but must be None because method is 'grpo'"),
        ({"method": "pref_grpo"}, "judge_url is None, but must be set because pref_grpo compares images"),
        ({"judge_url": "http://127.0.0.1:9/v1", "judge_model": "x"}, "but must be left out because no judge is asked"),
        ({"use_peft": "true", "lora_dropout": 0.1}, "lora_dropout is 0.1, but must be 0"),
        ({"guard": "stop"}, "eval_steps is 0, but must be above 0 because the guard compares"),
        (
            {**EVALUATED, "eval_rewards": "jpeg_compressibility", "metric_for_best_model": "jpeg_compressibility"},
            "but must be none of the rewards that are optimised",
        ),
        (
            {**EVALUATED, "guard": "regularize", "metric_for_best_model": "ocr_exact"},
            "guard_rewards is [], but must be set to what is not optimised",
        ),
        ({"guard_rewards": "ocr"}, "guard_rewards is ['ocr'], but must be [] because guard is 'off'"),
        (
            {
                **EVALUATED,
                "guard": "regularize",
                "metric_for_best_model": "ocr_exact",
                "guard_rewards": "jpeg_compressibility",
            },
            "guard_rewards is ['jpeg_compressibility'], but must be set to what is not optimised",
        ),
        ({"method": "nft", "rollout_sampler": "ode", "epsilon": 0.1}, "epsilon is 0.1, but must be 0.001"),
        ({"pairwise_weight": 2}, "pairwise_weight is 2.0, but must be 1.0 because method is 'grpo'"),
        ({"timestep_shift": 3}, "timestep_shift is 3.0, but must be 1.0 because method is 'grpo'"),
        ({"ref_guidance_scale": 2}, "ref_guidance_scale is 2.0, but must be null because beta is 0"),
        ({"reward_funcs": "features=mine.py:f"}, "without win_rate and features"),
        ({"shift_terminal": 1.5}, "shift_terminal is 1.5, but must be between 0 and 1"),
        ({"rollout_height": 32}, "rollout_height is 32, but must be set together with rollout_width"),
        ({"prompts_file": "nowhere.txt"}, "prompts_file is 'nowhere.txt'"),
    ],
)
def test_one_line_and_nothing_on_disk(prompts, warm_cache, tmp_path, capsys, changes, said):
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_prompts_that_a_reward_cannot_score_are_found_before(tmp_path, warm_cache, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("478\na red cube\n")
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", reward_funcs="ocr")) == 2
    assert "the prompt 'a red cube' has no text to read" in capsys.readouterr().err


def function(folder, body):
    path = folder / "mine.py"
    path.write_text(f"import math, time\ncalls = []\ndef score(images, prompts):\n    calls.append(1)\n    {body}\n")
    return f"{path}:score"


GOOD = "[float(sum(image.resize((1, 1)).getpixel((0, 0)))) for image in images]"


@pytest.mark.parametrize(
    ("body", "extra", "said"),
    [
        ("return [0.5] * len(images)", {}, "no group has images that score differently by score"),
        ("return [math.nan] * len(images)", {}, "nan"),
        ("time.sleep(2 * (len(calls) > 2)); return " + GOOD, {"reward_timeout_s": 0.5}, "reward_timeout_s"),
        ("return None", {}, "which is not a list of numbers"),
    ],
)
def test_a_reward_that_fails_ends_the_run_in_words(prompts, warm_cache, tmp_path, capsys, body, extra, said):
    changes = {"reward_funcs": function(tmp_path, body), **extra}
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "final").exists()


def test_a_reward_that_breaks_in_the_second_rollout_loses_nothing(prompts, warm_cache, tmp_path, capsys):
    reward = function(tmp_path, f"return {GOOD} if len(calls) <= 2 else [math.nan] * len(images)")
    changes = {"reward_funcs": reward, "save_steps": 0}
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 2
    assert "score" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-000004"]
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes, max_steps=4)) == 0
    assert [line["step"] for line in numbers(tmp_path / "run")] == [1, 2, 3, 4]
