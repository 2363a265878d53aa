"""What is trained at which noise level, and on whose states."""

from collections import Counter

import pytest
import torch

from prx_post.base.errors import ConfigError
from prx_post.data.plan import Draw
from prx_post.model.denoiser import predict_velocity
from prx_post.sampling import euler_sample, renoise_sample
from prx_post.stages.distill.levels import Levels, Randomness
from tests.distilling import SIGMAS, batch, config, objective

BY_LEVEL = {"trajectory": [10.0, 10.0, 0.0, 0.0], "ladd": [0.0, 0.0, 0.5, 0.25]}
PLACES = [2, 0, 3]
"""Levels of the samples of the tests' batches."""


def at_levels(levels=PLACES, own=()):
    data = {**batch(), "level": torch.tensor(levels), "is_own": torch.tensor([i in own for i in range(3)])}
    return Levels(BY_LEVEL).arrange(data)


def alone(data, place):
    """The batch of one sample."""
    one = {k: v[place : place + 1] for k, v in data.items() if isinstance(v, torch.Tensor) and len(v) == 3}
    kept = {k: one[k] for k in one if not k.endswith(("_samples", "_weight"))}
    return {**kept, "step": 0}


def losses(model, data):
    model.zero_grad()
    loss, metrics = model(data)
    loss.backward()
    return loss.item(), metrics, {n: p.grad.clone() for n, p in model.named_parameters()}


def test_samples_are_shared_out_by_their_levels():
    shares = Levels(BY_LEVEL).share_out([2, 0, 3, 1, 2], [True, False, True, False, False])
    assert shares["trajectory_samples"].tolist() == [1, 3]
    assert shares["trajectory_weight"].tolist() == [10.0, 10.0]
    assert shares["ladd_samples"].tolist() == [0, 2, 4]
    assert shares["ladd_weight"].tolist() == [0.5, 0.25, 0.5]
    assert shares["own_samples"].tolist() == [2, 0], "who has farthest to go first"
    assert shares["own_levels"] == [3, 2]
    assert Levels().share_out([0, 1], [False, False]) == {}


def test_each_method_learns_from_its_own_samples_with_their_weights():
    """The batch's gradient is the mean of what each sample gives alone to the method of its level."""
    model, data = objective(method=["trajectory", "ladd"], trajectory_levels=BY_LEVEL["trajectory"]), at_levels()
    _, metrics, both = losses(model, data)
    expected = dict.fromkeys(both, 0.0)
    own = dict.fromkeys(both, 0.0)
    for place, level in enumerate(PLACES):
        method = "trajectory" if level < 2 else "ladd"
        _, _, grads = losses(objective(method=[method]), alone(data, place))
        for name, grad in grads.items():
            kind = expected if name.startswith("policy.") else own
            weight = BY_LEVEL[method][level] if kind is expected else 1.0
            kind[name] = kind[name] + weight * grad / 3
    for name, grad in both.items():
        wanted = expected[name] if name.startswith("policy.") else own[name]
        assert torch.allclose(grad, torch.as_tensor(wanted), rtol=2e-3, atol=2e-6), name
    assert {"trajectory_mse", "generator_loss", "discriminator_loss"} <= set(metrics)


def test_a_method_without_a_sample_in_the_batch_changes_nothing_and_gives_every_weight_a_gradient():
    model = objective(method=["trajectory", "ladd"])
    _, metrics, grads = losses(model, at_levels([0, 1, 0]))
    assert "discriminator_loss" not in metrics
    heads = [grad for name, grad in grads.items() if name.startswith("networks.")]
    assert heads
    assert all((grad == 0).all() for grad in heads)


def test_one_sample_has_no_neighbour_to_be_mismatched_with():
    model = objective(method=["trajectory", "ladd"], mismatch_fraction=0.5)
    _, metrics, _ = losses(model, at_levels([0, 3, 0]))
    assert "mismatched_logit" not in metrics
    _, metrics, _ = losses(model, at_levels([2, 3, 0]))
    assert "mismatched_logit" in metrics


