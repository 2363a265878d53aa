"""The embedded world's held-out judge: a small reader of digits, for evaluation only, never to be optimised.

A convolutional network reads an image column by column and was trained with CTC (prx_post/tiny/make/judge.py) on digits
that the generator never saw. Its pooled features also serve as the feature space of the embedded world's FID.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from prx_post.base.errors import PrxPostError
from prx_post.base.files import file_sha256
from prx_post.base.settings import require_installed
from prx_post.model.config import EMBEDDED
from prx_post.rewards.reward import check_counts
from prx_post.rewards.scorers import ctc
from prx_post.rewards.scorers.ocr import DIGITS, wanted_text

JUDGE = EMBEDDED / "judge.safetensors"
HEIGHT, WIDTH = 32, 64
"""Of the images it reads, pixels."""
BLANK = 0
FEATURES = 64


class NumberJudge(nn.Module):
    """Grey images [B, 1, 32, 64] in [-1, 1] (ink is +1) -> CTC log-probabilities [B, 16, 11] over {blank, 0-9}."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, pool: tuple[int, int]) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(pool))

        self.trunk = nn.Sequential(
            block(1, 16, (2, 2)),
            block(16, 32, (2, 2)),
            block(32, 64, (2, 1)),
            nn.Conv2d(64, FEATURES, (4, 3), padding=(0, 1)),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, 11)

    def columns(self, images: torch.Tensor) -> torch.Tensor:
        """Features of each column, [B, 16, 64]."""
        return self.trunk(images).squeeze(2).transpose(1, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.columns(images)).log_softmax(-1)


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """PIL images of any size -> [B, 1, 32, 64] in [-1, 1], ink positive."""
    grey = [np.asarray(image.convert("L").resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)) for image in images]
    return 1 - torch.from_numpy(np.stack(grey)).float()[:, None] / 127.5


def load_judge(path: Path = JUDGE) -> NumberJudge:
    judge = NumberJudge()
    judge.load_state_dict(load_file(path))
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def judge_features(images: Sequence[Image.Image], judge: NumberJudge | None = None) -> torch.Tensor:
    """Features for FID: the mean of the judge's column features. [N, 64] fp32."""
    judge = judge or load_judge()
    batches = [to_tensor(images[i : i + 256]) for i in range(0, len(images), 256)]
    return torch.cat([judge.columns(batch).mean(1) for batch in batches])


class NumberJudgeReward:
    def __init__(self, score: ctc.Score) -> None:
        for module in ("mlxtend", "num2words"):
            require_installed(module, "the embedded judge", "demo")
        self._judge, self._score = load_judge(), score
        self.identity = f"embedded judge {score.__name__}, {file_sha256(JUDGE)[:16]}"

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if not set(wanted_text(prompt)) <= set(DIGITS):
                raise PrxPostError(f"the embedded judge reads digits only, but the prompt {prompt!r} asks for more.")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
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
