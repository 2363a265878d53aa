"""Settings of a vision-language judge. Imports nothing heavy."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from prx_post.base.errors import ConfigError
from prx_post.base.settings import check_fields, doc, require
from prx_post.rewards.judges.judge_answers import read_template

if TYPE_CHECKING:
    from prx_post.rewards.judges.chat import Endpoint

OPENAI_KEY = "OPENAI_API_KEY"
RECENT_ANSWERS = 200
"""Of so many last answers the unparsable fraction is taken: a server that breaks after a day of work is found, too."""
MIN_ANSWERS = 20
"""Fewer say nothing about the fraction."""


@dataclass
class VisionJudgeConfig:
    """A vision-language model that compares images, and how it is asked."""

    group = "judge"

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
            from prx_post.rewards.judges.chat import is_base_url  # brings httpx2, which --help does without

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

    def endpoint(self) -> "Endpoint":
        """With the API key of the environment. Raises ConfigError without judge_url, or if the key cannot be sent."""
        from prx_post.rewards.judges.chat import Endpoint

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
        from prx_post.rewards.judges.chat import is_this_machine

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
