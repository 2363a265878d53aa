"""The gradient of rewards through the one step of a policy gradient that is not random."""

import pytest
import torch

from prx_post.stages.grpo.config import GRPOConfig
from prx_post.stages.grpo.guard import Guard
from prx_post.stages.grpo.objective import PolicyGradient
from prx_post.stages.reward_gradient import LatentReward
from tests.linear import Scale

W, SIGMA = 0.5, 0.4


def made(weight, margin=None):
    config = GRPOConfig(
        **{"output_dir": "unused", "method": "grpo", "reward_funcs": ["judge_graded"], "guard": "off"},
        **{"last_step_reward_weight": weight, "last_step_reward_margin": margin, "num_inference_steps": 3},
    )
    scores = {"bright": lambda pixels, prompts: pixels.flatten(1).mean(1)}
    reward = LatentReward(lambda latents: latents, scores, {"bright": 2.0}, margin=margin)
    return PolicyGradient(Scale(), config, Guard(), reward=reward)


def batch(*values):
    x_last = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    count = len(values)
    return {
        **{"x_last": x_last, "sigma": torch.full((count,), SIGMA), "prompts": ["1"] * count},
        **{"prompt_embeds": torch.zeros(count, 1, 1), "prompt_mask": torch.ones(count, 1, dtype=torch.bool)},
    }


def test_it_is_the_weighted_slope_of_the_reward_along_the_last_step():
    """The pixel is 0.5 + x (1 - σ w) / 2, its score 2 pixels, its slope over w -σ x."""
    model = made(0.3)
    loss, metrics = model(batch(0.2, 0.6))
    loss.backward()
    scores = [2 * (0.5 + x * (1 - SIGMA * W) / 2) for x in (0.2, 0.6)]
    assert metrics["last_step/reward"].item() == pytest.approx(sum(scores) / 2)
    assert loss.item() == pytest.approx(-0.3 * sum(scores) / 2)
    assert model.policy.w.grad.item() == pytest.approx(0.3 * SIGMA * 0.4)


def test_images_beyond_the_margin_are_left_alone():
    margin = 1.3  # the scores are 1.16 and 1.48
    model = made(0.3, margin)
    loss, metrics = model(batch(0.2, 0.6))
    loss.backward()
    assert metrics["last_step/satisfied"].item() == 0.5
    assert model.policy.w.grad.item() == pytest.approx(0.3 * SIGMA * 0.2 / 2)
