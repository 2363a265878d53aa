"""What each option of SFT does, on numbers worked out by hand. The network answers 0 everywhere."""

import pytest
import torch

from prx_post.data.plan import Draw
from prx_post.data.source import timestep_and_noise
from prx_post.flow import sample_timesteps
from prx_post.stages.sft.objective import FlowMatchingObjective, immiscible


class Silent(torch.nn.Module):
    def forward(self, hidden_states, **_):
        return (torch.zeros_like(hidden_states),)


def batch():
    """Velocities noise - x0: -2, -1 and 2, 0; squares' means 2.5 and 2."""
    return {
        "latents": torch.full((2, 1, 1, 2), 3.0),
        "noise": torch.tensor([[[[1.0, 2.0]]], [[[5.0, 3.0]]]]),
        "t": torch.tensor([0.5, 0.25]),
        **{"prompt_embeds": None, "prompt_mask": None},
    }


def loss(**options):
    value, metrics = FlowMatchingObjective(Silent(), 1.0, **options)(batch())
    assert metrics["velocity_mse"].item() == pytest.approx(2.25)  # the unweighted error, always
    return value.item()


def test_every_timestep_counts_the_same_without_options():
    assert loss() == pytest.approx(2.25)


def test_min_snr_weighs_by_the_smaller_of_the_signal_and_gamma_times_the_noise():
    """min(0.5², 5·0.5²) = 0.25 and min(0.75², 5·0.25²) = 0.3125: (0.25·2.5 + 0.3125·2) / 2."""
    assert loss(min_snr_gamma=5.0) == pytest.approx(0.625)


def test_the_contrastive_term_subtracts_the_error_to_the_other_samples_target():
    """That error has the same mean here, for the network says 0: 2.25 · (1 - 0.05)."""
    assert loss(contrastive_weight=0.05) == pytest.approx(2.1375)


def test_immiscible_noise_goes_to_the_nearest_latent():
    """Latents 0 and 10, noises 9 and 1: straight 81 + 81, crossed 1 + 1."""
    given = {"latents": torch.tensor([0.0, 10.0]).view(2, 1, 1, 1), "noise": torch.tensor([9.0, 1.0]).view(2, 1, 1, 1)}
    assert immiscible(given)["noise"].flatten().tolist() == [1.0, 9.0]


def test_a_shift_favours_noise():
    """Without spread t is sigmoid(0) = 0.5, and 3·0.5 / (1 + 2·0.5) = 0.75."""
    assert sample_timesteps(2, std=0.0, shift=3.0).tolist() == [0.75, 0.75]


def test_a_sample_is_drawn_by_its_own_seed_and_the_density_it_is_given():
    drawn = timestep_and_noise(Draw(0, 5), (4, 2, 2), step=0, mean=0.0, std=0.0, shift=3.0, uniform_fraction=0.0)
    assert drawn["t"].item() == 0.75
    again = timestep_and_noise(Draw(0, 5), (4, 2, 2), step=9, mean=0.0, std=0.0)
    assert torch.equal(drawn["noise"], again["noise"])
    assert not torch.equal(drawn["noise"], timestep_and_noise(Draw(0, 6), (4, 2, 2), step=0)["noise"])
