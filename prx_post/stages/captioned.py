"""Stages that train on images with captions: a data set is encoded once, and its latents are drawn in any order."""

from typing import Any

from prx_post.data.buckets import Buckets, Size
from prx_post.data.config import DataConfig
from prx_post.data.encoding import prepare
from prx_post.data.plan import DrawPlan
from prx_post.data.readers import read_rows
from prx_post.data.sizes import CacheSize, cache_size
from prx_post.data.source import LatentSource
from prx_post.engine.run import Run
from prx_post.model.config import ModelConfig
from prx_post.stages.base import Encoded, PipelineStage


class CaptionedStage(PipelineStage):
    """Settings are a ModelConfig, a DataConfig and the stage's own."""

    def __init__(self, model: ModelConfig, data: DataConfig, config: Any, *, planned: bool = False) -> None:
        super().__init__(model, config, data, data.fixed_size, planned)
        self.data_config = data
        self.buckets = Buckets(self.pipeline, data.height, data.width)
        self.rows = None if planned else read_rows(data)

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
        source = f"{self.data_config.dataset_name} ({len(samples)} of {len(rows)} images)"
        return Encoded(samples, rows, cache, encoders, lambda sample: rows.name(sample.row), source)

    def latent_source(self, run: Run, data: Encoded, **options: Any) -> LatentSource:
        """Every sample as often as any other of its size; `options` are LatentSource's."""
        config = self.config
        plan = DrawPlan([s.size for s in data.samples], run.global_batch_size, config.seed, config.max_steps)
        return LatentSource(
            samples=data.samples,
            rows=data.rows,
            cache=data.cache,
            encoders=data.encoders,
            plan=plan,
            **self.batch_options(run),
            **options,
        )

    def cache_size(self) -> CacheSize | str | None:
        if self.data_config.cache == "none":
            return None
        data, text_dtype = self.data_config, self.text_dtype()
        return cache_size(
            data.dataset_name, lambda: read_rows(data), self.pipeline, self.buckets, self.cleaner, text_dtype
        )
