import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from prx_post import flow


def test_path_is_data_at_zero_noise_at_one_and_mixed_between():
    x0, noise = torch.full((3, 1, 1, 2), 2.0), torch.full((3, 1, 1, 2), -6.0)
    x_t = flow.interpolate(x0, noise, torch.tensor([0.0, 1.0, 0.25]))
    # 0.75·2 + 0.25·(-6) = 0
    assert x_t[:, 0, 0, 0].tolist() == [2.0, -6.0, 0.0]
    assert flow.velocity_target(x0, noise).unique().tolist() == [-8.0]


def test_x0_is_where_the_velocity_points_at_time_zero():
    x_t, velocity = torch.full((2, 1, 1, 1), 5.0), torch.full((2, 1, 1, 1), 4.0)
    x0 = flow.x0_from_velocity(x_t, velocity, torch.tensor([0.5, 1.0]))
    assert x0.flatten().tolist() == [3.0, 1.0]  # 5 - 0.5·4, 5 - 1·4


def test_pixel_velocity_divides_by_time_but_never_by_less_than_t_min():
    x_t, x0 = torch.full((2, 1, 1, 1), 1.0), torch.zeros(2, 1, 1, 1)
    velocity = flow.velocity_from_x0(x_t, x0, torch.tensor([0.5, 0.01]))
    assert velocity.flatten().tolist() == pytest.approx([2.0, 20.0])  # 1/0.5, 1/0.05


def test_logit_normal_timesteps_have_the_quantiles_of_a_sigmoid_of_a_normal():
    t = flow.sample_timesteps(200_000, mean=0.0, std=1.0, generator=torch.Generator().manual_seed(0))
    quantiles = torch.quantile(t[:100_000], torch.tensor([0.1587, 0.5, 0.8413]))
    # sigmoid(-1) = 0.2689, sigmoid(0) = 0.5, sigmoid(1) = 0.7311; the sample's own error is below 0.003
    assert quantiles.tolist() == pytest.approx([0.2689, 0.5, 0.7311], abs=0.005)


def test_shift_three_moves_the_median_to_three_quarters():
    t = flow.sample_timesteps(100_000, shift=3.0, generator=torch.Generator().manual_seed(1))
    assert t.median().item() == pytest.approx(0.75, abs=0.01)  # 3·0.5 / (1 + 2·0.5)


def test_uniform_fraction_of_one_is_uniform_and_of_a_tenth_fattens_the_tail():
    uniform = flow.sample_timesteps(100_000, uniform_fraction=1.0, generator=torch.Generator().manual_seed(2))
    assert torch.quantile(uniform, torch.tensor([0.01, 0.5, 0.99])).tolist() == pytest.approx(
        [0.01, 0.5, 0.99], abs=0.01
    )
    mixed = flow.sample_timesteps(200_000, uniform_fraction=0.1, generator=torch.Generator().manual_seed(3))
    # P(t < 0.01) = 0.1·0.01 + 0.9·Phi(logit 0.01) with Phi(-4.595) = 2.2e-6
    assert (mixed < 0.01).float().mean().item() == pytest.approx(0.001, abs=0.0003)


def test_inference_sigmas_are_the_schedulers_own_with_its_nearly_idle_last_step():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    sigmas = flow.inference_sigmas(scheduler, 8)
    assert sigmas.tolist() == pytest.approx([1, 0.9475, 0.8828, 0.8008, 0.6938, 0.548, 0.338, 0.0089, 0], abs=1e-3)
    assert sigmas.dtype == torch.float32


def test_noise_of_a_seed_does_not_depend_on_its_neighbours():
    alone = flow.seeded_noise([7], (4, 2, 2))
    among = flow.seeded_noise([3, 7, 11], (4, 2, 2))
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(among[0], among[1])
    assert math.isclose(flow.seeded_noise(range(200), (4, 8, 8)).std().item(), 1.0, abs_tol=0.02)


def test_a_scheduler_whose_levels_do_not_fall_is_an_error():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)
    with pytest.raises(ValueError, match="the noise levels of 4 steps do not fall"):
        flow.inference_sigmas(scheduler, 4)


def test_one_step_goes_from_noise_to_data_also_where_stretching_divides_by_zero():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.3)
    assert flow.inference_sigmas(scheduler, 1).tolist() == [1.0, 0.0]


def test_the_stretched_grid_ends_at_shift_terminal_and_keeps_its_proportions():
    plain = flow.inference_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), 8)
    stretched = flow.inference_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.3), 8)
    assert stretched[-2].item() == pytest.approx(0.3)
    # 1 - sigma is scaled by (1 - 0.3) / (1 - 0.008929)
    assert (1 - stretched[:-1]).tolist() == pytest.approx(((1 - plain[:-1]) * 0.7 / 0.991071).tolist(), abs=1e-5)
