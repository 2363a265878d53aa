import math

import pytest
import torch
from PIL import Image

from prx_post.base.errors import PrxPostError
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.rewards.judges.judge_answers import DEFAULT_TEMPLATE, fill_template, parse_answer, read_template
from prx_post.rewards.judges.pairwise import JudgeCounts, PointwiseJudge, compare_groups, position_bias
from prx_post.rewards.judges.vision_judge import VisionJudge


def flat(*reds):
    return [Image.new("RGB", (4, 4), (red, 0, 0)) for red in reds]


class Redness:
    """The red of an image, or twice that for the prompt `twice`; counts the images it was asked for."""

    identity = "redness"

    def __init__(self):
        self.asked = 0

    def check(self, prompts):
        if "blue" in prompts:
            raise PrxPostError("blue cannot be scored")

    def __call__(self, images, prompts):
        self.asked += len(images)
        scale = {"twice": 2.0}
        return torch.tensor(
            [image.getpixel((0, 0))[0] * scale.get(p, 1.0) for image, p in zip(images, prompts, strict=True)]
        )


def test_a_pointwise_judge_is_the_sigmoid_of_the_difference_over_the_temperature():
    judge = PointwiseJudge(Redness(), temperature=2.0)
    wins = judge(["x"] * 3, flat(3, 1, 5), flat(1, 3, 5))
    # (3 - 1) / 2 = 1 and its opposite; equal scores are ½
    assert wins.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1)), 0.5], rel=1e-6)
    assert wins.dtype == torch.float32
    assert judge.counts == JudgeCounts(comparisons=3, asked=3, ties=1, first_place_wins=1, second_place_wins=1)


def test_temperature_zero_compares_and_a_negative_one_is_refused():
    judge = PointwiseJudge(Redness(), temperature=0)
    assert judge(["x"] * 3, flat(3, 1, 5), flat(1, 3, 5)).tolist() == [1.0, 0.0, 0.5]
    with pytest.raises(PrxPostError, match="temperature is -1, but must be 0 or more"):
        PointwiseJudge(Redness(), temperature=-1)


def test_a_pointwise_judge_scores_each_image_of_a_prompt_once():
    reward = Redness()
    images = flat(1, 2, 3)
    compare_groups(PointwiseJudge(reward), ["x", "y"], [images, images])
    assert reward.asked == 6  # 3 images for each of 2 prompts, though each stands in two comparisons
    wins = PointwiseJudge(reward, 0.0)(["x", "twice"], [images[2], images[1]], [images[1], images[2]])
    assert wins.tolist() == [1.0, 0.0]


def test_a_pointwise_judge_knows_what_its_reward_cannot_score():
    judge = PointwiseJudge(Redness())
    assert judge.identity == "pointwise at 1.0 of redness"
    judge.check(["red"])
    with pytest.raises(PrxPostError, match="blue"):
        judge.check(["blue"])


def test_unequal_numbers_of_images_are_an_error_and_none_are_none():
    with pytest.raises(PrxPostError, match="got 2 first and 1 second images"):
        PointwiseJudge(Redness())(["x"] * 2, flat(1, 2), flat(1))
    assert PointwiseJudge(Redness())([], [], []).shape == (0,)


class Table:
    """Answers from a table; remembers what it was asked."""

    identity = "table"

    def __init__(self, answers):
        self.answers, self.calls, self.counts = answers, [], JudgeCounts()

    def check(self, prompts):
        pass

    def __call__(self, prompts, first, second):
        reds = [[image.getpixel((0, 0))[0] for image in images] for images in (first, second)]
        self.calls.append(list(zip(prompts, *reds, strict=True)))
        return torch.tensor(self.answers)


def test_groups_are_compared_two_by_two_in_one_call():
    judge = Table([0.75, 1.0, 0.25, 0.0, 0.5, 1.0])
    first_wins = compare_groups(judge, ["same", "same"], [flat(1, 2, 3), flat(4, 5, 6)])
    couples = [("same", 1, 2), ("same", 1, 3), ("same", 2, 3), ("same", 4, 5), ("same", 4, 6), ("same", 5, 6)]
    assert judge.calls == [couples]  # two groups of one prompt's text stay two groups
    expected = [
        [[0.5, 0.75, 1.0], [0.25, 0.5, 0.25], [0.0, 0.75, 0.5]],
        [[0.5, 0.0, 0.5], [1.0, 0.5, 1.0], [0.5, 0.0, 0.5]],
    ]
    assert first_wins.tolist() == expected
    assert first_wins.dtype == torch.float32


@pytest.mark.parametrize(("prompts", "sizes"), [(["a"], [2, 2]), (["a", "b"], [2, 3]), (["a"], [1]), ([], [])], ids=str)
def test_groups_that_cannot_be_compared_are_refused(prompts, sizes):
    with pytest.raises(PrxPostError, match="one group a prompt, all of the same size, 2 or more"):
        compare_groups(Table([1.0]), prompts, [flat(*range(size)) for size in sizes])


@pytest.mark.parametrize(
    ("answers", "message"),
    [([1.5], "outside"), ([-0.1], "outside"), ([math.nan], "gave nan"), ([0.5, 0.5], "shape")],
)
def test_a_judge_that_gives_no_probabilities_is_named(answers, message):
    with pytest.raises(PrxPostError, match=message):
        compare_groups(Table(answers), ["a"], [flat(1, 2)])


