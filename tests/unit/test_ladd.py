import pytest
import torch

from prx_post.objectives import ladd
from prx_post.objectives.distillation import distribution_matching_loss, path_velocity, trajectory_loss


def logits(*values: float) -> torch.Tensor:
    """One head, one sample, a token a value."""
    return torch.tensor(values).view(1, 1, -1)


def test_the_generator_wants_high_logits_on_its_fakes():
    # -(2 - 1 + 5) / 3
    assert ladd.generator_loss(logits(2, -1, 5)).item() == pytest.approx(-2.0)


def test_hinge_loss_by_hand():
    # real: max(0, 1 - 3) + max(0, 1 - 0.5) + max(0, 1 + 1) = 0 + 0.5 + 2, mean 2.5/3
    # fake: max(0, 1 - 2) + max(0, 1 + 0) + max(0, 1 + 0.25) = 0 + 1 + 1.25, mean 2.25/3
    loss = ladd.discriminator_loss(logits(3, 0.5, -1), logits(-2, 0, 0.25))
    assert loss.item() == pytest.approx(4.75 / 3)


def test_hinge_loss_is_two_at_chance_and_zero_when_both_are_beyond_the_margin():
    assert ladd.discriminator_loss(logits(0, 0), logits(0, 0)).item() == 2.0
    assert ladd.discriminator_loss(logits(1.5, 9), logits(-1, -4)).item() == 0.0


def test_mismatched_samples_take_their_share_of_the_fakes():
    # real 0.5; fake 1 + 1 = 2, mismatched 1 + 3 = 4: 0.5 + (0.75·2 + 0.25·4)
    assert ladd.discriminator_loss(logits(0.5), logits(1), logits(3), 0.25).item() == pytest.approx(3.0)
    assert ladd.discriminator_loss(logits(0), logits(0), logits(0), 0.25).item() == 2.0


def test_samples_beyond_the_margin_give_the_discriminator_no_gradient():
    real, fake = logits(2.0, 0).requires_grad_(), logits(-3, 0.5).requires_grad_()
    ladd.discriminator_loss(real, fake).backward()
    assert real.grad.flatten().tolist() == [0, -0.5]  # mean over two tokens
    assert fake.grad.flatten().tolist() == [0, 0.5]


def test_losses_are_fp32_whatever_the_logits_are():
    low = logits(1, 2).bfloat16()
    losses = (ladd.generator_loss(low), ladd.discriminator_loss(low, low), ladd.approximate_r1(low, low))
    assert {loss.dtype for loss in losses} == {torch.float32}


def test_approximate_r1_is_the_mean_squared_change():
    # (1.5 - 1)² = 0.25 and (2 - 4)² = 4, mean 2.125
    assert ladd.approximate_r1(logits(1, 4), logits(1.5, 2)).item() == pytest.approx(2.125)


def test_logit_metrics_count_the_tokens_on_their_own_side_by_head():
    real = torch.tensor([[[1.0, -1.0]], [[2.0, 3.0]]])  # head a: 1 of 2 right, head b: 2 of 2
    fake = torch.tensor([[[-1.0, 1.0]], [[-5.0, 4.0]]])  # head a: 1 of 2, head b: 1 of 2
    metrics = ladd.logit_metrics(real, fake, ["a", "b"])
    assert metrics["discriminator_accuracy/a"].item() == 0.5
    assert metrics["discriminator_accuracy/b"].item() == 0.75
    assert metrics["discriminator_accuracy"].item() == 0.625
    assert metrics["real_logit"].item() == pytest.approx(5 / 4)
    assert metrics["fake_logit/b"].item() == pytest.approx(-0.5)


def test_the_path_velocity_takes_one_euler_step_to_the_teachers_end():
    x_t, x_next = torch.tensor([1.0, 4.0]).view(2, 1, 1, 1), torch.tensor([0.0, 5.0]).view(2, 1, 1, 1)
    t, t_next = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.25])
    velocity = path_velocity(x_t, x_next, t, t_next)
    # (1 - 0) / (1 - 0.5) = 2 and (4 - 5) / (0.5 - 0.25) = -4
    assert velocity.flatten().tolist() == [2.0, -4.0]


def test_trajectory_loss_by_hand():
    loss, metrics = trajectory_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))
    assert loss.item() == metrics["trajectory_mse"].item() == pytest.approx(2.5)  # (1 + 4) / 2


def test_distribution_matching_pulls_away_from_the_fake_score_towards_the_real_one():
    x0 = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    real, fake = torch.tensor([1.0, 1.0]).view(1, 2, 1, 1), torch.tensor([3.0, 0.5]).view(1, 2, 1, 1)
    loss, _ = distribution_matching_loss(x0, real, fake)
    loss.backward()
    # |x0 - real| has mean (1 + 1) / 2 = 1; the pull is (fake - real) / 1 = (2, -0.5); the mean over two elements halves
    assert x0.grad.flatten().tolist() == pytest.approx([1.0, -0.25])
    # 0.5 · mean of the squared pull: 0.5 · (4 + 0.25) / 2
    assert loss.item() == pytest.approx(1.0625)


def test_distribution_matching_gives_nothing_where_both_scores_agree():
    x0 = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    score = torch.zeros_like(x0)
    loss, metrics = distribution_matching_loss(x0, score, score)
    loss.backward()
    assert loss.item() == metrics["dmd_gradient"].item() == 0
    assert not x0.grad.any()
