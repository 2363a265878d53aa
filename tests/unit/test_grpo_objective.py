"""What an update of `prx-post grpo` makes of a batch: what holds the policy, what teaches nothing, what follows
when."""

import pytest
import torch

from prx_post.base.errors import ConfigError
from prx_post.model.checkpoint import load
from prx_post.model.frozen import FrozenCopy
from prx_post.stages.grpo.advantages import compute_advantages
from prx_post.stages.grpo.config import GRPOConfig
from prx_post.stages.grpo.guard import Guard
from prx_post.stages.grpo.objective import ForwardProcess
from tests import distilling


def config_of(**changes):
    given = {
        **{"output_dir": "runs/x", "method": "dgpo", "reward_funcs": ["ocr"], "guard": "off", "epsilon": None},
        **{"num_generations": 3, "prompts_per_rollout": 4, "num_inference_steps": 4},
    }
    return GRPOConfig(**{**given, **changes})


def batch_of(weight=1.0):
    batch = distilling.batch()
    null = {"null_embeds": batch["prompt_embeds"].flip(0), "null_mask": batch["prompt_mask"].flip(0)}
    of_images = {"advantages": torch.tensor([1.0, 0.5, -1.5]), "weight": torch.full((3,), weight)}
    return {**batch, **null, **of_images, "t": batch["ladd_t"]}


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    other = load("tiny").transformer
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return load("tiny").transformer, other


def test_the_policy_is_held_to_the_guided_reference(networks):
    policy, other = networks
    batch = batch_of()
    t, level = batch["t"], batch["t"].view(-1, 1, 1, 1)
    x_t = (1 - level) * batch["latents"] + level * batch["noise"]
    configs = [config_of(beta=beta, ref_guidance_scale=3.0) for beta in (1e-9, 0.5)]
    losses = [ForwardProcess(policy, config, Guard(), reference=FrozenCopy(other))(batch) for config in configs]
    with torch.no_grad():
        cond, uncond = (
            other(x_t, t, batch[f"{name}_embeds"], batch[f"{name}_mask"], return_dict=False)[0]
            for name in ("prompt", "null")
        )
        own = policy(x_t, t, batch["prompt_embeds"], batch["prompt_mask"], return_dict=False)[0]
    distance = (own - (uncond + 3.0 * (cond - uncond))).square().mean()
    assert losses[1][1]["divergence"].item() == pytest.approx(distance.item(), rel=1e-4)
    assert (losses[1][0] - losses[0][0]).item() == pytest.approx(0.5 * distance.item(), rel=1e-3)


def test_groups_that_teach_nothing_have_no_gradient(networks):
    policy, other = networks
    loss, _ = ForwardProcess(policy, config_of(beta=0.1), Guard(), reference=FrozenCopy(other))(batch_of(weight=0.0))
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())
    policy.zero_grad()


def test_suspicious_images_are_held_by_the_guards_own_weight(networks):
    policy, other = networks
    config = config_of(
        **{"guard": "regularize", "guard_rewards": ["ocr_exact"], "guard_beta": 2.0, "eval_steps": 5},
        **{"eval_rewards": ["judge_exact"], "metric_for_best_model": "judge_exact"},
    )
    objective = ForwardProcess(policy, config, Guard(), reference=FrozenCopy(other))
    free, _ = objective(batch_of())
    held, metrics = objective({**batch_of(), "kl_weight": torch.ones(3)})
    assert (held - free).item() == pytest.approx(2.0 * metrics["divergence"].item(), rel=1e-4)


class Follower:
    def __init__(self):
        self.decays = []

    def follow(self, weights, decay):
        self.decays.append(decay)


def test_the_lagged_policy_follows_after_each_rollout_and_the_reference_when_it_is_due():
    config = config_of(
        **{"method": "nft", "epsilon": 1e-3, "steps_per_generation": 2, "beta": 0.1},
        **{"sync_ref_model": True, "ref_model_sync_steps": 3},
    )
    old, reference = Follower(), Follower()
    objective = ForwardProcess(torch.nn.Linear(1, 1), config, Guard(), reference=reference, old=old)
    asked = []
    for step in range(6):
        objective.after_step(step, lambda: asked.append(1) or {})
    assert old.decays == [0.0, 0.001, 0.002]  # after steps 1, 3 and 5: the first replaces it
    assert reference.decays == [0.0, 0.0]  # after steps 2 and 5
    assert len(asked) == 4  # the weights are gathered only where something follows, once


def test_weights_leave_out_groups_without_variance_step_by_step():
    combined = torch.tensor([[0.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
    config = config_of(num_generations=2, steps_per_generation=2)
    targets = compute_advantages(config, Guard(), combined, {"ocr": combined}, {"ocr": 1.0}, None)
    assert targets["weight"].tolist() == [[2, 2], [0, 0], [0, 0], [0, 0]]
    assert not targets["advantages"][1:].any()
    assert "kl_weight" not in targets


def test_regularizing_marks_what_only_the_optimised_reward_likes_and_divides_by_no_deviation():
    optimised = torch.tensor([[0.0, 10.0], [1.0, 2.0]])
    others = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    config = config_of(
        **{
            "num_generations": 2,
            "guard": "regularize",
            "guard_fraction": 0.25,
            "guard_rewards": ["jpeg_compressibility"],
        },
        **{"eval_steps": 5, "eval_rewards": ["judge_exact"], "metric_for_best_model": "judge_exact"},
    )
    guard = Guard(regularizes=True)
    targets = compute_advantages(config, guard, optimised, {"ocr": optimised, "light": others}, {"ocr": 1.0}, None)
    assert targets["kl_weight"].tolist() == [[0, 1], [0, 0]]
    assert targets["advantages"].tolist() == [[-5, 5], [-0.5, 0.5]]  # clipped at 5


@pytest.mark.parametrize(
    ("changes", "is_adapter", "ok"),
    [
        ({"epsilon": 1e-2}, True, False),  # an adapter is exchanged for the lagged one
        ({"epsilon": 1e-2}, False, True),
        ({}, True, True),  # no lagged policy; the reference is the policy without its adapter
        ({"beta": 0.1, "sync_ref_model": True}, True, False),
    ],
)
def test_an_earlier_adapter_needs_whole_weights(changes, is_adapter, ok):
    config = config_of(**changes)
    config.is_adapter = is_adapter
    config.check_zero(2, False)
    if ok:
        config.check_zero(3, False)
        return
    with pytest.raises(ConfigError, match="zero1 or zero2 with use_peft"):
        config.check_zero(3, False)
