"""The published scorers' arithmetic written once more, from their papers and names of weights, in plain torch."""

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize, softmax

State = dict[str, Tensor]


def norm(w: State, name: str, x: Tensor, eps: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def affine(w: State, name: str, x: Tensor) -> Tensor:
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Of [L, D] each, one sample; `mask` [Lq, Lk] is True where a token may look."""
    outputs = []
    for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = q_h @ k_h.T / math.sqrt(q_h.shape[-1])
        outputs.append(softmax(scores if mask is None else scores.masked_fill(~mask, -math.inf), -1) @ v_h)
    return torch.cat(outputs, -1)


def patches(pixels: Tensor, kernel: Tensor) -> Tensor:
    """[3, H, W] cut into squares, each times the kernel [D, 3, P, P]: [N, D] in reading order."""
    size = kernel.shape[-1]
    cut = pixels.unfold(1, size, size).unfold(2, size, size)  # [3, H/P, W/P, P, P]
    return cut.permute(1, 2, 0, 3, 4).reshape(-1, 3 * size * size) @ kernel.flatten(1).T


def open_clip_tower(w: State, prefix: str, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    i = 0
    while f"{prefix}resblocks.{i}.ln_1.weight" in w:
        block = f"{prefix}resblocks.{i}."
        h = norm(w, block + "ln_1", x, 1e-5)
        q, k, v = linear(h, w[block + "attn.in_proj_weight"], w[block + "attn.in_proj_bias"]).chunk(3, -1)
        x = x + affine(w, block + "attn.out_proj", attend(q, k, v, heads, mask))
        h = gelu(affine(w, block + "mlp.c_fc", norm(w, block + "ln_2", x, 1e-5)))
        x = x + affine(w, block + "mlp.c_proj", h)
        i += 1
    return x


def hps(w: State, pixels: Tensor, tokens: list[int]) -> float:
    """HPSv2 of one image [3, H, W] and one prompt's tokens (start … end, no padding)."""
    x = patches(pixels, w["visual.conv1.weight"])
    x = torch.cat([w["visual.class_embedding"][None], x]) + w["visual.positional_embedding"]
    x = open_clip_tower(w, "visual.transformer.", norm(w, "visual.ln_pre", x, 1e-5), x.shape[-1] // 80, None)
    image = norm(w, "visual.ln_post", x[0], 1e-5) @ w["visual.proj"]
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"][: len(tokens)]
    causal = torch.ones(len(tokens), len(tokens)).tril().bool()
    x = open_clip_tower(w, "transformer.", x, x.shape[-1] // 64, causal)
    text = norm(w, "ln_final", x[-1], 1e-5) @ w["text_projection"]
    return (normalize(image, dim=0) @ normalize(text, dim=0)).item()


def blip_image(w: State, pixels: Tensor) -> Tensor:
    """[1 + N, D] of one image [3, H, W]."""
    prefix = "blip.visual_encoder."
    x = patches(pixels, w[prefix + "patch_embed.proj.weight"]) + w[prefix + "patch_embed.proj.bias"]
    x = torch.cat([w[prefix + "cls_token"][0], x]) + w[prefix + "pos_embed"][0]
    for i in range(2):
        block = f"{prefix}blocks.{i}."
        q, k, v = affine(w, block + "attn.qkv", norm(w, block + "norm1", x, 1e-6)).chunk(3, -1)
        x = x + affine(w, block + "attn.proj", attend(q, k, v, x.shape[-1] // 64))
        h = gelu(affine(w, block + "mlp.fc1", norm(w, block + "norm2", x, 1e-6)))
        x = x + affine(w, block + "mlp.fc2", h)
    return norm(w, prefix + "norm", x, 1e-6)


def image_reward(w: State, pixels: Tensor, tokens: list[int]) -> float:
    """ImageReward of one image [3, H, W] and one prompt's tokens, no padding."""
    image, prefix = blip_image(w, pixels), "blip.text_encoder."
    x = w[prefix + "embeddings.word_embeddings.weight"][tokens]
    x = x + w[prefix + "embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(w, prefix + "embeddings.LayerNorm", x, 1e-12)
    for i in range(2):
        layer = f"{prefix}encoder.layer.{i}."
        for name, looked_at in (("attention", None), ("crossattention", image)):
            source = x if looked_at is None else looked_at
            q = affine(w, f"{layer}{name}.self.query", x)
            k, v = (affine(w, f"{layer}{name}.self.{part}", source) for part in ("key", "value"))
            h = affine(w, f"{layer}{name}.output.dense", attend(q, k, v, heads=2))
            x = norm(w, f"{layer}{name}.output.LayerNorm", h + x, 1e-12)
        h = affine(w, layer + "output.dense", gelu(affine(w, layer + "intermediate.dense", x)))
        x = norm(w, layer + "output.LayerNorm", h + x, 1e-12)
    score = x[0]
    for i in (0, 2, 4, 6, 7):
        score = affine(w, f"mlp.layers.{i}", score)
    return (score.item() - 0.16717362830052426) / 1.0333394966054072
