"""Rollouts of every sampler in every window, and the update's own view of them."""

from collections import Counter

import pytest
import torch

from prx_post.flow import inference_sigmas, seeded_noise
from prx_post.model.checkpoint import load
from prx_post.sampling import euler_sample
from prx_post.stages.grpo.config import GRPOConfig
from prx_post.stages.grpo.guard import Guard
from prx_post.stages.grpo.objective import PolicyGradient, batch_velocity
from prx_post.stages.grpo.windows import Window, window_of
from prx_post.stages.trajectories import Seeded, sample_trajectories, transition_of
from tests import distilling

SHAPE, STEPS = (4, 8, 16), 5
SEEDS = [Seeded(10, 1), Seeded(11, 1), Seeded(20, 2), Seeded(21, 2)]
SAMPLERS = ("sde", "cps", "dance", "renoise")
WINDOWS = ("all", "fast", "mix", "subset")


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def config_of(**changes):
    given = {
        **{"output_dir": "runs/x", "method": "grpo", "reward_funcs": ["jpeg_compressibility"], "guard": "off"},
        **{"rollout_num_inference_steps": STEPS, "num_inference_steps": STEPS, "per_device_train_batch_size": 4},
    }
    return GRPOConfig(**{**given, **changes})


def prompts():
    batch = distilling.batch()
    rows = [i % 3 for i in range(4)]
    cond = {name: batch[name][rows] for name in ("prompt_embeds", "prompt_mask")}
    return {**cond, "null_embeds": cond["prompt_embeds"].flip(0), "null_mask": cond["prompt_mask"].flip(0)}


def rolled_out(tiny, config, window, seeds=SEEDS):
    """The objective, the trajectories of four images, and the batch's prompts."""
    sigmas = inference_sigmas(tiny.scheduler, STEPS)
    transition = transition_of(config.sampler_name, config.sampler_noise, sigmas)
    objective = PolicyGradient(tiny.transformer.train(), config, Guard(), transition=transition)
    batch = prompts()

    def velocity_of(places):
        own = {name: value[list(places)] for name, value in batch.items()}
        return lambda x, t: batch_velocity(objective.velocity, x, t, own, config.rollout_guidance_scale)

    made = sample_trajectories(velocity_of, seeds, sigmas, transition, window, SHAPE, torch.device("cpu"))
    return objective, made, batch, sigmas


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_ratio_is_exactly_one(tiny, sampler, window, guidance):
    config = config_of(rollout_sampler=sampler, window=window, rollout_guidance_scale=guidance)
    which = window_of(config, 0)
    objective, made, batch, sigmas = rolled_out(tiny, config, which)
    assert len(made.log_prob) == len(which.trained) == config.trained_steps
    for row, step in enumerate(which.trained):
        states = {name: getattr(made, name)[row] for name in ("x_t", "x_next", "log_prob")}
        of_images = {"advantages": torch.tensor([1.0, -1.0, 2.0, -2.0]), "weight": torch.ones(4)}
        levels = {"sigma": sigmas[step].expand(4), "sigma_next": sigmas[step + 1].expand(4)}
        _, metrics = objective({**batch, **states, **of_images, **levels})
        assert metrics["ratio"].item() == 1.0
        assert metrics["log_ratio_abs"].item() == 0.0
        assert states["log_prob"].std() > 0


@pytest.mark.parametrize("sampler", ["sde", "dance", "cps"])
def test_a_rollout_without_noise_is_the_ode(tiny, sampler):
    config = config_of(rollout_sampler=sampler, noise_level=1e-12)
    _, made, batch, sigmas = rolled_out(tiny, config, window_of(config, 0))
    cond = {name: batch[name] for name in ("prompt_embeds", "prompt_mask")}
    velocity = PolicyGradient(tiny.transformer, config, Guard()).velocity
    whole = euler_sample(
        lambda x, t: batch_velocity(velocity, x, t, cond, 1.0), seeded_noise([s.own for s in SEEDS], SHAPE), sigmas
    )
    torch.testing.assert_close(made.x0, whole, atol=1e-5, rtol=1e-5)


def test_a_fast_groups_images_are_one_until_they_part(tiny):
    config = config_of(rollout_sampler="cps", window="fast", window_size=1)
    _, made, _, _ = rolled_out(tiny, config, Window((2,), (2,), branch=2))
    for first, second in ((0, 1), (2, 3)):
        assert torch.equal(made.x_t[0][first], made.x_t[0][second])
        assert not torch.equal(made.x_next[0][first], made.x_next[0][second])
    assert not torch.equal(made.x_t[0][0], made.x_t[0][2])


def noises(tiny, config, window):
    """The noise that each random step was given."""
    seen = []
    sigmas = inference_sigmas(tiny.scheduler, STEPS)
    transition = transition_of("cps", 0.8, sigmas)

    def watched(*args, noise):
        seen.append(noise)
        return transition(*args, noise=noise)

    sample_trajectories(
        lambda places: lambda x, t: torch.zeros_like(x), SEEDS, sigmas, watched, window, SHAPE, torch.device("cpu")
    )
    return seen


def test_untrained_steps_of_a_subset_have_the_groups_noise_and_trained_ones_the_images_own(tiny):
    seen = noises(tiny, config_of(), Window((0, 1, 2, 3), (1, 3), shares_noise=True))
    for step, noise in enumerate(seen):
        assert torch.equal(noise[0], noise[1]) == (step in (0, 2))
        assert not torch.equal(noise[0], noise[2])


def test_every_image_and_step_has_its_own_noise(tiny):
    seen = noises(tiny, config_of(), window_of(config_of(), 0))
    assert len({tuple(image.flatten()[:3].tolist()) for noise in seen for image in noise}) == 4 * 4


def test_an_images_noise_does_not_depend_on_its_neighbours(tiny):
    config = config_of(rollout_sampler="cps")
    _, whole, _, _ = rolled_out(tiny, config, window_of(config, 0))
    order = [2, 0, 3, 1]
    _objective, made, _, _sigmas = rolled_out(tiny, config, window_of(config, 0), [SEEDS[i] for i in order])
    assert torch.equal(made.x_t[0], whole.x_t[0][order])


def test_windows_are_a_function_of_the_rollout():
    assert window_of(config_of(), 3).trained == (0, 1, 2, 3)
    mix = config_of(window="mix", window_size=2, window_rollouts=2)
    firsts = [window_of(mix, rollout).trained[0] for rollout in range(9)]
    assert firsts == [0, 0, 1, 1, 2, 2, 0, 0, 1]
    fast = Counter(window_of(config_of(window="fast"), rollout).trained for rollout in range(200))
    assert set(fast) == {(0, 1), (1, 2), (2, 3)}
    assert all(
        window_of(config_of(window="fast"), r).branch == window_of(config_of(window="fast"), r).trained[0]
        for r in range(9)
    )
    subset = Counter(window_of(config_of(window="subset"), rollout).trained for rollout in range(200))
    assert len(subset) == 6  # of 4 steps 2
    assert window_of(config_of(window="subset"), 7) == window_of(config_of(window="subset"), 7)
