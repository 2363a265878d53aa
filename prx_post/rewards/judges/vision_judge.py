"""A vision-language model as pairwise judge, behind an OpenAI-compatible endpoint (UnifiedReward-Think on vLLM, say).

Every pair is shown in both orders and the two answers are averaged, because such models prefer a place. Answers are
kept on disk as they come; what was answered is not asked again.
"""

import base64
import hashlib
import io
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.rewards.cache import ScoreCache
from prx_post.rewards.judges.chat import ChatClient, Completion, Stopped
from prx_post.rewards.judges.config import MIN_ANSWERS, RECENT_ANSWERS, VisionJudgeConfig
from prx_post.rewards.judges.judge_answers import FIRST, SECOND, TIE, fill_template, parse_answer, read_template
from prx_post.rewards.judges.pairwise import Digests, JudgeCounts, check_pairs


@dataclass(frozen=True)
class Question:
    """Which of two images, told by their digests, is better for a prompt; `first` is shown first."""

    prompt: str
    first: str
    second: str

    def swapped(self) -> "Question":
        return Question(self.prompt, self.second, self.first)


class VisionJudge:
    """Asks a vision-language model; see `VisionJudgeConfig`. Nothing is sent before the first call."""

    def __init__(self, config: VisionJudgeConfig) -> None:
        """Raises ConfigError if the configuration names no endpoint, PrxPostError if the cache cannot be written."""
        self._config, self._endpoint = config, config.endpoint()
        self._template = read_template(config.judge_template_file)
        folder = config.judge_cache_dir
        self._cache = None if folder is None else ScoreCache(Path(folder).expanduser())
        self._unparsable: deque[bool] = deque(maxlen=RECENT_ANSWERS)
        self.counts = JudgeCounts(cost=None if config.judge_prompt_price is None else 0.0)

    @property
    def identity(self) -> str:
        template = hashlib.sha256(self._template.encode()).hexdigest()
        config = self._config
        return (
            f"vision judge {config.judge_model}, template {template}, {config.judge_max_tokens} tokens, "
            f"seed {config.judge_seed}, temperature 0"
        )

    def check(self, prompts: Sequence[str]) -> None:
        """Any prompt can be asked about."""

    def __call__(self, prompts: Sequence[str], first: Sequence[Image.Image], second: Sequence[Image.Image]) -> Tensor:
        """Probabilities [B] in {0, ¼, ½, ¾, 1}, fp32: the mean of both orders' answers, of which none means ½.

        Raises:
            PrxPostError: the endpoint fails or refuses, or too many answers are none. Answers so far are in the cache.
        """
        check_pairs(prompts, first, second)
        digests = Digests()
        images: dict[str, Image.Image] = {}
        questions: list[Question] = []
        for prompt, left, right in zip(prompts, first, second, strict=True):
            question = Question(prompt, digests.of(left), digests.of(right))
            images |= {question.first: left, question.second: right}
            questions.append(question)
        both = dict.fromkeys(shown for question in questions for shown in (question, question.swapped()))
        answers = {question: self._recall(question) for question in both}
        missing = [question for question, answer in answers.items() if answer is None]
        self.counts.from_cache += len(answers) - len(missing)
        fresh = self._ask(missing, images) if missing else {}
        return torch.tensor([self._combined(question, {**answers, **fresh}) for question in questions])

    def _combined(self, question: Question, answers: dict[Question, float | None]) -> float:
        """The probability that `question.first` wins. Counts what was said."""
        forward, backward = answers[question], answers[question.swapped()]
        self.counts.comparisons += 1
        for answer in (forward, backward):
            self.counts.unparsable += answer is None
            self.counts.ties += answer == TIE
            self.counts.first_place_wins += answer == FIRST
            self.counts.second_place_wins += answer == SECOND
        self.counts.contradictions += forward == backward and forward in (FIRST, SECOND)
        forward, backward = (TIE if answer is None else answer for answer in (forward, backward))
        return (forward + 1 - backward) / 2

    def _ask(self, questions: list[Question], images: dict[str, Image.Image]) -> dict[Question, float | None]:
        """Answers to all `questions`. The first failure ends the asking; what is on its way is waited for and kept."""
        stop = threading.Event()
        workers = self._config.judge_concurrency
        answers: dict[Question, float | None] = {}
        failure: PrxPostError | None = None
        with self._endpoint.client(workers) as http, ThreadPoolExecutor(workers) as pool:
            client = ChatClient(self._endpoint, http, stop)
            shown = sorted({digest for question in questions for digest in (question.first, question.second)})
            urls = dict(zip(shown, pool.map(lambda digest: data_url(images[digest]), shown), strict=True))
            asked = {pool.submit(client.complete, self._content(question, urls)): question for question in questions}
            try:
                for future in as_completed(asked):
                    try:
                        answers[asked[future]] = self._keep(asked[future], future.result())
                    except (Stopped, CancelledError):
                        continue
                    except PrxPostError as error:
                        failure = failure or error
                        _halt(stop, asked)
            finally:
                _halt(stop, asked)  # also on an interrupt: the pool waits for what is running
        if failure is not None:
            kept = (
                "" if self._cache is None else f" {len(answers)} answers of this batch are kept in the judge's cache."
            )
            raise PrxPostError(f"{failure}{kept}") from failure
        return answers

    def _content(self, question: Question, urls: dict[str, str]) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for number, digest in ((1, question.first), (2, question.second)):
            parts.append({"type": "text", "text": f"Image {number}:"})
            parts.append({"type": "image_url", "image_url": {"url": urls[digest]}})
        return [*parts, {"type": "text", "text": fill_template(self._template, question.prompt)}]

    def _keep(self, question: Question, completion: Completion) -> float | None:
        """Count and cache a fresh answer. Raises PrxPostError if too many of the last ones were none.

        One that is none is not cached: it is asked again by the next run, whose server may have been fixed.
        """
        answer = parse_answer(completion.text or "")
        self.counts.asked += 1
        self.counts.retries += completion.retries
        self._count_tokens(completion)
        if answer is not None and self._cache is not None:
            self._cache.put({self._key(question): answer})
        self._unparsable.append(answer is None)
        fraction = sum(self._unparsable) / len(self._unparsable)
        limit = self._config.judge_max_unparsable_fraction
        if answer is None and len(self._unparsable) >= MIN_ANSWERS and fraction > limit:
            raise PrxPostError(
                f"{sum(self._unparsable)} of the judge's last {len(self._unparsable)} answers are none, but at most "
                f"{limit:.0%} may be because each counts as a tie. The last is {completion.shown!r}. Check judge_model "
                f"and judge_template_file, or raise judge_max_tokens if answers are cut off."
            )
        return answer

    def _count_tokens(self, completion: Completion) -> None:
        self.counts.prompt_tokens += completion.prompt_tokens
        self.counts.completion_tokens += completion.completion_tokens
        prices = (self._config.judge_prompt_price, self._config.judge_completion_price)
        if prices[0] is not None and prices[1] is not None:
            self.counts.cost = (self.counts.prompt_tokens * prices[0] + self.counts.completion_tokens * prices[1]) / 1e6

    def _recall(self, question: Question) -> float | None:
        return None if self._cache is None else self._cache.get(self._key(question))

    def _key(self, question: Question) -> str:
        parts = (self.identity, question.first, question.second, question.prompt)
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _halt(stop: threading.Event, futures: dict[Future[Completion], Question]) -> None:
    stop.set()
    for future in futures:
        future.cancel()


def data_url(image: Image.Image) -> str:
    """An image as PNG in a data URL."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
