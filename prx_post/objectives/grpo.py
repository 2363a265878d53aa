"""Policy gradients through the sampler's steps, Flow-GRPO (Liu et al. 2025) and its kin; and advantages of groups,
which every online method needs.

Shapes: P prompts × G images of each (a group); B rows, a row being one step of one image. Log-probabilities are means
over C, H, W, so that ε does not depend on the resolution.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
SCALES = ("batch", "group", "none")


def group_advantages(rewards_PG: Tensor, *, scale: str = "batch", eps: float = 1e-4, clip: float = 5.0) -> Tensor:
    """Group-relative advantages (GRPO, Shao et al. 2024, section 4.1.2): (reward - group's mean) / (std + eps).

    Args:
        rewards_PG: [P, G].
        scale: whose standard deviation (of N - 1): of all rewards (`batch`), of each group (`group`), or 1 (`none`, as
            Dr. GRPO, Liu et al. 2025). TRL's scale_rewards.
        clip: advantages are clipped to ± this.

    Returns:
        advantages_PG [P, G] fp32; 0 in a group whose rewards are all the same.

    Raises:
        ValueError: another scale, or groups of one image.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, but must be one of {', '.join(SCALES)}")
    if rewards_PG.shape[1] < 2:
        raise ValueError("a group must have two images or more, for they are compared with each other")
    rewards_PG = rewards_PG.float()
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    # exactly 0, where rounding of the mean would leave a little
    centred_PG = torch.where(varies(rewards_PG)[:, None], centred_PG, torch.zeros_like(centred_PG))
    if scale == "none":
        return centred_PG.clamp(-clip, clip)
    std = rewards_PG.std() if scale == "batch" else rewards_PG.std(1, keepdim=True)
    return (centred_PG / (std + eps)).clamp(-clip, clip)


def varies(rewards_PG: Tensor) -> Tensor:
    """Whether a group's rewards differ, so that it teaches something. [P] bool."""
    return rewards_PG.amax(1) > rewards_PG.amin(1)


def combined_rewards(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Several rewards as one: each normalised within its group, then weighted and added (GDPO, Liu et al. 2026).

    In a sum of raw scores the reward of the largest spread would rule. A single reward is only weighted.

    Args:
        rewards: by name, [P, G] each; weights: by the same names.

    Returns:
        [P, G] fp32, for `group_advantages`, which normalises once more.
    """
    if len(rewards) == 1:
        ((name, only_PG),) = rewards.items()
        return weights[name] * only_PG.float()
    parts = [weights[name] * group_advantages(each_PG, scale="group") for name, each_PG in rewards.items()]
    return torch.stack(parts).sum(0)


def pairwise_win_rates(first_wins_PGG: Tensor) -> Tensor:
    """Each image's mean probability of beating another of its group: Pref-GRPO's reward (Wang et al. 2025).

    Args:
        first_wins_PGG: [P, G, G]; [p, i, j] is the probability that image i of group p beats image j, both orders of
            showing them averaged. The diagonal plays no part.

    Returns:
        rewards_PG [P, G] fp32; a group's mean is ½, as [p, i, j] + [p, j, i] is 1.
    """
    size = first_wins_PGG.shape[1]
    others = ~torch.eye(size, dtype=torch.bool, device=first_wins_PGG.device)
    return (first_wins_PGG.float() * others).sum(2) / (size - 1)


def clipped_policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    epsilon: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7): mean max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε)).

    ρ = exp(log_prob - old_log_prob) is the ratio to the policy that sampled.

    Args:
        log_prob, old_log_prob, advantages: [B].
        epsilon: small, 1e-5 to 1e-3, for log_prob is a mean over the latent.
        weight: of each row's loss, [B]; None is 1.

    Returns:
        loss (fp32 scalar); metrics, means over rows: `ratio`; `log_ratio_abs`, |ln ρ|; `approx_kl`, ρ - 1 - ln ρ;
        `clip_fraction`, those that the clip leaves without a gradient.
    """
    log_ratio = log_prob.float() - old_log_prob.float()
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - epsilon, 1 + epsilon)
    return _weighted(torch.maximum(plain, clipped), weight), _ratio_metrics(log_ratio, clipped > plain)


def masked_policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    divergence: Tensor,
    max_divergence: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """As `clipped_policy_loss`, the trust region being set by the divergence itself, not by the ratio (DPPO).

    A row takes no gradient if its divergence exceeds the limit *and* its update leads further away from the old policy.

    Args:
        divergence: from the policy that sampled, of this step, [B]; see `gaussian_kl`.
        max_divergence: about 1e-6, for it is a mean over the latent.
    """
    log_ratio = log_prob.float() - old_log_prob.float()
    ratio = log_ratio.exp()
    leads_away = torch.where(advantages > 0, ratio > 1, ratio < 1)
    is_masked = leads_away & (divergence.detach() > max_divergence)
    losses = -advantages * torch.where(is_masked, ratio.detach(), ratio)
    return _weighted(losses, weight), _ratio_metrics(log_ratio, is_masked)


def gaussian_kl(mean: Tensor, other_mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std²) ‖ N(other_mean, std²)) = (mean - other_mean)² / 2 std², its mean over C, H, W. [B] fp32.

    Flow-GRPO's penalty (Liu et al. 2025). Differs from their code, which leaves the step's length out of std²: a
    coefficient of 0.04 there is 0.004 here for steps of 0.1.

    Args:
        mean, other_mean: [B, C, H, W]; no gradient flows into the other. std: [B], above 0.
    """
    distance = (mean.float() - other_mean.detach().float()).square().flatten(1).mean(1)
    return distance / (2 * std.square())


def normalised_log_ratio(log_prob: Tensor, old_log_prob: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's ln ρ (Wang et al. 2025): std · (ln ρ + (mean - old_mean)² / 2 std²), the square's mean over C, H, W.
    [B].

    ln ρ has the expectation -(mean - old_mean)² / 2 std² and a spread that differs between steps. Without the first,
    and with the second evened out, one ε clips both sides and all steps alike. Their loss is divided by -dt besides.
    """
    drift = (mean.float() - old_mean.float()).square().flatten(1).mean(1) / (2 * std.square())
    return std * (log_prob.float() - old_log_prob.float() + drift)


def suspicion(optimised: Tensor, others: Sequence[Tensor]) -> Tensor:
    """How much better the optimised reward ranks an image than others do (GARDO, He et al. 2025). [N], in -1..1.

    Args:
        optimised: scores of a whole rollout, [N]; others: of rewards that are not optimised, [N] each.

    Returns:
        The rank by the first, 0 the worst and 1 the best, less the mean rank by the others; equal scores share a rank.
    """
    return _ranks(optimised) - torch.stack([_ranks(scores) for scores in others]).mean(0)


def most_suspicious(suspicion: Tensor, fraction: float) -> Tensor:
    """Those above 0, at most this fraction of all, the most suspicious first. [N] bool."""
    most = int(fraction * len(suspicion))
    chosen = torch.zeros_like(suspicion, dtype=torch.bool)
    chosen[suspicion.argsort(descending=True, stable=True)[:most]] = True
    return chosen & (suspicion > 0)


def diverse_advantages(advantages_PG: Tensor, features_PGD: Tensor) -> Tensor:
    """Good images weighted by how unlike their group they are (GARDO); advantages below 0 are left alone. [P, G].

    The weight is an image's distance to the nearest other of its group, 1 - cosine of features, over the group's mean.
    """
    unit = torch.nn.functional.normalize(features_PGD.float(), dim=-1)
    cosines_PGG = unit @ unit.transpose(1, 2)
    itself = torch.eye(cosines_PGG.shape[1], dtype=torch.bool, device=cosines_PGG.device)
    nearest_PG = 1 - cosines_PGG.masked_fill(itself, -torch.inf).amax(2)
    weight_PG = nearest_PG / nearest_PG.mean(1, keepdim=True).clamp_min(1e-8)
    return torch.where(advantages_PG > 0, advantages_PG * weight_PG, advantages_PG)


def _ranks(scores: Tensor) -> Tensor:
    """0 for the lowest, 1 for the highest, the mean of their ranks for equal ones. [N] fp32."""
    scores = scores.float()
    below, equal = scores[:, None] > scores[None], scores[:, None] == scores[None]
    return (below.sum(1) + (equal.sum(1) - 1) / 2) / max(1, len(scores) - 1)


def _weighted(losses: Tensor, weight: Tensor | None) -> Tensor:
    return losses.mean() if weight is None else (weight * losses).mean()


@torch.no_grad()
def _ratio_metrics(log_ratio: Tensor, has_no_gradient: Tensor) -> Metrics:
    ratio = log_ratio.exp()
    return {
        "ratio": ratio.mean(),
        "log_ratio_abs": log_ratio.abs().mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clip_fraction": has_no_gradient.float().mean(),
    }