@pytest.mark.parametrize("renoises", [False, True])
def test_own_states_are_those_the_emitted_sampler_visits(renoises):
    model, data = objective(method=["ladd"]), at_levels([3, 1, 2], own=(0, 2))
    model.renoises = renoises
    data["own_noise"] = torch.randn(3, 3, 4, 8, 16, generator=torch.Generator().manual_seed(9))
    step = model.student_step(data)
    for place, level in ((0, 3), (2, 2)):
        prompts = data["prompt_embeds"][place : place + 1], data["prompt_mask"][place : place + 1]
        visited = []

        def velocity(x_t, t, prompts=prompts, visited=visited):
            visited.append(x_t)
            return predict_velocity(model.policy, x_t, t, *prompts)

        noise = data["noise"][place : place + 1]
        if renoises:
            renoise_sample(velocity, noise, SIGMAS, lambda number, p=place: data["own_noise"][p, number - 1][None])
        else:
            euler_sample(velocity, noise, SIGMAS)
        assert torch.allclose(step.x_t[place], visited[level][0], atol=1e-5), place
    untouched = model.student_step({k: v for k, v in data.items() if not k.startswith("own_s")})
    assert torch.equal(step.x_t[1], untouched.x_t[1])
    assert not torch.allclose(step.x_t[0], untouched.x_t[0], atol=1e-2)


def test_real_images_have_levels_of_their_own_and_own_states_their_fractions():
    draw = Randomness(
        torch.tensor([1.0, 1, 0, 0]),
        real_level_weights=torch.tensor([0.0, 0, 1, 1]),
        first_real=10,
        own_fractions=torch.tensor([0.0, 0, 0.5, 1]),
        own_is_random=True,
    )
    of_teacher = [draw(Draw(9, seed), (2,), 0) for seed in range(200)]
    of_real = [draw(Draw(10, seed), (2,), 0) for seed in range(400)]
    assert {int(d["level"]) for d in of_teacher} == {0, 1}
    assert not any(d["is_own"] for d in of_teacher)
    own = Counter((int(d["level"]), bool(d["is_own"])) for d in of_real)
    assert set(own) == {(2, True), (2, False), (3, True)}
    assert 60 < own[2, True] < 140, "about half of about 200"
    assert of_real[0]["own_noise"].shape == (3, 2)


def test_noise_does_not_depend_on_whether_own_states_are_drawn():
    plain, more = Randomness(torch.ones(4)), Randomness(torch.ones(4), own_fractions=torch.tensor([0.0, 1, 1, 1]))
    first, second = plain(Draw(0, 5), (3,), 0), more(Draw(0, 5), (3,), 0)
    assert torch.equal(first["noise"], second["noise"])
    assert torch.equal(first["level"], second["level"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trajectory_levels": [1.0] * 4}, r"trajectory_levels is \[1.0.*null because method is \['ladd'\]"),
        ({"ladd_levels": [1.0, 1.0]}, "must be 4 numbers, 0 or more"),
        (
            {"ladd_levels": [0.0, 1.0, 1.0, 1.0]},
            "above 0 at level 0, from noise to data because samples are drawn there",
        ),
        ({"own_state_levels": [0.5, 0.5, 0.5, 0.5]}, "4 fractions, the first of them 0"),
        ({"own_state_levels": [0.0, 0.5, 0.5, 1.5]}, "4 fractions, the first of them 0"),
        ({"own_state_levels": [0.0, 0.5, 0.5, 1.0], "torch_compile": True}, "false with own_state_levels"),
        ({"real_timestep_weights": [0.0] * 4}, "not all 0"),
    ],
)
def test_levels_that_cannot_be_trained_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_level_that_is_never_drawn_needs_no_method():
    config(ladd_levels=[0.0, 0.0, 1.0, 1.0], timestep_weights=[0.0, 0.0, 1.0, 1.0])
    with pytest.raises(ConfigError, match="above 0 at level 1"):
        config(
            ladd_levels=[0.0, 0.0, 1.0, 1.0],
            timestep_weights=[0.0, 0.0, 1.0, 1.0],
            real_timestep_weights=[0.0, 1.0, 0.0, 0.0],
        )
