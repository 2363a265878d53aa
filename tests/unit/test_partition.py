"""Whole tensors out of the optimizer and back, in one process; ZeRO's cuts by hand, with two ranks pretended."""

import pytest
import torch
from torch import nn

from prx_post.engine import partition
from prx_post.engine.partition import Partition, join, split


class Wrapped:
    """As accelerate wraps an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def two_weights():
    named = {"policy.w": nn.Parameter(torch.tensor([1.0, 2.0])), "head.w": nn.Parameter(torch.tensor(3.0))}
    groups = [{"params": [p], "lr": 0.1, "name": name.split(".")[0]} for name, p in named.items()]
    return named, torch.optim.AdamW(groups, betas=(0.5, 0.5), weight_decay=0.0)


def step(named, optimizer, policy, head):
    named["policy.w"].grad = torch.tensor(policy)
    named["head.w"].grad = None if head is None else torch.tensor(head)
    optimizer.step()


def test_moments_by_name_are_the_optimizers_own():
    """After one gradient g: first moment 0.5 g, second 0.5 g²."""
    named, optimizer = two_weights()
    whole = Partition(named, Wrapped(optimizer))
    assert whole.optimizer_state("policy.w") == {}
    step(named, optimizer, [2.0, -4.0], None)
    state = whole.optimizer_state("policy.w")
    assert state["exp_avg"].tolist() == [1.0, -2.0]
    assert state["exp_avg_sq"].tolist() == [2.0, 8.0]
    assert int(state["step"]) == 1
    assert whole.optimizer_state("head.w") == {}  # it had no gradient


def test_what_was_taken_out_continues_to_the_bit_where_it_is_put_back():
    named, optimizer = two_weights()
    step(named, optimizer, [2.0, -4.0], 1.0)
    saved = Partition(named, Wrapped(optimizer))
    states = {name: {k: v.clone() for k, v in saved.optimizer_state(name).items()} for name in named}
    kept = {name: saved.weight(name).clone() for name in named}
    step(named, optimizer, [1.0, 1.0], 2.0)

    others, fresh = two_weights()
    restored = Partition(others, Wrapped(fresh))
    restored.set_optimizer_state(states)
    for name, value in kept.items():
        restored.set_weight(name, value)
    step(others, fresh, [1.0, 1.0], 2.0)
    assert all(torch.equal(others[name], named[name]) for name in named)


def test_norms_by_group():
    """|(3, 4)| = 5 and |-2| = 2."""
    named, optimizer = two_weights()
    whole = Partition(named, Wrapped(optimizer))
    named["policy.w"].grad, named["head.w"].grad = torch.tensor([3.0, 4.0]), torch.tensor(-2.0)
    assert whole.gradient_norms() == {"policy": pytest.approx(5.0), "head": pytest.approx(2.0)}


class SplitParameter:
    """A weight of five elements of which ZeRO-3 has left three here, on one of two ranks."""

    def __init__(self, rank):
        padded = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.0])
        self.ds_tensor, self.ds_numel, self.ds_shape = padded[3 * rank : 3 * rank + 3], 5, (5,)


@pytest.mark.parametrize(("rank", "part"), [(0, [1.0, 2.0, 3.0]), (1, [4.0, 5.0, 0.0])])
def test_a_whole_tensor_is_cut_into_equal_padded_parts(monkeypatch, rank, part):
    monkeypatch.setattr(partition.torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(partition.torch.distributed, "get_rank", lambda: rank)
    whole = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert split(SplitParameter(rank), whole).tolist() == part


def test_the_parts_make_the_whole_again_without_the_padding(monkeypatch):
    parts = [SplitParameter(rank).ds_tensor for rank in (0, 1)]
    monkeypatch.setattr(partition.torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        partition.torch.distributed, "all_gather_single", lambda flat, part: flat.copy_(torch.cat(parts))
    )
    assert join(SplitParameter(0), parts[0]).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
