"""LADD: latent adversarial diffusion distillation (Sauer et al. 2024), its losses on logits.

Shapes: logits [K, B, N], of K heads (a teacher block each), B samples, N image tokens.
"""

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


def generator_loss(fake_logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """-mean D(fake): what the student lowers (Sauer et al. 2024, section 3.1). fp32 scalar.

    Args:
        weight: [B], of each sample; None: 1.
    """
    logits = fake_logits.float()
    return -(logits.mean() if weight is None else (logits * weight[:, None]).mean())


def discriminator_loss(
    real_logits: Tensor,
    fake_logits: Tensor,
    mismatched_logits: Tensor | None = None,
    mismatch_fraction: float = 0.0,
) -> Tensor:
    """Hinge loss (Lim & Ye 2017): mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)). fp32 scalar; 2 at chance.

    Args:
        mismatched_logits: of real samples under others' prompts, which count as fakes (GAN-CLS, Reed et al. 2016).
            Without them nothing makes D ask whether a good image is one of the prompt.
        mismatch_fraction: their fraction of the second term, which keeps its weight: were they added to it, calling
            everything fake would be the cheapest answer.
    """
    real, fake = torch.relu(1 - real_logits.float()).mean(), torch.relu(1 + fake_logits.float()).mean()
    if mismatched_logits is not None:
        fake = torch.lerp(fake, torch.relu(1 + mismatched_logits.float()).mean(), mismatch_fraction)
    return real + fake


def approximate_r1(real_logits: Tensor, perturbed_logits: Tensor) -> Tensor:
    """Mean squared change of D under a little noise on real samples; a penalty on its slope without double backward.

    (Lin et al. 2025, Seaweed-APT, eq. 3.) Divide by the noise's variance to have the squared slope itself.
    """
    return (perturbed_logits.float() - real_logits.float()).square().mean()


@torch.no_grad()
def logit_metrics(real_logits: Tensor, fake_logits: Tensor, names: list[str]) -> Metrics:
    """Mean logits, and the accuracy (fraction of tokens on their own side of 0), overall and of each head.

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
