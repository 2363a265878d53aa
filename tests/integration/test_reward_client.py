"""A run's side of a reward server: what it does about servers that are away, busy, or wrong."""

import itertools
import math
import re

import pytest
from PIL import Image

from prx_post.base.errors import PrxPostError
from prx_post.rewards.cache import CachedReward, ScoreCache
from prx_post.rewards.registry import RewardSpec
from prx_post.rewards.reward import WeightedSum
from prx_post.rewards.service import client
from prx_post.rewards.service.client import Patience, RemoteReward, connect
from tests.processes import free_port
from tests.reward_serving import QUICK, Fingerprints, Stub, discovered, fingerprint, noise, scored, serving

BUSY = (503, {"error": {"kind": "busy", "message": "later"}}, {})
HANGS_UP = (0, b"", {})


@pytest.fixture
def stub():
    stubs = []

    def make(*answers, **discovery):
        stubs.append(Stub(*answers, **discovery))
        return stubs[-1]

    yield make
    for each in stubs:
        each.close()


@pytest.fixture
def _hasty(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)


def one(remote: RemoteReward) -> list[float]:
    return remote([noise(0)], ["a"]).tolist()


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize(
    "trouble",
    [BUSY, HANGS_UP, (502, b"<html>bad gateway</html>", {}), (504, b"", {}), (429, b"", {}), (408, b"", {})],
    ids=["503", "hangs up", "502", "504", "429", "408"],
)
def test_trouble_that_may_pass_is_waited_for(stub, trouble):
    server = stub(trouble, trouble, trouble, scored([0.1]))
    assert one(connect(server.url, QUICK)) == pytest.approx([0.1])
    assert len(server.asked) == 4


@pytest.mark.usefixtures("_hasty")
def test_trouble_that_does_not_pass_fails_the_run_and_scores_nothing(stub):
    server = stub(BUSY)
    with pytest.raises(PrxPostError, match="gave no answer in 4 tries; the last one: HTTP 503. Start it"):
        one(connect(server.url, QUICK))
    assert len(server.asked) == 4


@pytest.mark.usefixtures("_hasty")
def test_an_answer_that_is_cut_short_or_never_comes_is_asked_for_again(stub):
    short = (200, b'{"scores": [', {"Content-Length": "500"})
    assert one(connect(stub(short, scored([2.0])).url, QUICK)) == [2.0]
    with serving({"prints": Fingerprints()}) as running:
        remote = connect(running.url, Patience(tries=2, timeout_s=0.2))
    with pytest.raises(PrxPostError, match="gave no answer in 2 tries"):
        one(remote)  # the server is gone


def test_a_server_that_takes_too_long_is_asked_again():
    slow = Fingerprints()
    with serving({"prints": slow}) as running:
        remote = connect(running.url, Patience(tries=2, timeout_s=0.2))
        slow.gate.clear()
        with pytest.raises(PrxPostError, match="2 tries; the last one: Read timed out"):
            one(remote)
        slow.gate.set()
        assert one(connect(running.url)) == [fingerprint(noise(0), "a")]


def test_the_client_waits_as_long_as_it_is_told_to(stub):
    status, body, _ = BUSY
    server = stub((status, body, {"Retry-After": "2"}), scored([1.0]))
    assert one(connect(server.url, QUICK)) == [1.0]
    first, second = server.asked
    assert second - first >= 2.0  # its own first wait would have been 0.5 to 0.6 s


