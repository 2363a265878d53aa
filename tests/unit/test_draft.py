"""Direct reward gradients: the losses by hand, and which of the sampler's steps the gradient goes through."""

from collections import Counter

import pytest
import torch

from prx_post.base.errors import ConfigError
from prx_post.objectives.draft import drift, reward_loss
from prx_post.stages.draft.config import DraftConfig
from prx_post.stages.draft.objective import RewardGradient
from prx_post.stages.reward_gradient import LatentReward
from tests.linear import Scale

SIGMAS = torch.tensor([1.0, 0.6, 0.2, 0.0])
W = 0.5


class Still:
    def velocity(self, x_t, t, prompts):
        return torch.zeros_like(x_t)


def config(**changes):
    given = {"output_dir": "unused", "reward_funcs": ["judge_graded"], "num_inference_steps": 3, "guidance_scale": 1.0}
    return DraftConfig(**{**given, **changes})


def objective(reference=None, renoises=False, **changes):
    given, scores = config(**changes), {"judge_graded": lambda pixels, prompts: pixels.flatten(1).mean(1)}
    reward = LatentReward(lambda latents: latents, scores, given.weights, margin=given.reward_margin)
    return RewardGradient(
        *(Scale(), given, SIGMAS, reward),
        reference=reference,
        renoises=renoises,
    )


def batch(step=0):
    fresh = torch.tensor([0.3, -0.1]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 1, 1)
    return {
        **{"noise": torch.full((1, 3, 1, 1), 0.4), "fresh": fresh, "prompts": ["1"], "step": step},
        **{"prompt_embeds": torch.zeros(1, 1, 1), "prompt_mask": torch.ones(1, 1, dtype=torch.bool)},
    }


def gradient(model, data):
    loss, metrics = model(data)
    loss.backward()
    return loss.item(), model.policy.w.grad.item(), metrics


def test_the_loss_is_minus_the_mean_score_or_what_is_missing_to_the_margin():
    scores = torch.tensor([1.0, 2.0, 4.0])
    assert reward_loss(scores)[0].item() == pytest.approx(-7 / 3)
    loss, metrics = reward_loss(scores, margin=3.0)
    assert loss.item() == pytest.approx((2 + 1 + 0) / 3)
    assert metrics["satisfied"].item() == pytest.approx(1 / 3)
    assert metrics["reward"].item() == pytest.approx(7 / 3)


def test_drift_is_the_mean_square_of_each_sample():
    assert drift(torch.tensor([[[[3.0, 1.0]]], [[[0.0, 2.0]]]]), torch.ones(2, 1, 1, 2)).tolist() == [2.0, 1.0]


@pytest.mark.parametrize(("steps", "factors"), [(1, [2]), (2, [1, 2]), (3, [0, 1, 2])])
def test_the_gradient_goes_through_the_last_steps_alone(steps, factors):
    """The pixel is 0.5 + 0.4/2 · (1 - 0.4 w)(1 - 0.4 w)(1 - 0.2 w); of the product the last factors have a gradient."""
    strides = [0.4, 0.4, 0.2]
    product = (1 - 0.4 * W) ** 2 * (1 - 0.2 * W)
    slope = sum(-strides[i] * product / (1 - strides[i] * W) for i in factors)
    loss, grad, _ = gradient(objective(gradient_steps=steps), batch())
    assert loss == pytest.approx(-(0.5 + 0.2 * product), abs=1e-6)
    assert grad == pytest.approx(-0.2 * slope, abs=1e-6)


def test_a_renoising_sampler_goes_to_x0_and_back_up():
    # x0 = 0.4 (1 - w), x = 0.4 x0 + 0.6 · 0.3, x0 = x (1 - 0.6 w), x = 0.8 x0 + 0.2 · (-0.1), x0 = x (1 - 0.2 w)
    x = 0.4 * 0.4 * (1 - W) + 0.18
    x = 0.8 * x * (1 - 0.6 * W) - 0.02
    loss, grad, _ = gradient(objective(renoises=True), batch())
    assert loss == pytest.approx(-(0.5 + 0.5 * x * (1 - 0.2 * W)), abs=1e-6)
    assert grad == pytest.approx(0.5 * 0.2 * x, abs=1e-6)


def test_refl_stops_at_any_of_the_last_steps_and_scores_what_it_points_to():
    model = objective(refl_steps=2)
    stops = Counter(model.last_step(step) for step in range(200))
    assert set(stops) == {1, 2}
    assert all(60 < count < 140 for count in stops.values())
    early = next(step for step in range(200) if model.last_step(step) == 1)
    loss, grad, _ = gradient(model, batch(early))  # x0 after one Euler step: 0.4 (1 - 0.4 w)(1 - 0.6 w)
    assert loss == pytest.approx(-(0.5 + 0.2 * (1 - 0.4 * W) * (1 - 0.6 * W)), abs=1e-6)
    assert grad == pytest.approx(0.2 * (1 - 0.4 * W) * 0.6, abs=1e-6)


def test_beta_holds_velocities_to_the_reference_where_there_is_a_gradient():
    held, free = objective(Still(), beta=2.0, gradient_steps=2), objective(gradient_steps=2)
    loss, _, metrics = gradient(held, batch())
    x1 = 0.4 * (1 - 0.4 * W)
    x2 = x1 * (1 - 0.4 * W)
    expected = ((W * x1) ** 2 + (W * x2) ** 2) / 2
    assert metrics["drift"].item() == pytest.approx(expected, abs=1e-7)
    assert loss == pytest.approx(gradient(free, batch())[0] + 2 * expected, abs=1e-6)


def test_scores_are_added_up_by_their_weights():
    model = objective(reward_funcs=["judge_graded", "hpsv2"], reward_weights=[2.0, -0.5])
    model.reward.rewards = {"judge_graded": lambda *_: torch.tensor([1.0]), "hpsv2": lambda *_: torch.tensor([3.0])}
    loss, metrics = model(batch())
    assert loss.item() == pytest.approx(-(2 - 1.5))
    assert metrics["reward/hpsv2"].item() == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_funcs": []}, "reward_funcs is .*, but must be one reward or more"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights is .*, but must be 1 numbers"),
        ({"gradient_steps": 4}, "gradient_steps is 4, but must be at most 3 because num_inference_steps is 3"),
        ({"refl_steps": 2, "gradient_steps": 3}, "gradient_steps is 3, but must be at most 2 because refl_steps is 2"),
        ({"shift_terminal": 1.0}, "shift_terminal is 1.0, but must be between 0 and 1"),
        (
            {"eval_steps": 5, "eval_rewards": ["judge_graded"], "metric_for_best_model": "judge_graded"},
            "metric_for_best_model is 'judge_graded', but must be a held-out reward",
        ),
        ({"method": "drafts"}, "Did you mean 'draft'"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)
