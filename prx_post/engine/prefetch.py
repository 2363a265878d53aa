"""The next steps' batches, made on a thread while a step is trained."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prx_post.engine.protocols import Batch, Source

DEPTH = 2
"""Steps that are made ahead."""


class Prefetched:
    """An offline source, read ahead in its own order. What is read ahead is no state: a step is made anew if asked.

    Args:
        last_step: no step from this one on is made.
        pin: put tensors in page-locked memory, from which a GPU copies while it computes.

    Raises:
        ValueError: the source is online, and so depends on what was trained before.
    """

    online = False

    def __init__(self, source: Source, last_step: int, pin: bool = False) -> None:
        if source.online:
            raise ValueError("an online source cannot be read ahead")
        self._source, self._last_step, self._pin = source, last_step, pin
        self._queue: queue.Queue[tuple[int, list[Batch] | BaseException]] = queue.Queue(DEPTH)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._next = -1

    def __enter__(self) -> "Prefetched":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batches(self, step: int) -> Iterator[Batch]:
        """The source's batches of `step`. Raises what the source raised, in the step it was for."""
        if step != self._next or self._thread is None:
            self.close()
            self._start(step)
        found, made = self._get()
        assert found == step
        if isinstance(made, BaseException):
            self.close()
            raise made
        self._next = step + 1
        yield from made

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self._source.state()

    def load_state(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.close()
        self._source.load_state(info, tensors)

    def close(self) -> None:
        """End the thread; what it had made is dropped."""
        if self._thread is None:
            return
        self._stop.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(0.01)
        self._drain()
        self._thread = None

    def _drain(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass

    def _start(self, step: int) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(step, self._stop), name="prefetch", daemon=True)
        self._next = step
        self._thread.start()

    def _get(self) -> tuple[int, list[Batch] | BaseException]:
        while True:
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                assert self._thread is not None
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError("the prefetching thread has died without a word") from None

    def _run(self, first: int, stop: threading.Event) -> None:
        for step in range(first, self._last_step):
            made: list[Batch] | BaseException
            try:
                made = [self._pinned(batch) for batch in self._source.batches(step)]
            except BaseException as error:  # carried to the main thread, which raises it
                made = error
            while not stop.is_set():
                try:
                    self._queue.put((step, made), timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or isinstance(made, BaseException):
                return

    def _pinned(self, batch: Batch) -> Batch:
        if not self._pin:
            return batch
        return {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}


def can_pin() -> bool:
    return torch.cuda.is_available()
