"""The samplers' random steps: by hand, against torch.distributions, and against the marginals they must keep."""

import itertools
import math

import pytest
import torch

from prx_post import sampling
from prx_post.flow import inference_sigmas
from prx_post.sampling import cps_step, dance_step, euler_step, renoise_step, sde_step

X, V = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
STEPS = {
    "sde": lambda *args, **given: sde_step(*args, noise_level=0.7, sigma_max=0.75, **given),
    "dance": lambda *args, **given: dance_step(*args, noise_level=0.3, **given),
    "cps": lambda *args, **given: cps_step(*args, noise_level=0.5, **given),
    "renoise": renoise_step,
}


@pytest.mark.parametrize(
    ("name", "sigma", "sigma_next", "mean", "std"),
    [
        # s = 0.7·√(0.5/0.5); 1·(1 + 0.49·(-0.25)/1) + 2·(1 + 0.49·0.5/1)·(-0.25) = 0.8775 - 0.6225; 0.7·√0.25
        ("sde", 0.5, 0.25, 0.255, 0.35),
        # s = 0.7·√(1/(1 - 0.75)) = 1.4; 1·(1 + 1.96·(-0.25)/2) + 2·(1 + 0)·(-0.25) = 0.755 - 0.5; 1.4·√0.25
        ("sde", 1.0, 0.75, 0.255, 0.7),
        # 1·(1 + 0.09·(-0.25)/1) + 2·(1 + 0.09·0.5/1)·(-0.25) = 0.9775 - 0.5225; 0.3·√0.25
        ("dance", 0.5, 0.25, 0.455, 0.15),
        # x̂0 = 1 - 0.5·2 = 0, x̂1 = 1 + 0.5·2 = 2; std = 0.25·sin(π/4) = 0.25/√2; √(0.0625 - 0.03125)·2 = 0.5/√2
        ("cps", 0.5, 0.25, 0.5 / math.sqrt(2), 0.25 / math.sqrt(2)),
        # x̂0 = 0: (1 - 0.25)·0
        ("renoise", 0.5, 0.25, 0.0, 0.25),
    ],
)
def test_mean_and_std_by_hand(name, sigma, sigma_next, mean, std):
    step = STEPS[name](X, V, sigma, sigma_next, noise=torch.full_like(X, 2.0))
    assert step.mean.item() == pytest.approx(mean, abs=1e-6)
    assert step.std.tolist() == pytest.approx([std])
    assert step.x_next.item() == pytest.approx(mean + 2 * std, abs=1e-6)


@pytest.mark.parametrize("name", STEPS)
def test_log_prob_is_that_of_torchs_normal_and_a_mean_over_the_latent(name):
    x, v, x_next = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    sigma, sigma_next = torch.tensor([1.0, 0.6, 0.5]), torch.tensor([0.75, 0.3, 0.4])
    step = STEPS[name](x, v, sigma, sigma_next, x_next=x_next)
    normal = torch.distributions.Normal(step.mean, step.std.view(-1, 1, 1, 1))
    torch.testing.assert_close(step.log_prob, normal.log_prob(x_next).mean((1, 2, 3)))
    assert torch.equal(step.x_next, x_next)


@pytest.mark.parametrize("name", STEPS)
def test_one_level_for_all_and_a_level_for_each_give_the_same_bits(name):
    x, v, noise = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    one = STEPS[name](x, v, 0.8, 0.55, noise=noise)
    each = STEPS[name](x, v, torch.full((3,), 0.8), torch.full((3,), 0.55), noise=noise)
    assert torch.equal(one.x_next, each.x_next)
    assert torch.equal(one.log_prob, each.log_prob)


def test_the_gradient_of_log_prob_is_that_of_the_mean_alone():
    # d/dv of -(x' - m)²/2s² = (x' - m)/s² · dm/dv, with dm/dv = -0.25·1.245 for the step above, (x' - m)/s = 2
    velocity = V.clone().requires_grad_()
    sde_step(X, velocity, 0.5, 0.25, noise_level=0.7, sigma_max=0.75, noise=torch.full_like(X, 2.0)).log_prob.backward()
    assert velocity.grad.item() == pytest.approx(2 / 0.35 * -0.25 * 1.245, rel=1e-5)


