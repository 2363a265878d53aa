"""The embedded world's held-out judge as a reward: for evaluation only, never to be optimised."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from prx_post.rewards.base import check_counts
from prx_post.rewards.ocr import DIGITS, ctc_log_prob, greedy_text, wanted_text


class NumberJudgeReward:
    def __init__(self, score: Callable[[torch.Tensor, str, str], float]) -> None:
        from prx_post.tiny.judge import load_judge

        self._judge, self._score = load_judge(), score

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        from prx_post.tiny.judge import to_tensor

        check_counts(images, prompts)
        scores = []
        for start in range(0, len(images), 256):
            part = slice(start, start + 256)
            log_probs = self._judge(to_tensor(images[part]))
            texts = [wanted_text(prompt) for prompt in prompts[part]]
            scores += [self._score(row, text, DIGITS) for row, text in zip(log_probs, texts, strict=True)]
        return torch.tensor(scores)


def exact_match() -> NumberJudgeReward:
    """1 if the judge reads exactly the number asked for, else 0."""
    return NumberJudgeReward(lambda log_probs, text, alphabet: float(greedy_text(log_probs, alphabet) == text))


def graded() -> NumberJudgeReward:
    """Per-digit log-probability of the number asked for (natural log, at most 0)."""
    return NumberJudgeReward(ctc_log_prob)
