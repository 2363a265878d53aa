import numpy as np
import pytest
import torch
from PIL import Image

from prx_post.model.checkpoint import inspect
from prx_post.model.codec import LatentCodec, to_images, to_pixels


def test_pixels_of_a_picture_of_the_right_size_are_its_values_scaled():
    image = Image.fromarray(np.array([[[0, 127, 255]]], np.uint8))
    assert to_pixels(image, 1, 1).flatten().tolist() == pytest.approx([-1.0, 127 / 127.5 - 1, 1.0])


def test_other_sizes_are_scaled_to_cover_and_cropped_in_the_middle():
    # 6 wide, 2 high, thirds black, white, black: a 2×2 crop shows the white third
    strip = np.zeros((2, 6, 3), np.uint8)
    strip[:, 2:4] = 255
    pixels = to_pixels(Image.fromarray(strip), 2, 2)
    assert pixels.shape == (3, 2, 2)
    assert (pixels == 1).all()


def test_images_round_and_clip_and_survive_the_way_there_and_back():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert np.asarray(to_images(pixels)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(to_images(to_pixels(image, 4, 4)[None])[0]), np.asarray(image))


def test_latents_follow_the_pipelines_scaling_for_kl_and_dc_ae(base, dc_ae_pipeline):
    pixels = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for folder in (base, dc_ae_pipeline):
        pipeline = inspect(folder)
        vae = pipeline.load_vae()
        codec = LatentCodec(vae)
        latents = codec.encode(pixels)
        assert latents.shape == (2, *pipeline.latent_shape(32, 64))
        with torch.no_grad():
            encoded = vae.encode(pixels)
            raw = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            # what PRXPipeline does before decoding, undone: z = latents / scale + shift
            assert torch.allclose(latents / vae.config.scaling_factor + shift, raw, atol=1e-5)
            assert torch.equal(codec.decode(latents), vae.decode(latents / vae.config.scaling_factor + shift).sample)


def test_the_embedded_vae_keeps_real_handwriting_legible(base):
    from prx_post.rewards import base as rewards
    from tests.conftest import numbered_pictures

    pictures = numbered_pictures(list(range(200, 248)), seed=4)
    codec = LatentCodec(inspect(base).load_vae())
    pixels = torch.stack([to_pixels(p.image, 32, 64) for p in pictures])
    decoded = to_images(codec.decode(codec.encode(pixels)))
    prompts = [p.prompt for p in pictures]
    score = rewards.load("judge_exact")
    assert score(decoded, prompts).mean() >= score([p.image for p in pictures], prompts).mean() - 0.03