def test_without_noise_the_steps_are_the_odes():
    x, v, noise = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    euler = euler_step(x, v, torch.tensor(0.75), torch.tensor(0.5))
    for step in (
        sde_step(x, v, 0.75, 0.5, noise_level=0.0, sigma_max=0.9, noise=noise),
        dance_step(x, v, 0.75, 0.5, noise_level=0.0, noise=noise),
    ):
        assert torch.equal(step.x_next, euler)
        assert step.log_prob.tolist() == [0, 0]
    torch.testing.assert_close(cps_step(x, v, 0.75, 0.5, noise_level=0.0, noise=noise).x_next, euler)


def test_cps_at_full_noise_renoises():
    x, v, noise = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    full, again = cps_step(x, v, 0.75, 0.5, noise_level=1.0, noise=noise), renoise_step(x, v, 0.75, 0.5, noise=noise)
    torch.testing.assert_close(full.x_next, again.x_next)


COUNT, DATA_MEAN = 200_000, 3.0


def gaussian_velocity(x, sigma, data_std):
    """E[noise - x0 | x] for x0 of N(3, data_std²): noise and x0 are jointly Gaussian with x = (1 - σ) x0 + σ noise."""
    variance = (1 - sigma) ** 2 * data_std**2 + sigma**2
    slope = (sigma - (1 - sigma) * data_std**2) / variance
    return -DATA_MEAN + slope * (x - (1 - sigma) * DATA_MEAN)


def at_level(sigma, data_std, generator):
    x0 = DATA_MEAN + data_std * torch.randn(COUNT, generator=generator)
    return ((1 - sigma) * x0 + sigma * torch.randn(COUNT, generator=generator)).view(-1, 1, 1, 1)


def expect_marginal(x, sigma, data_std, tolerance):
    std = math.sqrt((1 - sigma) ** 2 * data_std**2 + sigma**2)
    assert x.mean().item() == pytest.approx((1 - sigma) * DATA_MEAN, abs=tolerance)
    assert x.std().item() == pytest.approx(std, abs=tolerance)


@pytest.mark.parametrize("name", ["sde", "dance"])
def test_many_small_steps_keep_the_marginals_of_gaussian_data(name):
    generator = torch.Generator().manual_seed(0)
    x = at_level(0.8, 0.5, generator)
    levels = torch.linspace(0.8, 0.3, 101).tolist()
    for sigma, sigma_next in itertools.pairwise(levels):
        x = STEPS[name](x, gaussian_velocity(x, sigma, 0.5), sigma, sigma_next, generator=generator).x_next
    expect_marginal(x, 0.3, 0.5, 0.012)  # of which Monte Carlo is 0.002 and the steps' size the rest


@pytest.mark.parametrize("name", ["cps", "renoise"])
def test_a_step_of_any_size_keeps_the_marginal_where_the_velocity_is_exact(name):
    """Data of one value, which x̂0 then is: the coefficients alone decide."""
    generator = torch.Generator().manual_seed(0)
    x = at_level(0.9, 0.0, generator)
    step = STEPS[name](x, gaussian_velocity(x, 0.9, 0.0), 0.9, 0.2, generator=generator)
    expect_marginal(step.x_next, 0.2, 0.0, 0.003)


def test_flow_grpos_grid_replaces_one_in_the_denominator_alone():
    """Published: σ/(1 - where(σ == 1, sigmas[1], σ)), on the scheduler's own grid; here by hand for N = 4, shift 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigmas = inference_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), 4)
    first, second = sigmas[0].item(), sigmas[1].item()
    assert first == 1.0
    step = sde_step(X, V, first, second, noise_level=0.7, sigma_max=second, noise=torch.zeros_like(X))
    spread = 0.7 * math.sqrt(1 / (1 - second))
    assert step.std.item() == pytest.approx(spread * math.sqrt(1 - second))  # 0.7, whatever the grid
    assert step.mean.item() == pytest.approx(1 - spread**2 / 2 * (1 - second) - 2 * (1 - second), abs=1e-5)


def test_the_step_dataclass_is_public():
    assert sampling.SDEStep(X, X, X.flatten(), X.flatten()).std.shape == (1,)
