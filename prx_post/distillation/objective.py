"""The student's losses: each method a term, all of them in one forward pass, for one optimizer.

Shapes: latents [B, C, H, W]; t [B]; prompt embeddings [B, L, E] with masks [B, L] bool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prx_post.distillation.config import DistillConfig
from prx_post.engine.protocols import Batch
from prx_post.flow import interpolate, sample_timesteps, velocity_target, x0_from_velocity
from prx_post.model.denoiser import guided, predict_velocity
from prx_post.model.heads import DiscriminatorHeads, block_tokens
from prx_post.model.text import pad_embeddings
from prx_post.objectives import ladd
from prx_post.objectives.distillation import distribution_matching_loss, path_velocity, trajectory_loss
from prx_post.objectives.flow_matching import flow_matching_loss

Metrics = dict[str, Tensor]
Prompts = tuple[Tensor, Tensor]
"""embeddings [B, L, E] and mask [B, L]"""


class Teacher:
    """A frozen transformer and its guidance. Not a module, so that no wrapper takes it for something to train."""

    def __init__(self, transformer: Any, null: Tensor, guidance_scale: float, patch_size: int) -> None:
        """null: embedding of the empty prompt, [L0, E]."""
        self.transformer = transformer.eval().requires_grad_(False)
        self.null, self.guidance_scale, self.patch_size = null, guidance_scale, patch_size

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """With guidance, fp32."""
        embeds, mask = prompts
        null, null_mask = pad_embeddings([self.null.to(embeds)] * len(embeds), max(embeds.shape[1], len(self.null)))
        if null.shape[1] > embeds.shape[1]:
            missing = null.shape[1] - embeds.shape[1]
            embeds, mask = nn.functional.pad(embeds, (0, 0, 0, missing)), nn.functional.pad(mask, (0, missing))
        return guided(self.transformer, (embeds, mask), (null, null_mask), self.guidance_scale)(x_t, t).float()

    @torch.no_grad()
    def follow(self, x_t: Tensor, t: Tensor, t_next: Tensor, prompts: Prompts, num_steps: int) -> Tensor:
        """Where `num_steps` equal Euler steps lead from x_t at t to t_next; both may differ from sample to sample."""
        stride = (t_next - t) / num_steps
        for i in range(num_steps):
            x_t = x_t + stride.view(-1, 1, 1, 1) * self.velocity(x_t, t + i * stride, prompts)
        return x_t

    def tokens(self, blocks: Sequence[int], x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """After `blocks`, [K, B, N, D]; without guidance, with a graph to x_t."""
        return block_tokens(self.transformer, blocks, x_t, t, *prompts)

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size


@dataclass(frozen=True)
class StudentStep:
    """One step of the student along its grid, from x_t at t to t_next. `learns`: the velocity has a graph."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    t_next: Tensor
    velocity: Tensor
    prompts: Prompts
    seeds: Sequence[int]
    learns: bool

    @property
    def sample(self) -> Tensor:
        """The clean sample that the student points to."""
        return x0_from_velocity(self.x_t, self.velocity.float(), self.t)

    def generators(self, purpose: int) -> list[torch.Generator]:
        """One a sample; a method's draws do not depend on which other methods there are."""
        return [torch.Generator().manual_seed(seed + purpose) for seed in self.seeds]

    def renoising(self, purpose: int, **density: Any) -> tuple[Tensor, Tensor]:
        """Noise levels [B] and noises like x0."""
        generators = self.generators(purpose)
        t = torch.cat([sample_timesteps(1, **density, generator=g) for g in generators])
        noise = torch.stack([torch.randn(self.x0.shape[1:], generator=g) for g in generators])
        return t.to(self.x0.device), noise.to(self.x0.device)


