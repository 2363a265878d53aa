"""CLIP (Radford et al. 2021): embeddings of images and prompts in one space, shared by the rewards built on it."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.rewards.scorers.network import NetworkReward
from prx_post.rewards.scorers.pixels import Images, Preparation, centre_square_of, normalised
from prx_post.rewards.scorers.weights import build, read_json, read_tensors

TOKENIZER = (("vocab.json",), ("merges.txt",))
PREPROCESSOR = (("preprocessor_config.json",),)


class CLIP:
    """A transformers CLIPModel with what makes its inputs."""

    def __init__(
        self,
        model: Any,
        pixels: Preparation,
        tokens: Callable[[Sequence[str]], Tensor] | None,
        device: torch.device,
    ) -> None:
        """
        Args:
            tokens: prompts -> token ids [B, L], L being the model's; None if only images are embedded.
        """
        self._model, self._pixels, self._tokens, self._device = model.to(device), pixels, tokens, device

    @property
    def logit_scale(self) -> float:
        """By which training multiplied cosines; 100 in the published models."""
        return self._model.logit_scale.float().exp().item()

    @property
    def width(self) -> int:
        """D of the embeddings."""
        return self._model.config.projection_dim

    def embed_images(self, images: Images) -> Tensor:
        """Unit vectors [B, D] fp32; of pixels with a gradient."""
        pixels = self._pixels(images).to(self._device, self._model.dtype)
        return _unit(self._model.get_image_features(pixel_values=pixels).pooler_output)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [B, D] fp32."""
        assert self._tokens is not None
        # No mask of the padding: attention is causal and the end token is what is read, so nothing after it counts.
        tokens = self._tokens(prompts).to(self._device)
        return _unit(self._model.get_text_features(input_ids=tokens).pooler_output)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def cosines(reward: NetworkReward, clip: CLIP, images: Images, prompts: Sequence[str]) -> Tensor:
    """Cosine [B] of each image's embedding and its prompt's. A repeated prompt is embedded once."""
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    texts = reward.in_batches(clip.embed_texts, list(rows))[[rows[prompt] for prompt in prompts]]
    return (reward.in_batches(clip.embed_images, images) * texts).sum(-1)


def load_clip(files: Sequence[Path], preprocessor: Path, tokenizer: Sequence[Path], reward: NetworkReward) -> CLIP:
    """A published CLIP in transformers' format.

    Args:
        files: the weights and config.json.
        tokenizer: vocab.json and merges.txt; none if only images are embedded.
        reward: says where and in which precision it runs.

    Raises:
        PrxPostError: a file is damaged, or these are not of one CLIP.
    """
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    weights, config = files
    described = read_json(config, ("text_config", "vision_config"))
    if described.get("model_type") != "clip":
        raise PrxPostError(f"{config} describes a {described.get('model_type')}, but {reward.name} needs a CLIP.")
    clip_config = CLIPConfig.from_dict(described)
    model = build(CLIPModel, clip_config, read_tensors(weights), weights, dtype=reward.dtype)
    processor = CLIPImageProcessorPil(**read_json(preprocessor, ("image_mean", "image_std")))

    def of_images(images: Sequence[Image.Image]) -> Tensor:
        return processor(list(images), return_tensors="pt")["pixel_values"]

    def of_pixels(pixels: Tensor) -> Tensor:
        square = centre_square_of(pixels, processor.crop_size["height"], math.floor)
        return normalised(square, processor.image_mean, processor.image_std)

    tokens = None
    if tokenizer:
        tokens = byte_pair_tokens(tokenizer, clip_config.text_config.max_position_embeddings)
    return CLIP(model, Preparation(of_images, of_pixels), tokens, reward.device)


def byte_pair_tokens(
    files: Sequence[Path], length: int, split_special_tokens: bool = False
) -> Callable[[Sequence[str]], Tensor]:
    """CLIP's tokenizer: prompts -> ids [B, length], cut or padded, with a start and an end token.

    Args:
        files: vocab.json and merges.txt.
        split_special_tokens: read `<|endoftext|>` in a prompt as text.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = files
    read_json(vocabulary)
    tokenizer = CLIPTokenizer(vocab=str(vocabulary), merges=str(merges))

    def tokens(prompts: Sequence[str]) -> Tensor:
        return tokenizer(
            list(prompts),
            max_length=length,
            padding="max_length",
            truncation=True,
            split_special_tokens=split_special_tokens,
            return_tensors="pt",
        )["input_ids"]

    return tokens
