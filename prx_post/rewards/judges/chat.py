"""Questions to an OpenAI-compatible `/chat/completions` endpoint, asked again where that may help.

httpx2 is what huggingface_hub talks HTTP with. It checks certificates, and follows no redirect unless told to.
"""

import ipaddress
import json
import random
import ssl
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2

from prx_post import __version__
from prx_post.base.errors import PrxPostError
from prx_post.base.net import TRANSIENT, retry_after

MAX_ANSWER_BYTES = 16 * 2**20
JITTER = random.Random()
"""Of its own: draws from the global generator would make a run depend on how often a server failed."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind a URL, and how patiently it is asked. Times are in seconds."""

    base_url: str
    model: str
    max_tokens: int
    seed: int
    timeout_s: float
    """Of one request, from its sending to the answer's last byte."""
    max_attempts: int
    backoff_s: float
    """The first pause; each one after it is twice as long."""
    max_wait_s: float
    """The longest pause, whatever the server asks for."""
    api_key: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return self.base_url.rstrip("/") + "/chat/completions"

    def client(self, connections: int) -> httpx2.Client:
        """Threads may share it. A proxy of the environment is used, but not on the way to this very machine."""
        headers = {"User-Agent": f"prx-post/{__version__}", "Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return httpx2.Client(
            headers=headers,
            timeout=self.timeout_s,
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            follow_redirects=False,
            trust_env=not is_this_machine(httpx2.URL(self.base_url).host),
        )


def is_base_url(text: str) -> bool:
    """Whether `/chat/completions` can be put behind it."""
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL:
        return False
    is_port = url.port is None or 0 < url.port < 2**16
    return url.scheme in ("http", "https") and bool(url.host) and is_port and not (url.query or url.fragment)


def is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Completion:
    """An answer. `text` is None if what came was no chat completion; `shown` is the start of it, for messages."""

    text: str | None
    shown: str
    prompt_tokens: int
    completion_tokens: int
    retries: int


class Stopped(Exception):
    """The question was not answered, because another one failed for good."""


class _Failure(Exception):
    def __init__(self, reason: str, *, permanent: bool, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.permanent, self.retry_after_s = permanent, retry_after_s


class ChatClient:
    """Asks one question at a time; threads may share one.

    `stop` ends pauses and forbids new requests; a question that fails for good sets it.
    """

    def __init__(self, endpoint: Endpoint, http: httpx2.Client, stop: threading.Event) -> None:
        self._endpoint, self._http, self._stop = endpoint, http, stop

    def complete(self, content: list[dict[str, Any]]) -> Completion:
        """The answer to one user message.

        Connections, time-outs, 429 and 5xx are tried again after a growing pause, at least the server's Retry-After,
        at most `max_wait_s`; anything else is final.

        Raises:
            PrxPostError: it is refused, or is not answered in `max_attempts` tries.
            Stopped: `stop` was set first.
        """
        body = self._body(content)
        for attempt in range(1, self._endpoint.max_attempts + 1):
            if self._stop.is_set():
                raise Stopped
            try:
                return _read_completion(self._post(body), retries=attempt - 1)
            except _Failure as failure:
                if failure.permanent or attempt == self._endpoint.max_attempts:
                    self._stop.set()  # here, so that this thread's next question is not asked either
                if failure.permanent:
                    raise PrxPostError(f"the judge at {self._endpoint.url} refuses: {failure}.") from failure
                if attempt == self._endpoint.max_attempts:
                    raise PrxPostError(
                        f"the judge at {self._endpoint.url} did not answer in {attempt} tries: {failure}. Check that "
                        f"its server runs and judge_url is right, or raise judge_max_attempts."
                    ) from failure
                self._pause(attempt, failure.retry_after_s)
        raise AssertionError("unreachable")

    def _body(self, content: list[dict[str, Any]]) -> bytes:
        question = {
            "model": self._endpoint.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "seed": self._endpoint.seed,
            "max_tokens": self._endpoint.max_tokens,
        }
        return json.dumps(question).encode()

    def _pause(self, attempt: int, retry_after_s: float) -> None:
        pause_s = self._endpoint.backoff_s * 2 ** (attempt - 1) * JITTER.uniform(0.5, 1.5)
        self._stop.wait(min(max(pause_s, retry_after_s), self._endpoint.max_wait_s))

    def _post(self, body: bytes) -> bytes:
        """The body of a success."""
        deadline = time.monotonic() + self._endpoint.timeout_s
        try:
            with self._http.stream("POST", self._endpoint.url, content=body) as response:
                answer = bytearray()
                for chunk in response.iter_bytes():
                    answer += chunk
                    if len(answer) > MAX_ANSWER_BYTES:
                        raise _Failure(f"its answer is longer than {MAX_ANSWER_BYTES} bytes", permanent=True)
                    if time.monotonic() > deadline:  # a timeout of the library's starts anew at every byte
                        raise httpx2.ReadTimeout("too slow")
        except httpx2.TimeoutException as error:
            raise _Failure(f"nothing within {self._endpoint.timeout_s:g} s", permanent=False) from error
        except httpx2.RequestError as error:
            raise _Failure(_connection_reason(error), permanent=_is_certificate(error)) from error
        self._check_status(response, bytes(answer))
        return bytes(answer)

    def _check_status(self, response: httpx2.Response, body: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        if response.is_redirect:
            location = response.headers.get("Location")
            raise _Failure(f"it redirects to {location!r}, which is not followed; set judge_url to it", permanent=True)
        reason = f"HTTP {status}: {self._without_key(_server_message(body))}"
        wait_s = retry_after(response.headers.get("Retry-After")) or 0.0
        raise _Failure(reason, permanent=status not in TRANSIENT and status < 500, retry_after_s=wait_s)

    def _without_key(self, text: str) -> str:
        """Servers may say back the key they refuse."""
        return text.replace(self._endpoint.api_key, "***") if self._endpoint.api_key else text


def _connection_reason(error: Exception) -> str:
    return f"the connection failed ({type(error).__name__}: {error})"


def _is_certificate(error: BaseException | None) -> bool:
    """Whether the server could not prove who it is, which no other try would change."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _server_message(body: bytes) -> str:
    """What the server says: OpenAI's `error.message`, others' `message` or `detail`, or the body's start."""
    try:
        said: Any = json.loads(body)
    except ValueError:
        return _start(body)
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
    return _start(said if isinstance(said, str) else body)


def _start(text: str | bytes, length: int = 300) -> str:
    decoded = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    line = " ".join(decoded.split())
    return line if len(line) <= length else line[:length] + "…"


def _read_completion(body: bytes, retries: int) -> Completion:
    try:
        answer: Any = json.loads(body)
        text = answer["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return Completion(None, _start(body), 0, 0, retries)
    usage = answer.get("usage")
    spent = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt_tokens, completion_tokens = (count if isinstance(count, int) else 0 for count in spent)
    if not isinstance(text, str):  # null, where all the tokens went into thinking
        return Completion(None, _start(body), prompt_tokens, completion_tokens, retries)
    shown = text if len(text) <= 300 else "…" + text[-300:]
    return Completion(text, shown, prompt_tokens, completion_tokens, retries)
