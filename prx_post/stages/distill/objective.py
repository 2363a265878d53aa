"""The student's losses: each method a term, all of them in one forward pass, for one optimizer.

Shapes: latents [B, C, H, W]; t [B]; prompt embeddings [B, L, E] with masks [B, L] bool.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prx_post.engine.protocols import POLICY, Batch, Objective, ParamGroup, Prompts
from prx_post.flow import interpolate, x0_from_velocity
from prx_post.model.denoiser import predict_velocity
from prx_post.model.frozen import FrozenCopy
from prx_post.model.heads import block_tokens
from prx_post.sampling import euler_step, renoise_step

Metrics = dict[str, Tensor]
Losses = tuple[Tensor | None, Tensor | None, Metrics]
"""The student's loss, the loss of the method's own network, metrics."""

DRAWN = ("ladd_t", "ladd_noise", "dmd2_t", "dmd2_noise", "r1_noise")
"""What the source draws for the methods."""


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
        drawn: of DRAWN what there is.
        weight: of each sample in the student's loss; None: 1.
    """

    x0: Tensor
    x_t: Tensor
    t: Tensor
    t_next: Tensor
    velocity: Tensor
    prompts: Prompts
    drawn: Mapping[str, Tensor]
    learns: bool
    weight: Tensor | None = None

    @property
    def sample(self) -> Tensor:
        """The clean sample that the student points to."""
        return x0_from_velocity(self.x_t, self.velocity.float(), self.t)

    def part(self, places: Tensor, weight: Tensor) -> "StudentStep":
        """The samples at `places` alone, [B'], with their weights [B']."""
        embeds, mask = self.prompts
        return replace(
            self,
            **{name: getattr(self, name)[places] for name in ("x0", "x_t", "t", "t_next", "velocity")},
            prompts=(embeds[places], mask[places]),
            drawn={name: value[places] for name, value in self.drawn.items()},
            weight=weight,
        )


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
        renoises: whether the emitted sampler does, on the way to the student's own states.
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
        renoises: bool = False,
    ) -> None:
        super().__init__()
        self.policy, self.networks = policy, nn.ModuleDict(networks)
        self.teacher, self.sigmas, self.terms, self.weights = teacher, sigmas, dict(terms), dict(weights)
        self.learning_rate, self.network_learning_rate = learning_rate, network_learning_rate
        self.learns, self.velocity_weight, self.renoises = learns, velocity_weight, renoises

    def groups(self) -> list[ParamGroup]:
        others = [ParamGroup(name, module, self.network_learning_rate) for name, module in self.networks.items()]
        return [ParamGroup(POLICY, self.policy, self.learning_rate, self.learns), *others]

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """`batch`: the teacher's latents, or real ones, prompts, what `Randomness` draws and `Levels` shares out.

        A method's loss is the sum over its own samples, divided by the size of the whole batch.
        """
        step = self.student_step(batch)
        loss = torch.zeros((), device=step.x0.device)
        metrics: Metrics = {}
        for name, term in self.terms.items():
            part = step
            if f"{name}_samples" in batch:
                part = step.part(batch[f"{name}_samples"], batch[f"{name}_weight"])
            if not len(part.x0):
                if name in self.networks:
                    loss = loss + _no_change(self.networks[name])
                continue
            student_loss, own_loss, of_term = term(part)
            metrics |= of_term
            fraction = len(part.x0) / len(step.x0)
            if student_loss is not None:
                loss = loss + self.weights[name] * fraction * student_loss
            if own_loss is not None:
                loss = loss + fraction * own_loss
        if step.learns and self.velocity_weight:
            target = self.teacher.velocity(step.x_t, step.t, step.prompts)
            error = (step.velocity.float() - target).square().mean()
            loss, metrics["velocity_mse"] = loss + self.velocity_weight * error, error.detach()
        if not step.learns:
            loss = loss + _no_change(self.policy)
        return loss, metrics

    def idle(self) -> Tensor | int:
        """A loss that changes none of the methods' networks, for passes in which they have no part."""
        return sum(_no_change(network) for network in self.networks.values())

    def student_step(self, batch: Batch) -> StudentStep:
        """Noise the latents to a level of the grid, or go there, and ask the student for the velocity."""
        x0, level = batch["latents"].float(), batch["level"]
        learns = self.learns(batch["step"])
        sigmas = self.sigmas.to(x0.device)
        t, t_next = sigmas[level], sigmas[level + 1]
        x_t, prompts = interpolate(x0, batch["noise"], t), (batch["prompt_embeds"], batch["prompt_mask"])
        if "own_samples" in batch:
            x_t = x_t.index_copy(0, batch["own_samples"], self.own_states(batch, prompts))
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            velocity = predict_velocity(self.policy, x_t, t, *prompts)
        drawn = {name: batch[name] for name in DRAWN if name in batch}
        return StudentStep(x0, x_t, t, t_next, velocity, prompts, drawn, learns)

    @torch.no_grad()
    def own_states(self, batch: Batch, prompts: Prompts) -> Tensor:
        """Where the student gets from the noise of `own_samples`, by the emitted sampler. [B', C, H, W] fp32."""
        places, levels = batch["own_samples"], batch["own_levels"]
        x_t, embeds, mask = batch["noise"][places], prompts[0][places], prompts[1][places]
        sigmas = self.sigmas.to(x_t.device)
        for i in range(levels[0]):
            going = sum(level > i for level in levels)  # who has farther to go stands first
            here, t = x_t[:going], sigmas[i].expand(going)
            velocity = predict_velocity(self.policy, here, t, embeds[:going], mask[:going])
            if self.renoises:
                fresh = batch["own_noise"][places[:going], i]
                here = renoise_step(here, velocity, sigmas[i], sigmas[i + 1], noise=fresh).x_next
            else:
                here = euler_step(here, velocity, sigmas[i], sigmas[i + 1])
            x_t = torch.cat([here, x_t[going:]])
        return x_t


def _no_change(network: nn.Module) -> Tensor | int:
    """0, with a gradient of 0 for every weight: processes reduce every gradient."""
    return sum(0.0 * p.float().sum() for p in network.parameters() if p.requires_grad)
