"""The student's losses: each method a term, all of them in one forward pass, for one optimizer.

Shapes: latents [B, C, H, W]; t [B]; prompt embeddings [B, L, E] with masks [B, L] bool.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prx_post.data.plan import stream
from prx_post.engine.protocols import POLICY, Batch, Objective, ParamGroup, Prompts
from prx_post.flow import interpolate, sample_timesteps, x0_from_velocity
from prx_post.model.denoiser import predict_velocity
from prx_post.model.frozen import FrozenCopy
from prx_post.model.heads import block_tokens

Metrics = dict[str, Tensor]
Losses = tuple[Tensor | None, Tensor | None, Metrics]
"""The student's loss, the loss of the method's own network, metrics."""


class Teacher(FrozenCopy):
    """A guided network that is followed, and whose tokens are judged.

    Args:
        patch_size: latents per token, along one side.
    """

    def __init__(self, transformer: Any, null: Tensor, guidance_scale: float, patch_size: int) -> None:
        super().__init__(transformer, null, guidance_scale)
        self.patch_size = patch_size

    @torch.no_grad()
    def follow(self, x_t: Tensor, t: Tensor, t_next: Tensor, prompts: Prompts, num_steps: int) -> Tensor:
        """Where `num_steps` equal Euler steps lead from x_t at t to t_next; both may differ from sample to sample."""
        stride = (t_next - t) / num_steps
        for i in range(num_steps):
            x_t = x_t + stride.view(-1, 1, 1, 1) * self.velocity(x_t, t + i * stride, prompts)
        return x_t

    def tokens(self, blocks: Sequence[int], x_t: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """Image tokens after `blocks`, without guidance, [K, B, N, D]; gradients flow to x_t."""
        return block_tokens(self.transformer, blocks, x_t, t, *prompts)

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size


@dataclass(frozen=True)
class StudentStep:
    """One step of the student along its grid, from x_t at t to t_next.

    Attributes:
        velocity: has a graph if the student learns.
        drawn: what the source drew for the methods, by name.
    """

    x0: Tensor
    x_t: Tensor
    t: Tensor
    t_next: Tensor
    velocity: Tensor
    prompts: Prompts
    drawn: Mapping[str, Any]
    learns: bool

    @property
    def sample(self) -> Tensor:
        """The clean sample that the student points to."""
        return x0_from_velocity(self.x_t, self.velocity.float(), self.t)


class Term(Protocol):
    """A method."""

    def __call__(self, step: StudentStep) -> Losses: ...


class DistillationObjective(Objective):
    """The student and the methods' own networks.

    Args:
        policy: the student.
        sigmas: [N + 1], noise levels of the emitted scheduler.
        terms: the methods by name.
        networks: those of the methods that have one, by the method's name.
        weights: of each method's loss for the student.
        learns: whether an optimizer step, counted from 0, changes the student, or only the networks.
        velocity_weight: of the squared error to the teacher's guided velocity; 0: off.
    """

    def __init__(
        self,
        policy: Any,
        teacher: Teacher,
        sigmas: Tensor,
        terms: Mapping[str, Term],
        networks: Mapping[str, nn.Module],
        *,
        learning_rate: float,
        network_learning_rate: float,
        weights: Mapping[str, float],
        learns: Callable[[int], bool],
        velocity_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.policy, self.networks = policy, nn.ModuleDict(networks)
        self.teacher, self.sigmas, self.terms, self.weights = teacher, sigmas, dict(terms), dict(weights)
        self.learning_rate, self.network_learning_rate = learning_rate, network_learning_rate
        self.learns, self.velocity_weight = learns, velocity_weight

    def groups(self) -> list[ParamGroup]:
        others = [ParamGroup(name, module, self.network_learning_rate) for name, module in self.networks.items()]
        return [ParamGroup(POLICY, self.policy, self.learning_rate, self.learns), *others]

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """`batch`: the teacher's latents, or real ones, prompts, and what `randomness` draws."""
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
        if step.learns and self.velocity_weight:
            target = self.teacher.velocity(step.x_t, step.t, step.prompts)
            error = (step.velocity.float() - target).square().mean()
            loss, metrics["velocity_mse"] = loss + self.velocity_weight * error, error.detach()
        if not step.learns:  # the student's weights take part all the same: processes reduce every gradient
            loss = loss + sum(0.0 * p.float().sum() for p in self.policy.parameters() if p.requires_grad)
        return loss, metrics

    def student_step(self, batch: Batch) -> StudentStep:
        """Noise the latents to a level of the grid, and ask the student for the velocity there."""
        x0, level = batch["latents"].float(), batch["level"]
        learns = self.learns(batch["step"])
        sigmas = self.sigmas.to(x0.device)
        t, t_next = sigmas[level], sigmas[level + 1]
        x_t, prompts = interpolate(x0, batch["noise"], t), (batch["prompt_embeds"], batch["prompt_mask"])
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            velocity = predict_velocity(self.policy, x_t, t, *prompts)
        return StudentStep(x0, x_t, t, t_next, velocity, prompts, batch, learns)


@dataclass(frozen=True)
class Randomness:
    """What is random about a sample, each method's from a stream of its own, so that none depends on the others.

    `level`, an index of the student's grid, and `noise`; `<method>_t` and `<method>_noise` of each method that
    re-noises samples; `r1_noise`.

    Args:
        level_weights: step -> how often each level is trained, [N].
        renoising: density of the noise level of each method that re-noises, as of `flow.sample_timesteps`.
        has_r1: whether the R1 penalty is on.
    """

    level_weights: Callable[[int], Tensor]
    renoising: Mapping[str, Mapping[str, float]]
    has_r1: bool = False

    def __call__(self, seed: int, shape: Sequence[int], step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        (level,) = torch.multinomial(self.level_weights(step), 1, generator=generator)
        drawn = {"level": level, "noise": torch.randn(*shape, generator=generator)}
        for name, density in self.renoising.items():
            generator = torch.Generator().manual_seed(stream(seed, PURPOSES[name]))
            (drawn[f"{name}_t"],) = sample_timesteps(1, **density, generator=generator)
            drawn[f"{name}_noise"] = torch.randn(*shape, generator=generator)
        if self.has_r1:
            generator = torch.Generator().manual_seed(stream(seed, PURPOSES["r1"]))
            drawn["r1_noise"] = torch.randn(*shape, generator=generator)
        return drawn


PURPOSES = {"ladd": 1, "dmd2": 2, "r1": 3}
"""Numbers of the streams."""
