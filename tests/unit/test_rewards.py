import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from prx_post.config import PrxPostError
from prx_post.rewards import base
from prx_post.rewards.ctc import LOG_FLOOR, greedy_text, log_prob
from prx_post.rewards.ocr import wanted_text
from prx_post.tiny.pictures import write_number


def test_greedy_reading_merges_repeats_and_keeps_those_with_a_blank_between():
    # columns: a a blank a b b -> "aab"
    path = [1, 1, 0, 1, 2, 2]
    log_probs = torch.full((6, 3), -10.0)
    log_probs[range(6), path] = -0.01
    assert greedy_text(log_probs, "ab") == "aab"


def test_ctc_probability_is_the_sum_over_all_alignments():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.2, 0.4]])

    def collapse(path):
        return "".join("ab"[c - 1] for i, c in enumerate(path) if c and (i == 0 or c != path[i - 1]))

    total = sum(
        math.prod(probabilities[i, c].item() for i, c in enumerate(path))
        for path in itertools.product(range(3), repeat=3)
        if collapse(path) == "ab"
    )
    assert log_prob(probabilities.log(), "ab", "ab") == pytest.approx(math.log(total) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("472", "472"), ("Trois cent six", "306"), ('a shop sign that says "Open 24h"', "Open 24h")],
)
def test_the_text_asked_for_is_quoted_or_a_number(prompt, text):
    assert wanted_text(prompt) == text


def test_a_prompt_without_text_is_an_error():
    with pytest.raises(PrxPostError, match="'a red cube' has no text to read"):
        wanted_text("a red cube")


@pytest.fixture(scope="module")
def real_handwriting():
    rng = np.random.default_rng(3)
    numbers = [int(n) for n in rng.integers(10, 1000, size=128)]
    return [write_number(n, "reference", rng) for n in numbers], [str(n) for n in numbers]


@pytest.mark.parametrize("name", ["ocr_exact", "judge_exact"])
def test_real_handwriting_is_read_right_and_wrong_prompts_score_nothing(name, real_handwriting):
    images, prompts = real_handwriting
    reward = base.load(name)
    scores = reward(images, prompts)
    assert scores.dtype == torch.float32
    assert scores.mean() > 0.9
    others = [str(int(p) + 1) for p in prompts]
    assert reward(images, others).mean() < 0.05


@pytest.mark.parametrize("name", ["ocr_graded", "judge_graded"])
def test_graded_scores_separate_right_from_wrong_even_through_noise(name, real_handwriting):
    images, prompts = real_handwriting
    noise = np.random.default_rng(0).normal(0, 60, size=(32, 64, 3))
    noisy = [Image.fromarray((np.asarray(i) + noise).clip(0, 255).astype(np.uint8)) for i in images]
    reward = base.load(name)
    right = reward(noisy, prompts)
    wrong = reward(noisy, [str(10 + (int(p) + 387) % 990) for p in prompts])
    assert (right <= 0).all()
    assert (right > wrong).float().mean() > 0.95


def test_general_text_is_read_too():
    from PIL import ImageDraw, ImageFont

    image = Image.new("RGB", (200, 48), "white")
    ImageDraw.Draw(image).text((8, 4), "Open late", fill="black", font=ImageFont.load_default(size=34))
    assert base.load("ocr_exact")([image], ['a sign that says "Open late"']).item() == 1.0


def test_a_score_does_not_depend_on_the_other_prompts_of_the_call(real_handwriting):
    images, prompts = real_handwriting
    for name in ("ocr_exact", "ocr_graded"):
        reward = base.load(name)
        alone = reward(images[:2], prompts[:2])
        among = reward(images[:3], [*prompts[:2], 'a sign that says "Open late"'])
        assert torch.allclose(alone, among[:2], atol=1e-5)


def test_a_text_too_long_for_the_picture_scores_the_floor_not_minus_infinity(real_handwriting):
    images, _ = real_handwriting
    score = base.load("ocr_graded")(images[:1], [f'"{"1" * 40}"']).item()
    assert score == pytest.approx(LOG_FLOOR)


def test_prompts_that_cannot_be_scored_are_found_before_any_picture():
    with pytest.raises(PrxPostError, match="reads digits only"):
        base.load("judge_exact").check(['a sign that says "open"'])
    with pytest.raises(PrxPostError, match="cannot read '\\U0001fae0'"):
        base.load("ocr_exact").check(['a sign that says "\U0001fae0"'])
    base.load("ocr_exact").check(["472", 'a sign that says "open"'])


def test_pictures_of_several_sizes_are_scored_in_their_order(real_handwriting):
    images, prompts = real_handwriting
    mixed = [image.resize((128, 64)) if i % 2 else image for i, image in enumerate(images[:16])]
    assert base.load("ocr_exact")(mixed, prompts[:16]).sum() >= 13


def test_unknown_names_and_unequal_counts_are_errors(real_handwriting):
    with pytest.raises(PrxPostError, match="Did you mean 'ocr_exact'"):
        base.load("ocr_exakt")
    images, prompts = real_handwriting
    for name in ("ocr_exact", "judge_exact"):
        with pytest.raises(PrxPostError, match="got 3 pictures, but must get as many as prompts"):
            base.load(name)(images[:3], prompts[:2])
