"""What is trained at which noise level of the student's grid, and what is random about a sample.

The grid has N levels, counted from noise to data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prx_post.data.plan import Draw, stream
from prx_post.engine.protocols import Batch
from prx_post.flow import sample_timesteps

PURPOSES = {"ladd": 1, "dmd2": 2, "r1": 3, "own": 4}
"""Numbers of the streams of random numbers."""


@dataclass(frozen=True)
class Levels:
    """Shares a micro-batch out by noise level.

    Attributes:
        weights: of each method's loss for the student at each level, N of them, 0 where it is not trained; a method
            that is absent is trained everywhere, with weight 1.
    """

    weights: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def share_out(self, levels: Sequence[int], is_own: Sequence[bool]) -> dict[str, Any]:
        """Who takes part in what, known on the host, so that no step waits for the device.

        Args:
            levels: of the samples.
            is_own: whether the student's input is a state of its own.

        Returns:
            `<method>_samples`, places in the batch [B'], and `<method>_weight` [B'], of every method that is not
            trained everywhere; `own_samples` [B'] with `own_levels`, highest number first, if there are any.
        """
        shares: dict[str, Any] = {}
        for method, weights in self.weights.items():
            places = [place for place, level in enumerate(levels) if weights[level] > 0]
            shares[f"{method}_samples"] = torch.tensor(places, dtype=torch.int64)
            shares[f"{method}_weight"] = torch.tensor([weights[levels[place]] for place in places])
        own = sorted((place for place, mine in enumerate(is_own) if mine), key=lambda place: -levels[place])
        if own:
            shares |= {"own_samples": torch.tensor(own), "own_levels": [levels[place] for place in own]}
        return shares

    def arrange(self, batch: Batch) -> Batch:
        """`batch` with the shares of its samples."""
        is_own = batch["is_own"].tolist() if "is_own" in batch else [False] * len(batch["level"])
        return {**batch, **self.share_out(batch["level"].tolist(), is_own)}


@dataclass(frozen=True)
class Randomness:
    """What is random about a sample, each method's from a stream of its own, so that none depends on the others.

    `level`, an index of the student's grid, and `noise`; `<method>_t` and `<method>_noise` of each method that
    re-noises samples; `r1_noise`; `is_own`, whether the student's input is a state of its own, and `own_noise`
    [N - 1, C, H, W], what a re-noising sampler adds on the way there.

    Attributes:
        level_weights: how often each level is trained, [N].
        warmup_level_weights: the same for the first `num_warmup_steps` steps.
        real_level_weights: the same for samples from `first_real` on, the real images; None: as the others.
        renoising: density of the noise level of each method that re-noises, as of `flow.sample_timesteps`.
        has_r1: whether the R1 penalty is on.
        own_fractions: how often the input at a level is a state of the student's own, [N]; None: never.
        own_is_random: whether the sampler that leads there re-noises.
    """

    level_weights: Tensor
    warmup_level_weights: Tensor | None = None
    num_warmup_steps: int = 0
    real_level_weights: Tensor | None = None
    first_real: int = 0
    renoising: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    has_r1: bool = False
    own_fractions: Tensor | None = None
    own_is_random: bool = False

    def __call__(self, draw: Draw, shape: Sequence[int], step: int) -> dict[str, Tensor]:
        seed = draw.seed
        generator = torch.Generator().manual_seed(seed)
        (level,) = torch.multinomial(self._weights(draw, step), 1, generator=generator)
        drawn = {"level": level, "noise": torch.randn(*shape, generator=generator)}
        for name, density in self.renoising.items():
            generator = self._stream(seed, name)
            (drawn[f"{name}_t"],) = sample_timesteps(1, **density, generator=generator)
            drawn[f"{name}_noise"] = torch.randn(*shape, generator=generator)
        if self.has_r1:
            drawn["r1_noise"] = torch.randn(*shape, generator=self._stream(seed, "r1"))
        if self.own_fractions is not None:
            generator = self._stream(seed, "own")
            drawn["is_own"] = torch.rand((), generator=generator) < self.own_fractions[level]
            if self.own_is_random:
                drawn["own_noise"] = torch.randn(len(self.own_fractions) - 1, *shape, generator=generator)
        return drawn

    def _weights(self, draw: Draw, step: int) -> Tensor:
        if self.warmup_level_weights is not None and step < self.num_warmup_steps:
            return self.warmup_level_weights
        if self.real_level_weights is not None and draw.index >= self.first_real:
            return self.real_level_weights
        return self.level_weights

    @staticmethod
    def _stream(seed: int, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(stream(seed, PURPOSES[name]))
