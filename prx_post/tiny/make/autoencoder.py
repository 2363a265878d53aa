"""The embedded world's AutoencoderKL: factor 4, four latent channels, so that a 32×64 image is 8×16 latents."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from prx_post.tiny.handwriting import write_number
from prx_post.tiny.world import split_of_numbers


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=32,
    )


def image_batch(rng: np.random.Generator, batch_size: int) -> torch.Tensor:
    """Training numbers written with the generator's digits, [B, 3, 32, 64] in [-1, 1]."""
    numbers = rng.choice(split_of_numbers()["train"], size=batch_size)
    images = np.stack([np.asarray(write_number(int(n), "generator", rng)) for n in numbers])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(steps: int, batch_size: int, seed: int, log, kl_weight: float = 1e-4) -> AutoencoderKL:
    """L1 + KL. Weights are rounded to bfloat16 at the end, as they are stored, and the latents standardised."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = new_autoencoder().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(1, steps + 1):
        pixels = image_batch(rng, batch_size)
        posterior = vae.encode(pixels).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        l1 = (reconstruction - pixels).abs().mean()
        loss = l1 + kl_weight * posterior.kl().mean() / 2048
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            log({"part": "autoencoder", "step": step, "l1": round(l1.item(), 4)})
    vae = vae.eval().to(torch.bfloat16).float()
    latents = torch.cat([vae.encode(image_batch(rng, 64)).latent_dist.mode() for _ in range(8)]).detach()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae
