"""`prx-post reward-serve`, asked over the loopback interface."""

import base64
import json
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from prx_post.rewards.registry import load
from prx_post.rewards.reward import WeightedSum
from prx_post.rewards.service import serving as http_side
from prx_post.rewards.service.client import connect
from prx_post.rewards.service.protocol import decode_image, encode_image
from prx_post.tiny.handwriting import write_number
from tests.processes import free_port
from tests.reward_serving import TOKEN, Fingerprints, fingerprint, noise, png, serving


@pytest.fixture
def reward():
    return Fingerprints()


@pytest.fixture
def served(reward):
    limits = {"max_request_mib": 1, "max_pixels": 10_000, "max_images": 8, "max_queued_images": 8}
    with serving({"prints": reward}, **limits) as running:
        yield running


def test_scores_are_exactly_those_in_process():
    rng = np.random.default_rng(3)
    numbers = [int(n) for n in rng.integers(10, 1000, size=40)]
    images = [write_number(n, "reference", rng) for n in numbers]
    images = [image.resize((128, 64)) if i % 3 else image for i, image in enumerate(images)]
    prompts = [str(n + n % 2) for n in numbers]  # some wrong
    local = {name: load(name) for name in ("ocr", "ocr_exact")}
    rewards = {**local, "sum": WeightedSum(local, [1.0, 0.25])}
    with serving(rewards) as running:
        for name, reward in rewards.items():
            remote = load(f"{running.url}/{name}")
            assert remote(images, prompts).tolist() == reward(images, prompts).tolist()
            assert remote.identity == reward.identity
            remote.check(prompts)
        assert 0 < local["ocr"](images, prompts).mean() < 1
        with pytest.raises(Exception, match="'a red cube' has no text to read"):
            remote.check([*prompts, "a red cube"])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(12, 9), (1, 1), (7, 1), (1, 7), (300, 200)])
def test_images_arrive_as_they_were_sent(mode, size):
    image = noise(1, size).convert(mode)
    arrived = decode_image(encode_image(image), 300 * 200)
    assert (arrived.mode, arrived.size, arrived.tobytes()) == (mode, size, image.tobytes())


def test_images_of_concurrent_requests_share_batches(reward):
    with serving({"prints": reward}, batch_size=4, max_batch_wait_ms=0.0) as running, ThreadPoolExecutor(8) as clients:
        reward.gate.clear()
        first = clients.submit(running.score, ["first"], [noise(0)])
        assert reward.is_inside.wait(60)
        counts = [1, 2, 1, 3, 1]  # 8 images wait while the first is scored
        others = []
        for i, count in enumerate(counts):
            others.append(clients.submit(running.score, [f"request {i}"] * count, [noise(i)] * count))
            running.wait_for_metric("queued_images", 1 + sum(counts[: i + 1]))
        reward.gate.set()
        assert first.result()[1]["scores"] == [fingerprint(noise(0), "first")]
        for i, (count, other) in enumerate(zip(counts, others, strict=True)):
            assert other.result()[1]["scores"] == [fingerprint(noise(i), f"request {i}")] * count
    assert [len(batch) for batch in reward.batches] == [1, 4, 4]


def test_a_image_waits_for_others_but_not_for_ever(reward):
    with serving({"prints": reward}, batch_size=2, max_batch_wait_ms=60_000.0) as running, ThreadPoolExecutor(2) as two:
        one = two.submit(running.score, ["a"], [noise(0)])
        running.wait_for_metric("queued_images", 1)
        assert reward.batches == []
        assert running.score(["b"], [noise(1)])[0] == one.result()[0] == 200
        assert reward.batches == [["a", "b"]]
    with serving({"prints": reward}, batch_size=2, max_batch_wait_ms=1.0) as running:
        assert running.score(["alone"], [noise(0)])[0] == 200


@pytest.mark.parametrize(
    ("poison", "status", "kind", "message"),
    [
        ("crash", 500, "crash", "the reward prints failed: ZeroDivisionError"),
        ("exit", 500, "crash", "the reward prints failed: SystemExit"),
        ("refused", 422, "unscorable", "this image is not for me"),
        ("nan", 422, "unscorable", "gave nan for image 0 of 1"),
        ("unscorable", 422, "unscorable", "has nothing to score"),
    ],
)
def test_a_poisonous_request_fails_alone(reward, poison, status, kind, message):
    with serving({"prints": reward}, batch_size=8, max_batch_wait_ms=0.0) as running, ThreadPoolExecutor(8) as clients:
        reward.gate.clear()
        clients.submit(running.score, ["first"], [noise(9)])
        assert reward.is_inside.wait(60)
        prompts = ["a", poison, "b"]
        answers = []
        for i, prompt in enumerate(prompts):
            answers.append(clients.submit(running.score, [prompt], [noise(i)]))
            running.wait_for_metric("queued_images", 2 + i)
        reward.gate.set()
        found, failed = answers[1].result()
        assert (found, failed["error"]["kind"]) == (status, kind)
        assert message in failed["error"]["message"]
        for i in (0, 2):
            assert answers[i].result()[1]["scores"] == [fingerprint(noise(i), prompts[i])]
        assert running.score(["later"], [noise(5)])[0] == 200
        assert running.metric("errors_total") == 1
    if poison != "unscorable":  # that one is found before there is a batch
        assert reward.batches[1:5] == [prompts, ["a"], [poison], ["b"]]


def test_a_crash_is_logged_under_the_number_that_the_client_got(served, caplog):
    _, answer = served.score(["crash"], [noise(0)])
    number = answer["error"]["message"].rpartition(" ")[2]
    (record,) = [record for record in caplog.records if number in record.getMessage()]
    assert record.exc_info[0] is ZeroDivisionError


def bomb(width: int, height: int) -> str:
    """A PNG of a few hundred bytes whose header promises this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def text_bomb() -> str:
    """A small image with a text that unpacks to 64 MiB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    plain = base64.b64decode(png(noise(0)))
    return base64.b64encode(
        plain[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26), 9)) + plain[33:]
    ).decode()


GOOD = png(noise(0))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([GOOD, "no base64!"], "images.1: not base64"),
        ([GOOD, "ä"], "images.1: not base64"),
        ([GOOD, GOOD[:-40]], "images.1: image file is truncated"),
        ([GOOD, base64.b64encode(b"<html>").decode()], "images.1: no image format"),
        ([png(noise(0), "JPEG"), GOOD], "images.0: no image format"),
        ([png(noise(0), "TIFF"), GOOD], "images.0: no image format"),
        ([GOOD, png(noise(0, (101, 100)))], "images.1: 101x100 are more than the 10000 pixels"),
        ([GOOD, bomb(50_000, 50_000)], "images.1: not a readable image (DecompressionBombError"),
        ([GOOD, bomb(5_000, 5_000)], "images.1: 5000x5000 are more"),
        ([GOOD, bomb(90, 0)], "images.1: no image format"),
        ([GOOD, text_bomb()], "images.1: not a readable image (ValueError: Decompressed data too large"),
    ],
)
def test_a_image_that_cannot_be_used_is_named(served, reward, images, message):
    status, answer = served.ask("/v1/score/prints", {"prompts": ["a", "b"], "images": images})
    assert status == 422
    assert answer["error"]["message"].startswith(message)
    assert reward.batches == []
    assert served.score(["a"], [noise(0)])[0] == 200


@pytest.mark.parametrize(
    ("payload", "status", "message"),
    [
        ({"prompts": ["a", "b"], "images": [GOOD]}, 422, "there are 1 images, but 2 prompts"),
        ({"prompts": ["a"] * 9, "images": [GOOD] * 9}, 413, "there are 9 images, but a request may have 8"),
        ({"prompts": ["a"]}, 422, "images: Field required"),
        ({"prompts": "a", "images": [GOOD]}, 422, "prompts: Input should be a valid"),
        ({"prompts": [1], "images": [GOOD]}, 422, "prompts.0: Input should be a valid string"),
        ({"prompts": ["a"], "images": [GOOD], "weights": "mine"}, 422, "weights: Extra inputs"),
        ([], 422, "the body: Input should be an object"),
        (b"{", 422, "the body: Invalid JSON"),
        (b"\x80\x04N.", 422, "the body: Invalid JSON"),  # a pickle
        (b'{"prompts": ["\\ud800"], "images": []}', 422, "the body: Invalid JSON"),
        (b"x" * (2**20 + 1), 413, "the body is larger than 1048576 bytes"),
        (b"x" * 20_000_000, 413, "the body is larger than 1048576 bytes"),
    ],
)
def test_a_request_that_cannot_be_understood_is_refused_with_the_reason(served, reward, payload, status, message):
    found, answer = served.ask("/v1/score/prints", payload)
    assert (found, answer["error"]["message"][: len(message)]) == (status, message)
    assert reward.batches == []
    assert served.ask("/v1/score/prints", {"prompts": [], "images": []})[1]["scores"] == []


def test_a_body_without_a_stated_length_is_limited_too(served):
    taken = []

    def pieces():
        for _ in range(3000):
            taken.append(65536)
            yield b" " * 65536

    status, answer = served.ask("/v1/score/prints", pieces())
    assert (status, answer["error"]["kind"]) == (413, "too large")
    body = json.dumps({"prompts": ["a"], "images": [GOOD]}).encode()
    status, answer = served.ask("/v1/score/prints", iter([body[:50], body[50:]]))
    assert answer["scores"] == [fingerprint(noise(0), "a")]


