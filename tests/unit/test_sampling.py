import pytest
import torch

from prx_post import sampling


def test_guidance_extrapolates_from_unconditional_through_conditional():
    uncond, cond = torch.tensor([1.0]), torch.tensor([2.0])
    assert sampling.guided_velocity(uncond, cond, 5.0).item() == 6.0  # 1 + 5·(2 - 1)
    assert sampling.guided_velocity(uncond, cond, 1.0).item() == 2.0


def test_euler_step_moves_by_velocity_times_the_change_in_sigma():
    x = sampling.euler_step(torch.tensor([[[[1.0]]]]), torch.tensor([[[[2.0]]]]), 0.75, 0.25)
    assert x.item() == 0.0  # 1 + (0.25 - 0.75)·2


def test_a_constant_velocity_is_integrated_exactly_whatever_the_grid():
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x0 = torch.zeros_like(noise)
    for sigmas in (torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.9, 0.3, 0.1, 0.0])):
        result = sampling.euler_sample(lambda x, t: noise - x0, noise, sigmas)
        assert result.abs().max().item() < 1e-6


def test_the_velocity_function_is_asked_at_each_sigma_but_the_last():
    asked = []

    def velocity(x, t):
        asked.append(t.tolist())
        return torch.zeros_like(x)

    sampling.euler_sample(velocity, torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 0.5, 0.0]))
    assert asked == [[1.0, 1.0], [0.5, 0.5]]


def test_halving_the_step_halves_the_error_on_a_curved_path():
    # dx/ds = x has the solution x(0) = x(1)/e; Euler's error is of first order
    def error(n):
        result = sampling.euler_sample(lambda x, t: x, torch.ones(1, 1, 1, 1), torch.linspace(1, 0, n + 1))
        return abs(result.item() - 0.36787944)

    assert error(100) / error(200) == pytest.approx(2.0, rel=0.02)


def test_renoising_goes_to_x0_and_back_up_with_fresh_noise_by_hand():
    # from 8 at 1: velocity 2 gives x0 = 8 - 1·2 = 6; back to 0.5 with noise -4: 0.5·6 + 0.5·(-4) = 1
    # from 1 at 0.5: x0 = 1 - 0.5·2 = 0, and that is the end
    seen = []

    def velocity(x, t):
        seen.append((x.item(), t.item()))
        return torch.full_like(x, 2.0)

    def fresh(step):
        assert step == 1
        return torch.full((1, 1, 1, 1), -4.0)

    noise = torch.full((1, 1, 1, 1), 8.0)
    result = sampling.renoise_sample(velocity, noise, torch.tensor([1.0, 0.5, 0.0]), fresh)
    assert seen == [(8.0, 1.0), (1.0, 0.5)]
    assert result.item() == 0.0


@pytest.mark.parametrize("noise_level", [0.0, 1.0])
def test_cps_stands_between_euler_and_renoising(noise_level):
    sigmas, noise = (
        torch.tensor([1.0, 0.8, 0.5, 0.0]),
        torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(1)),
    )

    def velocity(x, t):
        return torch.sin(3 * x) + t.view(-1, 1, 1, 1)

    def fresh(step):
        return torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(10 + step))

    ends = {
        0.0: sampling.euler_sample(velocity, noise, sigmas),
        1.0: sampling.renoise_sample(velocity, noise, sigmas, fresh),
    }
    assert torch.allclose(
        sampling.cps_sample(velocity, noise, sigmas, fresh, noise_level), ends[noise_level], atol=1e-5
    )
    between = sampling.cps_sample(velocity, noise, sigmas, fresh, 0.5)
    assert all((between - end).abs().mean() > 0.01 for end in ends.values())
