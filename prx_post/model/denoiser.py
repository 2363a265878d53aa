"""A PRX transformer as a velocity function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prx_post.engine.protocols import Prompts
from prx_post.sampling import VelocityFunction, guided_velocity

PromptedVelocity = Callable[[Tensor, Tensor, Prompts], Tensor]
"""(x_t [B, C, H, W], t [B], prompts) -> velocity [B, C, H, W]"""


def predict_velocity(transformer: Any, x_t: Tensor, t: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
    """The transformer's output. x_t [B, C, H, W], t [B] in [0, 1], prompt_embeds [B, L, D], prompt_mask [B, L] bool."""
    return transformer(
        hidden_states=x_t,
        timestep=t,
        encoder_hidden_states=prompt_embeds,
        attention_mask=prompt_mask,
        return_dict=False,
    )[0]


def guided(transformer: Any, cond: Prompts, uncond: Prompts | None, guidance_scale: float) -> VelocityFunction:
    """A transformer's velocity under classifier-free guidance; see `with_guidance`."""
    return with_guidance(lambda x_t, t, p: predict_velocity(transformer, x_t, t, *p), cond, uncond, guidance_scale)


def with_guidance(
    velocity: PromptedVelocity, cond: Prompts, uncond: Prompts | None, guidance_scale: float
) -> VelocityFunction:
    """Velocity under classifier-free guidance; `cond` and `uncond` are (embeddings [B, L, D], mask [B, L]) of one L.

    Like the pipeline, both halves go through the transformer in one batch, and a guidance_scale of 1 runs one half.
    """
    if guidance_scale == 1:
        return lambda x_t, t: velocity(x_t, t, cond)
    assert uncond is not None
    prompts = (torch.cat([uncond[0], cond[0]]), torch.cat([uncond[1], cond[1]]))

    def guided_both(x_t: Tensor, t: Tensor) -> Tensor:
        both = velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), prompts)
        uncond_velocity, cond_velocity = both.float().chunk(2)
        return guided_velocity(uncond_velocity, cond_velocity, guidance_scale)

    return guided_both
