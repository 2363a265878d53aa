"""The HTTP side of a reward server: who may ask, how much, and what is answered. See docs/reward-server.md.

Every limit is met before what it limits costs anything: the token before the body is read, the body's size while it is
read, the number of images before one is decoded, an image's pixels from its header.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prx_post.base.errors import PrxPostError
from prx_post.rewards.service.batching import Job, RewardCrashed, Scorer
from prx_post.rewards.service.metrics import CountAnswers, Metrics
from prx_post.rewards.service.protocol import CHECK_PATH, REWARDS_PATH, SCORE_PATH, SERVICE, VERSION, decode_image

BODY_TIMEOUT_S = 60.0
"""For a request's body to arrive; a client that drips would otherwise hold its place for ever."""
DISCARD_BYTES, DISCARD_S = 256 * 2**20, 10.0
"""How much of a refused body is read and dropped, so that the client, which is still sending it, reads the refusal."""
RETRY_AFTER_S = "1"
logger = logging.getLogger("prx_post.rewards")
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What requests may cost."""

    max_request_bytes: int
    max_pixels: int
    """Of one image."""
    max_images: int
    """Of one request."""
    max_queued_images: int
    """Of all requests: decoded or about to be, and not scored yet."""
    max_requests: int
    """Received or scored at a time."""


class Refusal(Exception):
    """An answer other than scores."""

    def __init__(self, status: int, kind: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, {k.replace("_", "-"): v for k, v in headers.items()}


class CheckRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    prompts: list[str]


class ScoreRequest(CheckRequest):
    images: list[str]


Body = TypeVar("Body", bound=CheckRequest)


def read_request(kind: type[Body], body: bytes) -> Body:
    """Raises Refusal for what is not such a JSON object."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise Refusal(422, "malformed", f"{where}: {first['msg']}") from error


def decode_all(texts: Sequence[str], max_pixels: int) -> list[Image.Image]:
    """Raises Refusal, with its index, for an image that cannot be used."""
    images = []
    for i, text in enumerate(texts):
        try:
            images.append(decode_image(text, max_pixels))
        except OSError as error:
            raise Refusal(422, "image", f"images.{i}: {error}") from error
    return images


