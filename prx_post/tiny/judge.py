"""The held-out judge: a small reader trained on digits the generator never saw, and never optimised against.

A convolutional network reads a picture column by column and is trained with CTC. Its pooled features also serve as
the feature space of the embedded world's FID.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from prx_post.tiny import JUDGE
from prx_post.tiny.pictures import HEIGHT, WIDTH, write_number
from prx_post.tiny.world import NUMBERS

BLANK = 0
FEATURES = 64


class NumberJudge(nn.Module):
    """Grey pictures [B, 1, 32, 64] in [-1, 1] (ink is +1) -> CTC log-probabilities [B, 16, 11] over {blank, 0-9}."""

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

    def columns(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features of each column, [B, 16, 64]."""
        return self.trunk(pictures).squeeze(2).transpose(1, 2)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.columns(pictures)).log_softmax(-1)


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """PIL pictures of any size -> [B, 1, 32, 64] in [-1, 1], ink positive."""
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


def train_judge(steps: int, batch_size: int, seed: int, log) -> NumberJudge:
    """Train on pictures of every number, written with the judge's own digits, slightly distorted."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    judge = NumberJudge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    ctc = nn.CTCLoss(blank=BLANK, zero_infinity=True)
    for step in range(1, steps + 1):
        numbers = rng.choice(NUMBERS, size=batch_size)
        pictures = distort(to_tensor([write_number(int(n), "judge", rng) for n in numbers]), rng)
        targets = torch.tensor([int(d) + 1 for n in numbers for d in str(n)])
        lengths = torch.tensor([len(str(n)) for n in numbers])
        log_probs = judge(pictures).transpose(0, 1)
        loss = ctc(log_probs, targets, torch.full((batch_size,), log_probs.shape[0]), lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            log({"part": "judge", "step": step, "loss": round(loss.item(), 4)})
    return judge.eval().requires_grad_(False)


def distort(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Small random affine maps, contrast and noise, since 100 digits a class are few. Shape unchanged."""
    batch = pictures.shape[0]

    def draw(scale: float) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, scale, batch)).float()

    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 + draw(0.06), 1 + draw(0.06)
    theta[:, 0, 1], theta[:, 1, 0] = draw(0.10), draw(0.05)
    theta[:, 0, 2], theta[:, 1, 2] = draw(0.04), draw(0.06)
    grid = nn.functional.affine_grid(theta, list(pictures.shape), align_corners=False)
    moved = nn.functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    contrast = (1 + draw(0.15))[:, None, None, None]
    noise = torch.from_numpy(rng.normal(0, 0.1, pictures.shape)).float()
    return moved * contrast + noise


def save_judge(judge: NumberJudge, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), path)
