import pytest
import torch

from prx_post.data.immiscible import immiscible_order
from prx_post.objectives.flow_matching import contrastive_term, flow_matching_loss, min_snr_weight


def test_loss_is_the_mean_squared_velocity_error_by_hand():
    velocity = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 4.0]]]])
    target = torch.tensor([[[[0.0, 0.0]]], [[[0.0, 1.0]]]])
    loss, metrics = flow_matching_loss(velocity, target)
    # sample 1: (1 + 4)/2 = 2.5; sample 2: (0 + 9)/2 = 4.5; mean 3.5
    assert loss.item() == 3.5
    assert metrics["velocity_mse"].item() == 3.5


def test_weights_apply_a_sample_each_and_leave_the_metric_alone():
    velocity = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 4.0]]]])
    target = torch.tensor([[[[0.0, 0.0]]], [[[0.0, 1.0]]]])
    loss, metrics = flow_matching_loss(velocity, target, weight=torch.tensor([2.0, 0.0]))
    assert loss.item() == 2.5  # (2·2.5 + 0·4.5) / 2
    assert metrics["velocity_mse"].item() == 3.5


def test_loss_is_taken_in_fp32_and_metrics_carry_no_gradient():
    velocity = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, metrics = flow_matching_loss(velocity, torch.zeros(1, 1, 1, 1))
    assert loss.dtype == torch.float32
    assert loss.requires_grad
    assert not metrics["velocity_mse"].requires_grad


def test_min_snr_caps_the_weight_of_nearly_clean_samples():
    # t = 0.5: SNR 1 < 5, weight (1 - t)² = 0.25; t = 0.1: SNR 81, capped: 5·0.01 = 0.05 instead of 0.81
    assert min_snr_weight(torch.tensor([0.5, 0.1]), gamma=5.0).tolist() == pytest.approx([0.25, 0.05])


def test_contrastive_term_compares_each_sample_with_the_others_target():
    velocity = torch.tensor([[[[1.0]]], [[[3.0]]]])
    target = torch.tensor([[[[0.0]]], [[[5.0]]]])
    assert contrastive_term(velocity, target).item() == 12.5  # ((1 - 5)² + (3 - 0)²) / 2
    with pytest.raises(ValueError, match="two samples"):
        contrastive_term(velocity[:1], target[:1])


def test_immiscible_assignment_minimises_total_distance_not_each_ones_own():
    x0 = torch.tensor([0.0, 1.0, 10.0]).view(3, 1, 1, 1)
    noise = torch.tensor([1.0, 9.0, 2.0]).view(3, 1, 1, 1)
    # x0 = 0 and 1 take noises 1 and 2 (total 1 + 1), x0 = 10 takes 9
    assert immiscible_order(x0, noise).tolist() == [0, 2, 1]
