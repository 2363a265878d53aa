"""Pairs as trajectories: every state that the sampler went through on the way to an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prx_post.data.pairs import PairSource
from prx_post.data.plan import Draw
from prx_post.engine.protocols import Batch
from prx_post.model.denoiser import predict_velocity
from prx_post.model.text import pad_embeddings
from prx_post.sampling import VelocityFunction
from prx_post.stages.trajectories import Seeded, Transition, every_random_step, sample_trajectories


@dataclass
class StepSampler:
    """Makes images without guidance, by a sampler whose steps are random.

    Args:
        sigmas: the grid, [N + 1].
        latent_shape: of one image.
        pad_length: tokens that prompts are padded to.
        autocast: whether the network computes in bfloat16.
    """

    policy: Any
    transition: Transition
    sigmas: Tensor
    latent_shape: Sequence[int]
    device: torch.device
    pad_length: int
    autocast: bool = False

    def states(self, embeddings: Sequence[Tensor], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Clean latents [B, C, H, W], and the states at sigmas[:-1], [B, N, C, H, W]; fp32.

        Args:
            embeddings: of each prompt, [L, D]; seeds: of each image's noise.
        """

        def velocity_of(images: Sequence[int]) -> VelocityFunction:
            embeds, mask = pad_embeddings([embeddings[i].to(self.device) for i in images], self.pad_length)
            return lambda x_t, t: predict_velocity(self.policy, x_t, t, embeds, mask)

        seeded, window = [Seeded(seed, seed) for seed in seeds], every_random_step(len(self.sigmas) - 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            made = sample_trajectories(
                velocity_of, seeded, self.sigmas, self.transition, window, self.latent_shape, self.device
            )
        return made.x0, torch.stack([*made.x_t, made.x_last], dim=1)


@dataclass
class StepPairSource(PairSource):
    """Pairs whose latents are states [N, C, H, W]: micro-batches of one step of each, the same of both images.

    `latents` and `rejected` [B, C, H, W] are where it begins, `x_next` and `rejected_x_next` where it ended,
    `step_index` [B] which one it is.
    """

    def batch(self, draws: Sequence[Draw], step: int) -> Batch:
        made = super().batch(draws, step)
        index, rows = made["step_index"], torch.arange(len(draws))
        for name, after in (("latents", "x_next"), ("rejected", "rejected_x_next")):
            states = made[name]
            made[name], made[after] = states[rows, index], states[rows, index + 1]
        return made


def random_step(draw: Draw, shape: Sequence[int], step: int) -> dict[str, Tensor]:
    """`step_index`: the state that a trained step begins at, of those of `shape` [N, C, H, W] but the last."""
    generator = torch.Generator().manual_seed(draw.seed)
    return {"step_index": torch.randint(shape[0] - 1, (), generator=generator)}
