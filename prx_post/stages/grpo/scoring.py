"""What a rollout's images are scored by, on a thread beside the policy."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.evaluation.features import Encoder, open_encoder
from prx_post.evaluation.pixels import STATISTICS, image_statistics
from prx_post.model.codec import to_images
from prx_post.model.sampler import default_device
from prx_post.objectives.grpo import pairwise_win_rates
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.rewards.judges.pairwise import PairwiseJudge, PointwiseJudge, compare_groups
from prx_post.rewards.judges.vision_judge import VisionJudge
from prx_post.rewards.registry import RewardSpec, parse_specs
from prx_post.rewards.reward import Reward, check_rows, score_rows
from prx_post.stages.grpo.config import GRPOConfig
from prx_post.stages.grpo.guard import Guard
from prx_post.stages.grpo.settings import FEATURES, WIN_RATE

Scores = dict[str, Tensor]
"""By reward, [P, G] fp32; FEATURES, [P, G, D], while the guard regularizes."""
Rows = Sequence[Mapping[str, Any]]
"""Of the prompts file: a `prompt` each, and what else rewards read."""


@dataclass(frozen=True)
class Scorer:
    """Rewards of groups of images.

    Attributes:
        rewards: by label, those that are optimised and those that only rank.
        judge: compares the images of a group with each other.
        encoder: makes features of images while `guard` regularizes.
        weights: of what is optimised, by label.
    """

    rewards: dict[str, Reward]
    judge: PairwiseJudge | None
    weights: dict[str, float]
    encoder: Encoder | None = None
    guard: Guard = field(default_factory=Guard)

    @classmethod
    def open(cls, config: GRPOConfig, judge: VisionJudgeConfig, rows: Rows, guard: Guard) -> "Scorer":
        """Raises PrxPostError if a reward is not installed, its weights are missing, or it cannot score a prompt."""
        device = str(default_device())
        specs = parse_specs(config.reward_funcs)
        others = [spec for spec in parse_specs(config.guard_rewards) if spec not in specs]
        rewards = {spec.label: spec.load(device=device) for spec in [*specs, *others]}
        weights, compares = config.weights, None
        if config.method == "pref_grpo":
            weights = {**weights, WIN_RATE: config.pairwise_weight}
            compares = VisionJudge(judge) if config.pairwise_reward is None else _pointwise(config, device)
        encoder = open_encoder(config.guard_encoder, default_device(), "float32", 16) if config.guard_encoder else None
        scorer = cls(rewards, compares, weights, encoder, guard)
        scorer.check(rows)
        return scorer

    def check(self, rows: Rows) -> None:
        """Raise PrxPostError for a prompt that cannot be scored, or that lacks what a reward reads."""
        prompts = [row["prompt"] for row in rows]
        for label, reward in self.rewards.items():
            check_rows(reward, label, rows, "prompts_file")
        if self.judge is not None:
            self.judge.check(prompts)

    def __call__(self, rows: Rows, groups: Sequence[Sequence[Image.Image]]) -> Scores:
        """Scores of `groups[i]`, images of `rows[i]`."""
        size = len(groups[0])
        images, repeated = list(itertools.chain(*groups)), [row for row in rows for _ in range(size)]
        scores = {
            label: score_rows(reward, label, images, repeated).view(len(rows), size)
            for label, reward in self.rewards.items()
        }
        if self.judge is not None:
            prompts = [row["prompt"] for row in rows]
            scores[WIN_RATE] = pairwise_win_rates(compare_groups(self.judge, prompts, groups))
        if self.encoder is not None and self.guard.regularizes:
            scores[FEATURES] = torch.from_numpy(self.encoder(images)).view(len(rows), size, -1)
        return scores

    @property
    def identity(self) -> list[str]:
        """What scores depend on."""
        judge = [] if self.judge is None else [self.judge.identity]
        return [*(reward.identity for reward in self.rewards.values()), *judge]


def _pointwise(config: GRPOConfig, device: str) -> PointwiseJudge:
    reward = RewardSpec.parse(str(config.pairwise_reward)).load(device=device)
    if getattr(reward, "takes_columns", False):
        raise PrxPostError(
            f"pairwise_reward is {config.pairwise_reward!r}, which is of TRL's form, but must take (images, prompts) "
            f"because it is asked about images alone. Change its parameters."
        )
    return PointwiseJudge(reward, config.pairwise_temperature)


class Background:
    """Work that is done in order on a thread, which does not keep the process from ending."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
            self._thread.start()
        future: Future[Any] = Future()
        self._queue.put((future, work))
        return future

    def _run(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(default_device())  # a new thread's is the first GPU, whichever the process has
        while True:
            future, work = self._queue.get()
            try:
                future.set_result(work())
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)


