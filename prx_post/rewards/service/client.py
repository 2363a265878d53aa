"""A reward that is computed by a reward server. See docs/reward-server.md."""

import itertools
import json
import math
import os
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import torch
import urllib3
from PIL import Image
from torch import Tensor
from urllib3.exceptions import HTTPError, InvalidHeader, SSLError

from prx_post import __version__
from prx_post.base.errors import PrxPostError
from prx_post.base.net import is_loopback, resolve
from prx_post.rewards.reward import check_counts
from prx_post.rewards.service.protocol import (
    CHECK_PATH,
    REWARDS_PATH,
    SCORE_PATH,
    SERVICE,
    TOKEN_VARIABLE,
    VERSION,
    encode_image,
)

TRANSIENT = (408, 429, 502, 503, 504)
"""HTTP statuses that another try may turn into a success."""
CONNECTIONS = 4
"""Requests at a time: while the server scores one, it receives and decodes the next."""
REQUEST_IMAGES, REQUEST_PROMPTS = 16, 256
ENVELOPE_BYTES = 64
"""JSON around an image and its prompt, at most."""
CONNECT_S, FIRST_WAIT_S, MAX_WAIT_S = 10.0, 0.5, 30.0
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for. By default about 150 seconds of waiting: time to start it again."""

    tries: int = 11
    timeout_s: float = 300.0
    """Without a byte of an answer, after which a try has failed."""

    def wait_s(self, tries_so_far: int, asked_for_s: float) -> float:
        """Exponential, at least what the server asked for, and spread so that clients do not return all at once."""
        wait = min(MAX_WAIT_S, max(FIRST_WAIT_S * 2 ** (tries_so_far - 1), asked_for_s))
        return wait * _spread.uniform(1.0, 1.25)


_spread = random.Random()  # of its own: training's random state is not touched


class RemoteReward:
    """One reward of a server. Scores arrive bit for bit as the server computed them (fp32).

    Args:
        base: the server's URL, such as `http://gpu:8000`.
        name: one of its rewards; None if it has just one.

    Raises:
        PrxPostError: it cannot be reached, is no reward server, refuses the token, or has no such reward.
    """

    def __init__(self, base: str, name: str | None = None, patience: Patience | None = None) -> None:
        self._base, self._patience = base, patience or Patience()
        self._token = os.environ.get(TOKEN_VARIABLE) or None
        if self._token is not None:
            _warn_of_plain_http(base)
        timeout = urllib3.Timeout(connect=CONNECT_S, read=self._patience.timeout_s)
        # Connections are verified, redirects are errors, and the environment's proxies are not asked.
        self._pool = urllib3.PoolManager(timeout=timeout, maxsize=CONNECTIONS, retries=False)
        first = Patience(min(4, self._patience.tries), min(30.0, self._patience.timeout_s))
        found = self._ask("GET", REWARDS_PATH, None, first, threading.Event())
        self.name, self.identity, self._max_bytes, max_images = self._discovered(found, name)
        self._max_images = min(REQUEST_IMAGES, max_images)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise PrxPostError for a prompt that the served reward cannot score."""
        distinct = [json.dumps(prompt) for prompt in dict.fromkeys(prompts)]
        parts = list(_parts([len(text) for text in distinct], REQUEST_PROMPTS, self._max_bytes - ENVELOPE_BYTES))

        def send(part: slice, stopped: threading.Event) -> None:
            body = f'{{"prompts":[{",".join(distinct[part])}]}}'
            self._check_identity(self._ask("POST", f"{CHECK_PATH}/{self.name}", body, self._patience, stopped))

        _concurrently(send, parts)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        check_counts(images, prompts)
        texts = [json.dumps(prompt) for prompt in prompts]
        encoded = _concurrently(lambda image, _: encode_image(image), images)
        sizes = [len(text) + len(image) + ENVELOPE_BYTES for text, image in zip(texts, encoded, strict=True)]
        self._check_sizes(sizes)
        parts = list(_parts(sizes, self._max_images, self._max_bytes - ENVELOPE_BYTES))

        def send(part: slice, stopped: threading.Event) -> list[float]:
            joined = ",".join(f'"{text}"' for text in encoded[part])  # base64 needs no escapes
            body = f'{{"prompts":[{",".join(texts[part])}],"images":[{joined}]}}'
            answer = self._ask("POST", f"{SCORE_PATH}/{self.name}", body, self._patience, stopped)
            self._check_identity(answer)
            return self._checked_scores(answer.get("scores"), part.stop - part.start)

        return torch.tensor(list(itertools.chain(*_concurrently(send, parts))), dtype=torch.float32)

    def _check_sizes(self, sizes: Sequence[int]) -> None:
        for i, size in enumerate(sizes):
            if size > self._max_bytes - ENVELOPE_BYTES:
                raise PrxPostError(
                    f"image {i} takes {size} bytes, but the reward server {self._base} accepts {self._max_bytes} a "
                    f"request. Start it with a larger max_request_mib."
                )

    def _ask(
        self, method: str, path: str, body: str | None, patience: Patience, stopped: threading.Event
    ) -> dict[str, Any]:
        """The answer to a request, tried again while another try may help. Raises PrxPostError."""
        headers = {"User-Agent": f"prx-post/{__version__}", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else body.encode()
        why = "nothing was tried"
        for tries in range(1, patience.tries + 1):
            asked_for_s = 0.0
            try:
                response = self._pool.request(method, self._base + path, body=data, headers=headers, redirect=False)
            except SSLError as error:
                self._fail(f"has no connection that can be trusted: {error}. Check its certificate and the URL")
            except HTTPError as error:
                why = _reason(error)
            else:
                if response.status not in TRANSIENT:
                    return self._read(response.status, response.data)
                why, asked_for_s = f"HTTP {response.status}", _retry_after(response.headers.get("Retry-After"))
            if tries < patience.tries and stopped.wait(patience.wait_s(tries, asked_for_s)):
                break
        self._fail(f"gave no answer in {patience.tries} tries; the last one: {why}. Start it, or correct the URL")

    def _read(self, status: int, data: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if status in (401, 403):
            self._fail(f"refused the token (HTTP {status}). Set {TOKEN_VARIABLE} to the server's token")
        if not isinstance(answer, dict):
            self._fail(f"answered HTTP {status} without a JSON object; it is no prx-post reward server. Check the URL")
        if status == 200:
            return answer
        error = answer.get("error")
        if not isinstance(error, dict):
            self._fail(f"answered HTTP {status}; it is no prx-post reward server. Check the URL")
        self._fail(f"answered HTTP {status}: {error.get('message')}")

    def _discovered(self, answer: dict[str, Any], name: str | None) -> tuple[str, str, int, int]:
        """Name, identity, bytes and images of a request."""
        try:
            service, version = answer["service"], answer["version"]
            identities = {str(entry["name"]): str(entry["identity"]) for entry in answer["rewards"]}
            limits = (int(answer["limits"]["max_request_bytes"]), int(answer["limits"]["max_images"]))
        except (KeyError, TypeError, ValueError):
            service = version = None
        if service != SERVICE:
            self._fail("is no prx-post reward server. Check the URL")
        if version != VERSION:
            self._fail(f"speaks version {version} of the protocol, but this is {VERSION}. Install one version on both")
        if name is None and len(identities) > 1:
            self._fail(f"has several rewards: {', '.join(identities)}. Add one to the URL, as {self._base}/NAME")
        name = next(iter(identities)) if name is None else name
        if name not in identities:
            self._fail(f"has no reward {name!r}; it has {', '.join(identities)}. Correct the URL")
        return name, identities[name], *limits

    def _check_identity(self, answer: dict[str, Any]) -> None:
        found = answer.get("identity")
        if found != self.identity:
            self._fail(
                f"now computes {self.name} by {found!r}, but it was {self.identity!r} when this run began, so that its "
                f"scores cannot be compared. Start the server as it was"
            )

    def _checked_scores(self, scores: object, count: int) -> list[float]:
        if not isinstance(scores, list) or len(scores) != count:
            found = len(scores) if isinstance(scores, list) else type(scores).__name__
            self._fail(f"answered {count} images with {found} scores. Fix the server")
        for score in scores:
            if type(score) not in (int, float) or not math.isfinite(score):
                self._fail(f"gave the score {score!r}, which is no finite number. Fix the server")
        return [float(score) for score in scores]

    def _fail(self, what: str) -> NoReturn:
        raise PrxPostError(f"the reward server {self._base} {what.rstrip('.')}.")


def connect(url: str, patience: Patience | None = None) -> RemoteReward:
    """The reward at `http://host:port/name`, or at `http://host:port` if that server has just one.

    Raises:
        PrxPostError: the URL is none of these, or as RemoteReward.
    """
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and parts.scheme in ("http", "https") and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        valid = False
    if not valid or parts.query or parts.fragment or parts.username or parts.password:
        shown = re.sub(r"//[^/]*@", "//...@", url)
        raise PrxPostError(
            f"rewards has {shown!r}, but a reward server's URL must be http://host:port/name, without user, query or "
            f"fragment. Correct it; the token goes into {TOKEN_VARIABLE}."
        )
    prefix, _, name = parts.path.rstrip("/").rpartition("/")
    return RemoteReward(f"{parts.scheme}://{parts.netloc}{prefix}", name or None, patience)


@cache
def _warn_of_plain_http(base: str) -> None:
    """Once a server: whoever sees the traffic sees the token."""
    parts = urlsplit(base)
    if parts.scheme == "https":
        return
    try:
        is_private = all(is_loopback(address) for address in resolve(str(parts.hostname), parts.port or 80))
    except OSError:
        is_private = False
    if not is_private:
        message = f"{TOKEN_VARIABLE} goes to {base} unencrypted; use https or an SSH tunnel on a network you share"
        warnings.warn(message, stacklevel=4)


def _reason(error: HTTPError) -> str:
    """Without the connection that urllib3 puts first: the message names the server already."""
    return re.sub(r"^HTTPS?Connection(Pool)?\(.*?\): ", "", str(error)) or type(error).__name__


def _retry_after(value: str | None) -> float:
    if value is None:
        return 0.0
    try:
        return urllib3.Retry().parse_retry_after(value)
    except InvalidHeader:
        return 0.0


def _parts(sizes: Sequence[int], max_count: int, max_bytes: int) -> Iterator[slice]:
    """Runs of at most `max_count` items and `max_bytes`, in order; at least one item each."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and (i - start == max_count or total + size > max_bytes):
            yield slice(start, i)
            start, total = i, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))


def _concurrently(work: Callable[[Any, threading.Event], T], items: Iterable[Any]) -> list[T]:
    """`work(item, stopped)` of every item, in order, CONNECTIONS at a time; raises the first failure in time.

    `stopped` is set then, or at an interrupt, so that nobody waits for the others' next try.
    """
    stopped, failures = threading.Event(), list[BaseException]()

    def guarded(item: Any) -> T:
        try:
            return work(item, stopped)
        except BaseException as error:
            failures.append(error)
            stopped.set()
            raise

    with ThreadPoolExecutor(CONNECTIONS, "reward") as pool:
        try:
            return list(pool.map(guarded, items))
        except BaseException as error:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if error in failures:
                raise failures[0] from None
            raise
