"""Each method's losses and gradients on one or two numbers, worked out by hand.

The networks are stand-ins that answer with a weight: the teacher's tokens are what it is shown, a head's logit is its
weight times the token plus the prompt, the fake score's velocity is its weight.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prx_post.stages.distill.objective import DistillationObjective, StudentStep
from prx_post.stages.distill.terms import Adversarial, DistributionMatching, Trajectory


class Heads(nn.Module):
    """logit = weight · token + prompt, one head, one token per sample."""

    names, blocks = ("only",), (0,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, tokens, t, embeds, mask, grid):
        return self.weight * tokens + embeds.view(1, -1, 1)


class Constant(nn.Module):
    """A transformer whose velocity is its weight everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def forward(self, hidden_states, **_):
        return (self.weight * torch.ones_like(hidden_states),)


TEACHER: Any = SimpleNamespace(
    tokens=lambda blocks, x_t, t, prompts: x_t.reshape(1, len(x_t), 1),
    velocity=lambda x_t, t, prompts: torch.ones_like(x_t),
    follow=lambda x_t, t, t_next, prompts, num_steps: x_t - 0.25 * num_steps,
    grid=lambda latents: (1, 1),
)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def student_step(velocity: torch.Tensor, x0=(2.0,), prompts=(0.0,), learns=True, **drawn) -> StudentStep:
    """At t = 0.5, x_t = 1: the sample is 1 - 0.5 · velocity, so 1 for a velocity of 0."""
    count = len(x0)
    half = torch.full((count,), 0.5)
    given = (torch.tensor(prompts).view(count, 1, 1), torch.ones(count, 1, dtype=torch.bool))
    x_t, v = numbers(*[1.0] * count), velocity.view(-1, 1, 1, 1).expand(count, 1, 1, 1)
    return StudentStep(numbers(*x0), x_t, half, torch.full((count,), 0.25), v, given, drawn, learns)


def ladd_draws(count=1, **more):
    """Re-noised to 0.5 with noise 1."""
    return {"ladd_t": torch.full((count,), 0.5), "ladd_noise": numbers(*[1.0] * count), **more}


def test_ladd_by_hand():
    """Real 0.5·2 + 0.5·1 = 1.5, fake 0.5·1 + 0.5·1 = 1: heads max(0, 1 - 1.5) + max(0, 1 + 1) = 2, student -1."""
    heads, velocity = Heads(), torch.zeros(1, requires_grad=True)
    student, own, metrics = Adversarial(TEACHER, heads)(student_step(velocity, **ladd_draws()))
    assert own.item() == 2.0
    assert student.item() == -1.0
    assert (metrics["real_logit"].item(), metrics["fake_logit"].item()) == (1.5, 1.0)
    (student + own).backward()
    # -weight · fake: fake falls by 0.25 with the velocity; the heads' own loss does not reach it
    assert velocity.grad.item() == pytest.approx(0.25)
    # max(0, 1 + weight · 1) alone has a slope; the student's loss does not reach the heads
    assert heads.weight.grad.item() == pytest.approx(1.0)


def test_ladd_without_the_student():
    student, own, _ = Adversarial(TEACHER, Heads())(student_step(torch.zeros(1), learns=False, **ladd_draws()))
    assert student is None
    assert own.item() == 2.0


def test_a_mismatched_prompt_counts_as_a_fake():
    """Two samples with prompts -3 and -1.

    Real: 1.5 - 3 = -1.5 and 0.5·4 + 0.5 - 1 = 1.5: (2.5 + 0) / 2 = 1.25.
    Fake: 1 - 3 = -2 and 1 - 1 = 0: (0 + 1) / 2 = 0.5.
    Real under the neighbour's prompt: 1.5 - 1 = 0.5 and 2.5 - 3 = -0.5: (1.5 + 0.5) / 2 = 1.
    1.25 + 0.75 · 0.5 + 0.25 · 1 = 1.875.
    """
    step = student_step(torch.zeros(1), x0=(2.0, 4.0), prompts=(-3.0, -1.0), **ladd_draws(2))
    _, own, metrics = Adversarial(TEACHER, Heads(), mismatch_fraction=0.25)(step)
    assert own.item() == pytest.approx(1.875)
    assert metrics["mismatched_logit"].item() == pytest.approx(0.0)


