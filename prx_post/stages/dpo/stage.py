"""Preference optimisation of a PRX transformer from pairs of images, of all weights or a LoRA adapter."""

from functools import partial
from typing import Any

import torch

from prx_post.data.buckets import Buckets, Size
from prx_post.data.config import PairConfig
from prx_post.data.pairs import PairSource, prepare_pairs, read_pairs
from prx_post.data.plan import DrawPlan
from prx_post.data.source import timestep_and_noise
from prx_post.engine.protocols import Batch, Objective, Reference
from prx_post.engine.run import Run
from prx_post.model.config import ModelConfig
from prx_post.model.frozen import AdapterOff, FrozenCopy
from prx_post.stages.base import Encoded, PipelineStage
from prx_post.stages.dpo.config import CONFIGS, DPOConfig
from prx_post.stages.dpo.objective import PreferenceObjective


class DPO(PipelineStage):
    name, configs = "dpo", CONFIGS

    def __init__(self, model: ModelConfig, data: PairConfig, config: DPOConfig, *, planned: bool = False) -> None:
        size = (data.height, data.width) if data.height is not None and data.width is not None else None
        super().__init__(model, config, data.skip_text_cleaning, data.cache_dir, size, planned)
        self.data_config = data
        self.buckets = Buckets(self.pipeline, data.height, data.width)
        self.rows = None if planned else read_pairs(data)

    @property
    def largest_size(self) -> Size:
        return self.buckets.largest

    def data(self, run: Run) -> Encoded:
        """Samples are the chosen and the rejected image of each pair in turn."""
        rows, encoders = self.rows, self.encoders(run)
        assert rows is not None
        pairs, cache = prepare_pairs(
            *(self.data_config, rows, encoders, self.buckets, run.output_dir), self.shown_prompts(), run.ranks
        )
        encoders.free()
        samples = [sample for pair in pairs for sample in (pair.chosen, pair.rejected)]
        described = f"{self.data_config.dataset_name} ({len(pairs)} of {len(rows) // 2} preference pairs)"
        return Encoded(samples, rows, cache, encoders, lambda sample: rows.name(sample.row), described)

    def objective(self, run: Run, data: Any) -> PreferenceObjective:
        config, policy = self.config, self.policy(run)
        return PreferenceObjective(
            *(policy, config.learning_rate, self.reference(run, policy)),
            beta=config.beta,
            loss_type=config.loss_type,
            label_smoothing=config.label_smoothing,
            lose_weight=config.lose_weight,
            sft_weight=config.sft_weight,
        )

    def reference(self, run: Run, policy: Any) -> Reference | None:
        """The policy without its adapter; or, where every weight is trained, a copy in the precision it is asked in."""
        if self.config.reference_free:
            return None
        if self.model.use_peft:
            return AdapterOff(policy)
        return FrozenCopy(run.place(run.transformer(self.pipeline, self.text_dtype())))

    def source(self, run: Run, data: Encoded, objective: Objective) -> PairSource:
        config, chosen = self.config, data.samples[::2]
        density = {
            "mean": config.timestep_mean,
            "std": config.timestep_std,
            "shift": config.timestep_shift,
            "uniform_fraction": config.timestep_uniform_fraction,
        }
        plan = DrawPlan([s.size for s in chosen], run.global_batch_size, config.seed, config.max_steps)
        return PairSource(
            *(chosen, data.rows, data.cache, data.encoders, plan),
            micro_batch_size=config.per_device_train_batch_size,
            rank=run.ranks.rank,
            world_size=run.ranks.world,
            randomness=partial(timestep_and_noise, **density),
            pad_length=self.pipeline.max_prompt_tokens if config.torch_compile else None,
            others=data.samples[1::2],
        )

    def example(self, run: Run) -> tuple[Any, Batch]:
        batch = self.example_batch(run)
        count, like = len(batch["latents"]), torch.empty_like(batch["latents"])
        return None, {**batch, "rejected": like, "noise": like, "t": torch.empty(count, device=run.device)}

    def cache_size(self) -> str:
        return "it is not computed for pairs yet"


STAGE = DPO
