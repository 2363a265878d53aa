"""What a reward server counts, for Prometheus. Labels are names that the server knows, never what a client sent."""

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PREFIX = "prx_post_reward_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Each with a registry of its own, so that a process can hold several servers."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter(PREFIX + "requests", "Requests answered.", ["endpoint", "status"], **options)
        self._request_seconds = Histogram(
            PREFIX + "request_seconds",
            "From a request's header to its answer.",
            ["endpoint"],
            buckets=SECONDS,
            **options,
        )
        self._batch_images = Histogram(
            PREFIX + "batch_images", "Images of a batch.", ["reward"], buckets=BATCH_IMAGES, **options
        )
        self._images = Counter(PREFIX + "images", "Images scored.", ["reward"], **options)
        self._batches = Counter(PREFIX + "batches", "Batches scored.", ["reward"], **options)
        self._scoring_seconds = Counter(PREFIX + "scoring_seconds", "Time inside the reward.", ["reward"], **options)
        self._queue = Gauge(PREFIX + "queued_images", "Images accepted and not scored yet.", **options)
        self.errors = Counter(PREFIX + "errors", "Requests not answered with scores.", ["kind"], **options)

    def watch_queue(self, length: Callable[[], int]) -> None:
        self._queue.set_function(length)

    def observe_batch(self, reward: str, images: int, seconds: float) -> None:
        self._batches.labels(reward=reward).inc()
        self._images.labels(reward=reward).inc(images)
        self._batch_images.labels(reward=reward).observe(images)
        self._scoring_seconds.labels(reward=reward).inc(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def observe_answer(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(endpoint=endpoint, status=status).inc()
        self._request_seconds.labels(endpoint=endpoint).observe(seconds)


class CountAnswers:
    """ASGI middleware that counts answers by their route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                endpoint = getattr(scope.get("route"), "path", "none")
                self._metrics.observe_answer(endpoint, message["status"], time.perf_counter() - began)
            await send(message)

        await self._app(scope, receive, counted)