def test_waits_double_are_spread_and_bounded():
    patience = Patience()
    for tries, expected in ((1, 0.5), (2, 1.0), (4, 4.0), (7, 30.0), (50, 30.0)):
        waits = {patience.wait_s(tries, 0.0) for _ in range(20)}
        assert len(waits) > 1
        assert expected <= min(waits) <= max(waits) <= 1.25 * expected
    assert 5.0 <= patience.wait_s(1, 5.0) <= 6.25
    assert patience.wait_s(1, 1e9) <= 37.5
    assert 120 < sum(patience.wait_s(tries, 0.0) for tries in range(1, patience.tries)) < 200


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (scored([1.0, 2.0]), "answered 1 images with 2 scores"),
        (scored([]), "answered 1 images with 0 scores"),
        (scored("1.0"), "answered 1 images with str scores"),
        (scored(None), "answered 1 images with NoneType scores"),
        (scored([math.nan]), "gave the score nan, which is no finite number"),
        (scored([math.inf]), "gave the score inf"),
        (scored([True]), "gave the score True"),
        (scored(["1"]), "gave the score '1'"),
        (scored([None]), "gave the score None"),
        (scored([1.0], identity="other"), "now computes prints by 'other', but it was 'stub'"),
        ((200, b"<html>welcome</html>", {}), "without a JSON object; it is no prx-post reward server"),
        ((200, [1.0], {}), "without a JSON object"),
        ((200, b"\xff", {}), "without a JSON object"),
        ((302, b"", {"Location": "http://127.0.0.1:9/"}), "answered HTTP 302"),
        ((401, b"", {}), "refused the token (HTTP 401)"),
        ((403, b"no", {}), "refused the token (HTTP 403)"),
        ((404, {"detail": "Not Found"}, {}), "answered HTTP 404; it is no prx-post reward server"),
        ((413, {"error": {"kind": "too large", "message": "too much"}}, {}), "answered HTTP 413: too much."),
        ((422, {"error": {"kind": "image", "message": "odd."}}, {}), "answered HTTP 422: odd."),
        ((500, {"error": {"kind": "crash", "message": "request 7"}}, {}), "answered HTTP 500: request 7."),
    ],
)
def test_a_wrong_answer_fails_the_run_at_once(stub, answer, message):
    server = stub(answer)
    with pytest.raises(PrxPostError, match=re.escape(message)):
        one(connect(server.url, QUICK))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("discovery", "path", "message"),
    [
        ((200, b"<html>", {}), "/prints", "no prx-post reward server"),
        ((200, {"rewards": []}, {}), "/prints", "no prx-post reward server"),
        ((200, discovered(rewards="prints"), {}), "/prints", "no prx-post reward server"),
        ((200, discovered(version=2), {}), "/prints", "speaks version 2 of the protocol, but this is 1"),
        ((200, discovered(), {}), "/other", "has no reward 'other'; it has prints"),
        (
            (200, discovered(rewards=[{"name": n, "identity": n} for n in "ab"]), {}),
            "",
            "has several rewards: a, b. Add",
        ),
        ((404, b"not here", {}), "/prints", "no prx-post reward server"),
        ((301, b"", {"Location": "https://127.0.0.1/"}), "/prints", "answered HTTP 301"),
    ],
)
def test_what_is_no_reward_server_is_found_when_the_run_begins(stub, discovery, path, message):
    with pytest.raises(PrxPostError, match=re.escape(message)):
        connect(stub(scored([1.0]), discovery=discovery).url + path, QUICK)


@pytest.mark.usefixtures("_hasty")
def test_a_server_that_is_not_there_is_named():
    port = free_port()
    with pytest.raises(PrxPostError, match=f"http://127.0.0.1:{port} gave no answer in 4 tries; .*Connection refused"):
        connect(f"http://127.0.0.1:{port}/prints")
    with (
        serving({"prints": Fingerprints()}) as running,
        pytest.raises(PrxPostError, match="no connection that can be trusted"),
    ):
        connect(running.url.replace("http:", "https:"))


@pytest.mark.parametrize(
    "url", ["http://", "http://h:port/x", "http://h/x?y", "http://h/x#y", "http://me:secret@h/x", "http://h:99999/x"]
)
def test_a_url_that_cannot_be_meant_is_refused_without_its_secrets(url):
    with pytest.raises(PrxPostError, match="must be http://host:port/name") as caught:
        connect(url)
    assert "secret" not in str(caught.value)


