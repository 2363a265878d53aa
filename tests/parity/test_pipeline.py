"""Our sampling and prompt encoding against stock PRXPipeline."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PRXPipeline

from prx_post.data.encoders import Encoders
from prx_post.flow import seeded_noise
from prx_post.model.checkpoint import load
from prx_post.model.sampler import Sampler, build_sampler, generate_images
from prx_post.model.text import PromptCleaner, PromptEncoder

SIZE = (32, 64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipe(base):
    pipe = PRXPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_latents(pipe, prompt, seed, steps, guidance):
    return pipe(
        prompt,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        use_resolution_binning=False,
        output_type="latent",
    ).images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 28])
def test_our_euler_sampler_equals_the_pipeline(pipe, base, guidance, steps):
    checkpoint = load(str(base))
    encoders = Encoders(checkpoint.pipeline, PromptCleaner(), CPU, torch.float32)
    sampler = build_sampler(checkpoint, SIZE, steps, guidance, CPU)
    ours = sampler.latents([encoders.prompts("trois cent six")], encoders.prompts(""), [11])
    theirs = pipeline_latents(pipe, "trois cent six", 11, steps, guidance)
    # Both run the same network on the same noise. What differs is rounding: the pipeline passes sigma·1000/1000, a
    # relative error of 1e-7 in t, which 28 steps of a network with gain about 1 amplify to some 1e-5.
    assert (ours - theirs).abs().max().item() < 2e-4
    assert theirs.std() > 0.3


@pytest.mark.parametrize("noise_level", [0.0, 0.4, 1.0])
def test_the_documented_scheduler_makes_stock_diffusers_sample_as_cps_does(base, monkeypatch, noise_level):
    page = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text()
    block = next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "class CPSScheduler" in block)
    scope: dict = {}
    exec(block, scope)
    checkpoint = load(str(base))
    encoders = Encoders(checkpoint.pipeline, PromptCleaner(), CPU, torch.float32)
    sampler = build_sampler(checkpoint, SIZE, 4, 2.0, CPU, noise_level)
    ours = sampler.latents([encoders.prompts("472")], encoders.prompts(""), [11])

    pipe = PRXPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scope["CPSScheduler"].from_config(pipe.scheduler.config)
    pipe.scheduler.noise_level = noise_level
    first = seeded_noise([11], sampler.latent_shape)
    fresh = iter([sampler.fresh_noise([11], step) for step in (1, 2, 3, 4)])
    monkeypatch.setattr(torch, "randn", lambda shape: next(fresh))
    theirs = pipe(
        "472",
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=first,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    assert (ours - theirs).abs().max().item() < 2e-4  # rounding, as above
    assert theirs.std() > 0.3


def test_guidance_changes_the_image(pipe):
    plain, guided = (pipeline_latents(pipe, "472", 0, 4, g) for g in (1.0, 3.0))
    assert (plain - guided).abs().max() > 0.1


def test_a_batch_of_ours_equals_single_images_of_the_pipeline(pipe, base):
    checkpoint = load(str(base))
    encoders = Encoders(checkpoint.pipeline, PromptCleaner(), CPU, torch.float32)
    sampler = build_sampler(checkpoint, SIZE, 8, 3.0, CPU)
    prompts, seeds = ["472", "eighty-one", "306"], [3, 4, 5]
    ours = list(generate_images(sampler, encoders.prompts, encoders.codec.decode, prompts, seeds, batch_size=3))
    for prompt, seed, image in zip(prompts, seeds, ours, strict=True):
        theirs = pipe(
            prompt,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=8,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
            use_resolution_binning=False,
        ).images[0]
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(theirs).astype(int))
        assert difference.max() <= 1  # a value may round to the neighbouring one of 256


def test_the_dc_ae_variant_draws_what_the_pipeline_draws(dc_ae_pipeline):
    pipe = PRXPipeline.from_pretrained(dc_ae_pipeline)
    pipe.set_progress_bar_config(disable=True)
    checkpoint = load(str(dc_ae_pipeline))
    encoders = Encoders(checkpoint.pipeline, PromptCleaner(), CPU, torch.float32)
    sampler = build_sampler(checkpoint, SIZE, 4, 2.0, CPU)
    (ours,) = generate_images(sampler, encoders.prompts, encoders.codec.decode, ["472"], [5], 1)
    theirs = pipe(
        "472",
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(5),
        use_resolution_binning=False,
    ).images[0]
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 1
    assert np.asarray(theirs).std() > 5


PROMPTS = [
    "472",
    "Four Hundred and Seventy-Two",
    "  deux cent vingt-deux!!  ",
    "A sign: https://example.com/x &amp; 1234567",
    "neunhundertfünf",
    "",
    "word " * 60,  # longer than the tokenizer's 24 tokens
]


@pytest.mark.parametrize("skip_text_cleaning", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_embeddings_equal_the_pipelines_bit_for_bit(pipe, prompt, skip_text_cleaning):
    encoder = PromptEncoder(pipe.tokenizer, pipe.text_encoder, PromptCleaner(skip_text_cleaning))
    theirs, mask, _, _ = pipe.encode_prompt(
        prompt, device=CPU, do_classifier_free_guidance=False, skip_text_cleaning=skip_text_cleaning
    )
    ours = encoder(prompt)
    assert ours.shape[0] == mask.sum()
    assert torch.equal(ours, theirs[0, mask[0]])


def test_cleaning_matters_so_the_flag_must_match():
    cleaned, light = PromptCleaner(), PromptCleaner(skip_text_cleaning=True)
    assert cleaned("A <B> 1234567") != light("A <B> 1234567")
    assert cleaned.is_lost("一只猫")
    assert not light.is_lost("一只猫")
    assert not cleaned.is_lost("")


def test_padding_that_the_pipeline_feeds_does_not_change_the_velocity(pipe, base):
    """We train without the padding that the pipeline generates with: the mask must make it invisible."""
    checkpoint = load(str(base))
    embeds, mask, _, _ = pipe.encode_prompt("472", device=CPU, do_classifier_free_guidance=False)
    x, t = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    with torch.no_grad():
        padded = checkpoint.transformer(x, t, embeds, mask, return_dict=False)[0]
        trimmed = checkpoint.transformer(x, t, embeds[:, mask[0]], mask[:, mask[0]], return_dict=False)[0]
    assert (padded - trimmed).abs().max().item() < 1e-5  # fp32 rounding of a softmax over fewer terms


def test_sampler_is_exported_with_the_pipelines_padding(base):
    checkpoint = load(str(base))
    sampler = build_sampler(checkpoint, SIZE, 4, 1.0, CPU)
    assert isinstance(sampler, Sampler)
    assert sampler.pad_length == checkpoint.pipeline.load_tokenizer().model_max_length
