"""DiffusionNFT, DGPO and AWM, by hand."""

import math

import pytest
import torch

from prx_post.objectives.forward_rl import awm_loss, dgpo_loss, flattened, nft_loss, optimality


def latent(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_optimality_by_hand():
    assert optimality(torch.tensor([-9.0, -5.0, 0.0, 2.0, 9.0])).tolist() == pytest.approx([0, 0, 0.5, 0.7, 1])


def test_nft_by_hand():
    # x_t = 2, x0 = 1, t = 0.5, v = 3, v_old = 1, beta = 0.5
    # v⁺ = 0.5·1 + 0.5·3 = 2: x̂0 = 2 - 1 = 1, off by 0; v⁻ = 1.5·1 - 0.5·3 = 0: x̂0 = 2, off by 1: 1²/1
    loss, metrics = nft_loss(
        *(latent(3.0), latent(1.0), latent(2.0), latent(1.0)),
        torch.tensor([0.5]),
        torch.tensor([0.25]),
        beta=0.5,
    )
    assert loss.item() == pytest.approx((0.25 * 0 + 0.75 * 1) / 0.5)
    assert (metrics["positive_error"].item(), metrics["negative_error"].item()) == (0, 1)


def nft_gradient(probability):
    velocity = latent(1.0).requires_grad_()
    args = (latent(1.0), latent(2.0), latent(1.0), torch.tensor([0.5]), torch.tensor([probability]))
    nft_loss(velocity, *args, beta=1.0)[0].backward()
    return velocity.grad.item()


def test_nft_pulls_towards_good_images_pushes_from_bad_and_leaves_the_others_at_the_start():
    # v = v_old = 1: x̂0 = 1.5, off by 0.5; d/dv of 0.5²/0.5 = 2·0.5·(-0.5)/0.5 = -1: up for good, down for bad
    assert nft_gradient(1.0) == pytest.approx(-1.0)
    assert nft_gradient(0.0) == pytest.approx(1.0)
    assert nft_gradient(0.5) == pytest.approx(0.0)


def test_dgpo_by_hand():
    error = torch.tensor([[0.5, 0.7]], requires_grad=True)
    reference, advantages = torch.tensor([[0.6, 0.6]]), torch.tensor([[1.0, -1.0]])
    loss, metrics = dgpo_loss(error, reference, advantages, beta=10.0)
    # mean of 1·(-0.1), -1·0.1 is -0.1: σ(10·(-0.1)) = 0.268941; loss 0.268941·(0.5 - 0.7)/2
    weight = 1 / (1 + math.e)
    assert metrics["group_weight"].item() == pytest.approx(weight)
    assert loss.item() == pytest.approx(weight * -0.1)
    loss.backward()
    assert error.grad.flatten().tolist() == pytest.approx([weight / 2, -weight / 2])


def test_dgpos_groups_do_not_mix_and_its_clip_stops_what_has_gone_far():
    error = torch.tensor([[0.5, 0.7], [0.3, 0.3]], requires_grad=True)
    old = torch.tensor([[0.6, 0.7], [0.3, 0.3]])
    loss, metrics = dgpo_loss(
        error,
        error.detach(),
        torch.tensor([[1.0, -1.0], [2.0, -2.0]]),
        beta=100.0,
        old_error_PG=old,
        epsilon=0.01,
        weight_P=torch.tensor([1.0, 0.5]),
    )
    loss.backward()
    # every weight ½; the first image's ratio e^0.1 is beyond the clip; the second group's gradient has weight ½
    assert error.grad.flatten().tolist() == pytest.approx([0, -0.125, 0.125, -0.125])
    assert metrics["clip_fraction"].item() == 0.25


def test_awm_is_the_clipped_loss_on_errors():
    error, old = torch.tensor([0.5, 0.9], requires_grad=True), torch.tensor([0.5, 0.7])
    loss, metrics = awm_loss(error, old, torch.tensor([1.0, 1.0]), epsilon=0.1)
    # ρ = 1 and e^-0.2: max(-1, -1), max(-0.8187, -0.9)
    assert loss.item() == pytest.approx((-1 - math.exp(-0.2)) / 2)
    assert metrics["ratio"].item() == pytest.approx((1 + math.exp(-0.2)) / 2)
    loss.backward()
    assert error.grad.tolist() == pytest.approx([0.5, 0.5 * math.exp(-0.2)])


def test_flattened_errors_by_hand():
    # 0.5/0.25·((0.0624 + 0.0001)^0.25 - 0.0001^0.25) = 2·(0.5 - 0.1)
    assert flattened(torch.tensor([0.0624]), torch.tensor([0.5]), 0.25).item() == pytest.approx(0.8, rel=1e-5)
