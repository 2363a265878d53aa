"""Prompts to embeddings, exactly as the pipeline makes them, and saving T5Gemma encoders so that they load again."""

import copy
import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

LENGTHS = 8
"""Prompts that are encoded together are padded to a multiple of this, so that a GPU sees few shapes."""


class PromptCleaner:
    """The pipeline's own prompt cleaning, once a prompt."""

    def __init__(self, skip_text_cleaning: bool = False) -> None:
        from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor

        preprocessor = TextPreprocessor()
        self.skip_text_cleaning = skip_text_cleaning
        self._clean = functools.cache(preprocessor.basic_clean if skip_text_cleaning else preprocessor.clean_text)

    def __call__(self, prompt: str) -> str:
        return self._clean(prompt)

    def is_lost(self, prompt: str) -> bool:
        """Whether cleaning leaves nothing of a prompt that had something (Chinese, for one, is stripped whole)."""
        return bool(prompt.strip()) and not self(prompt)

    def warn_of_lost(self, prompts: Iterable[str]) -> None:
        """Print a line for each prompt of which cleaning leaves nothing."""
        for prompt in dict.fromkeys(prompts):
            if self.is_lost(prompt):
                tqdm.write(f"warning: prompt cleaning leaves nothing of {prompt!r}; set skip_text_cleaning to keep it.")


@dataclass
class PromptEncoder:
    """Prompts -> embeddings with the pipeline's tokenizer, cleaner and encoder.

    The last bits of an embedding depend on the batch and the padding that it was computed with: encoded alone it is a
    function of the prompt, and the pipeline's own to the bit.
    """

    tokenizer: Any
    text_encoder: Any
    cleaner: PromptCleaner

    def __call__(self, prompt: str) -> Tensor:
        """Embedding of one prompt without its padding, [L, D] in the encoder's dtype, on the encoder's device."""
        return self.of_cleaned(self.cleaner(prompt))

    @torch.no_grad()
    def of_cleaned(self, cleaned_prompt: str) -> Tensor:
        """The same of a prompt that has been cleaned."""
        tokens = tokenize(self.tokenizer, cleaned_prompt)
        ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
        device = self.text_encoder.device
        output = self.text_encoder(input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True)
        return output["last_hidden_state"][0, mask[0].to(device)]

    @torch.no_grad()
    def together(self, cleaned_prompts: Sequence[str]) -> list[Tensor]:
        """Embeddings of cleaned prompts, each as one prompt's, padded to the longest of them alone."""
        tokens = self.tokenizer(
            list(cleaned_prompts),
            padding="longest",
            pad_to_multiple_of=LENGTHS,
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        mask = tokens["attention_mask"].bool()
        output = self.text_encoder(input_ids=tokens["input_ids"], attention_mask=mask, output_hidden_states=True)
        return [hidden[kept] for hidden, kept in zip(output["last_hidden_state"], mask, strict=True)]


def tokenize(tokenizer: Any, cleaned_prompt: str) -> dict[str, Tensor]:
    return tokenizer(
        [cleaned_prompt],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )


def count_tokens(tokenizer: Any, cleaned_prompts: Sequence[str]) -> list[int]:
    """How many each has before the tokenizer cuts it; there must be one at least."""
    return [len(ids) for ids in tokenizer(list(cleaned_prompts), truncation=False, verbose=False)["input_ids"]]


def pad_embeddings(embeddings: list[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Stack embeddings [L_i, D] into [B, L, D] with a bool mask [B, L]; L is `length` or the longest."""
    length = length or max(e.shape[0] for e in embeddings)
    padded = embeddings[0].new_zeros(len(embeddings), length, embeddings[0].shape[1])
    mask = torch.zeros(len(embeddings), length, dtype=torch.bool, device=padded.device)
    for i, embedding in enumerate(embeddings):
        padded[i, : embedding.shape[0]] = embedding
        mask[i, : embedding.shape[0]] = True
    return padded, mask


def save_text_encoder(text_encoder: Any, folder: Path) -> None:
    """Save a T5GemmaEncoder so that `from_pretrained` finds the composite config it expects.

    `T5GemmaEncoder.save_pretrained` alone writes the encoder's flat config, from which neither diffusers nor
    transformers can load it again. The decoder's part of the config is never built; it repeats the encoder's.
    """
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig

    text_encoder.save_pretrained(folder)
    flat: Any = text_encoder.config
    # Two copies: T5GemmaConfig marks the one it takes as decoder, which would turn the encoder's attention causal.
    composite = T5GemmaConfig(
        encoder=copy.deepcopy(flat),
        decoder=copy.deepcopy(flat),
        is_encoder_decoder=False,
        vocab_size=flat.vocab_size,
        architectures=["T5GemmaEncoder"],
    ).to_dict()
    for part in (composite, composite["encoder"], composite["decoder"]):
        part["_name_or_path"] = ""  # where it was loaded from says nothing about what it is
    composite["dtype"] = str(next(text_encoder.parameters()).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(composite, indent=2, sort_keys=True) + "\n")