def test_a_client_that_sends_all_of_a_refused_body_still_reads_the_refusal(served):
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=60) as sender:
        sender.sendall(b"POST /v1/score/prints HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        sender.sendall(b"Connection: close\r\nContent-Length: 60000000\r\n\r\n")
        sender.sendall(bytes(60_000_000))
        assert sender.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_drips_loses_its_place(served, monkeypatch):
    monkeypatch.setattr(http_side, "BODY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(http_side, "DISCARD_S", 0.2)
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as slow:
        slow.sendall(b"POST /v1/score/prints HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        slow.sendall(b"Content-Length: 1000\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_unknown_rewards_paths_and_content_types_are_refused(served):
    status, answer = served.score(["a"], [noise(0)], name="other")
    assert (status, answer["error"]["message"]) == (404, "there is no reward 'other'; there are prints")
    assert served.ask("/v1/nothing")[0] == 404
    assert served.ask("/docs")[0] == 404
    response = served.pool.request("POST", f"{served.url}/v1/score/prints", fields={"prompts": "a"})
    assert response.status == 415


def test_every_path_but_health_needs_the_token(reward, monkeypatch):
    with serving({"prints": reward}, token=TOKEN) as running:
        payload = {"prompts": ["a"], "images": [GOOD]}
        big = b"x" * 20_000_000  # its sender, too, reads the refusal
        for wrong in ("", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, "Bearer é"):
            for path, body in [
                ("/v1/rewards", None),
                ("/metrics", None),
                ("/v1/score/prints", payload),
                ("/v1/check/prints", {"prompts": []}),
                ("/v1/score/prints", big),
            ]:
                assert running.ask(path, body, Authorization=wrong)[0] == 401
        assert reward.batches == []
        assert running.ask("/health", Authorization="") == (200, {"status": "ready"})
        assert running.ask("/v1/score/prints", payload)[0] == 200

        for wrong in (None, "another-token-of-tests"):
            if wrong:
                monkeypatch.setenv("PRX_POST_REWARD_TOKEN", wrong)
            with pytest.raises(Exception, match=r"refused the token \(HTTP 401\). Set PRX_POST_REWARD_TOKEN") as caught:
                connect(running.url)
            assert str(wrong) not in str(caught.value)
        monkeypatch.setenv("PRX_POST_REWARD_TOKEN", TOKEN)
        assert connect(running.url)([noise(0)], ["a"]).tolist() == [fingerprint(noise(0), "a")]


def test_a_full_queue_sends_clients_away_to_come_again(reward):
    with (
        serving({"prints": reward}, max_images=2, max_queued_images=2, max_requests=3) as running,
        ThreadPoolExecutor(4) as clients,
    ):
        reward.gate.clear()
        running_one = clients.submit(running.score, ["a", "b"], [noise(0), noise(1)])
        assert reward.is_inside.wait(60)
        body = json.dumps({"prompts": ["c"], "images": [GOOD]}).encode()
        response = running.pool.request(
            "POST", f"{running.url}/v1/score/prints", body=body, headers={"Content-Type": "application/json"}
        )
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        patient = clients.submit(connect(running.url), [noise(2)], ["c"])
        while running.metric("errors_total") < 2:
            pass
        reward.gate.set()
        assert patient.result().tolist() == [fingerprint(noise(2), "c")]
        assert running_one.result()[0] == 200


def test_a_client_that_goes_away_frees_its_places_and_harms_nobody(reward):
    with serving({"prints": reward}, batch_size=2, max_batch_wait_ms=0.0) as running, ThreadPoolExecutor(2) as clients:
        reward.gate.clear()
        first = clients.submit(running.score, ["a"], [noise(0)])
        assert reward.is_inside.wait(60)
        body = json.dumps({"prompts": ["gone"] * 3, "images": [GOOD] * 3}).encode()
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as leaving:
            head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            leaving.sendall(b"POST /v1/score/prints HTTP/1.1\r\n" + head.encode() + body)
            running.wait_for_metric("queued_images", 4)
        running.wait_for_metric("queued_images", 1)
        second = clients.submit(running.score, ["b"], [noise(1)])
        running.wait_for_metric("queued_images", 2)
        reward.gate.set()
        assert first.result()[0] == second.result()[0] == 200
    assert reward.batches == [["a"], ["b"]]


def test_many_clients_at_once_lose_and_swap_nothing(reward):
    limits = {"batch_size": 7, "max_batch_wait_ms": 1.0, "max_queued_images": 64, "max_images": 5}

    def client(number: int) -> None:
        remote = connect(running.url)
        images = [noise(1000 * number + i, (8 + i, 9)) for i in range(40)]
        prompts = [f"client {number}, image {i}" for i in range(40)]
        for start, stop in ((0, 1), (1, 12), (12, 40)):
            scores = remote(images[start:stop], prompts[start:stop]).tolist()
            expected = [fingerprint(i, p) for i, p in zip(images[start:stop], prompts[start:stop], strict=True)]
            assert scores == expected

    with serving({"prints": reward}, **limits) as running, ThreadPoolExecutor(8) as clients:
        list(clients.map(client, range(8)))
        assert running.metric("images_total") == 8 * 40
        assert running.metric("batches_total") == len(reward.batches)
        assert running.metric("queued_images") == 0
    asked = [prompt for batch in reward.batches for prompt in batch]
    assert len(asked) == len(set(asked)) == 8 * 40
    shared = [batch for batch in reward.batches if len({prompt.split(",")[0] for prompt in batch}) > 1]
    assert shared, "no batch was shared by two clients"


def test_a_server_that_is_started_again_with_other_weights_fails_the_run(reward):
    port = free_port()
    with serving({"prints": reward}, port=port) as running:
        remote = connect(running.url)
        assert remote([noise(0)], ["a"]).tolist() == [fingerprint(noise(0), "a")]
    answers = threading.Event()

    def ask() -> None:
        with pytest.raises(Exception, match="now computes prints by 'version 2', but it was 'fingerprints, version 1'"):
            remote([noise(0)], ["a"])
        answers.set()

    client = threading.Thread(target=ask)
    client.start()  # while the server is away: the client waits for it
    with serving({"prints": Fingerprints("version 2")}, port=port):
        client.join()
    assert answers.is_set()
