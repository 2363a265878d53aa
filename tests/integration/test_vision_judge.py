"""The vision judge against a server on this machine, which answers, fails and lies as each test says."""

import threading

import pytest
import torch
from tqdm import TMonitor

from prx_post.base.errors import PrxPostError
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.rewards.judges.pairwise import compare_groups, position_bias
from prx_post.rewards.judges.vision_judge import VisionJudge
from tests.judging import DROP, answer, error, flat, judging, redder

KEY = "sk-secret"


@pytest.fixture
def server():
    with judging() as judge:
        yield judge


@pytest.fixture
def make(server, tmp_path, monkeypatch):
    """A judge of that server with the cache of the test; pauses are too short to notice."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def make_judge(**values):
        settings = {
            "judge_url": server.url,
            "judge_model": "red-lover",
            "judge_cache_dir": str(tmp_path / "judge"),
            "judge_backoff_s": 0.001,
            "judge_max_wait_s": 0.002,
        }
        return VisionJudge(VisionJudgeConfig(**{**settings, **values}))

    return make_judge


def test_images_are_shown_in_both_orders_and_the_answers_averaged(server, make):
    judge = make(judge_prompt_price=2.0, judge_completion_price=10.0)
    wins = judge(["a cube"] * 3, flat(9, 1, 5), flat(3, 7, 5))
    assert wins.tolist() == [1.0, 0.0, 0.5]
    assert wins.dtype == torch.float32
    assert sorted(server.asked) == [(1, 7), (3, 9), (5, 5), (7, 1), (9, 3)]
    counts = judge.counts
    assert (counts.comparisons, counts.asked, counts.ties, counts.unparsable) == (3, 5, 2, 0)
    assert (counts.first_place_wins, counts.second_place_wins, counts.contradictions) == (2, 2, 0)
    # 5 questions: 5 × 1000 prompt tokens at 2 a million and 5 × 100 completion tokens at 10 a million
    assert (counts.prompt_tokens, counts.completion_tokens) == (5000, 500)
    assert counts.cost == pytest.approx(5000 * 2e-6 + 500 * 10e-6)


def test_what_is_asked_is_the_models_with_temperature_zero(server, make, tmp_path):
    (tmp_path / "template.txt").write_text("Better for {prompt}?")
    judge = make(judge_template_file=str(tmp_path / "template.txt"), judge_max_tokens=77, judge_seed=3)
    judge(["a {cube}"], flat(1), flat(2))
    question = server.questions[0]
    assert question["text"] == "Better for a {cube}?"
    assert {k: question[k] for k in ("model", "temperature", "seed", "max_tokens")} == {
        "model": "red-lover",
        "temperature": 0,
        "seed": 3,
        "max_tokens": 77,
    }
    assert "Authorization" not in server.headers[0]
    assert judge.counts.cost is None


def test_a_judge_that_always_prefers_the_first_place_decides_nothing(server, make):
    server.reply = lambda *_: answer("<answer>Image 1</answer>")
    judge = make()
    first_wins = compare_groups(judge, ["a", "b"], [flat(1, 2, 3), flat(4, 5, 6)])
    assert (first_wins == 0.5).all()
    # 2 groups × 3 couples × 2 orders
    assert (judge.counts.first_place_wins, judge.counts.second_place_wins) == (12, 0)
    assert (judge.counts.contradictions, judge.counts.ties) == (6, 0)
    assert position_bias(judge.counts) == 1.0


def test_groups_give_every_comparison_from_one_batch(server, make):
    judge = make()
    first_wins = compare_groups(judge, ["same", "same"], [flat(1, 2, 3), flat(9, 8, 7)])
    assert first_wins[0].tolist() == [[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]]
    assert first_wins[1].tolist() == [[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]]
    assert len(server.asked) == 12
    assert position_bias(judge.counts) == 0.5


@pytest.mark.parametrize(
    "body",
    [
        answer("Image 1, clearly."),
        answer("<answer>Image 1</answer> <answer>Image 2</answer>"),
        answer(""),
        answer(None),
        (200, {}, "<html><answer>Image 1</answer>"),
        (200, {}, '{"choices": []}'),
        (200, {}, '{"answer": "<answer>Image 1</answer>"}'),
        (200, {}, '["<answer>Image 1</answer>"]'),
        (200, {}, '{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many"}}'),
    ],
    ids=lambda body: body[2][:40],
)
def test_an_answer_that_is_none_counts_as_a_half_and_is_asked_again_by_the_next_run(server, make, body):
    server.reply = lambda *_: body
    judge = make()
    assert judge(["x"] * 2, flat(9, 1), flat(3, 7)).tolist() == [0.5, 0.5]
    assert (judge.counts.unparsable, judge.counts.ties, judge.counts.asked) == (4, 0, 4)
    server.reply = redder
    assert make()(["x"] * 2, flat(9, 1), flat(3, 7)).tolist() == [1.0, 0.0]


def test_one_order_without_an_answer_leaves_the_others_half(server, make):
    server.reply = lambda first, second, _: redder(first, second, _) if first > second else answer("hm")
    # 9 before 3: image 1, so 1; 3 before 9: nothing, so ½. The mean of 1 and 1 - ½ is ¾
    assert make()(["x"], flat(9), flat(3)).tolist() == [0.75]


def test_too_many_answers_that_are_none_stop_the_run(server, make):
    server.reply = lambda *_: answer("As a language model, I")
    with pytest.raises(PrxPostError, match=r"20 of the judge's last 20 answers are none.*As a language model, I"):
        make(judge_concurrency=1)(["x"] * 40, flat(*range(40)), flat(*range(40, 80)))
    assert len(server.asked) < 80


def test_some_answers_that_are_none_are_borne(server, make):
    server.reply = lambda first, second, _: answer("hm") if (first, second) == (0, 40) else redder(first, second, _)
    judge = make()
    judge(["x"] * 40, flat(*range(40)), flat(*range(40, 80)))
    assert (judge.counts.asked, judge.counts.unparsable) == (80, 1)


def test_no_more_requests_run_at_a_time_than_allowed_and_answers_out_of_order_find_their_place(server, make):
    lock, waiting = threading.Lock(), []
    release = threading.Event()

    def late(first, second, question):
        """The first four wait for one another, then leave in the opposite order of their coming."""
        with lock:
            place = len(waiting)
            left = threading.Event()
            waiting.append(left)
            if len(waiting) == 4:
                release.set()
        if place < 4:
            assert release.wait(60)
            if place < 3:
                assert waiting[place + 1].wait(60)
            left.set()
        return redder(first, second, question)

    server.reply = late
    reds = list(range(12))
    wins = make(judge_concurrency=4)(["x"] * 12, flat(*reds), flat(*[11 - red for red in reds]))
    assert wins.tolist() == [float(red > 11 - red) for red in reds]
    assert server.most_at_a_time == 4


def fails_at_first(times, *failures):
    """Each question meets the failures `times` times, in turn, before it is answered."""
    met, lock = {}, threading.Lock()

    def reply(first, second, question):
        with lock:
            count = met[(first, second)] = met.get((first, second), 0) + 1
        return failures[(count - 1) % len(failures)] if count <= times else redder(first, second, question)

    return reply


@pytest.mark.parametrize(
    "failure",
    [error(500), error(503), error(429, Retry_After="1"), error(408), DROP],
    ids=["500", "503", "429", "408", "drop"],
)
def test_what_may_pass_is_tried_again(server, make, failure):
    server.reply = fails_at_first(2, failure)
    judge = make()
    assert judge(["x"] * 2, flat(9, 1), flat(3, 7)).tolist() == [1.0, 0.0]
    assert (judge.counts.asked, judge.counts.retries) == (4, 8)
    assert len(server.asked) == 12


def test_pauses_grow_and_are_as_long_as_the_server_asks_but_not_longer_than_allowed(server, make, monkeypatch):
    pauses = []
    monkeypatch.setattr("prx_post.rewards.judges.chat.JITTER.uniform", lambda low, high: 1.0)

    def noted(self, timeout=None, wait=threading.Event.wait):
        is_ours = not isinstance(threading.current_thread(), TMonitor)  # which other tests' bars leave behind
        return pauses.append(timeout) if is_ours and timeout is not None and timeout > 1 else wait(self, timeout)

    monkeypatch.setattr(threading.Event, "wait", noted)
    server.reply = fails_at_first(
        4, error(500), error(500), error(429, Retry_After="20"), error(429, Retry_After="900")
    )
    make(judge_backoff_s=2.0, judge_max_wait_s=60.0, judge_concurrency=1)(["x"], flat(4), flat(4))
    assert pauses == [2.0, 4.0, 20.0, 60.0]


def test_a_server_that_stays_broken_fails_the_run_clearly_and_keeps_what_was_answered(server, make):
    def reply(first, second, question):
        return error(500, "out of memory") if 7 in (first, second) else redder(first, second, question)

    server.reply = reply
    judge = make(judge_max_attempts=3, judge_concurrency=1)
    with pytest.raises(PrxPostError) as failure:
        judge(["x"] * 4, flat(9, 8, 7, 6), flat(1, 2, 3, 4))
    assert "did not answer in 3 tries: HTTP 500: out of memory." in str(failure.value)
    assert "Check that its server runs" in str(failure.value)
    # one at a time and in order: (9, 1), (1, 9), (8, 2), (2, 8) are answered before (7, 3) fails three times
    assert "4 answers of this batch are kept" in str(failure.value)
    assert len(server.asked) == 4 + 3
    server.reply = redder
    server.asked.clear()
    judge = make()
    assert judge(["x"] * 4, flat(9, 8, 7, 6), flat(1, 2, 3, 4)).tolist() == [1.0] * 4
    assert sorted(server.asked) == [(3, 7), (4, 6), (6, 4), (7, 3)]
    assert judge.counts.from_cache == 4


def test_a_refusal_is_not_tried_again_and_says_the_servers_words(server, make):
    server.reply = lambda *_: error(400, "model red-lover takes 1 image")
    with pytest.raises(PrxPostError, match="refuses: HTTP 400: model red-lover takes 1 image"):
        make(judge_concurrency=1)(["x"], flat(1), flat(2))
    assert len(server.asked) == 1


def test_a_key_is_sent_and_never_said(server, make, monkeypatch):
    judge = make(judge_api_key_env="JUDGE_KEY")
    judge(["x"], flat(1), flat(2))
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.reply = lambda *_: error(401, f"no such key: {KEY}")
    with pytest.raises(PrxPostError, match=r"HTTP 401: no such key: \*\*\*") as failure:
        make(judge_api_key_env="JUDGE_KEY")(["x"], flat(3), flat(4))
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    cause = failure.value
    while cause is not None:
        assert KEY not in str(cause)
        cause = cause.__cause__


def test_a_redirect_is_not_followed(server, make):
    server.reply = lambda *_: (307, {"Location": "http://127.0.0.1:1/elsewhere"}, "")
    with pytest.raises(PrxPostError, match="it redirects to 'http://127.0.0.1:1/elsewhere', which is not followed"):
        make(judge_concurrency=1)(["x"], flat(1), flat(2))
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_named(server, make):
    url = server.url
    server.close()
    with pytest.raises(PrxPostError, match=rf"the judge at {url}/chat/completions did not answer in 2 tries"):
        make(judge_url=url, judge_max_attempts=2)(["x"], flat(1), flat(2))


def test_an_answer_that_does_not_come_is_tried_again(server, make):
    over = threading.Event()
    slow = {(1, 2)}

    def reply(first, second, question):
        if (first, second) in slow:
            slow.discard((first, second))
            over.wait(60)
        return redder(first, second, question)

    server.reply = reply
    judge = make(judge_timeout_s=0.5)
    assert judge(["x"], flat(1), flat(2)).tolist() == [0.0]
    over.set()
    assert judge.counts.retries >= 1


def test_a_second_run_asks_nothing_and_counts_alike(server, make):
    images = [flat(1, 2, 3, 4)]
    judge = make()
    first_wins = compare_groups(judge, ["x"], images)
    assert (len(server.asked), judge.counts.from_cache) == (12, 0)
    again = make()
    assert torch.equal(compare_groups(again, ["x"], images), first_wins)
    assert len(server.asked) == 12
    assert (again.counts.asked, again.counts.from_cache, again.counts.prompt_tokens) == (0, 12, 0)
    assert again.counts.first_place_wins == judge.counts.first_place_wins == 6


def test_the_cache_is_of_the_images_the_prompt_the_model_the_template_and_the_settings(server, make, tmp_path):
    (tmp_path / "template.txt").write_text("{prompt}?")
    judge = make()
    judge(["x"], flat(1), flat(2))
    assert len(server.asked) == 2
    changed = [
        {"judge_model": "other"},
        {"judge_template_file": str(tmp_path / "template.txt")},
        {"judge_max_tokens": 5},
        {"judge_seed": 1},
    ]
    for number, values in enumerate(changed, start=2):
        make(**values)(["x"], flat(1), flat(2))
        assert len(server.asked) == 2 * number
    judge(["y"], flat(1), flat(2))
    judge(["x"], flat(1), flat(3))
    assert len(server.asked) == 2 * 7
    make(judge_concurrency=1, judge_timeout_s=9.0, judge_url=server.url + "/")(["x"], flat(2), flat(1))
    assert len(server.asked) == 2 * 7  # how it is asked, in which order the pair is given: the answers are the same


def test_without_a_cache_everything_is_asked_again_but_nothing_twice_in_a_call(server, make):
    judge = make(judge_cache_dir=None)
    wins = judge(["x"] * 3, flat(1, 1, 2), flat(2, 2, 1))
    assert wins.tolist() == [0.0, 0.0, 1.0]
    assert len(server.asked) == 2
    judge(["x"], flat(1), flat(2))
    assert len(server.asked) == 4
