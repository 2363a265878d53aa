"""Checkpoints of the published scorers' formats with small random weights: same names, containers and side files."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

PATCH = 14
MERGES = ["r e", "re d</w>", "c a", "ca t</w>", "b l", "bl u", "blu e</w>"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog", "##s", "photo", ",", "2"]

OLD_SETTINGS = {
    **{"add_cross_attention": False, "bad_words_ids": None, "chunk_size_feed_forward": 0, "diversity_penalty": 0.0},
    **{"do_sample": False, "dropout": 0.0, "early_stopping": False, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
    **{"is_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20},
    **{"min_length": 0, "num_beams": 1, "pruned_heads": {}, "return_dict": True, "torch_dtype": None},
    **{"transformers_version": "4.16.0.dev0", "use_bfloat16": False},
    **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
}
"""Of both halves of the config.json of OpenAI's repository: left over from old versions, and wrong special tokens."""


@dataclass(frozen=True)
class Size:
    """Of a checkpoint's networks."""

    image: int = 28
    """Pixels a side; a patch is 14."""
    layers: int = 2
    times: int = 1
    """Widths, in those of the smallest."""

    @property
    def positions(self) -> int:
        return 1 + (self.image // PATCH) ** 2


SMALL = Size()


class Weights:
    """Random tensors by name; norms are near the identity, so that a signal passes."""

    def __init__(self, seed: int, std: float = 0.25) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._generator, self._std = torch.Generator().manual_seed(seed), std

    def add(self, name: str, *shape: int, std: float | None = None) -> None:
        self.tensors[name] = torch.randn(shape, generator=self._generator) * (std or self._std)

    def linear(self, name: str, outputs: int, inputs: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", outputs, inputs, std=inputs**-0.5)
        if bias:
            self.add(f"{name}.bias", outputs)

    def norm(self, name: str, width: int) -> None:
        self.linear(name, width, 1)
        self.tensors[f"{name}.weight"] = 1 + 0.1 * self.tensors[f"{name}.weight"][:, 0]


def byte_pairs(folder: Path) -> int:
    """Write vocab.json and merges.txt of a small CLIP tokenizer; returns the vocabulary's size."""
    letters = sorted(ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in MERGES]
    entries = [*letters, *(f"{c}</w>" for c in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return len(entries)


def preprocessor(folder: Path, size: Size) -> None:
    """Write preprocessor_config.json as OpenAI's repository has it: sizes as plain numbers."""
    content = {
        "crop_size": size.image,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": size.image,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def clip(folder: Path, size: Size = SMALL, *, legacy: bool = False, seed: int = 0) -> Path:
    """A CLIP in transformers' format with tokenizer and preprocessor.

    Args:
        legacy: as OpenAI's: OLD_SETTINGS in config.json, settings twice, `position_ids` among the weights.
    """
    from transformers import CLIPConfig, CLIPModel

    vocabulary = byte_pairs(folder)
    preprocessor(folder, size)
    width, heads = 32 * size.times, 2 * size.times
    sizes = {"hidden_size": width, "intermediate_size": 2 * width}
    sizes |= {"num_hidden_layers": size.layers, "num_attention_heads": heads}
    text = {**sizes, "vocab_size": vocabulary, "eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2}
    vision = {**sizes, "image_size": size.image, "patch_size": PATCH}
    if legacy:
        text |= {**OLD_SETTINGS, "model_type": "clip_text_model"}
        vision |= {**OLD_SETTINGS, "model_type": "clip_vision_model"}
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 16, "torch_dtype": "float32"}
    config |= {
        "text_config": text,
        "vision_config": vision,
        "logit_scale_init_value": 2.6592,
        "initializer_factor": 1.0,
    }
    if legacy:
        config |= {"text_config_dict": text, "vision_config_dict": vision, "transformers_version": None}
    (folder / "config.json").write_text(json.dumps(config))
    random = Weights(seed)
    for name, tensor in CLIPModel(CLIPConfig.from_dict(config)).state_dict().items():
        if "norm" in name and name.endswith("weight"):
            random.norm(name.removesuffix(".weight"), len(tensor))
        elif name.endswith("bias"):
            random.add(name, *tensor.shape)
        elif "norm" not in name:
            random.add(name, *tensor.shape, std=tensor[0].numel() ** -0.5 if tensor.ndim > 1 else None)
    random.tensors["logit_scale"] = torch.tensor(100.0).log()
    if legacy:
        random.tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        random.tensors["vision_model.embeddings.position_ids"] = torch.arange(size.positions)[None]
    save_file(random.tensors, folder / "model.safetensors")
    return folder


def pickscore(folder: Path, size: Size = SMALL) -> Path:
    """PickScore's repository has no processor; it is in a folder named as the repository that has it."""
    clip(folder, size, seed=1)
    processor = folder / "CLIP-ViT-H-14-laion2B-s32B-b79K"
    processor.mkdir()
    for name in ("vocab.json", "merges.txt", "preprocessor_config.json"):
        (folder / name).rename(processor / name)
    return folder


def aesthetic(folder: Path, size: Size = SMALL) -> Path:
    clip(folder / "clip-vit-large-patch14", size, legacy=True, seed=2)
    random = Weights(3)
    for i, outputs, inputs in ((0, 24, 16), (2, 12, 24), (4, 8, 12), (6, 4, 8), (7, 1, 4)):
        random.linear(f"layers.{i}", outputs, inputs)
    torch.save(random.tensors, folder / "aesthetic-model.pth")
    return folder


def hpsv2(folder: Path, size: Size = SMALL) -> Path:
    """open_clip's ViT-H/14 made small: heads of 80 and 64 as there, the tensors under `state_dict`."""
    vocabulary = byte_pairs(folder)
    image, text = 160 * size.times, 128 * size.times
    random = Weights(4)
    random.add("visual.class_embedding", image)
    random.add("visual.positional_embedding", size.positions, image)
    random.add("visual.proj", image, 48, std=image**-0.5)
    random.add("visual.conv1.weight", image, 3, PATCH, PATCH, std=(3 * PATCH * PATCH) ** -0.5)
    random.norm("visual.ln_pre", image)
    random.norm("visual.ln_post", image)
    random.add("positional_embedding", 77, text)
    random.add("text_projection", text, 48, std=text**-0.5)
    random.add("token_embedding.weight", vocabulary, text)
    random.norm("ln_final", text)
    for prefix, width, layers in (
        ("visual.transformer.", image, size.layers + 1),
        ("transformer.", text, size.layers),
    ):
        for i in range(layers):
            block = f"{prefix}resblocks.{i}."
            random.norm(block + "ln_1", width)
            random.norm(block + "ln_2", width)
            random.add(block + "attn.in_proj_weight", 3 * width, width, std=width**-0.5)
            random.add(block + "attn.in_proj_bias", 3 * width)
            random.linear(block + "attn.out_proj", width, width)
            random.linear(block + "mlp.c_fc", 2 * width, width)
            random.linear(block + "mlp.c_proj", width, 2 * width)
    random.tensors["logit_scale"] = torch.tensor(100.0).log()
    torch.save({"epoch": 1, "name": "hps", "state_dict": random.tensors}, folder / "HPS_v2.1_compressed.pt")
    return folder


def image_reward(folder: Path, size: Size = SMALL) -> Path:
    """ImageReward made small: image heads of 64 as in ViT-L; a bare state dictionary with `position_ids` in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*WORDS, ""]))
    tokens = len(WORDS) + 2  # [DEC] and [ENC] come behind the words
    width, text = 128 * size.times, 32 * size.times
    config = {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": tokens, "hidden_size": text}
    config |= {"num_attention_heads": 2 * size.times, "num_hidden_layers": size.layers, "intermediate_size": 2 * text}
    config |= {"max_position_embeddings": 64, "layer_norm_eps": 1e-12, "pad_token_id": 0, "hidden_act": "gelu"}
    config |= {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.02}
    config |= {"type_vocab_size": 2, "add_cross_attention": True, "encoder_width": 768}
    (folder / "med_config.json").write_text(json.dumps(config))
    random = Weights(5)
    blip_vision(random, "blip.visual_encoder.", width, size)
    blip_text(random, "blip.text_encoder.", text, width, tokens, size.layers)
    random.linear("blip.vision_proj", 16, width)
    random.linear("blip.text_proj", 16, text)
    for i, outputs, inputs in ((0, 24, text), (2, 12, 24), (4, 8, 12), (6, 4, 8), (7, 1, 4)):
        random.linear(f"mlp.layers.{i}", outputs, inputs)
    torch.save(random.tensors, folder / "ImageReward.pt")
    return folder


def blip_vision(random: Weights, prefix: str, width: int, size: Size) -> None:
    random.add(prefix + "cls_token", 1, 1, width)
    random.add(prefix + "pos_embed", 1, size.positions, width)
    random.add(prefix + "patch_embed.proj.weight", width, 3, PATCH, PATCH, std=(3 * PATCH * PATCH) ** -0.5)
    random.add(prefix + "patch_embed.proj.bias", width)
    for i in range(size.layers):
        block = f"{prefix}blocks.{i}."
        random.norm(block + "norm1", width)
        random.norm(block + "norm2", width)
        random.linear(block + "attn.qkv", 3 * width, width)
        random.linear(block + "attn.proj", width, width)
        random.linear(block + "mlp.fc1", 4 * width, width)
        random.linear(block + "mlp.fc2", width, 4 * width)
    random.norm(prefix + "norm", width)


def blip_text(random: Weights, prefix: str, width: int, vision: int, tokens: int, layers: int) -> None:
    random.tensors[prefix + "embeddings.position_ids"] = torch.arange(64)[None]
    random.add(prefix + "embeddings.word_embeddings.weight", tokens, width)
    random.add(prefix + "embeddings.position_embeddings.weight", 64, width)
    random.norm(prefix + "embeddings.LayerNorm", width)
    for i in range(layers):
        layer = f"{prefix}encoder.layer.{i}."
        for attention, inputs in (("attention", width), ("crossattention", vision)):
            random.linear(f"{layer}{attention}.self.query", width, width)
            random.linear(f"{layer}{attention}.self.key", width, inputs)
            random.linear(f"{layer}{attention}.self.value", width, inputs)
            random.linear(f"{layer}{attention}.output.dense", width, width)
            random.norm(f"{layer}{attention}.output.LayerNorm", width)
        random.linear(layer + "intermediate.dense", 2 * width, width)
        random.linear(layer + "output.dense", width, 2 * width)
        random.norm(layer + "output.LayerNorm", width)


CHECKPOINTS = {
    "clip_score": lambda folder, size=SMALL: clip(folder, size, legacy=True),
    "pickscore": pickscore,
    "hpsv2": hpsv2,
    "image_reward": image_reward,
    "aesthetic": aesthetic,
}
WEIGHT_FILES = {
    "clip_score": "model.safetensors",
    "pickscore": "model.safetensors",
    "hpsv2": "HPS_v2.1_compressed.pt",
    "image_reward": "ImageReward.pt",
    "aesthetic": "aesthetic-model.pth",
}