class TrajectoryTerm(nn.Module):
    """One step of the student shall end where several guided steps of the teacher do."""

    def __init__(self, teacher: Teacher, config: DistillConfig, network: Any) -> None:
        super().__init__()
        self.teacher, self.num_steps = teacher, config.trajectory_teacher_steps

    def forward(self, step: StudentStep) -> tuple[Tensor | None, Tensor | None, Metrics]:
        if not step.learns:
            return None, None, {}
        x_next = self.teacher.follow(step.x_t, step.t, step.t_next, step.prompts, self.num_steps)
        loss, metrics = trajectory_loss(step.velocity, path_velocity(step.x_t, x_next, step.t, step.t_next))
        return loss, None, metrics


class AdversarialTerm(nn.Module):
    """LADD (Sauer et al. 2024): heads on the teacher's tokens tell the student's samples from the teacher's.

    One pass of the teacher over the fakes serves both losses: the heads see its tokens detached, the student sees the
    heads' weights detached. So there is one backward pass, and neither loss leaks into the other's weights.
    """

    def __init__(self, teacher: Teacher, config: DistillConfig, network: Any) -> None:
        super().__init__()
        self.teacher, self.config = teacher, config
        self.heads: DiscriminatorHeads = network

    def forward(self, step: StudentStep) -> tuple[Tensor | None, Tensor | None, Metrics]:
        config, heads, blocks = self.config, self.heads, self.heads.blocks
        t, noise = step.renoising(1, mean=config.renoise_mean, std=config.renoise_std)
        given = (t, *step.prompts, self.teacher.grid(step.x0))
        fake = self.teacher.tokens(blocks, interpolate(step.sample, noise, t), t, step.prompts)
        with torch.no_grad():
            real = self.teacher.tokens(blocks, interpolate(step.x0, noise, t), t, step.prompts)
        real_logits, fake_logits = heads(real, *given), heads(fake.detach(), *given)
        share = config.mismatch_fraction
        mismatched = self._mismatched_logits(step, noise, t) if share else None
        own = ladd.discriminator_loss(real_logits, fake_logits, mismatched, share)
        metrics = {"discriminator_loss": own.detach(), **ladd.logit_metrics(real_logits, fake_logits, heads.names)}
        if mismatched is not None:
            metrics["mismatched_logit"] = mismatched.detach().float().mean()
        if config.r1_weight:
            r1 = ladd.approximate_r1(real_logits, heads(self._perturbed(step, noise, t), *given)) / config.r1_noise**2
            own, metrics["r1"] = own + config.r1_weight * r1, r1.detach()
        if not step.learns:
            return None, own, metrics
        frozen = {name: p.detach() for name, p in heads.named_parameters()} | dict(heads.named_buffers())
        loss = ladd.generator_loss(functional_call(heads, frozen, (fake, *given)))
        return loss, own, metrics | {"generator_loss": loss.detach()}

    def _mismatched_logits(self, step: StudentStep, noise: Tensor, t: Tensor) -> Tensor:
        """Of the latents under their neighbours' prompts: good pictures, but not of what was asked for.

        Neighbours in the micro-batch, so that its size matters a little; a neighbour that asks for the same thing in
        other words is a wrong fake.
        """
        prompts = (step.prompts[0].roll(1, 0), step.prompts[1].roll(1, 0))
        with torch.no_grad():
            tokens = self.teacher.tokens(self.heads.blocks, interpolate(step.x0, noise, t), t, prompts)
        return self.heads(tokens, t, *prompts, self.teacher.grid(step.x0))

    @torch.no_grad()
    def _perturbed(self, step: StudentStep, noise: Tensor, t: Tensor) -> Tensor:
        little = torch.stack([torch.randn(step.x0.shape[1:], generator=g) for g in step.generators(3)])
        x0 = step.x0 + self.config.r1_noise * little.to(step.x0.device)
        return self.teacher.tokens(self.heads.blocks, interpolate(x0, noise, t), t, step.prompts)