def test_r1_is_the_squared_slope():
    """x0 + 0.1·1, re-noised by half, moves the logit by 0.05: 0.05² / 0.1² = 0.25, times 8."""
    step = student_step(torch.zeros(1), **ladd_draws(r1_noise=numbers(1.0)))
    _, own, metrics = Adversarial(TEACHER, Heads(), r1_weight=8.0, r1_noise=0.1)(step)
    assert metrics["r1"].item() == pytest.approx(0.25, rel=1e-4)
    assert own.item() == pytest.approx(2.0 + 8 * 0.25, rel=1e-4)


def dmd2_draws():
    """Re-noised to 0.5 with noise 3: the sample, 1, becomes 2."""
    return {"dmd2_t": torch.full((1,), 0.5), "dmd2_noise": numbers(3.0)}


def test_dmd2_by_hand():
    """The fake score says 0.5 where 3 - 1 = 2 is right: 1.5² = 2.25.

    Its x0 is 2 - 0.5·0.5 = 1.75, the teacher's 2 - 0.5·1 = 1.5; the pull is (1.75 - 1.5) / |1 - 1.5| = 0.5.
    """
    fake, velocity = Constant(0.5), torch.zeros(1, requires_grad=True)
    student, own, metrics = DistributionMatching(TEACHER, fake)(student_step(velocity, **dmd2_draws()))
    assert own.item() == metrics["fake_score_loss"].item() == pytest.approx(2.25)
    assert student.item() == pytest.approx(0.5 * 0.5**2)
    assert metrics["dmd_gradient"].item() == pytest.approx(0.5)
    (student + own).backward()
    assert velocity.grad.item() == pytest.approx(-0.5 * 0.5)  # the pull, where the sample falls by 0.5 a velocity
    assert fake.weight.grad.item() == pytest.approx(2 * (0.5 - 2))  # and nothing of the student's loss


def test_trajectory_by_hand():
    """Two teacher steps lead from 1 to 0.5: a velocity of (1 - 0.5) / (0.5 - 0.25) = 2; the student says 0."""
    velocity = torch.zeros(1, requires_grad=True)
    student, own, _ = Trajectory(TEACHER, num_steps=2)(student_step(velocity))
    assert own is None
    assert student.item() == pytest.approx(4.0)
    student.backward()
    assert velocity.grad.item() == pytest.approx(-4.0)
    assert Trajectory(TEACHER, num_steps=2)(student_step(velocity, learns=False)) == (None, None, {})


def test_the_objective_adds_the_methods_up_and_the_regression_on_the_teachers_velocity():
    """At level 0.5 of the grid with noise 0 and x0 2, x_t is 1; the student says 0, the teacher 1.

    Trajectory, half: 0.5 · 4; velocity regression, a tenth: 0.1 · (0 - 1)² = 0.1.
    """
    objective = DistillationObjective(
        *(Constant(0.0), TEACHER, torch.tensor([0.5, 0.25, 0.0]), {"trajectory": Trajectory(TEACHER, 2)}, {}),
        learning_rate=1.0,
        network_learning_rate=1.0,
        weights={"trajectory": 0.5},
        learns=lambda step: step == 7,
        velocity_weight=0.1,
    )
    batch = {
        **{"latents": numbers(2.0), "noise": numbers(0.0), "level": torch.tensor([0])},
        **{"prompt_embeds": torch.zeros(1, 1, 1), "prompt_mask": torch.ones(1, 1, dtype=torch.bool), "step": 7},
    }
    loss, metrics = objective(batch)
    assert loss.item() == pytest.approx(0.5 * 4 + 0.1)
    assert metrics["velocity_mse"].item() == 1.0
    assert objective({**batch, "step": 6})[0].item() == 0.0
