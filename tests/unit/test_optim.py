import copy

import pytest
import torch
from torch import nn

from prx_post.engine.optim import MuonWithAdamW, build_optimizer, learning_rate_factor
from prx_post.engine.protocols import POLICY, ParamGroup
from prx_post.stages.sft.config import SFTConfig


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.final_layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.final_layer(self.blocks[0](x).tanh())


def step(network, optimizer):
    x = torch.arange(12.0).view(3, 4) / 10
    network(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def config(**kwargs):
    return SFTConfig(output_dir="unused", learning_rate=0.01, **kwargs)


def groups(network):
    return [ParamGroup(POLICY, network, 0.01)]


def test_muon_takes_the_blocks_matrices_exactly_as_torchs_own_and_adamw_the_rest():
    ours, theirs = Network(), Network()
    optimizer = build_optimizer(groups(ours), config(optim="muon", weight_decay=0.1))
    assert isinstance(optimizer, MuonWithAdamW)
    muon = torch.optim.Muon([theirs.blocks[0].weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [theirs.blocks[0].bias, *theirs.final_layer.parameters()]
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, betas=(0.9, 0.999))
    for _ in range(3):
        step(ours, optimizer)
        x = torch.arange(12.0).view(3, 4) / 10
        theirs(x).square().mean().backward()
        for other in (muon, adamw):
            other.step()
            other.zero_grad()
    assert torch.equal(ours.blocks[0].weight, theirs.blocks[0].weight)
    # fused against plain AdamW: the same update, other rounding
    assert torch.allclose(ours.final_layer.weight, theirs.final_layer.weight, atol=1e-7)


def test_the_groups_of_the_two_optimizers_behind_one_face_are_their_own():
    optimizer = build_optimizer(groups(Network()), config(optim="muon"))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    assert [g["lr"] for g in optimizer.muon.param_groups] == [0.5]
    assert [g["lr"] for g in optimizer.adamw.param_groups] == [0.5]


def test_the_learning_rate_is_a_function_of_the_step():
    factor = learning_rate_factor(config(lr_scheduler_type="linear", warmup_steps=2), 6)
    assert [factor(step) for step in range(7)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_optimizer_state_round_trip_continues_identically():
    first, second = Network(), Network()
    optimizers = [build_optimizer(groups(n), config(optim="muon")) for n in (first, second)]
    step(first, optimizers[0])
    second.load_state_dict(first.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    step(first, optimizers[0])
    step(second, optimizers[1])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_frozen_parameters_are_left_out():
    network = Network()
    network.blocks.requires_grad_(False)
    optimizer = build_optimizer(groups(network), config())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 2


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_each_weight_gets_the_learning_rate_of_its_group(optim):
    network = Network()
    others = [
        ParamGroup(POLICY, nn.ModuleDict({"blocks": network.blocks}), 0.01),
        ParamGroup("last", network.final_layer, 0.5),
    ]
    optimizer = build_optimizer(others, config(optim=optim))
    rates = {id(p): (g["lr"], g["name"]) for g in optimizer.param_groups for p in g["params"]}
    assert {rates[id(p)] for p in network.final_layer.parameters()} == {(0.5, "last")}
    assert {rates[id(p)] for p in network.blocks.parameters()} == {(0.01, POLICY)}
    before = network.final_layer.bias.detach().clone()
    step(network, optimizer)
    # AdamW's first step moves a weight by its learning rate
    assert (network.final_layer.bias - before).abs().max().item() == pytest.approx(0.5, rel=1e-3)
