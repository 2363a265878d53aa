from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from prx_post.model.checkpoint import inspect
from prx_post.model.codec import LatentCodec, to_images, to_pixels


def test_pixels_of_a_image_of_the_right_size_are_its_values_scaled():
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


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 2.0), (None, 4.0)])
def test_latents_are_shifted_then_scaled_and_back(shift, scale):
    """A VAE that halves: pixel 0.8 is z = 0.4; the model sees (0.4 - shift)·scale."""

    class AutoencoderKL(torch.nn.Module):
        config = SimpleNamespace(scaling_factor=scale, shift_factor=shift)
        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, pixels):
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels / 2))

        def decode(self, z, return_dict):
            return (z * 2,)

    codec = LatentCodec(AutoencoderKL())
    latents = codec.encode(torch.full((1, 3, 1, 1), 0.8))
    assert latents.flatten().tolist() == pytest.approx([-0.2 if shift else 1.6] * 3)  # (0.4 - 0.5)·2, 0.4·4
    assert codec.decode(latents).flatten().tolist() == pytest.approx([0.8] * 3)


def test_both_variants_encode_to_the_shape_that_the_pipeline_denoises(base, dc_ae_pipeline):
    pixels = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for folder in (base, dc_ae_pipeline):
        pipeline = inspect(folder)
        assert LatentCodec(pipeline.load_vae()).encode(pixels).shape == (2, *pipeline.latent_shape(32, 64))


def test_the_embedded_vae_keeps_real_handwriting_legible(base):
    from prx_post.rewards import registry as rewards
    from tests.conftest import numbered_images

    images = numbered_images(list(range(200, 248)), seed=4)
    codec = LatentCodec(inspect(base).load_vae())
    pixels = torch.stack([to_pixels(p.image, 32, 64) for p in images])
    decoded = to_images(codec.decode(codec.encode(pixels)))
    prompts = [p.prompt for p in images]
    score = rewards.load("judge_exact")
    assert score(decoded, prompts).mean() >= score([p.image for p in images], prompts).mean() - 0.03
