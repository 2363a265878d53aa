"""LADD's discriminator: light heads on the tokens that a frozen transformer has after some of its blocks.

Shapes: tokens [K, B, N, D] of K blocks, N = height · width image tokens in row order, D the transformer's width;
logits [K, B, N].
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prx_post.base.settings import require
from prx_post.model.config import ATTENTION_HEADS
from prx_post.model.denoiser import predict_velocity

FREQUENCIES = 32


def default_blocks(depth: int) -> list[int]:
    """The last block of each quarter of the network, counted from 0; of 16 blocks 3, 7, 11 and 15."""
    return sorted({max(0, (quarter * depth) // 4 - 1) for quarter in range(1, 5)})


def check_blocks(blocks: Sequence[int] | None, depth: int) -> list[int]:
    """`blocks`, or the default. Raises ConfigError for one that the transformer has not, or has twice."""
    if blocks is None:
        return default_blocks(depth)
    action = f"Choose from 0 to {depth - 1}, or leave it out for {default_blocks(depth)}"
    for block in blocks:
        rule, reason = f"below {depth}", f"the teacher has {depth} blocks, counted from 0"
        require(0 <= block < depth, "head_blocks", list(blocks), rule, reason, action)
    rule, reason = "one or more different blocks", "each gets one head"
    require(0 < len(blocks) == len(set(blocks)), "head_blocks", list(blocks), rule, reason, action)
    return sorted(blocks)


def block_tokens(
    transformer: Any, blocks: Sequence[int], x_t: Tensor, t: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor
) -> Tensor:
    """The image tokens after `blocks` of a PRX transformer, [K, B, N, D]; gradients flow to x_t."""
    found: dict[int, Tensor] = {}

    def keep(block: int) -> Any:
        return lambda module, args, output: found.update({block: output})

    hooks = [transformer.blocks[block].register_forward_hook(keep(block)) for block in blocks]
    try:
        predict_velocity(transformer, x_t, t, prompt_embeds, prompt_mask)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([found[block] for block in blocks])


class Head(nn.Module):
    """Tokens of one block -> a logit a token, given prompt and noise level.

    Each channel is standardised by constants (see `DiscriminatorHeads.calibrate`), not by a norm over the sample,
    which would hide the very statistics that tell real from fake. Every token looks up the prompt by attention, which a
    pooled prompt would not let it: that says what is asked for, but not where. Then two 3×3 convolutions; the noise
    level scales and shifts between them.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.reduce = nn.Conv2d(channels, width, 1)
        self.ask = nn.MultiheadAttention(width, ATTENTION_HEADS, batch_first=True)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.modulate = nn.Linear(width, 2 * width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, tokens: Tensor, level: Tensor, text: Tensor, padding: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens [B, N, D], level [B, W], text [B, L, W], padding [B, L] bool, W the head's width -> logits [B, N]."""
        standard = (tokens - self.mean) / self.std
        x = self.reduce(standard.transpose(1, 2)[..., None]).squeeze(3).transpose(1, 2)
        x = x + self.ask(x, text, text, key_padding_mask=padding, need_weights=False)[0]
        x = x.transpose(1, 2).unflatten(2, grid)
        scale, shift = self.modulate(level)[..., None, None].chunk(2, dim=1)
        x = x + self.first(nn.functional.silu(x))
        x = nn.functional.silu(x * (1 + scale) + shift)
        x = nn.functional.silu(self.second(x))
        return self.out(x).flatten(1)


class DiscriminatorHeads(nn.Module):
    """One `Head` a block, and what they share: the noise level's and the prompt's projections to their width."""

    def __init__(self, blocks: Sequence[int], channels: int, text_width: int, width: int = 64) -> None:
        """channels: D of the tokens; text_width: of the prompt embeddings; width: of the heads."""
        super().__init__()
        self.blocks = list(blocks)
        self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.heads = nn.ModuleList([Head(channels, width) for _ in blocks])

    @property
    def names(self) -> list[str]:
        return [f"block{block}" for block in self.blocks]

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set each head's channel means and deviations to those of real tokens, batches of [K, B, N, D]."""
        sums = []
        for tokens in batches:
            flat = tokens.double().flatten(1, 2)  # [K, B·N, D]
            sums.append(torch.stack([torch.ones_like(flat).sum(1), flat.sum(1), flat.square().sum(1)]))
        count, total, squares = torch.stack(sums).sum(0)
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(1e-6).sqrt()
        for k, head in enumerate(self.heads):
            head.mean.copy_(mean[k])  # type: ignore[operator]
            head.std.copy_(std[k])  # type: ignore[operator]

    def forward(
        self, tokens: Tensor, t: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Logits [K, B, N].

        Args:
            tokens: [K, B, N, D] after `blocks`, of samples noised to t [B].
            prompt_embeds, prompt_mask: [B, L, E] and [B, L] bool.
            grid: rows and columns of tokens.
        """
        level, text = self.level(_waves(t)), self.text(prompt_embeds)
        given = (level, text, ~prompt_mask, grid)
        return torch.stack([head(x, *given) for head, x in zip(self.heads, tokens, strict=True)])


def _waves(t: Tensor) -> Tensor:
    """Sines and cosines of t [B] at frequencies from 1 to 1000 (geometric), [B, 2 · FREQUENCIES]."""
    frequencies = torch.logspace(0, 3, FREQUENCIES, device=t.device)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
