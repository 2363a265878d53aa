"""Images to latents and back, with the pipeline's own scaling: z_model = (z - shift) · scale."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def _encode_kl(vae: Any, pixels: Tensor) -> Tensor:
    # The mean rather than a draw, so that an image's latents are a function of the image and can be cached.
    return vae.encode(pixels).latent_dist.mode()


def _encode_dc(vae: Any, pixels: Tensor) -> Tensor:
    return vae.encode(pixels).latent


ENCODERS: dict[str, Callable[[Any, Tensor], Tensor]] = {"AutoencoderKL": _encode_kl, "AutoencoderDC": _encode_dc}


class LatentCodec:
    """Images <-> model latents through a Flux-style AutoencoderKL or a DC-AE."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.scale = vae.config.scaling_factor
        self.shift = getattr(vae.config, "shift_factor", None) or 0.0
        self._encode = ENCODERS[type(vae).__name__]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> latents [B, C, H/f, W/f] in the VAE's dtype."""
        pixels = pixels.to(self.vae.device, self.vae.dtype)
        return (self._encode(self.vae, pixels) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels [B, 3, H, W], about [-1, 1]."""
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """`decode`, through which a gradient flows to the latents."""
        latents = latents.to(self.vae.device, self.vae.dtype)
        return self.vae.decode(latents / self.scale + self.shift, return_dict=False)[0]


def to_pixels(image: Image.Image, height: int, width: int) -> Tensor:
    """Resize to cover height × width, crop the centre. [3, H, W] fp32 in [-1, 1]."""
    image = image.convert("RGB")
    scale = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] -> PIL images, rounded as the pipeline's image processor does."""
    array = (pixels.float() * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in (array * 255).round().astype(np.uint8)]
