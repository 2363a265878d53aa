"""Online methods on the forward process: not the sampler's steps are trained, but the policy's own images, noised anew.

Any sampler may have made them; their clean samples alone are needed. An image's flow-matching error at a fresh t and
noise, e = mean |v_θ(x_t, t) - (noise - x0)|², takes the place of -log p.

Shapes: B images; P prompts × G images of each (a group); velocities and samples [B, C, H, W]; t [B].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prx_post.objectives.grpo import clipped_policy_loss

Metrics = dict[str, Tensor]
MIN_DISTANCE = 1e-5
"""Of nft_loss's divisor."""


def optimality(advantages: Tensor, clip: float = 5.0) -> Tensor:
    """DiffusionNFT's probability that an image is a good one (Zheng et al. 2025): ½ + A / 2 clip, between 0 and 1.
    [B]."""
    return (0.5 + advantages / (2 * clip)).clamp(0, 1)


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    probability: Tensor,
    *,
    beta: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """DiffusionNFT (Zheng et al. 2025): flow matching by a positive and a negative policy, mirror images of each other.

    v⁺ = (1 - β) v_old + β v_θ and v⁻ = (1 + β) v_old - β v_θ. The loss is p times the error of v⁺ plus 1 - p times that
    of v⁻, over β; errors are of x̂0 = x_t - t v, squared, divided by their own mean absolute value, which takes no
    gradient.

    Args:
        old_velocity: of the policy that sampled; no gradient flows into it.
        probability: p, of `optimality`, [B].
        beta: β; at 1, v⁺ is v_θ.
        weight: of each image's loss, [B]; None is 1.

    Returns:
        loss (fp32 scalar); metrics `positive_error`, `negative_error`: mean squared errors of x̂0.
    """
    velocity, old_velocity = velocity.float(), old_velocity.detach().float()
    level = t.view(-1, 1, 1, 1)

    def error(v: Tensor) -> tuple[Tensor, Tensor]:
        difference = x_t - level * v - x0
        scale = difference.detach().abs().flatten(1).mean(1).clamp_min(MIN_DISTANCE)
        squared = difference.square().flatten(1).mean(1)
        return squared / scale, squared.detach().mean()

    positive, positive_error = error((1 - beta) * old_velocity + beta * velocity)
    negative, negative_error = error((1 + beta) * old_velocity - beta * velocity)
    losses = (probability * positive + (1 - probability) * negative) / beta
    loss = losses.mean() if weight is None else (weight * losses).mean()
    return loss, {"positive_error": positive_error, "negative_error": negative_error}


def dgpo_loss(
    error_PG: Tensor,
    ref_error_PG: Tensor,
    advantages_PG: Tensor,
    *,
    beta: float,
    old_error_PG: Tensor | None = None,
    epsilon: float = 1e-2,
    weight_P: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Direct group preference optimisation (Luo et al. 2025): a group's good images against its bad, as DPO has pairs.

    The loss is the mean of w A e. w = σ(mean of A β (e - e_ref) over the group) takes no gradient: it is how much the
    group has still to teach, ½ at the start, 0 once the policy has gained on the good images and lost on the bad.

    Args:
        error_PG, ref_error_PG: of the policy and the reference, at one t and noise for a whole group, [P, G].
        advantages_PG: [P, G].
        beta: 10 to 100 against a frozen reference; about 2000 against one that follows closely.
        old_error_PG: of the policy about which e is clipped as PPO's log-probability is, with the ratio
            exp(old_error - error); None: no clip.
        epsilon: of that clip.
        weight_P: of each group's loss, [P]; None is 1.

    Returns:
        loss (fp32 scalar); metrics `group_weight`, the mean w, and with a clip those of `clipped_policy_loss`.
    """
    error_PG = error_PG.float()
    learnt_P = (advantages_PG * (error_PG.detach() - ref_error_PG.detach().float())).mean(1)
    group_weight_P = torch.sigmoid(beta * learnt_P)
    metrics: Metrics = {"group_weight": group_weight_P.mean()}
    scale_P = group_weight_P if weight_P is None else group_weight_P * weight_P
    if old_error_PG is None:
        return (scale_P[:, None] * advantages_PG * error_PG).mean(), metrics
    loss, of_clip = clipped_policy_loss(
        -error_PG.flatten(),
        -old_error_PG.detach().float().flatten(),
        advantages_PG.flatten(),
        epsilon=epsilon,
        weight=scale_P[:, None].expand_as(error_PG).flatten(),
    )
    return loss, {**metrics, **of_clip}


def awm_loss(
    error: Tensor,
    old_error: Tensor,
    advantages: Tensor,
    *,
    epsilon: float,
    transform: Callable[[Tensor], Tensor] = lambda error: error,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Advantage weighted matching (AWM, arXiv:2509.25050): PPO's clipped surrogate with -w(e) as the log-probability.

    It diverges unless the clip is tight or a KL holds it.

    Args:
        error, old_error: of the policy and the policy that sampled, at one t and noise for an image, [B].
        transform: w, of errors [B]; such as `flattened`.

    Returns:
        loss and metrics of `clipped_policy_loss`.
    """
    log_prob, old_log_prob = -transform(error.float()), -transform(old_error.detach().float())
    return clipped_policy_loss(log_prob, old_log_prob, advantages, epsilon=epsilon, weight=weight)


def flattened(error: Tensor, t: Tensor, power: float, offset: float = 1e-4) -> Tensor:
    """t/power · ((error + offset)^power - offset^power): evens out errors whose size differs greatly over t. [B]."""
    return t / power * ((error + offset).pow(power) - offset**power)
