"""The embedded world's tokenizer and T5Gemma encoder.

The encoder learns what numbers mean the way T5Gemma did, from a sequence-to-sequence task: read a caption in any
language, write the number in digits. Only training numbers are used. The decoder is then dropped.
"""

import math
import random

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import GemmaTokenizerFast
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig, T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaForConditionalGeneration

from prx_post.rewards.scorers.numbers import FORMS, caption
from prx_post.tiny.world import split_of_numbers

VOCABULARY = 320
MAX_LENGTH = 24
PAD, EOS, BOS, UNK = 0, 1, 2, 3
TEXT_WIDTH = 128


def train_tokenizer() -> GemmaTokenizerFast:
    """Byte-pair tokenizer with Gemma's conventions: `▁` for spaces, digits one by one, <bos> in front, 24 tokens."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(all_train_captions(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return GemmaTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, padding_side="right", **names)


def all_train_captions() -> list[str]:
    return [caption(number, form) for number in split_of_numbers()["train"] for form in FORMS]


def new_language_model(vocabulary: int) -> T5GemmaForConditionalGeneration:
    """Two encoder layers of width 128, and a one-layer decoder that only exists while they learn."""

    def module(layers: int, **kwargs) -> T5GemmaModuleConfig:
        return T5GemmaModuleConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=192,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            query_pre_attn_scalar=32,
            max_position_embeddings=256,
            sliding_window=256,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=BOS,
            **kwargs,
        )

    config = T5GemmaConfig(encoder=module(2), decoder=module(1, is_decoder=True), vocab_size=vocabulary)
    return T5GemmaForConditionalGeneration(config)


def train_language_model(
    tokenizer: GemmaTokenizerFast, steps: int, batch_size: int, seed: int, log
) -> T5GemmaForConditionalGeneration:
    """Teach the model to write a caption's number in digits. Logs held-out accuracy by digit at the end."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = new_language_model(len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
    numbers = split_of_numbers()["train"]
    for step in range(1, steps + 1):
        batch = [rng.choice(numbers) for _ in range(batch_size)]
        loss = model(**number_reading_batch(tokenizer, batch, [rng.choice(FORMS) for _ in batch])).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            log({"part": "language", "step": step, "loss": round(loss.item(), 4)})
    log({"part": "language", "held_out_exact": reading_accuracy(model.eval(), tokenizer)})
    return model


def number_reading_batch(tokenizer, numbers: list[int], forms: list[str]) -> dict[str, torch.Tensor]:
    captions = [caption(n, form).lower() for n, form in zip(numbers, forms, strict=True)]
    inputs = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    answers = [[*tokenizer(str(n), add_special_tokens=False).input_ids, EOS] for n in numbers]
    labels = torch.tensor([ids + [-100] * (4 - len(ids)) for ids in answers])
    return {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask, "labels": labels}


@torch.no_grad()
def reading_accuracy(model: T5GemmaForConditionalGeneration, tokenizer) -> float:
    """Fraction of held-out captions whose every answer token is right, teacher forced."""
    pairs = [(n, form) for n in split_of_numbers()["test"] for form in FORMS]
    batch = number_reading_batch(tokenizer, [n for n, _ in pairs], [form for _, form in pairs])
    predicted = model(**batch).logits.argmax(-1)
    right = ((predicted == batch["labels"]) | (batch["labels"] == -100)).all(1)
    return round(right.float().mean().item(), 4)