class Service:
    """The answers. Runs in the event loop; parsing and decoding run in threads, checks and scoring in `scorer`'s."""

    def __init__(
        self, identities: Mapping[str, str], scorer: Scorer, limits: Limits, token: str | None, metrics: Metrics
    ) -> None:
        self._identities, self._scorer, self._limits, self._metrics = dict(identities), scorer, limits, metrics
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._requests = self._images = 0
        self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decoding")
        metrics.watch_queue(lambda: self._images)

    async def health(self) -> Response:
        """For whoever starts and watches the server: without a token, and without anything worth one."""
        ready = self._scorer.is_alive
        return JSONResponse({"status": "ready" if ready else "broken"}, 200 if ready else 503)

    async def authorise(self, request: Request) -> None:
        given = request.headers.get("Authorization", "").encode("latin-1")
        if self._expected is not None and not hmac.compare_digest(given, self._expected):
            message = "this server needs its token: Authorization: Bearer TOKEN"
            raise Refusal(401, "token", message, WWW_Authenticate="Bearer")

    async def metrics(self) -> Response:
        return Response(self._metrics.text(), media_type=self._metrics.content_type)

    async def rewards(self) -> Response:
        listed = [{"name": name, "identity": identity} for name, identity in self._identities.items()]
        limits = {
            "max_request_bytes": self._limits.max_request_bytes,
            "max_images": self._limits.max_images,
            "max_pixels": self._limits.max_pixels,
        }
        return JSONResponse({"service": SERVICE, "version": VERSION, "rewards": listed, "limits": limits})

    async def check(self, name: str, request: Request) -> Response:
        """Whether prompts can be scored, before an image is made for them."""
        async with self._body(name, request) as body:
            asked = await self._in_thread(lambda: read_request(CheckRequest, body))
            await self._outcome(Job(name, asked.prompts, None), request)
            return JSONResponse(self._named(name))

    async def score(self, name: str, request: Request) -> Response:
        async with self._body(name, request) as body:
            asked = await self._in_thread(lambda: read_request(ScoreRequest, body))
            count, texts = len(asked.images), asked.images
            if count != len(asked.prompts):
                raise Refusal(422, "malformed", f"there are {count} images, but {len(asked.prompts)} prompts")
            if count > self._limits.max_images:
                message = f"there are {count} images, but a request may have {self._limits.max_images}"
                raise Refusal(413, "too large", message)
            with self._places(count):
                images = await self._in_thread(lambda: decode_all(texts, self._limits.max_pixels))
                scores = await self._outcome(Job(name, asked.prompts, images), request)
            return JSONResponse({**self._named(name), "scores": scores})

    def _named(self, name: str) -> dict[str, Any]:
        return {"reward": name, "identity": self._identities[name]}

    @contextlib.asynccontextmanager
    async def _body(self, name: str, request: Request) -> AsyncIterator[bytes]:
        """A request's body, within its limits; its place among `max_requests` is held until it is answered."""
        if name not in self._identities:
            raise Refusal(
                404, "unknown reward", f"there is no reward {name!r}; there are {', '.join(self._identities)}"
            )
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            # Also what keeps a web page from posting here from the browser of someone on this machine.
            raise Refusal(415, "malformed", "the Content-Type must be application/json")
        if self._requests >= self._limits.max_requests:
            raise Refusal(503, "busy", "too many requests at a time; try again", Retry_After=RETRY_AFTER_S)
        self._requests += 1
        try:
            yield await self._read_in_time(request)
        finally:
            self._requests -= 1

    async def _read_in_time(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await self._read(request)
        except TimeoutError as error:
            raise Refusal(408, "slow body", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from error

    async def _read(self, request: Request) -> bytes:
        limit = self._limits.max_request_bytes
        too_large = Refusal(413, "too large", f"the body is larger than {limit} bytes")
        stated = request.headers.get("Content-Length", "0")
        if stated.isdecimal() and int(stated) > limit:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():  # a chunked body states no length
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    @contextlib.contextmanager
    def _places(self, count: int) -> Iterator[None]:
        """Places in the queue, held from before images are decoded until they are scored."""
        if self._images + count > self._limits.max_queued_images:
            raise Refusal(503, "busy", "the queue is full; try again", Retry_After=RETRY_AFTER_S)
        self._images += count
        try:
            yield
        finally:
            self._images -= count

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)

    async def _outcome(self, job: Job, request: Request) -> list[float]:
        """The job's scores; its images leave the queue if the client goes away."""
        self._scorer.submit(job)
        scores = asyncio.wrap_future(job.future)
        gone = asyncio.ensure_future(_disconnected(request))
        waited: set[asyncio.Future[Any]] = {scores, gone}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not scores.done():
            scores.cancel()
            raise ClientDisconnect
        return scores.result()


class DiscardBody:
    """ASGI middleware that reads what is left of a body before an answer that did not need it.

    Otherwise the connection closes with bytes unread, and the client sees a reset instead of the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that asked first (Expect: 100-continue) and was not told to go on sends nothing.
        has_more = scope["type"] == "http" and (b"expect", b"100-continue") not in scope["headers"]

        async def watched() -> Message:
            nonlocal has_more
            message = await receive()
            has_more = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def after_body(message: Message) -> None:
            left = DISCARD_BYTES
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DISCARD_S):
                    while has_more and left > 0:
                        left -= len((await watched()).get("body", b""))
            await send(message)

        await self._app(scope, watched, after_body)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(service: Service, metrics: Metrics) -> FastAPI:
    # Without FastAPI's pages about itself, which load scripts from elsewhere.
    app = FastAPI(title="prx-post rewards", openapi_url=None, docs_url=None, redoc_url=None)
    guarded = APIRouter(dependencies=[Depends(service.authorise)])
    guarded.add_api_route("/metrics", service.metrics, methods=["GET"])
    guarded.add_api_route(REWARDS_PATH, service.rewards, methods=["GET"])
    guarded.add_api_route(f"{CHECK_PATH}/{{name}}", service.check, methods=["POST"])
    guarded.add_api_route(f"{SCORE_PATH}/{{name}}", service.score, methods=["POST"])
    app.add_api_route("/health", service.health, methods=["GET"])
    app.include_router(guarded)
    app.add_middleware(DiscardBody)
    app.add_middleware(CountAnswers, metrics=metrics)

    def refused(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
        metrics.errors.labels(kind=kind).inc()
        return JSONResponse({"error": {"kind": kind, "message": message}}, status, headers)

    async def on_refusal(_: Request, error: Any) -> Response:
        return refused(error.status, error.kind, str(error), error.headers)

    async def on_unscorable(_: Request, error: Any) -> Response:
        return refused(422, "unscorable", str(error))

    async def on_crash(_: Request, error: Any) -> Response:
        number = uuid.uuid4().hex
        logger.error("request %s: %s", number, error, exc_info=error.__cause__ or error)
        return refused(500, "crash", f"{error}; the server's log has more under request {number}")

    async def on_disconnect(_: Request, error: Any) -> Response:
        return refused(499, "client gone", "nobody reads this")

    app.add_exception_handler(Refusal, on_refusal)
    app.add_exception_handler(PrxPostError, on_unscorable)
    app.add_exception_handler(RewardCrashed, on_crash)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    return app
