"""Reward servers on the loopback interface: real ones in a thread, and stubs that misbehave."""

import base64
import contextlib
import http.server
import io
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import urllib3
from PIL import Image

from prx_post.base.errors import PrxPostError
from prx_post.rewards.reward import Reward
from prx_post.rewards.service.client import Patience
from prx_post.rewards.service.server import RewardServeConfig, make_server

QUICK = Patience(tries=4, timeout_s=20.0)
TOKEN = "a-token-of-the-tests"


def noise(seed: int, size: tuple[int, int] = (12, 9)) -> Image.Image:
    """An image that no other seed makes, (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def fingerprint(image: Image.Image, prompt: str) -> float:
    """A score that no other image or prompt has: 24 bits, which is what fp32 holds exactly."""
    return float(zlib.crc32(image.tobytes() + prompt.encode()) >> 8)


class Fingerprints:
    """Scores by `fingerprint`; remembers its batches; some prompts are poison. Waits while `gate` is closed."""

    def __init__(self, identity: str = "fingerprints, version 1") -> None:
        self.identity = identity
        self.batches: list[list[str]] = []
        self.gate, self.is_inside = threading.Event(), threading.Event()
        self.gate.set()

    def check(self, prompts: Sequence[str]) -> None:
        if "unscorable" in prompts:
            raise PrxPostError("the prompt 'unscorable' has nothing to score.")

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        self.batches.append(list(prompts))
        self.is_inside.set()
        assert self.gate.wait(60)
        if "crash" in prompts:
            raise ZeroDivisionError("a defect")
        if "exit" in prompts:
            raise SystemExit(3)
        if "refused" in prompts:
            raise PrxPostError("this image is not for me.")
        scores = [fingerprint(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.tensor([float("nan") if p == "nan" else s for s, p in zip(scores, prompts, strict=True)])


class Served:
    """A running server, spoken to in raw HTTP."""

    def __init__(self, port: int, token: str | None) -> None:
        self.url, self._token = f"http://127.0.0.1:{port}", token
        self.pool = urllib3.PoolManager(retries=False, maxsize=16)

    def ask(self, path: str, payload: object = None, **headers: str) -> tuple[int, dict]:
        """Status and JSON of a GET, or of a POST of `payload` (bytes and iterators as they are)."""
        if self._token is not None:
            headers = {"Authorization": f"Bearer {self._token}", **headers}
        if payload is not None:
            headers = {"Content-Type": "application/json", **headers}
        body = json.dumps(payload).encode() if isinstance(payload, dict | list) else payload
        response = self.pool.request("GET" if payload is None else "POST", self.url + path, body=body, headers=headers)
        assert b"NaN" not in response.data
        return response.status, json.loads(response.data)

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image], name: str = "prints") -> tuple[int, dict]:
        return self.ask(f"/v1/score/{name}", {"prompts": list(prompts), "images": [png(i) for i in images]})

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        text = self.pool.request("GET", f"{self.url}/metrics", headers=headers).data.decode()
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(f"prx_post_reward_{name}")]
        return sum(float(value) for label, value in lines if label.split("{")[0] == f"prx_post_reward_{name}")

    def wait_for_metric(self, name: str, value: float) -> None:
        deadline = time.monotonic() + 60
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.01)


def png(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


@contextlib.contextmanager
def serving(
    rewards: Mapping[str, Reward], *, token: str | None = None, port: int = 0, **settings: object
) -> Iterator[Served]:
    """`rewards`, whatever the configuration's own are, on a free port of the loopback interface."""
    config = RewardServeConfig(rewards=["ocr"], **settings)  # type: ignore[arg-type]
    server, scorer = make_server(config, rewards, token)
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Served(listener.getsockname()[1], token)
        finally:
            server.should_exit = True
            thread.join()
            scorer.close()


Answer = tuple[int, object, dict[str, str]]
"""Status, body (JSON unless it is bytes) and headers; status 0 hangs up instead."""


class Stub:
    """Answers discovery as a reward server does, and the POSTs by `answers` in turn, the last one for ever."""

    def __init__(self, *answers: Answer, discovery: Answer | None = None) -> None:
        self.answers, self.asked, self.tokens = list(answers), [], []
        self.discovery = discovery or (200, discovered(), {})
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(stub.discovery)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                stub.asked.append(time.monotonic())
                self.answer(stub.answers.pop(0) if len(stub.answers) > 1 else stub.answers[0])

            def answer(self, answer: Answer) -> None:
                status, body, headers = answer
                stub.tokens.append(self.headers.get("Authorization"))
                if status == 0:
                    self.close_connection = True
                    return
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def discovered(**changes: object) -> dict:
    rewards = [{"name": "prints", "identity": "stub"}]
    limits = {"max_request_bytes": 2**20, "max_images": 4, "max_pixels": 2**20}
    return {"service": "prx-post rewards", "version": 1, "rewards": rewards, "limits": limits, **changes}


def scored(scores: object, identity: str = "stub") -> Answer:
    return 200, {"reward": "prints", "identity": identity, "scores": scores}, {}
