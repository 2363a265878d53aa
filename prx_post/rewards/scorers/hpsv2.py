"""HPSv2.1 (Wu et al. 2023): CLIP ViT-H/14 trained on people's rankings of images for one prompt."""

import html
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.rewards.scorers.clip import CLIP, TOKENIZER, byte_pair_tokens, cosines
from prx_post.rewards.scorers.network import NetworkReward
from prx_post.rewards.scorers.pickscore import VIT_H_14
from prx_post.rewards.scorers.pixels import Images, Preparation, normalised, padded_square, unit_range
from prx_post.rewards.scorers.weights import Published, build, locate, locate_companion, read_tensors, require_tensors

PUBLISHED = Published("xswu/HPSv2", (("HPS_v2.1_compressed.pt",),))
VOCABULARY = Published(VIT_H_14, TOKENIZER)
"""OpenAI's byte pairs, as open_clip carries them in its package."""
VISION_HEAD_WIDTH, TEXT_HEAD_WIDTH = 80, 64
"""Of ViT-H/14: the checkpoint has no configuration, and its shapes do not tell the number of heads."""
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""open_clip's names of a block's layers, and transformers'."""
OUTSIDE_BLOCKS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # so spelt there
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
SIZED_BY = (
    "visual.conv1.weight",
    "visual.positional_embedding",
    "visual.proj",
    "visual.transformer.resblocks.0.mlp.c_fc.weight",
    "token_embedding.weight",
    "positional_embedding",
    "transformer.resblocks.0.mlp.c_fc.weight",
)
WHAT = "an open_clip ViT-H/14"


class HPSv2(NetworkReward):
    """cos(image, prompt), the prompt cut to 77 tokens: published scores are this times 1 or 100; here it is 1."""

    name = "hpsv2"

    def __init__(
        self, weights: str | None = None, device: str | None = None, dtype: str = "float32", batch_size: int = 16
    ) -> None:
        self._files = locate(self.name, PUBLISHED, weights)
        self._vocabulary = locate_companion(self.name, VOCABULARY, weights)
        super().__init__([self._files, self._vocabulary], device, dtype, batch_size)

    @cached_property
    def _clip(self) -> CLIP:
        return load_open_clip(self._files.paths[0], self._vocabulary.paths, self)

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return cosines(self, self._clip, images, prompts)


def load_open_clip(weights: Path, vocabulary: Sequence[Path], reward: NetworkReward) -> CLIP:
    """Raises PrxPostError if the weights are damaged or are not an open_clip ViT-H/14's."""
    from transformers import CLIPModel

    published = read_tensors(weights, "state_dict")
    config = config_of(published, weights)
    model = build(CLIPModel, config, as_transformers(published), weights, dtype=reward.dtype)
    size, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    tokens = byte_pair_tokens(vocabulary, length, split_special_tokens=True)
    return CLIP(
        model,
        Preparation(
            lambda images: torch.cat([normalised(padded_square(unit_range(image)[None], size)) for image in images]),
            lambda pixels: normalised(padded_square(pixels, size)),
        ),
        lambda prompts: tokens([cleaned(prompt) for prompt in prompts]),
        reward.device,
    )


def cleaned(prompt: str) -> str:
    """As open_clip cleans before tokenizing: broken Unicode fixed, HTML entities resolved, white space joined."""
    import ftfy

    unescaped = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", unescaped).strip().lower()


def config_of(published: dict[str, Tensor], path: Path) -> Any:
    """The CLIPConfig that the shapes tell. Raises PrxPostError if they are not a ViT-H/14's."""
    from transformers import CLIPConfig

    require_tensors(published, SIZED_BY, path, WHAT)
    patches, positions, projection, vision_mlp, tokens, text_positions, text_mlp = (published[n] for n in SIZED_BY)
    for tower, width, head in (
        ("image", patches.shape[0], VISION_HEAD_WIDTH),
        ("text", tokens.shape[1], TEXT_HEAD_WIDTH),
    ):
        if width % head:
            raise PrxPostError(
                f"{path} does not hold {WHAT}: its {tower} tower is {width} wide, which does not divide into heads of "
                f"{head}. Check which file it is."
            )
    grid = int((positions.shape[0] - 1) ** 0.5)
    vision = {
        "hidden_size": patches.shape[0],
        "intermediate_size": vision_mlp.shape[0],
        "num_hidden_layers": _blocks(published, "visual.transformer.resblocks."),
        "num_attention_heads": patches.shape[0] // VISION_HEAD_WIDTH,
        "patch_size": patches.shape[-1],
        "image_size": grid * patches.shape[-1],
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": tokens.shape[0],
        "hidden_size": tokens.shape[1],
        "intermediate_size": text_mlp.shape[0],
        "num_hidden_layers": _blocks(published, "transformer.resblocks."),
        "num_attention_heads": tokens.shape[1] // TEXT_HEAD_WIDTH,
        "max_position_embeddings": text_positions.shape[0],
        "hidden_act": "gelu",
        "bos_token_id": tokens.shape[0] - 2,
        "eos_token_id": tokens.shape[0] - 1,  # the last of the vocabulary: open_clip reads at the greatest id
        "pad_token_id": tokens.shape[0] - 1,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection.shape[1])


def _blocks(published: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].partition(".")[0] for name in published if name.startswith(prefix)})


def as_transformers(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors by CLIPModel's names. Names that are not open_clip's stay, for `build` to refuse."""
    converted: dict[str, Tensor] = {}
    for name, tensor in published.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(\w+)", name)
        in_projection = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
        if in_projection:
            layer = _layer(in_projection)
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{layer}.self_attn.{part}_proj.{in_projection[3]}"] = rows
        elif block and block[3] in BLOCK:
            converted[f"{_layer(block)}.{BLOCK[block[3]]}.{block[4]}"] = tensor
        elif name in TRANSPOSED:
            converted[TRANSPOSED[name]] = tensor.T
        elif name != "attn_mask":  # the causal mask, which some versions of open_clip save
            converted[OUTSIDE_BLOCKS.get(name, name)] = tensor
    return converted


def _layer(match: re.Match[str]) -> str:
    return f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}"
