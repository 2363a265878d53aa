"""The two families: policy gradients through the sampler's steps, and methods on images that are noised anew."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prx_post.engine.protocols import POLICY, Batch, Objective, ParamGroup, Prompts
from prx_post.flow import interpolate, velocity_target, x0_from_velocity
from prx_post.model.denoiser import PromptedVelocity, predict_velocity, with_guidance
from prx_post.objectives.forward_rl import awm_loss, dgpo_loss, flattened, nft_loss, optimality
from prx_post.objectives.grpo import clipped_policy_loss, gaussian_kl, masked_policy_loss, normalised_log_ratio
from prx_post.sampling import SDEStep
from prx_post.stages.grpo.config import GRPOConfig
from prx_post.stages.grpo.guard import Guard
from prx_post.stages.reward_gradient import LatentReward

Metrics = dict[str, Tensor]


def batch_velocity(velocity: PromptedVelocity, x_t: Tensor, t: Tensor, batch: Batch, guidance_scale: float) -> Tensor:
    """Of a batch's prompts; with guidance, by its `null_embeds` and `null_mask`."""
    prompts = (batch["prompt_embeds"], batch["prompt_mask"])
    null = (batch["null_embeds"], batch["null_mask"]) if guidance_scale > 1 else None
    return with_guidance(velocity, prompts, null, guidance_scale)(x_t, t)


