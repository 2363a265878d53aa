"""Prompts and noise: all that a sampler starts from, as pure functions of the step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prx_post.data.plan import Plan
from prx_post.engine.protocols import Batch, OfflineSource
from prx_post.model.text import pad_embeddings
from prx_post.stages.base import Encoded


@dataclass
class PromptSource(OfflineSource):
    """This rank's micro-batches: `noise` [B, C, H, W], prompt_embeds [B, L, D], prompt_mask [B, L], and `prompts`.

    Args:
        num_fresh: noises that a sampler which re-noises draws on the way; `fresh` [B, num_fresh, C, H, W].
        pad_length: tokens that prompts are padded to.
        has_null: whether `null_embeds` and `null_mask`, of the empty prompt, are given too.
    """

    data: Encoded
    plan: Plan
    latent_shape: Sequence[int]
    micro_batch_size: int
    rank: int
    world_size: int
    pad_length: int
    num_fresh: int = 0
    has_null: bool = False

    def batches(self, step: int) -> Iterator[Batch]:
        size, world = self.micro_batch_size, self.world_size
        for start in range(self.rank * size, self.plan.global_batch_size, world * size):
            draws = self.plan.draws(step, range(start, start + size))
            prompts = [self.data.samples[draw.index].prompt for draw in draws]
            noises = [self._noise(draw.seed) for draw in draws]
            yield {
                **self._embedded("prompt", prompts),
                **(self._embedded("null", [""] * len(prompts)) if self.has_null else {}),
                "noise": torch.stack([noise[0] for noise in noises]),
                "fresh": torch.stack([noise[1:] for noise in noises]),
                "prompts": prompts,
                "seeds": [draw.seed for draw in draws],
                "rows": [self.data.samples[draw.index].row for draw in draws],
                "step": step,
            }

    def _noise(self, seed: int) -> Tensor:
        """[1 + num_fresh, C, H, W]."""
        return torch.randn(1 + self.num_fresh, *self.latent_shape, generator=torch.Generator().manual_seed(seed))

    def _embedded(self, name: str, prompts: Sequence[str]) -> Batch:
        embeds, mask = pad_embeddings([self.data.embed(prompt).cpu() for prompt in prompts], self.pad_length)
        return {f"{name}_embeds": embeds, f"{name}_mask": mask}
