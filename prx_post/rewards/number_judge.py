"""The embedded world's held-out judge as a reward: for evaluation only, never to be optimised."""

from collections.abc import Sequence

import torch
from PIL import Image

from prx_post.config import PrxPostError, require_installed
from prx_post.data.files import file_sha256
from prx_post.rewards import ctc
from prx_post.rewards.base import check_counts
from prx_post.rewards.ocr import DIGITS, wanted_text
from prx_post.tiny import JUDGE


class NumberJudgeReward:
    def __init__(self, score: ctc.Score) -> None:
        for module in ("mlxtend", "num2words"):
            require_installed(module, "the embedded judge", "demo")
        from prx_post.tiny.judge import load_judge

        self._judge, self._score = load_judge(), score
        self.identity = f"embedded judge {score.__name__}, {file_sha256(JUDGE)[:16]}"

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if not set(wanted_text(prompt)) <= set(DIGITS):
                raise PrxPostError(f"the embedded judge reads digits only, but the prompt {prompt!r} asks for more.")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        from prx_post.tiny.judge import to_tensor

        check_counts(images, prompts)
        self.check(prompts)
        scores = []
        for start in range(0, len(images), 256):
            part = slice(start, start + 256)
            log_probs = self._judge(to_tensor(images[part]))
            texts = [wanted_text(prompt) for prompt in prompts[part]]
            scores += [self._score(row, text, DIGITS) for row, text in zip(log_probs, texts, strict=True)]
        return torch.tensor(scores)


def exact_match() -> NumberJudgeReward:
    """1 if the judge reads exactly the number asked for, else 0."""
    return NumberJudgeReward(ctc.exact)


def graded() -> NumberJudgeReward:
    """Per-digit log-probability of the number asked for (natural log, at most 0)."""
    return NumberJudgeReward(ctc.log_prob)
