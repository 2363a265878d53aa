"""Advantages, win rates and policy losses, by hand."""

import math

import pytest
import torch

from prx_post.objectives import grpo

REWARDS = torch.tensor([[1.0, 3.0], [2.0, 2.0]])


@pytest.mark.parametrize(
    ("scale", "first"),
    [
        # all four: mean 2, squares 1 + 1 + 0 + 0, over 3: √(2/3); group: squares 1 + 1 over 1: √2
        ("batch", 1 / (math.sqrt(2 / 3) + 1e-4)),
        ("group", 1 / (math.sqrt(2) + 1e-4)),
        ("none", 1.0),
    ],
)
def test_advantages_by_hand(scale, first):
    advantages = grpo.group_advantages(REWARDS, scale=scale)
    assert advantages.flatten().tolist() == pytest.approx([-first, first, 0, 0])


def test_advantages_are_clipped_and_a_group_without_variance_has_none_to_the_bit():
    rewards = torch.tensor([[0.0] * 15 + [100.0], [0.1] * 16])
    advantages = grpo.group_advantages(rewards, scale="none", clip=5.0)
    assert advantages[0].max() == 5
    assert advantages[1].tolist() == [0.0] * 16  # 0.1 is no binary fraction: its mean over 16 may differ from it
    assert grpo.varies(rewards).tolist() == [True, False]


def test_what_advantages_refuse():
    with pytest.raises(ValueError, match="two images or more"):
        grpo.group_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="one of batch, group, none"):
        grpo.group_advantages(REWARDS, scale="all")


def test_advantages_of_one_group_do_not_depend_on_another_beyond_the_scale():
    """Two groups of one prompt: as rows they never mix."""
    rewards = torch.tensor([[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]])
    advantages = grpo.group_advantages(rewards)
    assert torch.equal(advantages[0], advantages[1])


def test_several_rewards_weigh_as_asked_whatever_their_spread():
    rewards = {"small": torch.tensor([[0.0, 1.0]]), "large": torch.tensor([[1000.0, 0.0]])}
    combined = grpo.combined_rewards(rewards, {"small": 3.0, "large": 1.0})
    # each is ∓1/√2 (∓0.5 over the std 1/√2); 3·(-0.7071) + 0.7071 and the reverse
    assert combined.flatten().tolist() == pytest.approx([-math.sqrt(2), math.sqrt(2)], rel=1e-3)
    assert torch.equal(grpo.combined_rewards({"one": REWARDS}, {"one": 2.0}), 2 * REWARDS)


def test_win_rates_by_hand():
    # image 0 beats 1 surely and 2 with 0.75; 1 ties with 2
    wins = torch.tensor([[[0.9, 1.0, 0.75], [0.0, 0.9, 0.5], [0.25, 0.5, 0.9]]])
    assert grpo.pairwise_win_rates(wins).flatten().tolist() == pytest.approx([0.875, 0.25, 0.375])


def test_the_clipped_loss_by_hand():
    log_prob = torch.tensor([math.log(1.3), math.log(1.3), math.log(0.5), math.log(0.5)])
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0])
    loss, metrics = grpo.clipped_policy_loss(log_prob, torch.zeros(4), advantages, epsilon=0.2)
    # max(-2.6, -2.4), max(2.6, 2.4), max(-1, -1.6), max(1, 1.6)
    assert loss.item() == pytest.approx((-2.4 + 2.6 - 1.0 + 1.6) / 4)
    assert metrics["clip_fraction"].item() == 0.5
    assert metrics["ratio"].item() == pytest.approx(0.9)


def test_the_gradient_is_that_of_reinforce_at_the_first_update_and_none_beyond_the_clip():
    log_prob = torch.tensor([0.0, 0.3, -0.3], requires_grad=True)
    loss, _ = grpo.clipped_policy_loss(log_prob, torch.zeros(3), torch.tensor([2.0, 2.0, 2.0]), epsilon=0.2)
    loss.backward()
    # -A/3; none where the ratio is above 1.2 already; -A·ρ/3 where it has fallen
    assert log_prob.grad.tolist() == pytest.approx([-2 / 3, 0, -2 / 3 * math.exp(-0.3)])


def test_weights_multiply_rows():
    log_prob, advantages = torch.tensor([0.1, 0.2]), torch.tensor([1.0, -1.0])
    both, _ = grpo.clipped_policy_loss(log_prob, torch.zeros(2), advantages, epsilon=1.0, weight=torch.tensor([2.0, 0]))
    first, _ = grpo.clipped_policy_loss(log_prob[:1], torch.zeros(1), advantages[:1], epsilon=1.0)
    assert both.item() == pytest.approx(first.item())


def test_the_divergence_mask_stops_only_what_leads_further_away():
    log_prob = torch.tensor([0.1, 0.1, -0.1, -0.1, 0.1], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    divergence = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    loss, metrics = grpo.masked_policy_loss(
        log_prob, torch.zeros(5), advantages, divergence=divergence, max_divergence=0.5
    )
    loss.backward()
    assert [bool(g) for g in log_prob.grad] == [False, True, True, False, True]
    assert metrics["clip_fraction"].item() == pytest.approx(0.4)


def test_the_kl_is_torchs():
    mean, other = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    std = torch.tensor([0.5, 2.0])
    normal = [torch.distributions.Normal(m, std.view(-1, 1, 1, 1)) for m in (mean, other)]
    expected = torch.distributions.kl_divergence(*normal).mean((1, 2, 3))
    torch.testing.assert_close(grpo.gaussian_kl(mean, other, std), expected)


def test_the_normalised_ratio_has_no_bias_and_one_spread_at_every_step():
    """Means that differ by 0.1 at each of 512 values, at a noisy and at a quiet step."""
    generator = torch.Generator().manual_seed(0)
    old_mean = torch.zeros(4000, 8, 8, 8)
    mean = old_mean + 0.1
    for std in (0.2, 0.9):
        x = old_mean + std * torch.randn(old_mean.shape, generator=generator)
        both = [torch.distributions.Normal(m, std).log_prob(x).mean((1, 2, 3)) for m in (mean, old_mean)]
        ratio = grpo.normalised_log_ratio(*both, mean, old_mean, torch.full((4000,), std))
        # std·mean((x - old_mean)·0.1/std²) = 0.1·mean(noise) of 512: spread 0.1/√512
        assert ratio.mean().item() == pytest.approx(0, abs=3e-4)
        assert ratio.std().item() == pytest.approx(0.1 / math.sqrt(512), rel=0.05)


def test_suspicion_is_the_rank_that_others_do_not_share():
    optimised, other = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 1.0])
    # ranks 1, 0, 0.5 against 0, 0.75, 0.75
    doubt = grpo.suspicion(optimised, [other])
    assert doubt.tolist() == pytest.approx([1.0, -0.75, -0.25])
    assert grpo.most_suspicious(doubt, 0.5).tolist() == [True, False, False]
    assert grpo.most_suspicious(doubt, 1.0).tolist() == [True, False, False]  # others are not suspicious at all
    assert grpo.most_suspicious(doubt, 0.1).tolist() == [False, False, False]


def test_unlike_images_count_more_and_bad_ones_as_before():
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    advantages = torch.tensor([[1.0, -1.0, 1.0]])
    # nearest distances 0, 0, 1; their mean 1/3
    assert grpo.diverse_advantages(advantages, features).flatten().tolist() == pytest.approx([0.0, -1.0, 3.0])
