"""DPO on the sampler's steps: the log-ratios by hand, and which steps they are taken of."""

import math

import pytest
import torch

from prx_post.base.errors import ConfigError
from prx_post.data.plan import Draw
from prx_post.flow import seeded_noise
from prx_post.stages.dpo.config import DPOConfig
from prx_post.stages.dpo.objective import StepPairObjective
from prx_post.stages.dpo.steps import StepSampler, random_step
from prx_post.stages.trajectories import transition_of
from tests.linear import Scale

SIGMAS = torch.tensor([1.0, 0.6, 0.2, 0.0])


def objective(policy=0.5, reference=0.3, sampler="renoise", **loss):
    given = {"beta": 2.0, "loss_type": "sigmoid", "label_smoothing": 0.0, "lose_weight": 1.0, "sft_weight": 0.0, **loss}
    transition = transition_of(sampler, 0.5, SIGMAS)
    return StepPairObjective(Scale(policy), 1e-4, Scale(reference), 0, transition=transition, sigmas=SIGMAS, **given)


def batch(index):
    chosen, rejected = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([-0.4, 0.8, 0.3])

    def at(values, place):
        return values[place].view(1, 1, 1, 1).expand(1, 2, 1, 1)

    return {
        **{"latents": at(chosen, index), "rejected": at(rejected, index), "step_index": torch.tensor([index])},
        **{"x_next": at(chosen, index + 1), "rejected_x_next": at(rejected, index + 1), "t": torch.zeros(1)},
        **{"prompt_embeds": torch.zeros(1, 1, 1), "prompt_mask": torch.ones(1, 1, dtype=torch.bool)},
    }


@pytest.mark.parametrize("index", [0, 1])
def test_the_loss_is_of_the_gaussian_log_ratios_of_one_step(index):
    sigma, sigma_next = SIGMAS[index].item(), SIGMAS[index + 1].item()

    def log_ratio(x, x_next):
        def log_density(w):
            mean = (1 - sigma_next) * (x - sigma * w * x)
            return torch.distributions.Normal(mean, sigma_next).log_prob(torch.tensor(x_next)).item()

        return log_density(0.5) - log_density(0.3)

    states = batch(index)
    gains = [
        log_ratio(states[name].mean().item(), states[after].mean().item())
        for name, after in (("latents", "x_next"), ("rejected", "rejected_x_next"))
    ]
    loss, metrics = objective()(states)
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-2.0 * (gains[0] - gains[1])))), rel=1e-5)
    assert metrics["win_change"].item() == pytest.approx(-2 * gains[0], rel=1e-4)


def test_without_a_difference_from_the_reference_the_loss_is_ln_2_and_has_a_gradient():
    model = objective(policy=0.3)
    loss, _ = model(batch(1))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert abs(model.policy.w.grad.item()) > 1e-3


def test_a_trained_step_is_any_but_the_last():
    drawn = [random_step(Draw(0, seed), (3, 4, 8, 16), 0)["step_index"].item() for seed in range(200)]
    assert set(drawn) == {0, 1}
    assert 70 < drawn.count(0) < 130


def test_states_begin_with_the_seeds_noise_and_lead_to_the_image():
    network = Scale(0.25)
    sampler = StepSampler(network, transition_of("renoise", 0.0, SIGMAS), SIGMAS, (4, 2, 2), torch.device("cpu"), 4)
    x0, states = sampler.states([torch.zeros(2, 3), torch.zeros(4, 3)], [5, 6])
    assert states.shape == (2, 3, 4, 2, 2)
    assert torch.equal(states[:, 0], seeded_noise([5, 6], (4, 2, 2)))
    last = states[:, 2]
    torch.testing.assert_close(x0, last - 0.2 * 0.25 * last)
    assert not torch.equal(states[0, 1], states[1, 1])


def config(**changes):
    given = {
        **{"output_dir": "unused", "pairs": "online", "prompts_file": "prompts.txt", "reward": "ocr_exact"},
        **{"log_ratio": "steps", "num_inference_steps": 4, "guidance_scale": 1.0},
    }
    return DPOConfig(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pairs": "dataset", "prompts_file": None, "reward": None}, "pairs is 'dataset', but must be 'online'"),
        ({"guidance_scale": 4.0}, "guidance_scale is 4.0, but must be 1"),
        ({"rollout_guidance_scale": 2.0}, "rollout_guidance_scale is 2.0, but must be 1"),
        ({"num_inference_steps": 1}, "num_inference_steps is 1, but must be 2 or more"),
        ({"rollout_sampler": "renoise", "noise_level": 0.5}, "noise_level is 0.5, but must be null"),
        ({"noise_level": 1.0}, "noise_level is 1.0, but must be below 1"),
        ({"timestep_mean": 0.5}, "timestep_mean is 0.5, but must be 0.0"),
        ({"pair_noise": "own"}, "pair_noise is 'own', but must be shared"),
        ({"log_ratio": "noised", "rollout_sampler": "cps"}, "rollout_sampler is 'cps', but must be null"),
        ({"log_ratio": "noised", "noise_level": 0.3}, "noise_level is 0.3, but must be null"),
    ],
)
def test_what_contradicts_it_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        config(**changes)
