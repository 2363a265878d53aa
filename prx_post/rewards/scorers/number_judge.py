"""The embedded world's held-out judge: a small reader of digits, for evaluation, but where its gradient is climbed.

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
from prx_post.rewards.scorers.pixels import resize

JUDGE = EMBEDDED / "judge.safetensors"
HEIGHT, WIDTH = 32, 64
"""Of the images it reads, pixels."""
BLANK = 0
FEATURES = 64
LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue in grey, as Pillow weighs them (ITU-R 601)."""


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


def grey_of(pixels: torch.Tensor) -> torch.Tensor:
    """As `to_tensor`, of pixels [B, 3, H, W] in 0..1, with a gradient."""
    luma = (pixels * torch.tensor(LUMA, device=pixels.device).view(3, 1, 1)).sum(1, keepdim=True)
    return 1 - 2 * resize(luma, (HEIGHT, WIDTH), "bilinear")


class NumberJudgeReward:
    """Scores images by what the judge reads; only `graded` has a gradient."""

    def __init__(self, score: ctc.Score) -> None:
        self.gradient = score is ctc.log_prob
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
            log_probs = self._judge(to_tensor(images[part]).to(self._judge.head.weight.device)).cpu()
            texts = [wanted_text(prompt) for prompt in prompts[part]]
            scores += [self._score(row, text, DIGITS) for row, text in zip(log_probs, texts, strict=True)]
        return torch.tensor(scores)

    def of_pixels(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """As of DifferentiableReward; not bounded below, so that a hopeless image has a gradient, too."""
        self.check(prompts)
        judge = self._judge.to(pixels.device)
        texts = [wanted_text(prompt) for prompt in prompts]
        log_probs = judge(grey_of(pixels.float()))
        return torch.stack([ctc.log_likelihood(row, text, DIGITS) for row, text in zip(log_probs, texts, strict=True)])


def exact_match() -> NumberJudgeReward:
    """1 if the judge reads exactly the number asked for, else 0."""
    return NumberJudgeReward(ctc.exact)


def graded() -> NumberJudgeReward:
    """Per-digit log-probability of the number asked for (natural log, at most 0)."""
    return NumberJudgeReward(ctc.log_prob)
