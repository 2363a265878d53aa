"""The loss of an objective with a distillation beside it, and which micro-batch carries it."""

import pytest
import torch
from torch import nn

from prx_post.engine.optim import check_groups
from prx_post.engine.protocols import POLICY, Objective, OfflineSource, ParamGroup
from prx_post.stages.anchor.anchored import Anchored, AnchoredSource


class Slope(Objective):
    """loss = slope · w · x, with w the policy's weight."""

    def __init__(self, policy, slope, network=None):
        super().__init__()
        self.policy, self.slope, self.network = policy, slope, network

    def groups(self):
        more = [] if self.network is None else [ParamGroup("network", self.network, 0.5)]
        return [ParamGroup(POLICY, self.policy, 0.1), *more]

    def idle(self):
        return 0.0 * self.network.weight.sum()

    def forward(self, batch):
        loss = self.slope * self.policy.weight.sum() * batch["x"]
        if self.network is not None:
            loss = loss + self.network.weight.sum()
        return loss, {"x": batch["x"]}


def anchored(weight=0.5, accumulation=4):
    policy, network = (nn.Linear(1, 1, bias=False) for _ in range(2))
    return Anchored(Slope(policy, 1.0), Slope(policy, 10.0, network), weight, accumulation)


def test_the_mean_over_micro_batches_is_the_own_mean_and_the_weighted_distillation():
    model, x = anchored(), torch.tensor(2.0)
    losses = [model({"x": x, "anchor/x": torch.tensor(3.0)}), *[model({"x": x}) for _ in range(3)]]
    (sum(loss for loss, _ in losses) / 4).backward()
    assert model.policy.weight.grad.item() == pytest.approx(2.0 + 0.5 * 10 * 3)
    assert model.anchor.network.weight.grad.item() == pytest.approx(0.5)
    assert losses[0][1]["x"].item() == 2
    assert losses[0][1]["anchor/x"].item() == 3
    w, v = model.policy.weight.item(), model.anchor.network.weight.item()
    assert losses[0][1]["anchor/loss"].item() == pytest.approx(10 * 3 * w + v)


def test_a_micro_batch_without_it_has_a_gradient_of_nothing_for_its_networks():
    """Or processes that reduce every gradient would wait for it."""
    model = anchored()
    model({"x": torch.tensor(2.0)})[0].backward()
    assert model.anchor.network.weight.grad.item() == 0


def test_its_networks_are_groups_beside_the_policys():
    model = anchored()
    check_groups(model, model.groups())
    assert [(group.name, group.lr) for group in model.groups()] == [(POLICY, 0.1), ("network", 0.5)]


def test_what_follows_a_step_is_the_own_objectives():
    model, heard = anchored(), []
    model.own.after_step = lambda step, weights: heard.append((step, weights()))
    model.own.kept = lambda: {"old": torch.ones(1)}
    model.after_step(5, lambda: {"weight": torch.zeros(1)})
    assert [step for step, _ in heard] == [5]
    assert list(model.kept()) == ["old"]
    type(model.own).learning_rate_factor = property(lambda self: 0.3)
    try:
        assert model.learning_rate_factor == 0.3
    finally:
        del type(model.own).learning_rate_factor


class Counted(OfflineSource):
    def __init__(self, name, count):
        self.name, self.count = name, count

    def batches(self, step):
        for number in range(self.count):
            yield {self.name: (step, number)}


def test_the_first_micro_batch_of_a_step_carries_it():
    source = AnchoredSource(Counted("own", 3), Counted("held", 1))
    assert list(source.batches(7)) == [{"own": (7, 0), "anchor/held": (7, 0)}, {"own": (7, 1)}, {"own": (7, 2)}]
    assert not source.online
