"""Encoding several images or prompts at a time, in this process and in workers."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from prx_post.data.encoders import Cleaned, Encoders
from prx_post.data.scan import Sample
from prx_post.model.checkpoint import open_pipeline
from prx_post.model.text import PromptCleaner, count_tokens

CPU = torch.device("cpu")
PROMPTS = ["12", "three hundred and nine", "quatre-vingt-dix-sept", "7", "", "one two three " * 30]


class Rows:
    """Noise of these sizes; one that is no image where the size is None."""

    def __init__(self, sizes):
        generator = np.random.default_rng(0)
        self.files = [None if size is None else png(generator.integers(0, 256, (*size, 3))) for size in sizes]

    def image_bytes(self, row):
        return self.files[row] or b"no image"


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def encoders(dtype=torch.float32, **options):
    return Encoders(open_pipeline("tiny"), PromptCleaner(), CPU, dtype, **options)


def embeddings(dtype=torch.float32, **options):
    made = encoders(dtype, **options)
    counts = count_tokens(made.pipeline.load_tokenizer(), PROMPTS)
    texts = {prompt: Cleaned(prompt, count) for prompt, count in zip(PROMPTS, counts, strict=True)}
    return dict(made.embeddings_of(texts))


def test_prompts_together_have_the_embeddings_of_each_alone_but_for_rounding():
    alone, together = embeddings(), embeddings(batch_size=4)
    assert set(together) == set(PROMPTS)
    for prompt in PROMPTS:
        assert together[prompt].shape == alone[prompt].shape
        torch.testing.assert_close(together[prompt], alone[prompt], rtol=0, atol=1e-5)
        assert torch.equal(alone[prompt], encoders().prompts(prompt))


def test_in_bfloat16_prompts_together_differ_by_a_few_roundings():
    alone, together = embeddings(torch.bfloat16), embeddings(torch.bfloat16, batch_size=4)
    for prompt in PROMPTS:
        scale = alone[prompt].float().std()
        assert (together[prompt].float() - alone[prompt].float()).abs().max() < 0.1 * scale


def samples_of(sizes):
    return [Sample(i, "", size, f"i{i}", "") for i, size in enumerate(sizes)]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_together_have_the_latents_of_each_alone_but_for_rounding(workers):
    rows = Rows([(32, 64), (64, 32), None, (40, 100), (32, 64), (64, 32)])
    samples = samples_of([(32, 64), (64, 32), (32, 64), (32, 64), (32, 64), (64, 32)])
    made = encoders(batch_size=3, num_workers=workers)
    together = {sample.row: found for sample, found in made.latents_of(samples, rows)}
    assert sorted(together) == list(range(6))
    assert together.pop(2) == "no image format that Pillow knows"
    for row, latents in together.items():
        alone = made.latents(rows.image_bytes(row), samples[row].size)
        torch.testing.assert_close(latents, alone, rtol=0, atol=1e-5)


def test_one_at_a_time_is_the_same_to_the_bit_with_workers_and_without():
    rows, samples = Rows([(32, 64), (50, 90)]), samples_of([(32, 64), (32, 64)])
    here = [latents for _, latents in encoders().latents_of(samples, rows)]
    there = [latents for _, latents in encoders(num_workers=2).latents_of(samples, rows)]
    for row, (one, other) in enumerate(zip(here, there, strict=True)):
        assert torch.equal(one, other)
        assert torch.equal(one, encoders().latents(rows.image_bytes(row), (32, 64)))
