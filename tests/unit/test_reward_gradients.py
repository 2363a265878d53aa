"""Rewards that can be climbed: their scores of pixels are those of images, and their gradients those of differences."""

import numpy as np
import pytest
import torch
from PIL import Image

from prx_post.rewards import registry
from prx_post.rewards.reward import has_gradient
from prx_post.rewards.scorers.pixels import unit_range
from prx_post.tiny.handwriting import write_number
from tests.scorer_checkpoints import CHECKPOINTS

PROMPTS = ["a red cat", "blue"]
SIZES = {"as it is": (28, 28), "half a pixel off": (59, 28), "smaller": (61, 83), "larger": (20, 14)}


def images(size):
    """Smooth ones, which two filters of resizing agree on."""
    rng = np.random.default_rng(1)
    coarse = [Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)) for _ in PROMPTS]
    return [image.resize(size, Image.Resampling.BICUBIC) for image in coarse]


def reward_of(name, checkpoints):
    return registry.load(name, weights=str(checkpoints / name), device="cpu")


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_scores_of_pixels_are_those_of_the_images(name, size, checkpoints):
    reward, given = reward_of(name, checkpoints), images(size)
    pixels = torch.stack([unit_range(image) for image in given])
    with torch.no_grad():
        ours = reward.of_pixels(pixels, PROMPTS)
    theirs = reward(given, PROMPTS)
    spread = reward([*given, Image.new("RGB", size, "white")], [*PROMPTS, "blue"]).std()
    # PIL rounds after resizing, by up to 1/510 of the range; a wrong crop or channel order moves scores by their spread
    assert (ours - theirs).abs().max() < 0.03 * spread + 1e-4


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_gradient_is_that_of_finite_differences(name, checkpoints):
    reward = reward_of(name, checkpoints)
    pixels = torch.stack([unit_range(image) for image in images((40, 33))]).clamp(0.1, 0.9).requires_grad_()
    reward.of_pixels(pixels, PROMPTS).sum().backward()
    assert pixels.grad.abs().max() > 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        towards = torch.randn(pixels.shape, generator=generator)
        towards = torch.nn.functional.avg_pool2d(towards, 5, stride=1, padding=2)  # which survives the resizing
        with torch.no_grad():
            ahead, behind = (reward.of_pixels(pixels + h * towards, PROMPTS).sum() for h in (0.02, -0.02))
        measured = ((ahead - behind) / 0.04).item()
        expected = (pixels.grad * towards).sum().item()
        size = (pixels.grad.norm() * towards.norm()).item()
        assert measured == pytest.approx(expected, rel=0.05, abs=2e-3 * size)


def written(numbers):
    return [write_number(number, "judge", np.random.default_rng(number)) for number in numbers]


def test_the_embedded_judge_has_a_gradient_for_what_is_asked_for():
    judge, numbers = registry.load("judge_graded"), [472, 81, 306]
    given, prompts = written(numbers), [str(number) for number in numbers]
    pixels = torch.stack([unit_range(image) for image in given]).requires_grad_()
    ours, theirs = judge.of_pixels(pixels, prompts), judge(given, prompts)
    assert torch.allclose(ours, theirs, atol=0.01)
    ours.sum().backward()
    with torch.no_grad():
        climbed = judge.of_pixels((pixels + 0.02 * pixels.grad.sign()).clamp(0, 1), prompts)
    assert (climbed > ours).all()
    wrong = judge.of_pixels(pixels, ["999", "11", "555"])
    assert (wrong < ours - 1).all()
    assert torch.isfinite(wrong).all()


def test_only_rewards_with_a_network_of_torch_have_a_gradient(checkpoints):
    assert all(has_gradient(reward_of(name, checkpoints)) for name in CHECKPOINTS)
    assert has_gradient(registry.load("judge_graded"))
    assert not any(has_gradient(registry.load(name)) for name in ("judge_exact", "ocr_graded", "jpeg_compressibility"))
