"""Supervised fine-tuning of a PRX transformer by flow matching, of all weights or a LoRA adapter."""

import dataclasses
from functools import partial
from typing import Any

import torch

from prx_post.base.settings import require
from prx_post.data.cache import content_key
from prx_post.data.plan import Draw, stream
from prx_post.data.scan import Sample
from prx_post.data.source import LatentSource, timestep_and_noise
from prx_post.engine.protocols import Batch, Monitor, Objective, to_device
from prx_post.engine.run import Run
from prx_post.evaluation.monitor import ImageMonitor
from prx_post.stages.base import Encoded
from prx_post.stages.captioned import CaptionedStage
from prx_post.stages.sft.config import CONFIGS
from prx_post.stages.sft.objective import FlowMatchingObjective, immiscible

VALIDATION = 5
"""Key of the held-out rows' random stream."""


class SFT(CaptionedStage):
    name, configs = "sft", CONFIGS
    held_out: tuple[Sample, ...] = ()
    """Rows that are not trained on."""

    def data(self, run: Run) -> Encoded:
        data = super().data(run)
        count, rule = len(data.samples), f"below {len(data.samples)}"
        reason, action = "other rows must be left to train on", "Lower it"
        require(self.config.eval_rows < count, "eval_rows", self.config.eval_rows, rule, reason, action)
        shuffled = sorted(data.samples, key=lambda s: content_key(f"{self.config.seed} {s.image_key}"))
        self.held_out = tuple(shuffled[: self.config.eval_rows])
        kept_back = {sample.row for sample in self.held_out}
        return dataclasses.replace(data, samples=[s for s in data.samples if s.row not in kept_back])

    def objective(self, run: Run, data: Any) -> FlowMatchingObjective:
        config = self.config
        return FlowMatchingObjective(
            self.policy(run),
            config.learning_rate,
            min_snr_gamma=config.min_snr_gamma if config.loss_weighting == "min_snr" else None,
            contrastive_weight=config.contrastive_weight,
        )

    def source(self, run: Run, data: Encoded, objective: Objective) -> LatentSource:
        config = self.config
        return self.latent_source(
            *(run, data),
            randomness=partial(timestep_and_noise, **config.timestep_density),
            arrange=immiscible if config.immiscible else None,
            caption_dropout=config.caption_dropout,
        )

    def monitor(self, run: Run, data: Encoded, objective: Objective) -> Monitor:
        loss = None
        if self.held_out:
            source = self.source(run, data, objective)
            held_out = dataclasses.replace(source, samples=self.held_out, caption_dropout=0.0, arrange=None)
            loss = partial(self._validation_loss, run, held_out, objective)
        sampler = self.sampler(objective.policy, run)
        return ImageMonitor(run, self.config, sampler, data, **self.watched(data), validation_loss=loss)

    @torch.no_grad()
    def _validation_loss(self, run: Run, source: LatentSource, objective: Objective) -> float:
        """Mean over the held-out rows, each at its own fixed t and noise; whole batches split over the ranks."""
        size = self.config.per_device_train_batch_size
        by_size: dict[Any, list[int]] = {}
        for index, sample in enumerate(self.held_out):
            by_size.setdefault(sample.size, []).append(index)
        batches = [group[i : i + size] for group in by_size.values() for i in range(0, len(group), size)]

        def loss_of(place: int) -> tuple[int, float]:
            indices = batches[min(place, len(batches) - 1)]
            draws = [Draw(index, stream(self.config.seed, VALIDATION, 0, index)) for index in indices]
            batch = to_device(source.batch(draws, 0), run.device)
            with torch.autocast(run.device.type, torch.bfloat16, enabled=self.config.bf16):
                return place, float(objective(batch)[1]["velocity_mse"]) * len(indices)

        total = 0.0
        for first in range(0, len(batches), run.ranks.world):  # in rounds, for ZeRO-3 gathers on all ranks together
            parts = run.ranks.together(partial(loss_of, first + run.ranks.rank))
            total += sum(value for place, value in parts if place < len(batches))
        return total / len(self.held_out)

    def example(self, run: Run) -> tuple[Any, Batch]:
        batch = self.example_batch(run)
        count = len(batch["latents"])
        return None, {**batch, "noise": torch.empty_like(batch["latents"]), "t": torch.empty(count, device=run.device)}


STAGE = SFT
