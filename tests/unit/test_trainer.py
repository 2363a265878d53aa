"""The training loop on two weights, whose gradients the batches state; numbers worked out by hand.

Adam has no memory here and an offset of 1, so that a weight moves by rate · g / (|g| + 1).
"""

import math

import pytest
import torch

from prx_post.base.errors import PrxPostError
from prx_post.engine.checkpointing import checkpoints, open_checkpoint
from prx_post.engine.signals import StopEarly
from tests.training import ListSource, NoMonitor, config, lines, trainer, weights


def test_a_step_follows_the_gradient_of_each_weight(tmp_path):
    """1 - 0.1 · 3/4 = 0.925 and 1 - 0.1 · 4/5 = 0.92."""
    trained = trainer(config(tmp_path, 1), [[(3.0, 4.0)]])
    trained.fit()
    assert weights(trained) == pytest.approx((0.925, 0.92))
    (line,) = lines(tmp_path)
    assert line["loss"] == pytest.approx(7.0)  # 3 · 1 + 4 · 1
    assert line["grad_norm"] == pytest.approx(5.0)


def test_gradients_are_clipped_together_by_their_common_norm(tmp_path):
    """The norm of (3, 4) is 5; at most 1 makes it (0.6, 0.8): 1 - 0.1 · 0.6/1.6 = 0.9625, 1 - 0.1 · 0.8/1.8."""
    trained = trainer(config(tmp_path, 1, max_grad_norm=1.0), [[(3.0, 4.0)]])
    trained.fit()
    assert weights(trained) == pytest.approx((0.9625, 1 - 0.08 / 1.8), rel=1e-5)
    assert lines(tmp_path)[0]["grad_norm"] == pytest.approx(5.0)  # as it was before


def test_accumulated_micro_batches_count_as_their_mean(tmp_path):
    """(2 + 4) / 2 = 3 and (3 + 5) / 2 = 4: the first test's gradients."""
    trained = trainer(config(tmp_path, 1, gradient_accumulation_steps=2), [[(2.0, 3.0), (4.0, 5.0)]])
    trained.fit()
    assert weights(trained) == pytest.approx((0.925, 0.92))


def test_groups_have_rates_of_their_own(tmp_path):
    """The head at 0.2: 1 - 0.2 · 4/5 = 0.84."""
    trained = trainer(config(tmp_path, 1), [[(3.0, 4.0)]], head_rate=0.2)
    trained.fit()
    assert weights(trained) == pytest.approx((0.925, 0.84))


def test_a_group_that_does_not_learn_in_a_step_keeps_its_weights_and_moments(tmp_path):
    """The head learns in every second step only: one step of it, two of the policy."""
    settings = config(tmp_path, 2, adam_beta1=0.5, save_steps=1)
    every_second = {"head_rate": 0.2, "head_learns": lambda step: step % 2 == 1}
    trained = trainer(settings, [[(3.0, 4.0)], [(3.0, 4.0)]], **every_second)
    trained.fit()
    # with beta1 0.5 and a constant gradient the corrected first moment is the gradient itself
    assert weights(trained) == pytest.approx((1 - 2 * 0.075, 0.84))
    first, second = (open_checkpoint(folder).tensors() for folder in checkpoints(tmp_path))
    assert "optimizer/head.w/exp_avg" not in first
    assert second["optimizer/head.w/exp_avg"].item() == pytest.approx(2.0)  # 0.5 · 0 + 0.5 · 4


def test_the_average_is_taken_after_the_step_with_a_warmed_up_decay(tmp_path):
    """First update: decay min(0.9, 2/11), so 2/11 · 1 + 9/11 · 0.925; and of the policy alone."""
    trained = trainer(config(tmp_path, 1, ema_decay=0.9), [[(3.0, 4.0)]])
    trained.fit()
    emitted = trained.averaged_weights()
    assert list(emitted) == ["w"]
    assert emitted["w"].item() == pytest.approx(2 / 11 + 9 / 11 * 0.925)


def test_a_step_that_is_not_finite_is_skipped_whole(tmp_path):
    trained = trainer(config(tmp_path, 3, ema_decay=0.9), [[(3.0, 4.0)], [(math.nan, 4.0)], [(3.0, 4.0)]])
    trained.fit()
    assert trained.step == 3
    assert weights(trained) == pytest.approx((0.85, 0.84))  # two steps of 0.075 and of 0.08
    assert trained.ema.num_updates == 2
    (skipped,) = lines(tmp_path, "nonfinite.jsonl")
    assert skipped == {"step": 2, "rank": 0, "loss": "nan", "rows": [10], "seeds": [1]}
    assert [line["loss"] for line in lines(tmp_path)] == [pytest.approx(7.0), None, pytest.approx(3 * 0.925 + 4 * 0.92)]


def test_too_many_such_steps_in_a_row_end_the_run(tmp_path):
    trained = trainer(config(tmp_path, 5, max_nonfinite_steps=2), [[(math.inf, 0.0)]] * 5)
    with pytest.raises(PrxPostError, match="not finite for 2 steps in a row"):
        trained.fit()
    assert trained.step == 2
    assert weights(trained) == (1.0, 1.0)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    steps = [[(3.0 - i, 4.0 + i)] for i in range(4)]
    changes = {"ema_decay": 0.9, "adam_beta1": 0.5, "adam_beta2": 0.9, "save_steps": 2, "logging_steps": 3}
    whole = trainer(config(tmp_path / "run", 4, **changes), steps)
    whole.fit()
    again = trainer(config(tmp_path / "run", 4, **changes), steps)
    again.resume(open_checkpoint(checkpoints(tmp_path / "run")[0]))
    assert again.step == 2
    again.fit()
    assert weights(again) == weights(whole)
    assert torch.equal(again.averaged_weights()["w"], whole.averaged_weights()["w"])


