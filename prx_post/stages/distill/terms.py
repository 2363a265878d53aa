"""The methods of distillation, each a function of the student's step."""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from prx_post.flow import interpolate, velocity_target, x0_from_velocity
from prx_post.model.denoiser import predict_velocity
from prx_post.model.heads import DiscriminatorHeads
from prx_post.objectives import ladd
from prx_post.objectives.distillation import distribution_matching_loss, path_velocity, trajectory_loss
from prx_post.objectives.flow_matching import flow_matching_loss
from prx_post.stages.distill.objective import Losses, StudentStep, Teacher


class Trajectory:
    """One step of the student shall end where several guided steps of the teacher do."""

    def __init__(self, teacher: Teacher, num_steps: int) -> None:
        self.teacher, self.num_steps = teacher, num_steps

    def __call__(self, step: StudentStep) -> Losses:
        if not step.learns:
            return None, None, {}
        x_next = self.teacher.follow(step.x_t, step.t, step.t_next, step.prompts, self.num_steps)
        target = path_velocity(step.x_t, x_next, step.t, step.t_next)
        loss, metrics = trajectory_loss(step.velocity, target, step.weight)
        return loss, None, metrics


class Adversarial:
    """LADD (Sauer et al. 2024): heads on the teacher's tokens tell the student's samples from the teacher's.

    One pass of the teacher over the fakes serves both losses: the heads see its tokens detached, the student sees the
    heads' weights detached. So there is one backward pass, and neither loss leaks into the other's weights.

    Args:
        mismatch_fraction: of the fakes are real latents under another prompt.
        r1_weight, r1_noise: of the approximate R1 penalty, and the standard deviation of its perturbation.
    """

    def __init__(
        self,
        teacher: Teacher,
        heads: DiscriminatorHeads,
        *,
        mismatch_fraction: float = 0.0,
        r1_weight: float = 0.0,
        r1_noise: float = 0.05,
    ) -> None:
        self.teacher, self.heads, self.mismatch_fraction = teacher, heads, mismatch_fraction
        self.r1_weight, self.r1_noise = r1_weight, r1_noise

    def __call__(self, step: StudentStep) -> Losses:
        heads, blocks = self.heads, self.heads.blocks
        t, noise = step.drawn["ladd_t"], step.drawn["ladd_noise"]
        given = (t, *step.prompts, self.teacher.grid(step.x0))
        fake = self.teacher.tokens(blocks, interpolate(step.sample, noise, t), t, step.prompts)
        with torch.no_grad():
            real = self.teacher.tokens(blocks, interpolate(step.x0, noise, t), t, step.prompts)
        real_logits, fake_logits = heads(real, *given), heads(fake.detach(), *given)
        has_neighbours = len(step.x0) > 1
        mismatched = self._mismatched_logits(step, noise, t) if self.mismatch_fraction and has_neighbours else None
        own = ladd.discriminator_loss(real_logits, fake_logits, mismatched, self.mismatch_fraction)
        metrics = {"discriminator_loss": own.detach(), **ladd.logit_metrics(real_logits, fake_logits, heads.names)}
        if mismatched is not None:
            metrics["mismatched_logit"] = mismatched.detach().float().mean()
        if self.r1_weight:
            r1 = ladd.approximate_r1(real_logits, heads(self._perturbed(step, noise, t), *given)) / self.r1_noise**2
            own, metrics["r1"] = own + self.r1_weight * r1, r1.detach()
        if not step.learns:
            return None, own, metrics
        frozen = {name: p.detach() for name, p in heads.named_parameters()} | dict(heads.named_buffers())
        loss = ladd.generator_loss(functional_call(heads, frozen, (fake, *given)), step.weight)
        return loss, own, metrics | {"generator_loss": loss.detach()}

    def _mismatched_logits(self, step: StudentStep, noise: Tensor, t: Tensor) -> Tensor:
        """Of the latents under their neighbours' prompts: good images, but not of what was asked for.

        Neighbours in the micro-batch, so that its size matters a little; a neighbour that asks for the same thing in
        other words is a wrong fake.
        """
        prompts = (step.prompts[0].roll(1, 0), step.prompts[1].roll(1, 0))
        with torch.no_grad():
            tokens = self.teacher.tokens(self.heads.blocks, interpolate(step.x0, noise, t), t, prompts)
        return self.heads(tokens, t, *prompts, self.teacher.grid(step.x0))

    @torch.no_grad()
    def _perturbed(self, step: StudentStep, noise: Tensor, t: Tensor) -> Tensor:
        x0 = step.x0 + self.r1_noise * step.drawn["r1_noise"]
        return self.teacher.tokens(self.heads.blocks, interpolate(x0, noise, t), t, step.prompts)


class DistributionMatching:
    """DMD2 (Yin et al. 2024) without its discriminator: add `ladd` for one.

    The fake-score network learns the student's distribution by flow matching; its prediction at the re-noised sample,
    less the teacher's, is what the student follows.

    Differs from DMD2: the student is given noised latents of the teacher, not its own earlier steps; noise levels are
    uniform in (0, 1); the fake score is trained at the very level and noise at which it is asked, which saves a pass.
    """

    def __init__(self, teacher: Teacher, fake: Any) -> None:
        self.teacher, self.fake = teacher, fake

    def __call__(self, step: StudentStep) -> Losses:
        t, noise = step.drawn["dmd2_t"], step.drawn["dmd2_noise"]
        sample = step.sample
        x_t = interpolate(sample.detach(), noise, t)
        fake_velocity = predict_velocity(self.fake, x_t, t, *step.prompts)
        own, metrics = flow_matching_loss(fake_velocity, velocity_target(sample.detach(), noise))
        metrics = {"fake_score_loss": metrics["velocity_mse"]}
        if not step.learns:
            return None, own, metrics
        real_x0 = x0_from_velocity(x_t, self.teacher.velocity(x_t, t, step.prompts), t)
        fake_x0 = x0_from_velocity(x_t, fake_velocity.detach().float(), t)
        loss, more = distribution_matching_loss(sample, real_x0, fake_x0, step.weight)
        return loss, own, metrics | more