class Scoring:
    """Of a rollout's images in one process: decoded as they come, looked at, and scored a batch of whole groups at a
    time.

    Attributes:
        decode_s, score_s, waited_s: seconds spent decoding, scoring (on the thread), and waiting for that.
        statistics: of all images, by name.
    """

    def __init__(
        self,
        scorer: Scorer,
        decode: Callable[[Tensor], Tensor],
        rows: Rows,
        group_size: int,
        batch_size: int,
        background: Background,
        timeout_s: float,
        waits: bool,
    ) -> None:
        """rows: of each group, in their order. batch_size: images decoded at a time. waits: for each batch's scores."""
        self._scorer, self._decode, self._rows, self._size = scorer, decode, rows, group_size
        self._batch_size, self._background = batch_size, background
        self._timeout_s, self._waits = timeout_s, waits
        self._pending: list[Image.Image] = []
        self._futures: list[Future[Scores]] = []
        self._begun = 0
        self.decode_s = self.score_s = self.waited_s = 0.0
        self.statistics: dict[str, list[float]] = {name: [] for name in STATISTICS}

    def add(self, latents: Tensor) -> None:
        """The next images, [B, C, H, W]. Raises PrxPostError if it waits and a reward fails or is late."""
        began = time.perf_counter()
        for part in latents.split(self._batch_size):
            self._pending += to_images(self._decode(part))
        self.decode_s += time.perf_counter() - began
        whole = len(self._pending) // self._size
        if not whole:
            return
        images, self._pending = self._pending[: whole * self._size], self._pending[whole * self._size :]
        groups = [images[i : i + self._size] for i in range(0, len(images), self._size)]
        rows = self._rows[self._begun : self._begun + whole]
        self._begun += whole
        self._futures.append(self._background.submit(lambda: self._score(rows, groups)))
        if self._waits:
            began = time.perf_counter()
            self._result(self._futures[-1])
            self.waited_s += time.perf_counter() - began

    def results(self) -> list[Scores]:
        """Of each group, [G] by name. Raises PrxPostError if a reward failed or is late."""
        found: list[Scores] = []
        for future in self._futures:
            scores = self._result(future)
            count = len(next(iter(scores.values())))
            found += [{name: value[i] for name, value in scores.items()} for i in range(count)]
        return found

    def _score(self, rows: Rows, groups: Sequence[Sequence[Image.Image]]) -> Scores:
        began = time.perf_counter()
        for name, values in image_statistics(list(itertools.chain(*groups))).items():
            self.statistics[name] += values
        scores = self._scorer(rows, groups)
        self.score_s += time.perf_counter() - began
        return scores

    def _result(self, future: Future[Scores]) -> Scores:
        try:
            return future.result(self._timeout_s)
        except TimeoutError as error:
            if future.done():
                raise  # the reward's own
            raise PrxPostError(
                f"the rewards of a batch of images were not there after {self._timeout_s:g} s (reward_timeout_s). "
                f"Look at the reward, or raise the limit; then resume with resume_from_checkpoint: latest."
            ) from error
