import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from prx_post.base.errors import PrxPostError
from prx_post.rewards import registry, reward
from prx_post.rewards.cache import CachedReward, ScoreCache
from prx_post.rewards.scorers.ctc import LOG_FLOOR, greedy_text, log_prob, similarity
from prx_post.rewards.scorers.ocr import wanted_text
from prx_post.tiny.handwriting import write_number


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
    reward = registry.load(name)
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
    reward = registry.load(name)
    right = reward(noisy, prompts)
    wrong = reward(noisy, [str(10 + (int(p) + 387) % 990) for p in prompts])
    assert (right <= 0).all()
    assert (right > wrong).float().mean() > 0.95


def test_general_text_is_read_too():
    from PIL import ImageDraw, ImageFont

    image = Image.new("RGB", (200, 48), "white")
    ImageDraw.Draw(image).text((8, 4), "Open late", fill="black", font=ImageFont.load_default(size=34))
    assert registry.load("ocr_exact")([image], ['a sign that says "Open late"']).item() == 1.0


def test_a_score_does_not_depend_on_the_other_prompts_of_the_call(real_handwriting):
    images, prompts = real_handwriting
    for name in ("ocr_exact", "ocr_graded"):
        reward = registry.load(name)
        alone = reward(images[:2], prompts[:2])
        among = reward(images[:3], [*prompts[:2], 'a sign that says "Open late"'])
        assert torch.allclose(alone, among[:2], atol=1e-5)


def test_a_text_too_long_for_the_image_scores_the_floor_not_minus_infinity(real_handwriting):
    images, _ = real_handwriting
    score = registry.load("ocr_graded")(images[:1], [f'"{"1" * 40}"']).item()
    assert score == pytest.approx(LOG_FLOOR)


def test_prompts_that_cannot_be_scored_are_found_before_any_image():
    with pytest.raises(PrxPostError, match="reads digits only"):
        registry.load("judge_exact").check(['a sign that says "open"'])
    with pytest.raises(PrxPostError, match="cannot read '\\U0001fae0'"):
        registry.load("ocr_exact").check(['a sign that says "\U0001fae0"'])
    registry.load("ocr_exact").check(["472", 'a sign that says "open"'])


def test_images_of_several_sizes_are_scored_in_their_order(real_handwriting):
    images, prompts = real_handwriting
    mixed = [image.resize((128, 64)) if i % 2 else image for i, image in enumerate(images[:16])]
    assert registry.load("ocr_exact")(mixed, prompts[:16]).sum() >= 13


def test_unknown_names_and_unequal_counts_are_errors(real_handwriting):
    with pytest.raises(PrxPostError, match="Did you mean 'ocr_exact'"):
        registry.load("ocr_exakt")
    images, prompts = real_handwriting
    for name in ("ocr_exact", "judge_exact"):
        with pytest.raises(PrxPostError, match="got 3 images, but must get as many as prompts"):
            registry.load(name)(images[:3], prompts[:2])


def flat(count):
    return [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(count)]


class Redness:
    """The red of an image's first pixel; counts the images it was asked for."""

    def __init__(self, identity="redness"):
        self.identity, self.asked = identity, 0

    def check(self, prompts):
        if "blue" in prompts:
            raise PrxPostError("blue cannot be scored")

    def __call__(self, images, prompts):
        self.asked += len(images)
        return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])


def test_ocr_similarity_is_one_minus_the_edit_distance_over_the_length():
    def reading(text):
        return torch.nn.functional.one_hot(torch.tensor([["-abcde".index(c) for c in text]])[0], 6).float().log()

    # kitten -> sitting style, by hand: "abd" to "abcd" is one insertion of 4 letters; "e" to "abcd" is 4 edits
    assert similarity(reading("ab-d"), "abcd", "abcde") == 0.75
    assert similarity(reading("abcd"), "abcd", "abcde") == 1.0
    assert similarity(reading("e---"), "abcd", "abcde") == 0.0
    assert similarity(reading("abcdeabc"), "ab", "abcde") == 0.0  # 6 insertions of 2 letters, no less than 0


def test_a_weighted_sum_keeps_the_parts():
    total = reward.WeightedSum({"a": Redness(), "b": Redness()}, [1.0, -0.5])
    parts = total.parts(flat(3), ["x"] * 3)
    assert list(parts) == ["a", "b"]
    assert total.combine(parts).tolist() == total(flat(3), ["x"] * 3).tolist() == [0.0, 0.5, 1.0]
    # 0, 1, 2: mean 1, population variance (1 + 0 + 1)/3
    assert reward.statistics(parts["a"]) == reward.Statistics(1.0, pytest.approx((2 / 3) ** 0.5), 0.0, 2.0)
    with pytest.raises(PrxPostError, match="blue"):
        total.check(["blue"])
    for weights in ([1.0], [1.0, math.nan]):
        with pytest.raises(PrxPostError, match="reward_weights"):
            reward.WeightedSum({"a": Redness(), "b": Redness()}, weights)


