"""A vision-language model as pairwise judge, behind an OpenAI-compatible endpoint (UnifiedReward-Think on vLLM, say).

Every pair is shown in both orders and the two answers are averaged, because such models prefer a place. Answers are
kept on disk as they come; what was answered is not asked again.
"""

import base64
import hashlib
import io
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from prx_post.base.errors import ConfigError, PrxPostError
from prx_post.base.settings import check_fields, doc, require
from prx_post.rewards.cache import ScoreCache
from prx_post.rewards.judges.chat import ChatClient, Completion, Endpoint, Stopped, is_base_url, is_this_machine
from prx_post.rewards.judges.judge_answers import FIRST, SECOND, TIE, fill_template, parse_answer, read_template
from prx_post.rewards.judges.pairwise import Digests, JudgeCounts, check_pairs

OPENAI_KEY = "OPENAI_API_KEY"
RECENT_ANSWERS = 200
"""Of so many last answers the unparsable fraction is taken: a server that breaks after a day of work is found, too."""
MIN_ANSWERS = 20
"""Fewer say nothing about the fraction."""


@dataclass
class VisionJudgeConfig:
    """A vision-language model that compares images, and how it is asked."""

    judge_url: str | None = doc("Base URL of an OpenAI-compatible API, such as http://localhost:8000/v1.", None)
    judge_model: str | None = doc("The model's name there.", None)
    judge_api_key_env: str | None = doc(
        "Environment variable with the API key; unset, or null here: none is sent.", OPENAI_KEY
    )
    judge_template_file: str | None = doc("Text of the question, with {prompt} in it; null: the built-in one.", None)
    judge_max_tokens: int = doc("Most tokens of an answer, thinking included.", 2048, above=0)
    judge_seed: int = doc("Sampling seed that is sent along; the temperature is 0.", 0, at_least=0)
    judge_concurrency: int = doc("Requests at a time, a process.", 16, above=0)
    judge_timeout_s: float = doc("Seconds a request may take.", 120.0, above=0)
    judge_max_attempts: int = doc("Tries of a request before the run fails.", 6, above=0)
    judge_backoff_s: float = doc("Seconds before the second try; doubled for each one after it.", 1.0, at_least=0)
    judge_max_wait_s: float = doc(
        "Longest pause between tries, seconds, also where the server asks for more.", 60.0, at_least=0
    )
    judge_max_unparsable_fraction: float = doc(
        f"Stop when more than this fraction of the last {RECENT_ANSWERS} answers (and {MIN_ANSWERS} or more) is none.",
        0.2,
        between=(0, 1),
    )
    judge_cache_dir: str | None = doc("Folder of the answers; null keeps none.", "~/.cache/prx-post/judge")
    judge_prompt_price: float | None = doc(
        "Price of a million prompt tokens; with the next, costs are counted.", None, at_least=0
    )
    judge_completion_price: float | None = doc("Price of a million completion tokens.", None, at_least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        url, model = self.judge_url, self.judge_model
        if url is not None:
            if "@" in url:  # not shown: it holds a password
                raise ConfigError("judge_url has a user name, which ends in logs. Put the key into judge_api_key_env.")
            action = "Write it such as http://localhost:8000/v1"
            reason = "/chat/completions is put behind it"
            require(is_base_url(url), "judge_url", url, "an http:// or https:// URL without a query", reason, action)
            reason = "a server may have several models"
            require(bool(model), "judge_model", model, "set", reason, "Write the model's name as the server has it")
        prices = (self.judge_prompt_price, self.judge_completion_price)
        reason = f"judge_completion_price is {prices[1]!r}"
        both = (prices[0] is None) == (prices[1] is None)
        require(both, "judge_prompt_price", prices[0], "set together with it", reason, "Set both, or neither")
        read_template(self.judge_template_file)

    def endpoint(self) -> Endpoint:
        """With the API key of the environment. Raises ConfigError without judge_url, or if the key cannot be sent."""
        if self.judge_url is None or self.judge_model is None:
            raise ConfigError(
                "judge_url is None, but must be set because a vision judge is asked there. Set judge_url."
            )
        return Endpoint(
            base_url=self.judge_url,
            model=self.judge_model,
            max_tokens=self.judge_max_tokens,
            seed=self.judge_seed,
            timeout_s=self.judge_timeout_s,
            max_attempts=self.judge_max_attempts,
            backoff_s=self.judge_backoff_s,
            max_wait_s=self.judge_max_wait_s,
            api_key=self._api_key(),
        )

    def _api_key(self) -> str | None:
        name, parts = self.judge_api_key_env, urlsplit(str(self.judge_url))
        key = os.environ.get(name, "").strip() if name else ""
        if not key:
            return None
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(f"the value of {name} is no API key: it has blanks or letters beyond ASCII. Correct it.")
        if name == OPENAI_KEY and parts.scheme == "http" and not is_this_machine(str(parts.hostname)):
            raise ConfigError(
                f"judge_url is {self.judge_url!r}, to which {OPENAI_KEY} would travel in the clear. Use https, or set "
                f"judge_api_key_env to null, or to the variable with that server's own key."
            )
        return key


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