class OnlineObjective(Objective):
    """A policy, what it was, and what holds it.

    Args:
        transition: the random step of the sampler of rollouts; None: it is the ODE's.
        reference: what the divergence is measured from; None: it is not.
        old: the lagged policy, which follows after every rollout; None: there is none.
        average: of a scalar over all processes.
        reward: of clean latents, as a loss, for the gradient through the last step; None: it is not taken.
    """

    def __init__(
        self,
        policy: Any,
        config: GRPOConfig,
        guard: Guard,
        *,
        transition: Callable[..., SDEStep] | None = None,
        reference: Any = None,
        old: Any = None,
        average: Callable[[Tensor], Tensor] | None = None,
        reward: LatentReward | None = None,
    ) -> None:
        super().__init__()
        self.reward = reward
        self.policy, self.config, self.guard = policy, config, guard
        self.transition: Any = transition
        self.reference, self.old, self.average = reference, old, average
        self._divergence: Tensor | None = None

    @property
    def learning_rate_factor(self) -> float:
        return self.guard.learning_rate_factor

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(POLICY, self.policy, self.config.learning_rate)]

    def velocity(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """The velocity of the policy in training."""
        return predict_velocity(self.policy, x_t, t, *prompts)

    def reference_velocity(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The velocity of the reference, with its guidance."""
        return batch_velocity(self.reference.velocity, x_t, t, batch, self.config.reference_guidance)

    @property
    def rollout_velocity(self) -> PromptedVelocity:
        """What rollouts are generated with: nft's are the lagged policy's."""
        return self.old.velocity if self.config.method == "nft" else self.velocity

    def kept(self) -> dict[str, Tensor]:
        kept = {} if self.old is None else self.old.kept("old")
        return kept | (self.reference.kept("reference") if self._reference_follows else {})

    @property
    def _reference_follows(self) -> bool:
        return self.reference is not None and hasattr(self.reference, "follow")

    def after_step(self, step: int, weights: Callable[[], dict[str, Tensor]]) -> None:
        config = self.config
        rollout, within = divmod(step, config.steps_per_rollout)
        ends = within == config.steps_per_rollout - 1
        syncs = self._reference_follows and self._is_due_to_sync(step, rollout, ends)
        self._divergence = None
        if syncs or (ends and self.old is not None):
            now = weights()
            if syncs:
                self.reference.follow(now, 0.0)
            if ends and self.old is not None:
                self.old.follow(now, config.decay_of(rollout))

    def _is_due_to_sync(self, step: int, rollout: int, ends: bool) -> bool:
        config = self.config
        if config.sync_ref_model and (step + 1) % config.ref_model_sync_steps == 0:
            return True
        if not (self.guard.regularizes and ends):
            return False
        return self._is_far() or (rollout + 1) % config.guard_sync_rollouts == 0

    def _is_far(self) -> bool:
        """Whether the divergence of the step's last micro-batch, on all processes, is beyond the guard's limit."""
        limit, divergence = self.config.guard_max_divergence, self._divergence
        if limit is None or divergence is None:
            return False
        return float(divergence if self.average is None else self.average(divergence)) > limit

    def _has_penalty(self, batch: Batch) -> bool:
        return self.reference is not None and (self.config.beta > 0 or "kl_weight" in batch)

    def _penalty(self, divergence: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """The penalty for a divergence [B]: of all images that teach, and of suspicious ones."""
        strength = self.config.beta * batch["weight"]
        metrics = {"divergence": divergence.detach().mean()}
        if "kl_weight" in batch:
            strength = strength + self.config.guard_beta * batch["kl_weight"]
            metrics["suspicious"] = batch["kl_weight"].mean()
        self._divergence = metrics["divergence"]
        return (strength * divergence).mean(), metrics


class PolicyGradient(OnlineObjective):
    """Flow-GRPO and its kin: the random steps of the rollout, asked for their probability again."""

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """`batch`: x_t, x_next [B, C, H, W], sigma, sigma_next, log_prob, advantages, weight [B], prompts; mean
        [B, C, H, W] where the ratio is normalised or masked. Or x_last, for the last step, sigma, and the prompts as
        text, too.
        """
        if "x_last" in batch:
            return self._last_step(batch)
        guidance = self.config.rollout_guidance_scale
        levels = (batch["sigma"], batch["sigma_next"])
        reference = None
        if self._has_penalty(batch):  # first, for it may be the policy's own network with other weights
            reference = self.reference_velocity(batch["x_t"], levels[0], batch)
        velocity = batch_velocity(self.velocity, batch["x_t"], levels[0], batch, guidance)
        step = self.transition(batch["x_t"], velocity, *levels, x_next=batch["x_next"])
        loss, metrics = self._loss(step, batch)
        if reference is not None:
            mean = self.transition(batch["x_t"], reference, *levels, x_next=batch["x_next"]).mean
            penalty, of_penalty = self._penalty(gaussian_kl(step.mean, mean, step.std), batch)
            loss, metrics = loss + penalty, metrics | of_penalty
        return loss, metrics

    def _last_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The rewards' own gradient, for the one step that is not random."""
        assert self.reward is not None
        x_t, sigma, guidance = batch["x_last"], batch["sigma"], self.config.rollout_guidance_scale
        velocity = batch_velocity(self.velocity, x_t, sigma, batch, guidance)
        loss, metrics = self.reward(x0_from_velocity(x_t, velocity.float(), sigma), batch["prompts"])
        weight = self.config.last_step_reward_weight
        return weight * loss, {f"last_step/{name}": value for name, value in metrics.items()}

    def _loss(self, step: SDEStep, batch: Batch) -> tuple[Tensor, Metrics]:
        config, weight = self.config, batch["weight"]
        ratio = (step.log_prob, batch["log_prob"], batch["advantages"])
        if config.max_divergence is not None:
            divergence = gaussian_kl(step.mean, batch["mean"], step.std)
            return masked_policy_loss(
                *ratio, divergence=divergence, max_divergence=config.max_divergence, weight=weight
            )
        if config.normalise_ratio:
            log_ratio = normalised_log_ratio(*ratio[:2], step.mean, batch["mean"], step.std)
            weight = weight / (batch["sigma"] - batch["sigma_next"])
            ratio = (log_ratio, torch.zeros_like(log_ratio), batch["advantages"])
        return clipped_policy_loss(*ratio, epsilon=config.clip, weight=weight)


class ForwardProcess(OnlineObjective):
    """DiffusionNFT, DGPO and AWM: images of the policy's own at fresh timesteps and noises."""

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """`batch`: latents, noise [B, C, H, W], t, advantages, weight [B], prompts; for dgpo whole groups."""
        prompts = (batch["prompt_embeds"], batch["prompt_mask"])
        x0, noise, t = batch["latents"].float(), batch["noise"], batch["t"]
        x_t = interpolate(x0, noise, t)
        needs_reference = self.config.method == "dgpo" or self._has_penalty(batch)
        reference = self.reference_velocity(x_t, t, batch) if needs_reference else None
        old = None if self.old is None else self.old.velocity(x_t, t, prompts)
        velocity = self.velocity(x_t, t, prompts).float()
        seen = {"velocity": velocity, "old": old, "x_t": x_t, "x0": x0, "t": t, "target": velocity_target(x0, noise)}
        loss, metrics = LOSSES[self.config.method](self.config, {**seen, "reference": reference}, batch)
        if self._has_penalty(batch) and reference is not None:
            penalty, of_penalty = self._penalty(_error(velocity, reference), batch)
            loss, metrics = loss + penalty, metrics | of_penalty
        return loss, metrics


def _error(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean over C, H, W of the squared difference, [B]."""
    return (velocity - target).square().flatten(1).mean(1)


def _nft(config: GRPOConfig, seen: Batch, batch: Batch) -> tuple[Tensor, Metrics]:
    probability = optimality(batch["advantages"], config.advantage_clip)
    states = (seen["velocity"], seen["old"], seen["x_t"], seen["x0"], seen["t"])
    return nft_loss(*states, probability, beta=config.nft_beta, weight=batch["weight"])


def _dgpo(config: GRPOConfig, seen: Batch, batch: Batch) -> tuple[Tensor, Metrics]:
    def of_groups(value: Tensor) -> Tensor:
        return value.view(-1, config.num_generations)

    error, reference = (of_groups(_error(seen[name], seen["target"])) for name in ("velocity", "reference"))
    return dgpo_loss(
        error,
        reference,
        of_groups(batch["advantages"]),
        beta=config.dgpo_beta,
        old_error_PG=None if seen["old"] is None else of_groups(_error(seen["old"], seen["target"])),
        epsilon=config.clip,
        weight_P=of_groups(batch["weight"])[:, 0],
    )


def _awm(config: GRPOConfig, seen: Batch, batch: Batch) -> tuple[Tensor, Metrics]:
    power = config.awm_power
    error, old = (_error(seen[name], seen["target"]) for name in ("velocity", "old"))
    return awm_loss(
        error,
        old,
        batch["advantages"],
        epsilon=config.clip,
        transform=(lambda e: e) if power is None else (lambda e: flattened(e, seen["t"], power)),
        weight=batch["weight"],
    )


LOSSES = {"nft": _nft, "dgpo": _dgpo, "awm": _awm}
