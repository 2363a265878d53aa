"""Preference losses by hand."""

import math

import pytest
import torch

from prx_post.objectives.dpo import diffusion_dpo_loss, diffusion_kto_loss
from prx_post.stages.dpo.objective import PairObjective


def errors(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def by_hand(loss_type: str = "sigmoid", **options: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Two pairs. Changes: chosen -0.2 and +0.1, rejected +0.2 and +0.3; gains ½ · 0.4 = 0.2 and ½ · 0.2 = 0.1."""
    win, lose = errors(0.8, 1.1), errors(1.2, 0.8)
    return diffusion_dpo_loss(win, lose, errors(1.0, 1.0), errors(1.0, 0.5), beta=10, loss_type=loss_type, **options)


def test_dpo_loss_is_log_2_when_the_policy_is_the_reference():
    same = errors(0.3, 0.9, 2.0)
    loss, metrics = diffusion_dpo_loss(same, 2 * same, same, 2 * same, beta=5000)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["accuracy"].item() == 0.5
    assert metrics["margin"].item() == metrics["both_rise"].item() == 0


def test_dpo_loss_by_hand():
    """Margins β · gain = 2 and 1: ln(1 + e^-2) = 0.126928 and ln(1 + e^-1) = 0.313262, mean 0.220095."""
    loss, metrics = by_hand()
    assert loss.item() == pytest.approx(0.220095, abs=1e-5)
    assert metrics["win_change"].item() == pytest.approx(-0.05)
    assert metrics["lose_change"].item() == pytest.approx(0.25)
    assert metrics["accuracy"].item() == 1
    assert metrics["margin"].item() == pytest.approx(1.5)
    assert metrics["both_rise"].item() == 0.5  # the second pair: +0.1 and +0.3


def test_the_loss_is_taken_per_pair_not_of_the_mean_margin():
    """Margins 20 and -20: 0 and 20, mean 10; the mean margin of 0 would give ln 2."""
    loss, _ = diffusion_dpo_loss(errors(0.0, 4.0), errors(4.0, 0.0), errors(0.0, 0.0), errors(0.0, 0.0), beta=10)
    assert loss.item() == pytest.approx(10, abs=1e-6)


def test_hinge_and_ipo_by_hand():
    # 1 - 2 is below 0; 1 - 1 = 0
    assert by_hand("hinge")[0].item() == pytest.approx(0, abs=1e-6)
    # 1/(2·10) = 0.05: (0.15² + 0.05²) / 2 = (0.0225 + 0.0025) / 2
    assert by_hand("ipo")[0].item() == pytest.approx(0.0125)


def test_a_smoothed_label_is_wrong_with_that_probability():
    """Of the margins 2 and 1 turned round: ln(1 + e^2) = 2.126928, ln(1 + e) = 1.313262, mean 1.720095."""
    assert by_hand(label_smoothing=0.1)[0].item() == pytest.approx(0.9 * 0.220095 + 0.1 * 1.720095, abs=1e-5)
    with pytest.raises(ValueError, match="label_smoothing is for loss_type sigmoid, not hinge"):
        by_hand("hinge", label_smoothing=0.1)


def test_the_rejected_images_change_can_count_less():
    """Halved: gains ½ (0.2 + 0.1) = 0.15 and ½ (-0.1 + 0.15) = 0.025; then ln(1 + e^-1.5), ln(1 + e^-¼)."""
    loss, metrics = by_hand(lose_weight=0.5)
    assert loss.item() == pytest.approx((0.201413 + 0.575939) / 2, abs=1e-5)
    assert metrics["margin"].item() == pytest.approx(1.5)  # what is reported stays comparable


def test_the_chosen_images_own_error_can_be_added():
    assert by_hand(sft_weight=2.0)[0].item() == pytest.approx(0.220095 + 2 * 0.95, abs=1e-5)


def test_gradients_lower_the_chosen_images_error_and_raise_the_others():
    """At the start each pair's slope is ½ β σ(0) = β/4, over two pairs β/8; the reference gets none."""
    win, lose, ref = (errors(1.0, 2.0).requires_grad_() for _ in range(3))
    diffusion_dpo_loss(win, lose, ref, ref, beta=100)[0].backward()
    assert win.grad.tolist() == pytest.approx([12.5, 12.5])
    assert lose.grad.tolist() == pytest.approx([-12.5, -12.5])
    assert ref.grad is None


def test_losses_are_fp32_whatever_the_errors_are():
    low = errors(1.0, 2.0).bfloat16()
    assert diffusion_dpo_loss(low, low, low, low, beta=10)[0].dtype == torch.float32
    assert diffusion_kto_loss(low, low, torch.tensor([True, False]), beta=10)[0].dtype == torch.float32


def test_kto_by_hand():
    """Rewards -5 · (-0.4, +0.2) = 2 and -1, their mean 0.5: 1 - σ(1.5) = 0.182426 and 1 - σ(0.5 + 1) = 0.182426."""
    loss, metrics = diffusion_kto_loss(
        errors(0.6, 1.2), errors(1.0, 1.0), torch.tensor([True, False]), beta=10, undesirable_weight=3.0
    )
    assert loss.item() == pytest.approx((0.182426 + 3 * 0.182426) / 2, abs=1e-5)
    assert metrics["reference_point"].item() == pytest.approx(0.5)
    assert metrics["margin"].item() == pytest.approx(1.5)  # 2 - 0.5 and 0.5 - -1
    assert metrics["accuracy"].item() == 1


def test_ktos_reference_point_is_not_below_zero_and_takes_no_gradient():
    """Rewards -1 and -1; at 0 instead of -1: σ'(-1) = σ'(1) = 0.196612, times ½ β = 5, over two images."""
    error = errors(1.2, 1.2).requires_grad_()
    loss, metrics = diffusion_kto_loss(error, errors(1.0, 1.0), torch.tensor([True, False]), beta=10)
    loss.backward()
    assert metrics["reference_point"].item() == 0
    assert error.grad.tolist() == pytest.approx([2.5 * 0.196612, -2.5 * 0.196612], abs=1e-5)


def test_kto_takes_the_reference_point_of_all_processes():
    """Reward 2 here, 0 in another process: the point is 1, and 1 - σ(2 - 1) = 0.268941."""
    loss, metrics = diffusion_kto_loss(
        errors(0.6), errors(1.0), torch.tensor([True]), beta=10, average=lambda mean: (mean + 0) / 2
    )
    assert metrics["reference_point"].item() == pytest.approx(1)
    assert loss.item() == pytest.approx(0.268941, abs=1e-5)


def test_kto_of_a_policy_that_is_the_reference_says_half_and_half():
    same = errors(1.0, 2.0)
    loss, metrics = diffusion_kto_loss(same, same, torch.tensor([True, False]), beta=10)
    assert loss.item() == 0.5
    assert metrics["accuracy"].item() == 0.5
    assert metrics["margin"].item() == 0


def test_each_pair_may_have_a_beta_of_its_own():
    """Gains 0.2 and 0.1 as above; β 10 and 20: both margins 2, both losses ln(1 + e^-2)."""
    win, lose = errors(0.8, 1.1), errors(1.2, 0.8)
    loss, metrics = diffusion_dpo_loss(win, lose, errors(1.0, 1.0), errors(1.0, 0.5), beta=errors(10.0, 20.0))
    assert loss.item() == pytest.approx(0.126928, abs=1e-5)
    assert metrics["margin"].item() == pytest.approx(2)


class Constant(torch.nn.Module):
    """A transformer that predicts the same velocity everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, hidden_states, **_):
        return (self.value.expand_as(hidden_states),)


class Still:
    """A reference that predicts no velocity at all."""

    def velocity(self, x_t, t, prompts):
        return torch.zeros_like(x_t)


def test_it_is_the_chosen_images_error_that_is_lowered():
    """Targets 0 and -1; at velocity ½ errors ¼ and 2¼, the reference's 0 and 1: gain ½ (1¼ - ¼), ln(1 + e^-1)."""
    shape = (3, 4, 2, 2)
    batch = {"latents": torch.zeros(shape), "rejected": torch.ones(shape), "noise": torch.zeros(shape)}
    batch |= {"t": torch.full((3,), 0.5), "prompt_embeds": torch.zeros(3, 1, 8), "prompt_mask": torch.ones(3, 1)}
    objective = PairObjective(Constant(0.5), 1e-3, Still(), beta=2.0)
    loss, metrics = objective(batch)
    assert loss.item() == pytest.approx(0.313262, abs=1e-5)
    assert metrics["win_change"].item() == pytest.approx(0.25)
    assert metrics["lose_change"].item() == pytest.approx(1.25)
