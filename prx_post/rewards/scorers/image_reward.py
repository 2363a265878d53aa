"""ImageReward (Xu et al. 2023): BLIP ViT-L whose text encoder looks at the image, trained on people's rankings."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.rewards.scorers.linear_head import linear_head
from prx_post.rewards.scorers.network import NetworkReward
from prx_post.rewards.scorers.pixels import Images, Preparation, centre_square, centre_square_of, normalised
from prx_post.rewards.scorers.weights import (
    Published,
    build,
    locate,
    locate_companion,
    read_json,
    read_tensors,
    require_tensors,
)

PUBLISHED = Published("zai-org/ImageReward", (("ImageReward.pt",), ("med_config.json",)))
VOCABULARY = Published("google-bert/bert-base-uncased", (("vocab.txt",),))
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores on the authors' data; published scores are (raw - MEAN) / STD."""
MAX_TOKENS = 35
HEAD_WIDTH = 64
"""Of ViT-L: the checkpoint's shapes do not tell the number of heads."""
TEXT_SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"),
)
"""Of med_config.json."""
VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
UNUSED = ("blip.vision_proj.", "blip.text_proj.")
"""BLIP's contrastive projections, which are in the checkpoint and play no part in the score."""
BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}
OUTSIDE_BLOCKS = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
"""timm's names, by which BLIP's ViT is saved, and transformers'."""
SIZED_BY = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")


class ImageReward(NetworkReward):
    """(raw score - 0.167) / 1.033, about -2 to 2; the prompt cut to 35 tokens."""

    name = "image_reward"

    def __init__(
        self, weights: str | None = None, device: str | None = None, dtype: str = "float32", batch_size: int = 16
    ) -> None:
        self._files = locate(self.name, PUBLISHED, weights)
        self._vocabulary = locate_companion(self.name, VOCABULARY, weights)
        super().__init__([self._files, self._vocabulary], device, dtype, batch_size)

    @cached_property
    def _network(self) -> "CrossAttendingBLIP":
        return CrossAttendingBLIP(self._files.paths, self._vocabulary.paths[0], self)

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        def raw_scores(places: Sequence[int]) -> Tensor:
            return self._network.raw_scores(images[places[0] : places[-1] + 1], [prompts[i] for i in places])

        return (self.in_batches(raw_scores, range(len(prompts))) - MEAN) / STD


class CrossAttendingBLIP:
    """BLIP's image encoder, the text encoder that cross-attends to it, and a head on its first token."""

    def __init__(self, files: Sequence[Path], vocabulary: Path, reward: NetworkReward) -> None:
        """Raises PrxPostError if a file is damaged, or these are not an ImageReward."""
        from transformers import BlipTextModel, BlipVisionModel

        weights, config = files
        parts = _split(read_tensors(weights), weights)
        vision_config = _vision_config(parts[VISION], weights)
        text_config = _text_config(config, vision_config.hidden_size)
        vision, dtype = _as_transformers(parts[VISION]), reward.dtype
        self._vision = build(BlipVisionModel, vision_config, vision, weights, dtype=dtype).to(reward.device)
        text = build(BlipTextModel, text_config, parts[TEXT], weights, dtype=dtype, add_pooling_layer=False)
        self._text = text.to(reward.device)
        self._head = linear_head(parts[HEAD], text_config.hidden_size, weights).to(reward.device)
        self._tokenizer, self._device, self._dtype = _tokenizer(vocabulary), reward.device, dtype

    def raw_scores(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """[B] fp32; of pixels with a gradient."""
        size = self._vision.config.image_size
        prepared = Preparation(
            lambda images: torch.stack([normalised(centre_square(image, size)) for image in images]),
            lambda pixels: normalised(centre_square_of(pixels, size)),
        )
        pixels = prepared(images)
        tokens = self._tokenizer(
            list(prompts), max_length=MAX_TOKENS, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self._device)
        patches = self._vision(pixels.to(self._device, self._dtype)).last_hidden_state
        output = self._text(tokens["input_ids"], tokens["attention_mask"], encoder_hidden_states=patches)
        return self._head(output.last_hidden_state[:, 0].float()).squeeze(-1)


def _split(tensors: dict[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part, by its own names. Raises PrxPostError for one that is no part's."""
    parts: dict[str, dict[str, Tensor]] = {VISION: {}, TEXT: {}, HEAD: {}}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is not None:
            parts[prefix][name.removeprefix(prefix)] = tensor
        elif not name.startswith(UNUSED):
            raise PrxPostError(f"{path} does not hold an ImageReward: it has {name}. Check which file it is.")
    return parts


def _vision_config(tensors: dict[str, Tensor], path: Path) -> Any:
    from transformers import BlipVisionConfig

    require_tensors(tensors, SIZED_BY, path, "an ImageReward")
    patches, positions, mlp = (tensors[name] for name in SIZED_BY)
    width, patch = patches.shape[0], patches.shape[-1]
    if width % HEAD_WIDTH:
        raise PrxPostError(
            f"{path} does not hold an ImageReward: its image encoder is {width} wide, which does not divide into heads "
            f"of {HEAD_WIDTH}. Check which file it is."
        )
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=mlp.shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=patch,
        image_size=int((positions.shape[1] - 1) ** 0.5) * patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # BLIP's, through timm; transformers' default is 1e-5
    )


def _text_config(path: Path, vision_width: int) -> Any:
    from transformers import BlipTextConfig

    settings = read_json(path, TEXT_SETTINGS)
    # is_decoder only builds the layers of cross-attention; attention among the tokens is not causal.
    chosen = {name: settings[name] for name in TEXT_SETTINGS}
    return BlipTextConfig(**chosen, encoder_hidden_size=vision_width, is_decoder=True)


def _as_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image encoder's tensors by BlipVisionModel's names. Unknown names stay, for `build` to refuse."""
    converted = {}
    for name, tensor in tensors.items():
        if block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", name):
            converted[f"encoder.layers.{block[1]}.{BLOCK.get(block[2], block[2])}.{block[3]}"] = tensor
        else:
            converted[OUTSIDE_BLOCKS.get(name, name)] = tensor
    return converted


def _tokenizer(vocabulary: Path) -> Any:
    """BERT's, with BLIP's two tokens behind its own, so that a prompt that spells them is read as there."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab=str(vocabulary))
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return tokenizer
