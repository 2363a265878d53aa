"""Which samples make up each step's batch: a function of (seed, step, position), so a rank computes its own alone.

Legend: G global batch (samples of one optimizer step on all processes).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Draw:
    """One appearance of one sample: which, and the seed of everything random that happens to it."""

    index: int
    seed: int


def stream(*key: int) -> int:
    """A seed of 32 bits, all that torch's CPU generator uses; different keys give independent streams."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class Plan(Protocol):
    global_batch_size: int

    def draws(self, step: int, positions: Iterable[int]) -> list[Draw]:
        """The draws of `step`, counted from 0, at these of its G positions."""


class DrawPlan:
    """Samples grouped by size; a step's batch comes from one group, chosen in proportion to the groups' sizes.

    A group's samples come in one endless stream of permutations, each complete before the next begins. So every sample
    is drawn as often as any other of its group, nothing is dropped at the end of an epoch, and the global batch of a
    step is the same for any number of processes and micro-batches that multiply to G.
    """

    def __init__(
        self,
        group_of_sample: Sequence[Any],
        global_batch_size: int,
        seed: int,
        num_steps: int,
        draws_per_sample: int | None = None,
    ) -> None:
        """draws_per_sample: a sample has so many different draws, taken in turn; None: each is new."""
        self.global_batch_size, self.seed, self.draws_per_sample = global_batch_size, seed, draws_per_sample
        names = sorted(set(group_of_sample))
        self._groups = [np.flatnonzero([g == name for g in group_of_sample]) for name in names]
        fractions = np.array([len(g) for g in self._groups]) / len(group_of_sample)
        self._group_of_step = np.random.default_rng([seed, 1]).choice(len(names), size=num_steps, p=fractions)

    def draws(self, step: int, positions: Iterable[int]) -> list[Draw]:
        group = int(self._group_of_step[step])
        before = int((self._group_of_step[:step] == group).sum())
        first = before * self.global_batch_size
        return [self._draw(group, first + position) for position in positions]

    def _draw(self, group: int, position: int) -> Draw:
        members = self._groups[group]
        epoch, place = divmod(position, len(members))
        index = int(members[self._permutation(group, epoch)[place]])
        if self.draws_per_sample is not None:
            return self.fixed_draw(index, epoch % self.draws_per_sample)
        return Draw(index, stream(self.seed, group, position))

    def fixed_draw(self, index: int, number: int) -> Draw:
        """Draw `number` of the `draws_per_sample` that a sample has."""
        return Draw(index, stream(self.seed, 6, index, number))

    def _permutation(self, group: int, epoch: int) -> np.ndarray:
        key = (group, epoch)
        if getattr(self, "_permutation_key", None) != key:
            rng = np.random.default_rng([self.seed, 2, group, epoch])
            self._permutation_key, self._permutation_cached = key, rng.permutation(len(self._groups[group]))
        return self._permutation_cached


class MixedPlan:
    """Two sets of samples in a fixed proportion in every batch, in an order that is shuffled by step.

    The second set's samples are counted on from the first's.
    """

    def __init__(
        self, first: int, second: int, second_fraction: float, global_batch_size: int, seed: int, num_steps: int
    ) -> None:
        """first, second: how many samples each set has."""
        self.global_batch_size, self.seed = global_batch_size, seed
        of_second = round(second_fraction * global_batch_size)
        sets = [(0, first, global_batch_size - of_second, seed), (first, second, of_second, seed + 2**40)]
        self._sets = [
            (offset, part, DrawPlan(["all"] * count, part, own_seed, num_steps))
            for offset, count, part, own_seed in sets
            if part
        ]

    def draws(self, step: int, positions: Iterable[int]) -> list[Draw]:
        order = np.random.default_rng([self.seed, 4, step]).permutation(self.global_batch_size)
        return [self._draw(step, int(order[position])) for position in positions]

    def _draw(self, step: int, place: int) -> Draw:
        for offset, part, plan in self._sets:
            if place < part:
                (draw,) = plan.draws(step, [place])
                return Draw(draw.index + offset, draw.seed)
            place -= part
        raise IndexError(place)