def test_position_bias_is_the_first_places_share_of_what_was_decided():
    assert position_bias(JudgeCounts(first_place_wins=9, second_place_wins=3, ties=100)) == 0.75
    assert position_bias(JudgeCounts(ties=4)) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>Image 1</answer>", 1.0),
        ("Both have merits.\n<answer>Image 2</answer>\n", 0.0),
        ("<think>Image 1? <answer>Image 1</answer>? No.</think><answer> Image 2 is better. </answer>", 0.0),
        ("thinking without its opening tag</think><ANSWER>tie</ANSWER>", 0.5),
        ("", None),
        ("Image 1", None),
        ("<answer>Image 3</answer>", None),
        ("<answer>Image 1 or Image 2</answer>", None),
        ("<answer>not Image 1</answer>", None),
        ("<answer>Image 1</answer><answer>Image 2</answer>", None),
        ("<answer>Image 1</answer> though Image 2 is good, too", None),
        ("<think>I would say <answer>Image 1</answer>", None),
        ("<answer>Image 1", None),
    ],
)
def test_an_answer_is_read_only_where_it_is_one(text, answer):
    assert parse_answer(text) == answer


def test_the_prompt_is_put_into_the_template_as_it_is(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text("\ufeffWhich shows {prompt} {better}?", encoding="utf-8")
    assert fill_template(read_template(str(path)), "a {cube} {prompt}") == "Which shows a {cube} {prompt} {better}?"
    assert DEFAULT_TEMPLATE.count("{prompt}") == 1
    for line in DEFAULT_TEMPLATE.splitlines()[-3:]:
        assert parse_answer(line) is not None


CONFIG = {"judge_url": "http://127.0.0.1:1/v1", "judge_model": "m", "judge_cache_dir": None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"judge_url": "localhost:8000/v1"}, "must be an http:// or https:// URL"),
        ({"judge_url": "http://h:8000/v1?x=1"}, "URL without a query"),
        ({"judge_url": "http://h:99999/v1"}, "must be an http:// or https:// URL"),
        ({"judge_model": None}, "judge_model is None, but must be set"),
        ({"judge_max_tokens": 0}, "judge_max_tokens is 0, but must be above 0"),
        ({"judge_concurrency": 0}, "judge_concurrency is 0"),
        ({"judge_timeout_s": 0.0}, "judge_timeout_s is 0.0"),
        ({"judge_backoff_s": -1.0}, "judge_backoff_s is -1.0, but must be 0 or more"),
        ({"judge_max_unparsable_fraction": 1.5}, "must be between 0 and 1"),
        ({"judge_prompt_price": 1.0}, "judge_prompt_price is 1.0, but must be set together with it"),
        ({"judge_prompt_price": -1.0, "judge_completion_price": 1.0}, "judge_prompt_price is -1.0"),
        ({"judge_seed": "one"}, "judge_seed is 'one', but must be a whole number"),
        ({"judge_template_file": "nowhere.txt"}, "cannot be read: No such file"),
    ],
)
def test_a_vision_judge_that_cannot_work_is_refused_when_it_is_configured(values, message):
    with pytest.raises(PrxPostError, match=message):
        VisionJudgeConfig(**{**CONFIG, **values})


def test_a_template_without_the_prompt_is_refused(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text("Which is better?")
    with pytest.raises(PrxPostError, match="must hold {prompt} because the judge has to know the prompt"):
        VisionJudgeConfig(**CONFIG, judge_template_file=str(path))
    path.write_bytes(b"\xff{prompt}")
    with pytest.raises(PrxPostError, match="it is not UTF-8"):
        VisionJudgeConfig(**CONFIG, judge_template_file=str(path))


def test_a_password_in_the_url_is_refused_and_not_repeated():
    with pytest.raises(PrxPostError, match="has a user name") as error:
        VisionJudgeConfig(judge_url="https://me:hunter2@host/v1", judge_model="m")
    assert "hunter2" not in str(error.value)


def test_without_a_url_there_is_a_configuration_but_no_judge():
    with pytest.raises(PrxPostError, match="judge_url is None, but must be set"):
        VisionJudge(VisionJudgeConfig())


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    endpoint = VisionJudgeConfig(**CONFIG).endpoint()
    assert endpoint.api_key == "sk-secret"
    assert "sk-secret" not in repr(endpoint)
    assert VisionJudgeConfig(**CONFIG, judge_api_key_env=None).endpoint().api_key is None
    monkeypatch.setenv("OPENAI_API_KEY", "sk sécret")
    with pytest.raises(PrxPostError, match="the value of OPENAI_API_KEY is no API key") as error:
        VisionJudgeConfig(**CONFIG).endpoint()
    assert "cret" not in str(error.value)


def test_openais_key_does_not_travel_in_the_clear_to_another_machine(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("JUDGE_KEY", "own")
    remote = {**CONFIG, "judge_url": "http://node7:8000/v1"}
    with pytest.raises(PrxPostError, match="OPENAI_API_KEY would travel in the clear"):
        VisionJudgeConfig(**remote).endpoint()
    assert VisionJudgeConfig(**remote, judge_api_key_env="JUDGE_KEY").endpoint().api_key == "own"
    assert VisionJudgeConfig(**{**CONFIG, "judge_url": "https://node7/v1"}).endpoint().api_key == "sk-secret"