def test_a_groups_warm_up_counts_its_own_updates(tmp_path):
    """The head waits for two steps, then warms up over two of its own: 0, then half its rate, then all of it."""
    settings = config(tmp_path, 5, lr_scheduler_type="constant_with_warmup", warmup_steps=2)
    trained = trainer(settings, [[(0.0, 4.0)]] * 5, head_rate=0.2, head_learns=lambda step: step >= 2)
    rates = [trained.stepper.schedule.rate("head", step) for step in range(5)]
    assert rates == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.2])
    trained.fit()
    assert weights(trained)[1] == pytest.approx(1 - (0.1 + 0.2) * 4 / 5)


def test_a_weight_outside_the_groups_is_an_error(tmp_path):
    from prx_post.engine.optim import check_groups
    from tests.training import TwoWeights

    objective = TwoWeights(0.1)
    with pytest.raises(ValueError, match="must be in exactly one parameter group"):
        check_groups(objective, objective.groups()[:1])


def test_state_is_saved_before_the_monitor_looks_and_when_it_ends_the_run(tmp_path):
    def fails(step):
        raise PrxPostError("out of memory, for instance")

    monitor = NoMonitor(is_due=lambda step: step == 2, validate=fails)
    trained = trainer(config(tmp_path, 4, save_steps=3), [[(3.0, 4.0)]] * 4, monitor)
    with pytest.raises(PrxPostError, match="out of memory"):
        trained.fit()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-000002"]
    open_checkpoint(checkpoints(tmp_path)[0]).verify()


def test_the_best_weights_are_kept_by_the_trainer_and_emitted(tmp_path):
    """0.925 after the first step, which the monitor calls the best; 0.775 at the end."""
    monitor = NoMonitor(
        is_due=lambda step: step > 0, validate=lambda step: {"score": -step}, is_best=lambda m: m["score"] == -1
    )
    trained = trainer(config(tmp_path, 3), [[(3.0, 4.0)]] * 3, monitor)
    trained.fit()
    assert trained.emitted_weights()["w"].item() == pytest.approx(0.925)
    assert trained.averaged_weights()["w"].item() == pytest.approx(0.775)
    assert [line["score"] for line in lines(tmp_path, "evaluations.jsonl")] == [-1, -2, -3]


def test_a_monitor_that_finds_no_more_gain_ends_the_run_as_if_it_were_whole(tmp_path):
    """One step of 0.075 in four; what is emitted is its weight, and the state is saved."""

    def watch(step, metrics):
        raise StopEarly("no more gain")

    trained = trainer(config(tmp_path, 4), [[(3.0, 4.0)]] * 4, NoMonitor(watch=watch))
    assert trained.fit()["step"] == 1
    assert trained.emitted_weights()["w"].item() == pytest.approx(0.925)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-000001"]


def test_a_validation_that_was_interrupted_is_made_before_the_next_step(tmp_path):
    """The best of step 2 would be lost otherwise; a validation that was complete is not made again."""
    made, fails = [], {"now": True}

    def validate(step):
        made.append(step)
        if step == 2 and fails.pop("now", False):
            raise PrxPostError("interrupted")
        return {"score": -step}

    functions = {"is_due": lambda step: step in (1, 2), "validate": validate, "is_best": lambda m: m["score"] == -2}
    settings, steps = config(tmp_path, 3, save_steps=2), [[(3.0, 4.0)]] * 3
    with pytest.raises(PrxPostError, match="interrupted"):
        trainer(settings, steps, NoMonitor(**functions)).fit()
    again = trainer(settings, steps, NoMonitor(**functions))
    again.resume(open_checkpoint(checkpoints(tmp_path)[0]))
    assert again.fit()["best"] == {"step": 2, "metrics": {"score": -2}}
    assert made == [1, 2, 2]
    assert [line["step"] for line in lines(tmp_path, "evaluations.jsonl")] == [1, 2]
    assert again.emitted_weights()["w"].item() == pytest.approx(0.85)
    once_more = trainer(settings, steps, NoMonitor(**functions))
    once_more.resume(open_checkpoint(checkpoints(tmp_path)[0]))
    once_more.fit()
    assert made == [1, 2, 2]


def test_a_source_that_fails_is_saved_as_it_was_before_the_step(tmp_path):
    """Other ranks may have moved on; a resumed run asks the source again."""

    class Online(ListSource):
        online = True
        rollout = 0

        def state(self):
            return {"rollout": self.rollout}, {}

        def load_state(self, info, tensors):
            self.rollout = info["rollout"]

        def batches(self, step):
            self.rollout += 1
            if step == 1:
                raise PrxPostError("the reward has failed")
            yield from super().batches(step)

    trained = trainer(config(tmp_path, 3), [], source=Online([[(3.0, 4.0)]] * 3))
    with pytest.raises(PrxPostError, match="the reward has failed"):
        trained.fit()
    assert open_checkpoint(checkpoints(tmp_path)[0]).info["source"] == {"rollout": 1}