def test_scores_that_are_not_finite_or_too_few_are_refused():
    for scores, message in (([1.0, math.nan], "gave nan for image 1 of 2"), ([1.0], r"shape \(1,\) for 2 images")):
        with pytest.raises(PrxPostError, match=message):
            reward.checked(torch.tensor(scores), "mine", 2)


def test_a_cached_score_is_computed_once_per_image_prompt_and_reward(tmp_path):
    reward = Redness()
    cached = CachedReward(reward, "redness", ScoreCache(tmp_path))
    images = [*flat(3), *flat(1)]
    assert cached(images, ["x"] * 4).tolist() == [0.0, 1.0, 2.0, 0.0]
    assert reward.asked == 3
    again = CachedReward(reward, "redness", ScoreCache(tmp_path))  # as another process
    assert again(images[::-1], ["x"] * 4).tolist() == [0.0, 2.0, 1.0, 0.0]
    assert reward.asked == 3
    again(images[:1], ["y"])
    again(images[:1], ["x"])
    assert reward.asked == 4
    other = Redness("other weights")
    CachedReward(other, "redness", ScoreCache(tmp_path))(images[:1], ["x"])
    assert other.asked == 1


def test_a_torn_line_of_the_score_cache_costs_one_score(tmp_path):
    reward = Redness()
    CachedReward(reward, "redness", ScoreCache(tmp_path))(flat(3), ["x"] * 3)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    again = CachedReward(reward, "redness", ScoreCache(tmp_path))
    assert again(flat(3), ["x"] * 3).tolist() == [0.0, 1.0, 2.0]
    assert reward.asked == 4
    CachedReward(reward, "redness", ScoreCache(tmp_path))(flat(3), ["x"] * 3)
    assert reward.asked == 4


FUNCTIONS = """
def plain(images, prompts):
    return [float(i.width) for i in images]

def trl(prompts, completions, target, **kwargs):
    return [float(t) + len(kwargs) for t in target]

def short(images, prompts):
    return [0.0]

def words(images, prompts):
    return ["good"] * len(images)

def odd(images):
    return []
"""


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def test_a_users_function_is_a_reward_in_either_convention(functions):
    assert registry.load(f"{functions}:plain")(flat(2), ["a", "b"]).tolist() == [4.0, 4.0]
    columns = {"target": ["3", "5"], "group": ["x", "y"]}
    assert registry.load(f"{functions}:trl")(flat(2), ["a", "b"], columns).tolist() == [4.0, 6.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"gave scores of shape \(1,\) for 2 images"),
        ("words", "not a list of numbers"),
        ("odd", r"takes \(images\), but must take \(images, prompts\)"),
        ("gone", "has no function gone"),
    ],
)
def test_a_function_that_is_no_reward_is_named(functions, name, message):
    with pytest.raises(PrxPostError, match=message):
        registry.load(f"{functions}:{name}")(flat(2), ["a", "b"])


def test_a_file_that_cannot_be_imported_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("def (:\n")
    with pytest.raises(PrxPostError, match="cannot be imported"):
        registry.load(f"{tmp_path}/bad.py:score")
    with pytest.raises(PrxPostError, match="there is no file"):
        registry.load("nowhere.py:score")


@pytest.mark.parametrize(
    ("text", "label", "target"),
    [
        ("ocr", "ocr", "ocr"),
        ("my/taste.py:score", "score", "my/taste.py:score"),
        ("taste=my/taste.py:score", "taste", "my/taste.py:score"),
        ("http://gpu:8000/hpsv2", "hpsv2", "http://gpu:8000/hpsv2"),
        ("remote=https://gpu/a", "remote", "https://gpu/a"),
    ],
)
def test_a_reward_is_written_as_a_name_a_function_or_a_url(text, label, target):
    spec = registry.RewardSpec.parse(text)
    assert (spec.label, spec.target, spec.weights) == (label, target, None)


def test_rewards_that_cannot_be_told_apart_or_take_no_weights_are_refused():
    with pytest.raises(PrxPostError, match="distinctly named"):
        registry.parse_specs(["ocr", "http://gpu:8000/ocr"])
    with pytest.raises(PrxPostError, match="ocr takes no weights"):
        registry.parse_specs(["ocr=somewhere"])
