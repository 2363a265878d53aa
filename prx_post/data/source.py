"""Micro-batches of cached (or freshly encoded) latents and embeddings, with their noise: pure functions of the step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prx_post.data.cache import content_key
from prx_post.data.encoders import Encoders
from prx_post.data.encoding import EncodedCache
from prx_post.data.plan import Draw, Plan
from prx_post.data.rows import ImageRows
from prx_post.data.scan import Sample
from prx_post.engine.protocols import Batch, OfflineSource
from prx_post.flow import sample_timesteps
from prx_post.model.text import pad_embeddings

Randomness = Callable[[Draw, Sequence[int], int], dict[str, Tensor]]
"""(a draw, shape of its latents, step) -> everything random about it, by name; stacked to [B, ...]."""


def timestep_and_noise(draw: Draw, shape: Sequence[int], step: int, **density: float) -> dict[str, Tensor]:
    """What is random about a sample: `t`, a scalar, by the density of `flow.sample_timesteps`; `noise` of `shape`."""
    generator = torch.Generator().manual_seed(draw.seed)
    (t,) = sample_timesteps(1, generator=generator, **density)
    return {"t": t, "noise": torch.randn(*shape, generator=generator)}


def no_randomness(draw: Draw, shape: Sequence[int], step: int) -> dict[str, Tensor]:
    return {}


@dataclass
class LatentSource(OfflineSource):
    """This rank's micro-batches: latents [B, C, H, W], prompt_embeds [B, L, D], prompt_mask [B, L] bool, and what
    `randomness` draws for each sample.

    Args:
        plan: whose global batch is micro_batch_size · world_size · accumulation.
        rows: the images to encode; may be None with a cache.
        cache: None encodes every image and prompt on the fly.
        caption_dropout: probability that a draw's prompt is replaced by the encoded empty prompt.
        pad_length: pad prompts to this many tokens; None pads to the longest of the batch (masked either way).
    """

    samples: Sequence[Sample]
    rows: ImageRows | None
    cache: EncodedCache | None
    encoders: Encoders
    plan: Plan
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    randomness: Randomness = no_randomness
    caption_dropout: float = 0.0
    pad_length: int | None = None
    arrange: Callable[[Batch], Batch] | None = None
    """The last word on a batch."""

    def __post_init__(self) -> None:
        self._null_key = content_key(self.encoders.cleaner(""))

    def batches(self, step: int) -> Iterator[Batch]:
        size, world = self.micro_batch_size, self.world_size
        for start in range(self.rank * size, self.plan.global_batch_size, world * size):
            yield self.batch(self.plan.draws(step, range(start, start + size)), step)

    def batch(self, draws: Sequence[Draw], step: int) -> Batch:
        """The samples of `draws`, as they are trained in `step`."""
        samples = [self.samples[draw.index] for draw in draws]
        latents = torch.stack([self._latents(sample) for sample in samples])
        embeds, mask = pad_embeddings(
            [self._embedding(s, d) for s, d in zip(samples, draws, strict=True)], self.pad_length
        )
        drawn = [self.randomness(draw, latents.shape[1:], step) for draw in draws]
        batch = {
            "latents": latents,
            "prompt_embeds": embeds,
            "prompt_mask": mask,
            **{name: torch.stack([one[name] for one in drawn]) for name in drawn[0]},
            "seeds": [draw.seed for draw in draws],
            "rows": [sample.row for sample in samples],
            "step": step,
        }
        return batch if self.arrange is None else self.arrange(batch)

    def _latents(self, sample: Sample) -> Tensor:
        if self.cache is not None:
            return self.cache.latents[sample.image_key]
        assert self.rows is not None
        return self.encoders.latents(self.rows.image_bytes(sample.row), sample.size).cpu()

    def _embedding(self, sample: Sample, draw: Draw) -> Tensor:
        dropped = np.random.default_rng([draw.seed, 3]).random() < self.caption_dropout
        if self.cache is None:
            return self.encoders.prompts("" if dropped else sample.prompt).cpu()
        return self.cache.embeddings[self._null_key if dropped else sample.prompt_key]
