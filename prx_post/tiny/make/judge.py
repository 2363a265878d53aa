"""Training of the held-out judge on digits that the generator never saw."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from prx_post.rewards.scorers.number_judge import BLANK, NumberJudge, to_tensor
from prx_post.tiny.handwriting import write_number
from prx_post.tiny.world import NUMBERS


def train_judge(steps: int, batch_size: int, seed: int, log) -> NumberJudge:
    """Train on images of every number, written with the judge's own digits, slightly distorted."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    judge = NumberJudge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    ctc = nn.CTCLoss(blank=BLANK, zero_infinity=True)
    for step in range(1, steps + 1):
        numbers = rng.choice(NUMBERS, size=batch_size)
        images = distort(to_tensor([write_number(int(n), "judge", rng) for n in numbers]), rng)
        targets = torch.tensor([int(d) + 1 for n in numbers for d in str(n)])
        lengths = torch.tensor([len(str(n)) for n in numbers])
        log_probs = judge(images).transpose(0, 1)
        loss = ctc(log_probs, targets, torch.full((batch_size,), log_probs.shape[0]), lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            log({"part": "judge", "step": step, "loss": round(loss.item(), 4)})
    return judge.eval().requires_grad_(False)


def distort(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Small random affine maps, contrast and noise, since 100 digits a class are few. Shape unchanged."""
    batch = images.shape[0]

    def draw(scale: float) -> torch.Tensor:
        return torch.from_numpy(rng.normal(0, scale, batch)).float()

    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 + draw(0.06), 1 + draw(0.06)
    theta[:, 0, 1], theta[:, 1, 0] = draw(0.10), draw(0.05)
    theta[:, 0, 2], theta[:, 1, 2] = draw(0.04), draw(0.06)
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast = (1 + draw(0.15))[:, None, None, None]
    noise = torch.from_numpy(rng.normal(0, 0.1, images.shape)).float()
    return moved * contrast + noise


def save_judge(judge: NumberJudge, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), path)
