"""What can be known to be wrong when the settings are read."""

import json

import pytest

from prx_post.base.errors import ConfigError
from prx_post.stages.distill.config import DistillConfig, TeacherConfig
from tests.distilling import config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ["lad"]}, "method is 'lad'.* Did you mean 'ladd'"),
        ({"method": []}, r"method is \[\], but must be one or more different methods"),
        ({"method": ["ladd", "ladd"]}, "one or more different methods"),
        ({"method_weights": [1.0, 2.0]}, r"method_weights is \[1.0, 2.0\], but must be 1 numbers above 0"),
        ({"method_weights": [0.0]}, "numbers above 0"),
        ({"guidance_scale": 4.0}, "guidance_scale is 4.0, but must be 1 because a distilled student"),
        ({"shift_terminal": 1.0}, "shift_terminal is 1.0, but must be between 0 and 1"),
        ({"num_inference_steps": 1}, "shift_terminal is 0.3, but must be null for one step"),
        ({"sampler": "sde"}, "sampler is 'sde'"),
        ({"timestep_weights": [1.0, 1.0]}, r"timestep_weights is \[1.0, 1.0\], but must be 4 numbers"),
        ({"timestep_weights": [0, 0, 0, 0]}, "not all 0"),
        ({"timestep_warmup_steps": 5}, "timestep_warmup_steps is 5, but must be set with the weights"),
        ({"discriminator_warmup_steps": 100}, "max_steps is 100, but must be 101 or more because the student learns"),
        ({"discriminator_steps_per_generator": 101}, "max_steps is 100, but must be 101 or more"),
        ({"renoise_mean": float("nan")}, "renoise_mean is nan, but must be finite"),
        ({"method": ["trajectory"], "discriminator_warmup_steps": 5}, "has no discriminator"),
        ({"deepspeed": "zero3"}, "deepspeed is 'zero3', but must be zero1 or zero2 because the frozen teacher"),
        ({"deepspeed": "zero2_offload", "discriminator_warmup_steps": 5}, "optimizer on the CPU"),
        ({"eval_steps": 10}, "eval_prompts_file is None, but must be a file"),
        ({"eval_steps": 10, "eval_prompts_file": "x"}, r"eval_num_inference_steps is \[8, 4, 2, 1\]"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end is True, but must be off without eval_steps"),
        ({"max_discriminator_accuracy": 1.5}, "between 0 and 1"),
    ],
)
def test_wrong_settings_are_named_with_their_reason(changes, message):
    base = {} if "eval_steps" in changes else {"eval_num_inference_steps": [4]}
    if changes.get("num_inference_steps") == 1:
        base = {"eval_num_inference_steps": [1]}
    if changes == {"eval_steps": 10, "eval_prompts_file": "x"}:
        changes = {**changes, "num_inference_steps": 3}
    with pytest.raises(ConfigError, match=message):
        config(**base, **changes)


def test_the_best_model_needs_a_metric_that_is_measured():
    evaluated = {"eval_steps": 5, "eval_prompts_file": "x", "load_best_model_at_end": True}
    with pytest.raises(ConfigError, match="metric_for_best_model is 'hpsv2'"):
        config(**evaluated, metric_for_best_model="hpsv2", eval_rewards=["clip_score"])
    named = {"eval_rewards": ["taste=mine.py:score"]}
    assert config(**evaluated, **named, metric_for_best_model="taste").eval_rewards == ["taste=mine.py:score"]
    assert config(**evaluated, metric_for_best_model="fid", eval_encoder="judge").load_best_model_at_end


def test_zero_3_in_a_deepspeed_file_is_refused_as_well(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match="must be zero1 or zero2"):
        config(deepspeed=str(file))


def test_one_step_needs_no_level_to_end_at():
    assert DistillConfig(output_dir="x", num_inference_steps=1, shift_terminal=None).num_inference_steps == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts_file": None}, "prompts_file is None, but must be a file"),
        ({"cache": "none"}, "cache is 'none', but must be disk because every step reads"),
        ({"real_fraction": 0.5}, "dataset_name is None, but must be set because real_fraction is 0.5"),
        ({"dataset_name": "x"}, "dataset_name is 'x'.* real_fraction is 0.0"),
        ({"teacher_guidance_scale": 0.5}, "1 or more"),
        ({"latents_per_prompt": 0}, "above 0"),
    ],
)
def test_a_teacher_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TeacherConfig(**{"prompts_file": "prompts.jsonl", **changes})
