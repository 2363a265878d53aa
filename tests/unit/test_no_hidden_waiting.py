"""A training step does not wait for the device: each stage's objective runs on meta tensors, which have no values.

There `.item()`, `bool(tensor)` and shapes that depend on values raise. What remains in a step, once each:
Stepper.backward reads the gradient's norm, because a step that is not finite must not be done; and the loop agrees on
signals and failures among ranks, over gloo, which does not touch the device.
"""

import pytest
import torch

from prx_post.engine.metrics import Window
from prx_post.model.checkpoint import load
from prx_post.model.frozen import FrozenCopy
from prx_post.stages.dpo.objective import PairObjective
from prx_post.stages.grpo.config import GRPOConfig
from prx_post.stages.grpo.guard import Guard
from prx_post.stages.grpo.objective import ForwardProcess, PolicyGradient
from prx_post.stages.sft.objective import FlowMatchingObjective
from prx_post.stages.trajectories import transition_of
from tests import distilling


def on_meta(batch):
    return {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def step(objective, batch):
    loss, metrics = objective.to("meta")(on_meta(batch))
    loss.backward()
    window = Window()
    window.add({"loss": loss.detach(), **metrics}, images=3)
    window.commit(1.0, {})
    assert all(value.is_meta for value in window.sums.values())
    assert all(p.grad is not None for p in objective.policy.parameters())


def test_a_meta_tensor_has_no_value_to_wait_for():
    with pytest.raises(RuntimeError):
        torch.zeros((), device="meta").item()
    with pytest.raises(RuntimeError):
        bool(torch.zeros((), device="meta"))


@pytest.mark.parametrize("options", [{}, {"min_snr_gamma": 5.0, "contrastive_weight": 0.05}])
def test_sft(options):
    batch = distilling.batch()
    batch |= {"t": batch["ladd_t"]}
    step(FlowMatchingObjective(load("tiny").transformer.train(), 1e-4, **options), batch)


@pytest.mark.parametrize("has_reference", [True, False])
def test_dpo(has_reference):
    batch = distilling.batch()
    batch |= {"t": batch["ladd_t"], "rejected": batch["latents"]}
    reference = FrozenCopy(load("tiny").transformer.to("meta")) if has_reference else None
    options = {"beta": 500.0, "label_smoothing": 0.1, "sft_weight": 0.1}
    step(PairObjective(load("tiny").transformer.train(), 1e-4, reference, **options), batch)


@pytest.mark.parametrize("method", ["trajectory", "ladd", "dmd2"])
def test_distillation(method):
    options = {"mismatch_fraction": 0.3, "r1_weight": 1.0} if method == "ladd" else {}
    objective = distilling.objective(method=[method], velocity_weight=0.1, **options)
    objective.teacher.transformer.to("meta")
    step(objective, distilling.batch())


GRPO = {
    **{"output_dir": "runs/x", "reward_funcs": ["ocr"], "guard": "off", "num_inference_steps": 4, "beta": 0.1},
    **{"num_generations": 3},
}


@pytest.mark.parametrize("changes", [{}, {"normalise_ratio": True}, {"max_divergence": 1e-6}])
def test_policy_gradients(changes):
    batch, count = distilling.batch(), 3
    batch |= dict.fromkeys(("x_t", "x_next", "mean"), batch["latents"])
    batch |= {name: torch.rand(count) for name in ("log_prob", "advantages", "weight", "kl_weight")}
    batch |= {"sigma": torch.full((count,), 0.8), "sigma_next": torch.full((count,), 0.5)}
    config = GRPOConfig(method="grpo", **GRPO, **changes)
    reference = FrozenCopy(load("tiny").transformer.to("meta"))
    transition = transition_of("sde", 0.7, torch.tensor([1.0, 0.8, 0.5, 0.0]))
    network = load("tiny").transformer.train()
    step(PolicyGradient(network, config, Guard(), transition=transition, reference=reference), batch)


@pytest.mark.parametrize("method", ["dgpo", "nft", "awm"])
def test_methods_on_the_forward_process(method):
    batch = distilling.batch()
    batch |= {"t": batch["ladd_t"], "advantages": torch.rand(3), "weight": torch.ones(3)}
    config = GRPOConfig(method=method, **GRPO)
    reference, old = (FrozenCopy(load("tiny").transformer.to("meta")) for _ in range(2))
    network = load("tiny").transformer.train()
    step(ForwardProcess(network, config, Guard(), reference=reference, old=old), batch)
