"""Supervised fine-tuning of a PRX transformer by flow matching, of all weights or a LoRA adapter."""

import dataclasses
from functools import partial
from typing import Any

import torch

from prx_post.data.buckets import Buckets, Size
from prx_post.data.cache import content_key
from prx_post.data.config import DataConfig
from prx_post.data.encoding import Sample, prepare
from prx_post.data.plan import Draw, DrawPlan, stream
from prx_post.data.readers import read_rows
from prx_post.data.sizes import CacheSize, cache_size
from prx_post.data.source import LatentSource
from prx_post.engine.protocols import Batch, Monitor, Objective, to_device
from prx_post.engine.run import Run
from prx_post.evaluation.monitor import ImageMonitor
from prx_post.model.card import ModelCard
from prx_post.model.config import ModelConfig
from prx_post.stages.base import Encoded, PipelineStage
from prx_post.stages.sft.config import CONFIGS, SFTConfig
from prx_post.stages.sft.objective import FlowMatchingObjective, immiscible, timestep_and_noise


class SFT(PipelineStage):
    configs = CONFIGS

    def __init__(self, model: ModelConfig, data: DataConfig, config: SFTConfig, *, planned: bool = False) -> None:
        size = (data.height, data.width) if data.height is not None and data.width is not None else None
        super().__init__(model, config, data.skip_text_cleaning, data.cache_dir, size, planned)
        self.data_config = data
        self.buckets = Buckets(self.pipeline, data.height, data.width)
        self.rows = None if planned else read_rows(data)
        self.held_out: list[Sample] = []

    @property
    def largest_size(self) -> Size:
        return self.buckets.largest

    def data(self, run: Run) -> Encoded:
        rows, encoders, bad_rows = self.rows, self.encoders(run), run.output_dir / "bad_rows.jsonl"
        assert rows is not None
        shown = self.shown_prompts()
        samples, cache = prepare(self.data_config, rows, encoders, self.buckets, bad_rows, shown, run.ranks)
        if cache is not None:
            encoders.free()
        shuffled = sorted(samples, key=lambda s: content_key(f"{self.config.seed} {s.image_key}"))
        self.held_out = shuffled[: self.config.eval_rows]
        kept = {sample.row for sample in self.held_out}
        samples = [sample for sample in samples if sample.row not in kept]
        return Encoded(samples, rows, cache, encoders, lambda sample: rows.name(sample.row), len(rows))

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
        plan = DrawPlan([s.size for s in data.samples], run.global_batch_size, config.seed, config.max_steps)
        density = {
            "mean": config.timestep_mean,
            "std": config.timestep_std,
            "shift": config.timestep_shift,
            "uniform_fraction": config.timestep_uniform_fraction,
        }
        return LatentSource(
            *(data.samples, data.rows, data.cache, data.encoders, plan),
            micro_batch_size=config.per_device_train_batch_size,
            rank=run.ranks.rank,
            world_size=run.ranks.world,
            randomness=partial(timestep_and_noise, **density),
            arrange=immiscible if config.immiscible else None,
            caption_dropout=config.caption_dropout,
            # torch.compile specialises on shapes, so it gets one text length
            pad_length=self.pipeline.max_prompt_tokens if config.torch_compile else None,
        )

    def monitor(self, run: Run, data: Encoded, objective: Objective) -> Monitor:
        loss = None
        if self.held_out:
            held_out = dataclasses.replace(
                self.source(run, data, objective), samples=self.held_out, caption_dropout=0.0
            )
            loss = partial(self._validation_loss, run, held_out, objective)
        sampler = self.sampler(objective.policy, run)
        return ImageMonitor(run, self.config, sampler, data, **self.watched(data), validation_loss=loss)

    @torch.no_grad()
    def _validation_loss(self, run: Run, source: LatentSource, objective: Objective) -> float:
        """Mean over the held-out rows, each at its own fixed t and noise; whole batches shared out over the ranks."""
        size = self.config.per_device_train_batch_size
        by_size: dict[Any, list[int]] = {}
        for index, sample in enumerate(self.held_out):
            by_size.setdefault(sample.size, []).append(index)
        batches = [group[i : i + size] for group in by_size.values() for i in range(0, len(group), size)]

        def loss_of(place: int) -> tuple[int, float]:
            indices = batches[min(place, len(batches) - 1)]
            draws = [Draw(index, stream(self.config.seed, 5, index)) for index in indices]
            batch = to_device(source.batch(draws, 0), run.device)
            with torch.autocast(run.device.type, torch.bfloat16, enabled=self.config.bf16):
                return place, float(objective(batch)[1]["velocity_mse"]) * len(indices)

        sums = 0.0
        for first in range(0, len(batches), run.ranks.world):  # in rounds, for ZeRO-3 gathers on all ranks together
            parts = run.ranks.together(partial(loss_of, first + run.ranks.rank))
            sums += sum(value for place, value in parts if place < len(batches))
        return sums / len(self.held_out)

    def card(self, run: Run, data: Encoded, metrics: dict[str, Any]) -> ModelCard:
        used = f"{self.data_config.dataset_name} ({len(data.samples)} of {data.num_rows} images)"
        return dataclasses.replace(super().card(run, data, metrics), stage="sft", data=used)

    def example(self, run: Run) -> tuple[Any, Batch]:
        batch = self.example_batch(run)
        count = len(batch["latents"])
        return None, {**batch, "noise": torch.empty_like(batch["latents"]), "t": torch.empty(count, device=run.device)}

    def cache_size(self) -> CacheSize | str | None:
        if self.data_config.cache == "none":
            return None
        return cache_size(self.data_config, self.pipeline, self.buckets, self.text_dtype())


STAGE = SFT
