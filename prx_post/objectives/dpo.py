"""Preference losses on flow-matching errors: Diffusion-DPO (Wallace et al. 2023) and its kin.

An image's error, mean |v_θ(x_t, t) - (noise - x0)|², takes the place of -2 log p: what the policy has gained over the
reference is -½ (error - ref_error), and β times that is the implicit reward.

Shapes: every error [B], means over C, H, W of squared velocity errors, B pairs (kto: B images). Means, so that β does
not depend on the resolution: β of sum-reduced errors is 1/(C·H·W) of it. Differs from Wallace et al., eq. 14: β is
constant over t, without T·ω(λ_t), because a weight by t over-optimises high noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Metrics = dict[str, Tensor]
Beta = float | Tensor
"""One for all, or each pair's, [B]."""


def _sigmoid(gain: Tensor, beta: Beta) -> Tensor:
    """-log σ(β gain): DPO (Rafailov et al. 2023, eq. 7)."""
    return -logsigmoid(beta * gain)


def _hinge(gain: Tensor, beta: Beta) -> Tensor:
    """max(0, 1 - β gain): SLiC (Zhao et al. 2023) on DPO's margin."""
    return torch.relu(1 - beta * gain)


def _ipo(gain: Tensor, beta: Beta) -> Tensor:
    """(gain - 1/(2β))²: IPO (Azar et al. 2023, eq. 17), whose margin is bounded."""
    return (gain - 1 / (2 * beta)).square()


PAIR_LOSSES = {"sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo}
"""(gain of the chosen over the rejected image [B], β) -> losses [B]."""


def diffusion_dpo_loss(
    win_error: Tensor,
    lose_error: Tensor,
    ref_win_error: Tensor,
    ref_lose_error: Tensor,
    *,
    beta: Beta,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    lose_weight: float = 1.0,
    sft_weight: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Wallace et al. 2023, eq. 14: the loss of each pair, then the mean over pairs.

    Args:
        win_error, lose_error: the policy's on the chosen and the rejected image, at the pair's one t and noise. [B].
        ref_win_error, ref_lose_error: the reference's there; no gradient flows into them. [B]; zeros: reference-free.
        beta: how dearly leaving the reference is paid, per mean error; one number, or one a pair [B].
        loss_type: of PAIR_LOSSES.
        label_smoothing: probability that a label is wrong (conservative DPO, Mitchell 2023); for `sigmoid` alone.
        lose_weight: of the rejected image's change; below 1, less is gained by spoiling it.
        sft_weight: of the chosen image's own flow-matching error, added to the loss.

    Returns:
        loss (fp32 scalar); metrics of `pair_metrics`.

    Raises:
        ValueError: label_smoothing with another loss than sigmoid.
    """
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing is for loss_type sigmoid, not {loss_type}")
    win_change = win_error.float() - ref_win_error.detach().float()
    lose_change = lose_error.float() - ref_lose_error.detach().float()
    gain = -0.5 * (win_change - lose_weight * lose_change)
    losses = PAIR_LOSSES[loss_type](gain, beta)
    if label_smoothing:
        losses = torch.lerp(losses, _sigmoid(-gain, beta), label_smoothing)
    loss = losses.mean()
    if sft_weight:
        loss = loss + sft_weight * win_error.float().mean()
    return loss, pair_metrics(win_change, lose_change, beta)


@torch.no_grad()
def pair_metrics(win_change: Tensor, lose_change: Tensor, beta: Beta) -> Metrics:
    """Means over pairs; `*_change` [B], policy's error less the reference's.

    `win_change`, `lose_change`: below 0, the policy has become better at denoising such images.
    `accuracy`: fraction of pairs in which it gained more on the chosen image; a tie counts half.
    `margin`: difference of implicit rewards, β/2 (lose_change - win_change).
    `both_rise`: fraction of pairs in which both errors rose; the known failure, the margin grows as both images decay.
    """
    difference = lose_change - win_change
    return {
        "win_change": win_change.mean(),
        "lose_change": lose_change.mean(),
        "accuracy": ((difference > 0).float() + 0.5 * (difference == 0).float()).mean(),
        "margin": (0.5 * beta * difference).mean(),
        "both_rise": ((win_change > 0) & (lose_change > 0)).float().mean(),
    }


def diffusion_kto_loss(
    error: Tensor,
    ref_error: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    average: Callable[[Tensor], Tensor] = lambda mean: mean,
) -> tuple[Tensor, Metrics]:
    """KTO on images that are labelled good or bad, unpaired (Ethayarajh et al. 2024, eq. 7; Li et al. 2024 for images).

    Differs from Ethayarajh et al.: the reference point is the mean implicit reward of these B images, of all processes,
    not below 0, because noised images have no mismatched completions from which a KL could be estimated. It takes no
    gradient. So the loss depends on B: of a single image it is the image's own reward.

    Args:
        error, ref_error: the policy's and the reference's. [B].
        desirable: whether the image is a good one. [B] bool.
        average: of a scalar over all processes, so that they have one reference point.

    Returns:
        loss (fp32 scalar), 1 - the mean utility at weights of 1; metrics, means over the batch: `accuracy`, images on
        their label's side of the reference point, a tie counts half; `margin`, how far; `reference_point`.
    """
    reward = -0.5 * beta * (error.float() - ref_error.detach().float())
    reference_point = average(reward.detach().mean()).clamp_min(0)
    gain = torch.where(desirable, reward - reference_point, reference_point - reward)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    with torch.no_grad():
        metrics = {
            "accuracy": ((gain > 0).float() + 0.5 * (gain == 0).float()).mean(),
            "margin": gain.mean(),
            "reference_point": reference_point,
        }
    return (weight * (1 - torch.sigmoid(gain))).mean(), metrics
