"""Preference optimisation of a PRX transformer, of all weights or a LoRA adapter."""

from functools import partial
from typing import Any

from prx_post.base.settings import require
from prx_post.data.buckets import Buckets, Size
from prx_post.data.config import PreferenceConfig
from prx_post.engine.protocols import Batch, Monitor, Objective, Source
from prx_post.engine.run import Run
from prx_post.model.checkpoint import PipelineFolder, open_pipeline
from prx_post.model.config import ModelConfig
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.stages.base import Encoded, PipelineStage
from prx_post.stages.compatibility import check_fit, check_same_encoders
from prx_post.stages.dpo.config import CONFIGS, DPOConfig, check_together
from prx_post.stages.dpo.feeds import Feed, LabelFeed, OnlineFeed, PairFeed
from prx_post.stages.dpo.monitor import PreferenceMonitor
from prx_post.stages.dpo.objective import ComparedWithReference
from prx_post.stages.dpo.references import build_reference


class DPO(PipelineStage):
    name, configs = "dpo", CONFIGS

    def __init__(
        self,
        model: ModelConfig,
        data: PreferenceConfig,
        judge: VisionJudgeConfig,
        config: DPOConfig,
        *,
        planned: bool = False,
    ) -> None:
        check_together(data, judge, config)
        super().__init__(model, config, data, data.fixed_size, planned)
        self.data_config = data
        self.buckets = Buckets(self.pipeline, data.height, data.width)
        self._check_noise()
        self.reference_pipeline = self._open_reference(planned)
        self.feed: Feed
        if config.is_online:
            self.feed = OnlineFeed(self, judge, planned)
        elif config.loss_type == "kto":
            self.feed = LabelFeed(self, planned)
        else:
            self.feed = PairFeed(self, planned)

    def _check_noise(self) -> None:
        own, stochastic = self.config.pair_noise == "own", self.scheduler.config.stochastic_sampling
        reason = "its pipeline adds fresh noise in every step, so that an image has none of its own"
        require(not (own and stochastic), "pair_noise", "own", "shared", reason, "Set it")

    def _open_reference(self, planned: bool) -> PipelineFolder:
        config = self.config
        if config.ref_model_name_or_path is None:
            return self.pipeline
        reference = open_pipeline(config.ref_model_name_or_path, config.ref_model_revision, weights=not planned)
        check_fit(self.pipeline, reference, "reference")
        return reference

    @property
    def bases(self) -> tuple[PipelineFolder, ...]:
        is_other = self.reference_pipeline is not self.pipeline
        return (self.pipeline, self.reference_pipeline) if is_other else (self.pipeline,)

    @property
    def largest_size(self) -> Size:
        return self.buckets.largest

    def data(self, run: Run) -> Encoded:
        if self.reference_pipeline is not self.pipeline:
            pipelines = self.pipeline, self.reference_pipeline
            run.ranks.on_main(lambda: check_same_encoders(*pipelines, "reference", self.cache_dir))
        return self.feed.data(run)

    def steps_per_epoch(self, run: Run, data: Encoded) -> float:
        return self.feed.steps_per_epoch(run, data)

    def objective(self, run: Run, data: Any) -> ComparedWithReference:
        config, policy = self.config, self.policy(run)
        reference = build_reference(run, config, self.model, self.reference_pipeline, policy, self.text_dtype())
        loss = config.loss_settings
        if config.loss_type == "kto" and not run.is_planned:
            count = config.per_device_train_batch_size * run.ranks.world
            reason = "an image is compared with the mean of those that all processes compute at a time"
            rule, action = "2 or more, of all processes", "Raise it"
            require(count > 1, "per_device_train_batch_size", count, rule, reason, action)
            loss["average"] = partial(run.accelerator.reduce, reduction="mean")
        sync_steps = config.steps_per_round if config.sync_ref_model else 0
        return self.feed.objective(policy, config.learning_rate, reference, sync_steps, **loss)

    def source(self, run: Run, data: Encoded, objective: Objective) -> Source:
        return self.feed.source(run, data, objective.policy)

    def monitor(self, run: Run, data: Encoded, objective: Objective) -> Monitor:
        sampler, watched = self.sampler(objective.policy, run), self.watched(data)
        return PreferenceMonitor(run, self.config, sampler, data, **watched)

    def example(self, run: Run) -> tuple[Any, Batch]:
        return None, self.feed.example(self.example_batch(run))

    def cache_size(self) -> Any:
        return self.feed.cache_size()


STAGE = DPO
