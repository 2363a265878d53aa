"""LADD: latent adversarial diffusion distillation (Sauer et al. 2024), its losses on logits.

Shapes: logits [K, B, N], of K heads (a teacher block each), B samples, N image tokens.
"""

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean D(fake): what the student lowers (Sauer et al. 2024, section 3.1). fp32 scalar."""
    return -fake_logits.float().mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss (Lim & Ye 2017): mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)). fp32 scalar; 2 at chance."""
    return torch.relu(1 - real_logits.float()).mean() + torch.relu(1 + fake_logits.float()).mean()


def approximate_r1(real_logits: Tensor, perturbed_logits: Tensor) -> Tensor:
    """Mean squared change of D under a little noise on real samples; a penalty on its slope without double backward.

    (Lin et al. 2025, Seaweed-APT, eq. 3.) Divide by the noise's variance to have the squared slope itself.
    """
    return (perturbed_logits.float() - real_logits.float()).square().mean()


@torch.no_grad()
def logit_metrics(real_logits: Tensor, fake_logits: Tensor, names: list[str]) -> Metrics:
    """Mean logits, and the accuracy (share of tokens on their own side of 0), overall and of each head.

    Args:
        names: of the K heads.
    """
    real, fake = real_logits.float(), fake_logits.float()
    accuracy_k = 0.5 * ((real > 0).float().flatten(1).mean(1) + (fake < 0).float().flatten(1).mean(1))
    metrics = {"real_logit": real.mean(), "fake_logit": fake.mean(), "discriminator_accuracy": accuracy_k.mean()}
    for k, name in enumerate(names):
        metrics[f"real_logit/{name}"], metrics[f"fake_logit/{name}"] = real[k].mean(), fake[k].mean()
        metrics[f"discriminator_accuracy/{name}"] = accuracy_k[k]
    return metrics
