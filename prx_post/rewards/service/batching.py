"""Batches across requests: one thread owns every model and scores together what concurrent requests bring.

One thread, because models that share a GPU gain nothing from contending for it, and because what a reward holds (a
tokenizer, say) need not be safe for threads: `check` and scoring never run beside each other.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from prx_post.base.errors import PrxPostError
from prx_post.rewards.reward import Reward, checked


class RewardCrashed(Exception):
    """A reward raised something other than PrxPostError, or the scoring thread is gone; the cause tells more."""


@dataclass(eq=False)
class Job:
    """One request: its prompts are checked, then its images scored; `images` is None if checking is all."""

    reward: str
    prompts: Sequence[str]
    images: Sequence[Image.Image] | None
    future: Future[list[float]] = field(default_factory=Future)
    """The scores, in order; PrxPostError or RewardCrashed; cancelled by a client that went away."""
    arrived_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._scores = [0.0] * len(self.images or ())
        self._left = len(self._scores)

    @property
    def is_over(self) -> bool:
        return self.future.done()

    def put(self, index: int, score: float) -> None:
        self._scores[index] = score
        self._left -= 1

    def finish_if_complete(self) -> None:
        if self._left == 0 and not self.is_over and self.future.set_running_or_notify_cancel():
            self.future.set_result(self._scores)

    def fail(self, error: BaseException) -> None:
        if self.is_over or not self.future.set_running_or_notify_cancel():
            return
        if not isinstance(error, PrxPostError | RewardCrashed):
            crash = RewardCrashed(f"the reward {self.reward} failed: {type(error).__name__}")
            crash.__cause__ = error
            error = crash
        self.future.set_exception(error)


Item = tuple[Job, int]
"""An image: its job, and its index there."""
BatchObserver = Callable[[str, int, float], None]
"""(reward, images, seconds) of every batch that was scored"""


class Scorer:
    """The scoring thread. A batch is due when it is full, or when its oldest image has waited `max_wait_s`."""

    def __init__(
        self, rewards: Mapping[str, Reward], *, batch_size: int, max_wait_s: float, observe: BatchObserver
    ) -> None:
        self._rewards, self._batch_size, self._max_wait_s = dict(rewards), batch_size, max_wait_s
        self._observe = observe
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lanes: dict[str, deque[Item]] = {name: deque() for name in rewards}
        self._closing = False
        # A daemon, so that a second Ctrl+C ends the process even in the middle of a batch.
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        if not self.is_alive:
            job.fail(RewardCrashed("the scoring thread has ended; the log tells why"))
        self._inbox.put(job)

    def close(self) -> None:
        """Score what was submitted, then end."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while not (self._closing and not any(self._lanes.values())):
                self._collect()
                if (name := self._due_lane()) is not None:
                    self._score(name, self._take(name))
        finally:
            self._abandon()

    def _collect(self) -> None:
        """Admit what has arrived; wait for more until a batch is due."""
        while True:
            wait_s = self._wait_s()
            try:
                job = self._inbox.get(block=wait_s != 0, timeout=wait_s)
            except queue.Empty:
                return
            if job is None:
                self._closing = True
            else:
                self._admit(job)

    def _wait_s(self) -> float | None:
        """Seconds until a batch is due; None: nothing waits."""
        if self._closing or self._due_lane() is not None:
            return 0.0
        arrivals = [lane[0][0].arrived_s for lane in self._lanes.values() if lane]
        return max(0.0, min(arrivals) + self._max_wait_s - time.monotonic()) if arrivals else None

    def _due_lane(self) -> str | None:
        """Of the rewards with a batch that is due, the one whose oldest image has waited longest."""
        latest = time.monotonic() - self._max_wait_s
        due = {
            name: lane[0][0].arrived_s
            for name, lane in self._lanes.items()
            if lane and (self._closing or len(lane) >= self._batch_size or lane[0][0].arrived_s <= latest)
        }
        return min(due, key=due.__getitem__) if due else None

    def _admit(self, job: Job) -> None:
        """Check the prompts here, alone, so that a prompt which cannot be scored never meets another's batch."""
        if job.is_over:
            return
        try:
            self._rewards[job.reward].check(job.prompts)
        except (Exception, SystemExit) as error:
            job.fail(error)
            return
        self._lanes[job.reward].extend((job, i) for i in range(len(job.images or ())))
        job.finish_if_complete()  # if there was nothing but prompts to check

    def _take(self, name: str) -> list[Item]:
        """The next batch, without the images of requests that failed or whose client went away."""
        lane = self._lanes[name]
        batch: list[Item] = []
        while lane and len(batch) < self._batch_size:
            item = lane.popleft()
            if not item[0].is_over:
                batch.append(item)
        return batch

    def _score(self, name: str, batch: list[Item]) -> None:
        """Score a batch; if that fails, each request's part alone, so that only the one at fault fails."""
        if not batch or (error := self._attempt(name, batch)) is None:
            return
        jobs = list(dict.fromkeys(job for job, _ in batch))
        if len(jobs) == 1:
            jobs[0].fail(error)
            return
        for job in jobs:
            if (own := self._attempt(name, [item for item in batch if item[0] is job])) is not None:
                job.fail(own)

    def _attempt(self, name: str, batch: list[Item]) -> BaseException | None:
        """Score, and hand every job its part; or what went wrong, of whatever kind: the server goes on living."""
        images = [job.images[i] for job, i in batch if job.images is not None]
        began = time.perf_counter()
        try:
            scores = checked(self._rewards[name](images, [job.prompts[i] for job, i in batch]), name, len(batch))
        except (Exception, SystemExit) as error:
            return error
        self._observe(name, len(batch), time.perf_counter() - began)
        for (job, i), score in zip(batch, scores.tolist(), strict=True):
            job.put(i, score)
        for job in dict.fromkeys(job for job, _ in batch):
            job.finish_if_complete()
        return None

    def _abandon(self) -> None:
        """Fail what is left; nothing is, unless this thread met an error of its own."""
        left = [job for lane in self._lanes.values() for job, _ in lane]
        while not self._inbox.empty():
            left += [job for job in [self._inbox.get()] if job is not None]
        for job in dict.fromkeys(left):
            job.fail(RewardCrashed("the scoring thread has ended; the log tells why"))
