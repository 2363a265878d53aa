"""Which student is kept as the best, and when a run is given up; nothing is drawn."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from prx_post.engine.signals import StopTraining
from prx_post.stages.distill.monitor import StudentMonitor
from tests.distilling import config


def monitor(tmp_path, **changes) -> StudentMonitor:
    network = torch.nn.Linear(1, 1, bias=False)
    sampler = SimpleNamespace(transformer=network)
    encoders = SimpleNamespace(device=torch.device("cpu"))
    common = {"eval_num_inference_steps": [4], **changes}
    return StudentMonitor(config(**common), sampler, sampler, [], {}, encoders, None, tmp_path)


def keep(made: StudentMonitor, step: int, value: float) -> None:
    with torch.no_grad():
        made.student.transformer.weight.fill_(step)
    made._keep_if_best(step, value)


def best(tmp_path) -> tuple[int, float]:
    weights = load_file(tmp_path / "best.safetensors")
    return json.loads((tmp_path / "best.json").read_text())["step"], weights["transformer.weight"].item()


EVALUATED = {"eval_steps": 1, "eval_prompts_file": "x", "load_best_model_at_end": True}


def test_a_higher_reward_is_better_and_a_tie_keeps_the_earlier(tmp_path):
    made = monitor(tmp_path, **EVALUATED, eval_rewards=["ocr"], metric_for_best_model="ocr")
    for step, value in ((1, 0.2), (2, 0.7), (3, 0.7), (4, 0.5), (5, float("nan"))):
        keep(made, step, value)
    assert best(tmp_path) == (2, 2.0)


def test_a_lower_distance_is_better(tmp_path):
    made = monitor(tmp_path, **EVALUATED, eval_encoder="judge", metric_for_best_model="fid")
    for step, value in ((1, 9.0), (2, 3.0), (3, 5.0)):
        keep(made, step, value)
    assert best(tmp_path) == (2, 2.0)


def test_a_best_by_another_metric_does_not_count(tmp_path):
    keep(monitor(tmp_path, **EVALUATED, eval_encoder="judge", metric_for_best_model="fid"), 1, 30.0)
    keep(monitor(tmp_path, **EVALUATED, eval_rewards=["ocr"], metric_for_best_model="ocr"), 2, 0.1)
    assert best(tmp_path) == (2, 2.0)


def test_a_best_of_steps_that_are_run_again_is_forgotten(tmp_path):
    made = monitor(tmp_path, **EVALUATED, eval_rewards=["ocr"], metric_for_best_model="ocr")
    keep(made, 4, 0.7)
    made.forget_after(4)
    assert made.best_weights() is not None
    made.forget_after(3)
    assert made.best_weights() is None


def test_a_discriminator_must_be_perfect_in_a_row_and_after_its_warm_up(tmp_path):
    made = monitor(tmp_path, discriminator_warmup_steps=2, max_discriminator_accuracy=0.9, saturation_patience=2)
    for step, accuracy in ((1, 1.0), (2, 1.0), (3, 0.95), (4, 0.5), (5, 0.9)):
        made.watch(step, {"discriminator_accuracy": accuracy})
    with pytest.raises(StopTraining, match="accuracy 0.930 .* in 2 logged windows in a row.* stopped at step 6"):
        made.watch(6, {"discriminator_accuracy": 0.93})


def test_a_limit_of_one_never_stops(tmp_path):
    made = monitor(tmp_path, max_discriminator_accuracy=1.0, saturation_patience=1)
    made.watch(5, {"discriminator_accuracy": 1.0})


@pytest.mark.parametrize(("step", "own", "stops"), [(5, 0.049, True), (5, 0.051, False), (0, 0.0, False)])
def test_diversity_is_compared_with_the_teachers(tmp_path, step, own, stops):
    made = monitor(tmp_path, min_diversity=0.5)
    metrics = {"eval/diversity/4_steps": own, "eval/diversity/teacher": 0.1}
    if stops:
        with pytest.raises(StopTraining, match="it has collapsed"):
            made._check_diversity(step, metrics)
    else:
        made._check_diversity(step, metrics)
