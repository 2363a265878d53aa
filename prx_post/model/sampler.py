"""Images from a transformer: the sampler that training, evaluation and `prx-post generate` share."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from prx_post.flow import inference_sigmas, seeded_noise
from prx_post.model.checkpoint import Checkpoint
from prx_post.model.codec import to_images
from prx_post.model.denoiser import guided
from prx_post.model.text import pad_embeddings
from prx_post.sampling import cps_sample, euler_sample, renoise_sample

Embed = Callable[[str], Tensor]
"""prompt -> embedding without padding, [L, D]"""


@dataclass
class Sampler:
    """Generates images from a transformer, many at a time, with and without guidance.

    The noise of an image is that of `torch.Generator().manual_seed(seed)`, so in float32 one image equals what
    PRXPipeline makes with that generator. (PRXPipeline itself fails on guided batches.) Whatever the transformer's
    precision, the trajectory is kept in float32. A scheduler with `stochastic_sampling` re-noises between steps.
    """

    transformer: Any
    scheduler: Any
    num_inference_steps: int
    guidance_scale: float
    latent_shape: tuple[int, int, int]
    device: torch.device
    pad_length: int
    """Tokens that prompts are padded to; the tokenizer's model_max_length, as in the pipeline."""
    autocast: bool = False
    """bfloat16 autocast, for a transformer whose weights are float32 while it is trained so."""
    noise_level: float | None = None
    """Of coefficients-preserving sampling; None: as the scheduler steps."""

    @torch.no_grad()
    def latents(
        self,
        embeddings: Sequence[Tensor],
        null: Tensor,
        seeds: Sequence[int],
        record: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """One image for each embedding and seed. Returns latents [B, C, H/f, W/f] fp32.

        Args:
            record: called with x_t and the (guided) velocity of every step, [B, C, H/f, W/f] each.
        """
        dtype = next(self.transformer.parameters()).dtype

        def pad(embeds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            return pad_embeddings([e.to(self.device, dtype) for e in embeds], self.pad_length)

        uncond = pad([null] * len(embeddings)) if self.guidance_scale > 1 else None
        velocity = guided(self.transformer, pad(embeddings), uncond, self.guidance_scale)

        def step(x_t: Tensor, t: Tensor) -> Tensor:
            predicted = velocity(x_t.to(dtype), t)
            if record is not None:
                record(x_t, predicted)
            return predicted

        noise = seeded_noise(seeds, self.latent_shape).to(self.device)
        sigmas = inference_sigmas(self.scheduler, self.num_inference_steps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            if self.noise_level is not None:
                return cps_sample(step, noise, sigmas, lambda number: self.fresh_noise(seeds, number), self.noise_level)
            if self.scheduler.config.stochastic_sampling:
                return renoise_sample(step, noise, sigmas, lambda number: self.fresh_noise(seeds, number))
            return euler_sample(step, noise, sigmas)

    def fresh_noise(self, seeds: Sequence[int], step: int) -> Tensor:
        """What a re-noising sampler adds after step `step`, counted from 1."""
        mixed = [np.random.SeedSequence([seed, step]).generate_state(1)[0] for seed in seeds]
        return seeded_noise([int(seed) for seed in mixed], self.latent_shape).to(self.device)


def generate_images(
    sampler: Sampler,
    embed: Embed,
    decode: Callable[[Tensor], Tensor],
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
) -> Iterator[Image.Image]:
    """Images of `prompts[i]` from noise `seeds[i]`, in order."""
    memo: dict[str, Tensor] = {}
    for prompt in ["", *prompts]:
        if prompt not in memo:
            memo[prompt] = embed(prompt)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        latents = sampler.latents([memo[p] for p in prompts[part]], memo[""], seeds[part])
        yield from to_images(decode(latents))


def default_device() -> torch.device:
    """The GPU of this process (by LOCAL_RANK, where a launcher set it), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def build_sampler(
    checkpoint: Checkpoint,
    size: tuple[int, int],
    num_inference_steps: int,
    guidance_scale: float,
    device: torch.device,
    noise_level: float | None = None,
) -> Sampler:
    pipeline = checkpoint.pipeline
    return Sampler(
        transformer=checkpoint.transformer.to(device).eval(),
        scheduler=checkpoint.scheduler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        latent_shape=pipeline.latent_shape(*size),
        device=device,
        pad_length=pipeline.max_prompt_tokens,
        noise_level=noise_level,
    )


def png_info(settings: dict[str, Any]) -> PngInfo:
    """Settings as PNG text chunks, one each."""
    info = PngInfo()
    for name, value in settings.items():
        info.add_itxt(name, str(value))
    return info