class DistributionMatchingTerm(nn.Module):
    """DMD2 (Yin et al. 2024) without its discriminator: add `ladd` for one.

    The fake-score network learns the student's distribution by flow matching; its prediction at the re-noised sample,
    less the teacher's, is what the student follows.

    Differs from DMD2: the student is given noised latents of the teacher, not its own earlier steps; noise levels are
    uniform in (0, 1); the fake score is trained at the very level and noise at which it is asked, which saves a pass.
    """

    def __init__(self, teacher: Teacher, config: DistillConfig, network: Any) -> None:
        super().__init__()
        self.teacher, self.fake = teacher, network

    def forward(self, step: StudentStep) -> tuple[Tensor | None, Tensor | None, Metrics]:
        t, noise = step.renoising(2, uniform_fraction=1.0)
        sample = step.sample
        x_t = interpolate(sample.detach(), noise, t)
        fake_velocity = predict_velocity(self.fake, x_t, t, *step.prompts)
        own, metrics = flow_matching_loss(fake_velocity, velocity_target(sample.detach(), noise))
        metrics = {"fake_score_loss": metrics["velocity_mse"]}
        if not step.learns:
            return None, own, metrics
        real_x0 = x0_from_velocity(x_t, self.teacher.velocity(x_t, t, step.prompts), t)
        fake_x0 = x0_from_velocity(x_t, fake_velocity.detach().float(), t)
        loss, more = distribution_matching_loss(sample, real_x0, fake_x0)
        return loss, own, metrics | more


TERMS: dict[str, Any] = {"trajectory": TrajectoryTerm, "ladd": AdversarialTerm, "dmd2": DistributionMatchingTerm}


class DistillationObjective(nn.Module):
    """The student and the methods' own networks.

    Args:
        transformer: the student.
        sigmas: [N + 1], noise levels of the emitted scheduler.
        networks: of the methods that have one: `ladd`'s heads, `dmd2`'s fake-score transformer.
    """

    def __init__(
        self, transformer: nn.Module, teacher: Teacher, sigmas: Tensor, networks: dict[str, Any], config: DistillConfig
    ) -> None:
        super().__init__()
        self.transformer, self.teacher, self.config, self.sigmas = transformer, teacher, config, sigmas
        self.terms = nn.ModuleDict({name: TERMS[name](teacher, config, networks.get(name)) for name in config.method})
        self.weights = dict(zip(config.method, config.method_weights or [1.0] * len(config.method), strict=True))

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """`batch` as made by BatchSource; `latents` are the teacher's, or real ones."""
        step = self.student_step(batch)
        loss = torch.zeros((), device=step.x0.device)
        metrics: Metrics = {}
        for name, term in self.terms.items():
            student_loss, own_loss, of_term = term(step)
            metrics |= of_term
            if student_loss is not None:
                loss = loss + self.weights[name] * student_loss
            if own_loss is not None:
                loss = loss + own_loss
        if step.learns and self.config.velocity_weight:
            target = self.teacher.velocity(step.x_t, step.t, step.prompts)
            error = (step.velocity.float() - target).square().mean()
            loss, metrics["velocity_mse"] = loss + self.config.velocity_weight * error, error.detach()
        if not step.learns:  # the student's weights take part all the same: processes reduce every gradient
            loss = loss + sum(0.0 * p.float().sum() for p in self.transformer.parameters() if p.requires_grad)
        return loss, metrics

    def student_step(self, batch: Batch) -> StudentStep:
        """Noise the latents to a level of the grid, and ask the student for the velocity there."""
        x0, seeds = batch["latents"].float(), batch["seeds"]
        learns = self.config.student_learns(batch["step"])
        weights = self._level_weights(batch["step"])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        level = torch.cat([torch.multinomial(weights, 1, generator=g) for g in generators])
        noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(x0.device)
        t, t_next = (self.sigmas[i].to(x0.device) for i in (level, level + 1))
        x_t, prompts = interpolate(x0, noise, t), (batch["prompt_embeds"], batch["prompt_mask"])
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            velocity = predict_velocity(self.transformer, x_t, t, *prompts)
        return StudentStep(x0, x_t, t, t_next, velocity, prompts, seeds, learns)

    def _level_weights(self, step: int) -> Tensor:
        config = self.config
        warming_up = step < config.timestep_warmup_steps
        weights = config.warmup_timestep_weights if warming_up else config.timestep_weights
        return torch.ones(len(self.sigmas) - 1) if weights is None else torch.tensor(weights)
