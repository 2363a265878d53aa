"""Which averaged weights are the best, and when a run is given up; nothing is generated."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prx_post.engine.signals import StopEarly, StopTraining
from prx_post.evaluation.monitor import ImageMonitor, Judges, win_rate
from prx_post.stages.distill.monitor import StudentMonitor
from tests.distilling import config


def monitor(kind=ImageMonitor, name="start", limits=None, **changes):
    run = SimpleNamespace(device=torch.device("cpu"))
    common = {"eval_num_inference_steps": [4], "eval_prompts_file": "x", **changes}
    return kind(run, config(**common), None, None, Judges([], {}), [], reference_name=name, **(limits or {}))


EVALUATED = {"eval_steps": 1, "load_best_model_at_end": True}


def verdicts(made, name, values):
    return [made.is_best({f"eval/{name}/4_steps": value}) for value in values]


def test_a_higher_reward_is_better_and_a_tie_keeps_the_earlier():
    made = monitor(**EVALUATED, eval_rewards=["ocr"], metric_for_best_model="ocr")
    assert verdicts(made, "ocr", [0.2, 0.7, 0.7, 0.5, float("nan"), 0.8]) == [True, True, False, False, False, True]


def test_a_lower_distance_is_better():
    made = monitor(**EVALUATED, eval_encoder="judge", metric_for_best_model="fid")
    assert verdicts(made, "fid", [9.0, 3.0, 5.0]) == [True, True, False]


def test_metrics_without_the_chosen_one_are_no_best():
    made = monitor(**EVALUATED, eval_rewards=["ocr"], metric_for_best_model="ocr")
    assert not made.is_best({"eval/fid/4_steps": 1.0})
    assert not monitor().is_best({"eval/ocr/4_steps": 1.0})


def test_a_resumed_run_knows_the_best_so_far():
    made = monitor(**EVALUATED, eval_rewards=["ocr"], metric_for_best_model="ocr")
    made.resume([{"step": 1, "eval/ocr/4_steps": 0.7}, {"step": 2, "eval/ocr/4_steps": 0.4}], [])
    assert verdicts(made, "ocr", [0.6, 0.75]) == [False, True]


def test_evaluations_without_a_new_best_end_the_run_after_the_patience():
    made = monitor(eval_steps=1, eval_rewards=["ocr"], metric_for_best_model="ocr", early_stopping_patience=2)
    for step, value in ((1, 0.5), (2, 0.4), (3, 0.6), (4, 0.6)):
        metrics = {"eval/ocr/4_steps": value}
        assert not made.is_best(metrics)  # nothing is kept, for load_best_model_at_end is off
        made.watch(step, metrics)
    metrics = {"eval/ocr/4_steps": 0.1}
    made.is_best(metrics)
    made.watch(5, {"loss": 1.0})  # a line of training says nothing about it
    with pytest.raises(StopEarly, match="at step 5: ocr has not been better than 0.6 for 2 evaluations in a row"):
        made.watch(5, metrics)


LIMITS = {"max_accuracy": 0.9, "patience": 2, "warmup_steps": 2}


def test_a_discriminator_must_be_perfect_in_a_row_and_after_its_warm_up():
    made = monitor(StudentMonitor, limits=LIMITS)
    for step, accuracy in ((1, 1.0), (2, 1.0), (3, 0.95), (4, 0.5), (5, 0.9)):
        made.watch(step, {"discriminator_accuracy": accuracy})
    with pytest.raises(StopTraining, match="accuracy 0.9 or more .* in 2 logged windows in a row.* stopped at step 6"):
        made.watch(6, {"discriminator_accuracy": 0.93})


def test_a_resumed_run_knows_how_long_the_discriminator_has_been_perfect():
    made = monitor(StudentMonitor, limits=LIMITS)
    made.resume([], [{"step": 3, "discriminator_accuracy": 0.5}, {"step": 4, "discriminator_accuracy": 0.95}])
    with pytest.raises(StopTraining, match="stopped at step 5"):
        made.watch(5, {"discriminator_accuracy": 0.91})


def test_a_limit_of_one_never_stops():
    made = monitor(StudentMonitor, limits={**LIMITS, "max_accuracy": 1.0, "patience": 1})
    made.watch(5, {"discriminator_accuracy": 1.0})


@pytest.mark.parametrize(("step", "own", "stops"), [(5, 0.049, True), (5, 0.051, False), (0, 0.0, False)])
def test_diversity_is_compared_with_the_teachers(step, own, stops):
    made = monitor(StudentMonitor, "teacher", min_diversity=0.5)
    metrics = {"eval/diversity/4_steps": own, "eval/diversity/teacher": 0.1}
    if stops:
        with pytest.raises(StopTraining, match="they have collapsed"):
            made.watch(step, metrics)
    else:
        made.watch(step, metrics)


def test_win_rates_are_by_image_and_a_tie_counts_half():
    # higher, lower, equal, higher: (1 + 0 + ½ + 1) / 4
    assert win_rate(np.array([2.0, 1.0, 3.0, 0.1]), np.array([1.0, 2.0, 3.0, 0.0])) == 0.625


def test_the_best_may_be_by_win_rate():
    made = monitor(**EVALUATED, eval_rewards=["ocr"], metric_for_best_model="ocr_wins")
    assert verdicts(made, "ocr_wins", [0.5, 0.6, 0.55]) == [True, True, False]