def test_large_calls_are_split_within_the_servers_limits_and_keep_their_order():
    reward = Fingerprints()
    images = [noise(i, (200, 150)) for i in range(60)]  # 120 kB each as base64, so 8 of them are a request
    prompts = [f'"{i}" \\ ü\n' for i in range(60)]
    limits = {"max_request_mib": 1, "max_images": 16, "batch_size": 64, "max_batch_wait_ms": 0.0}
    with serving({"prints": reward}, **limits) as running:
        expected = [fingerprint(*pair) for pair in zip(images, prompts, strict=True)]
        assert connect(running.url)(images, prompts).tolist() == expected
        assert connect(running.url)([], []).tolist() == []
        small = list(zip([noise(i) for i in range(100)], itertools.repeat("x"), strict=False))
        assert connect(running.url)(*zip(*small, strict=True)).tolist() == [fingerprint(*pair) for pair in small]
        with pytest.raises(PrxPostError, match="image 1 takes .* larger max_request_mib"):
            connect(running.url)([noise(0), noise(0, (600, 600))], ["a", "b"])
        with pytest.raises(PrxPostError, match="got 1 images, but must get as many as prompts"):
            connect(running.url)([noise(0)], [])


def test_prompts_are_checked_by_the_served_reward():
    reward = Fingerprints()
    with serving({"prints": reward}, max_request_mib=1) as running:
        remote = connect(running.url)
        remote.check([f"prompt {i} {'x' * 6000}" for i in range(1000)])  # 6 MB
        with pytest.raises(PrxPostError, match="'unscorable' has nothing to score"):
            remote.check(["a"] * 1000 + ["unscorable"])
        assert running.metric("batches_total") == 0


def test_one_failed_request_fails_the_call_without_waiting_for_the_others(stub):
    server = stub((422, {"error": {"message": "odd"}}, {}), BUSY)
    with pytest.raises(PrxPostError, match="odd"):
        connect(server.url)([noise(i) for i in range(12)], ["a"] * 12)  # 3 requests at once
    assert len(server.asked) < 1 + 2 * Patience().tries  # the busy ones were not tried to the end


def test_a_remote_reward_is_a_reward_like_any_other(tmp_path):
    served = Fingerprints()
    with serving({"prints": served}) as running:
        spec = RewardSpec.parse(f"taste={running.url}/prints")
        remote = spec.load()
        total = WeightedSum({spec.label: remote}, [2.0])
        assert total([noise(0)], ["a"]).tolist() == [2 * fingerprint(noise(0), "a")]
        cached = CachedReward(remote, spec.label, ScoreCache(tmp_path))
        asked = [one(cached), one(cached)]
    assert asked[0] == asked[1]
    assert len(served.batches) == 2  # the sum's, and one of the cached
    CachedReward(served, "taste", ScoreCache(tmp_path))([noise(0)], ["a"])  # in process: the identity is the same
    assert len(served.batches) == 2


def test_images_of_other_modes_are_scored_as_rgb():
    with serving({"prints": Fingerprints()}) as running:
        image = noise(0).convert("CMYK")
        assert connect(running.url)([image], ["a"]).tolist() == [fingerprint(image.convert("RGB"), "a")]
        assert one(connect(running.url)) == [fingerprint(noise(0), "a")]


def test_a_colour_profile_does_not_travel(monkeypatch):
    image = noise(0)
    image.info["icc_profile"] = bytes(2**20)
    assert len(client.encode_image(image)) < 1000
    assert isinstance(image, Image.Image)


def test_the_token_is_sent_and_its_way_over_plain_http_is_warned_of_once(stub, monkeypatch, recwarn):
    monkeypatch.setenv("PRX_POST_REWARD_TOKEN", "a-token-of-the-tests")
    server = stub(scored([1.0]))
    one(connect(server.url, QUICK))
    assert server.tokens == ["Bearer a-token-of-the-tests"] * 2
    assert len(recwarn) == 0  # on this machine it is safe
    monkeypatch.setattr(client, "resolve", lambda *_: ["192.0.2.1"])
    monkeypatch.setattr(RemoteReward, "_ask", lambda *_: discovered())
    for _ in range(2):
        connect("http://gpu:8000/prints")
        connect("https://gpu:8000/prints")
    (warning,) = recwarn
    assert "goes to http://gpu:8000 unencrypted" in str(warning.message)
    assert "a-token" not in str(warning.message)
