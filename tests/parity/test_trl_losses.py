"""The preference losses against the installed TRL's own code: a completion of one token whose log p is -½ the error."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from prx_post.objectives.dpo import diffusion_dpo_loss, diffusion_kto_loss

PAIRS = 16
BETA = 7.0


class Answers:
    """A language model that has been asked already: `log_p` [N] of each completion."""

    training = True

    def __init__(self, log_p):
        self.log_p = log_p

    def __call__(self, **inputs):
        column = self.log_p[:, None]
        other = torch.zeros_like(column)
        return SimpleNamespace(log_probs=column, entropy=other, mean_logits=other, is_top1=other.bool())


def tokens(count):
    """A prompt of one token, a completion of one."""
    return {
        "input_ids": torch.zeros(count, 2, dtype=torch.long),
        "attention_mask": torch.ones(count, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * count),
    }


def trainer(**settings):
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    common = {"beta": BETA, "accelerator": accelerator, "aux_loss_enabled": False, "precompute_ref_logps": True}
    common |= {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1, "args": None}
    return SimpleNamespace(model=SimpleNamespace(training=True), **common, **settings)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_pair_losses_and_metrics_are_trls(loss_type):
    torch.manual_seed(0)
    win, lose, ref_win, ref_lose = torch.rand(4, PAIRS)
    win.requires_grad_(), lose.requires_grad_()
    ours, metrics = diffusion_dpo_loss(win, lose, ref_win, ref_lose, beta=BETA, loss_type=loss_type)
    theirs_of = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        label_smoothing=0.0,
    )
    inputs = {**tokens(2 * PAIRS), "ref_chosen_logps": -0.5 * ref_win, "ref_rejected_logps": -0.5 * ref_lose}
    theirs = DPOTrainer._compute_loss(theirs_of, Answers(-0.5 * torch.cat([win, lose])), inputs, False)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, (win, lose)) for loss in (ours, theirs)]
    for own, other in zip(*gradients, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-7)
    logged = theirs_of._metrics["train"]
    assert metrics["margin"].item() == pytest.approx(logged["rewards/margins"][0], rel=1e-4)
    assert metrics["accuracy"].item() == pytest.approx(logged["rewards/accuracies"][0])


@pytest.mark.parametrize("shift", [-0.3, 0.3])
def test_kto_is_trls_with_the_batchs_own_mean_as_its_kl(shift):
    """Whether the reference point is above 0 (errors fell) or held at it."""
    torch.manual_seed(1)
    error, ref_error = torch.rand(PAIRS), torch.rand(PAIRS) + shift
    error.requires_grad_()
    desirable = torch.rand(PAIRS) < 0.4
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    ours, metrics = diffusion_kto_loss(error, ref_error, desirable, beta=BETA, **weights)
    theirs_of = trainer(loss_type="kto", calculate_KL=True, **weights)
    theirs_of._compute_kl_logps = lambda model, batch: model.log_p.detach()
    inputs = {**tokens(PAIRS), "label": desirable, "ref_logps": -0.5 * ref_error, "ref_KL_logps": -0.5 * ref_error}
    theirs = KTOTrainer._compute_loss(theirs_of, Answers(-0.5 * error), inputs, False)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    own, other = (torch.autograd.grad(loss, error)[0] for loss in (ours, theirs))
    assert torch.allclose(own, other, rtol=1e-4, atol=1e-7)
    assert metrics["reference_point"].item() == pytest.approx(BETA * theirs_of._metrics["train"]["kl"][0], abs=1e-6)
    assert (metrics["reference_point"].item() > 0) == (shift > 0)
