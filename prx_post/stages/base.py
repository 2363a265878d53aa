"""What stages that post-train one latent PRX pipeline have in common; each overrides what it does differently."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prx_post.base.errors import ConfigError, PrxPostError
from prx_post.base.files import write_jsonl
from prx_post.data.buckets import Size
from prx_post.data.cache import content_key, fingerprint
from prx_post.data.config import EncodersConfig
from prx_post.data.encoders import Encoders
from prx_post.data.encoding import EncodedCache
from prx_post.data.rows import DataError, ImageRows
from prx_post.data.scan import Sample
from prx_post.engine.protocols import Batch, Monitor, Objective
from prx_post.engine.run import Run
from prx_post.evaluation.monitor import ImageMonitor, Judges
from prx_post.flow import inference_sigmas
from prx_post.model import lora
from prx_post.model.card import ModelCard
from prx_post.model.checkpoint import PipelineFolder, emit, load, open_pipeline
from prx_post.model.config import ModelConfig, SchedulerConfig
from prx_post.model.inference import Inference
from prx_post.model.merging import merge
from prx_post.model.sampler import Sampler
from prx_post.model.scheduler import rescheduled
from prx_post.model.text import PromptCleaner
from prx_post.model.trainable import make_trainable, with_weights
from prx_post.stages.anchor.anchored import Anchor
from prx_post.stages.anchor.config import AnchorConfig
from prx_post.stages.compatibility import check_fit
from prx_post.stages.registry import RolloutWork

CAPTIONS_SHOWN = 4


@dataclass
class Encoded:
    """What a stage is trained on: samples, and their latents and embeddings.

    Args:
        name_of: how messages and samples.jsonl call a sample.
        cache: None if images and prompts are encoded on the fly.
        described: for the model card.
        told: what is known of each sample besides, such as a label; a resumed run must have the same.
    """

    samples: list[Sample]
    rows: ImageRows | None
    cache: EncodedCache | None
    encoders: Encoders
    name_of: Callable[[Sample], str]
    described: str
    told: Sequence[Any] | None = None

    def embed(self, prompt: str) -> Tensor:
        """[L, D], without padding."""
        key = content_key(self.encoders.cleaner(prompt))
        if self.cache is None or key not in self.cache.embeddings:
            return self.encoders.prompts(prompt)
        return self.cache.embeddings[key]

    def decode(self, latents: Tensor) -> Tensor:
        return self.encoders.codec.decode(latents)

    def free(self) -> None:
        """Let go of the VAE and the text encoder, if what they are needed for is cached."""
        if self.cache is not None:
            self.encoders.free()

    def captions(self) -> list[str]:
        """A few, spread over the data set, each once."""
        chosen = self.samples[:: max(1, len(self.samples) // CAPTIONS_SHOWN)]
        return list(dict.fromkeys(sample.prompt for sample in chosen))[:CAPTIONS_SHOWN]


class PipelineStage:
    """A stage that trains the transformer of `model_name_or_path`.

    Args:
        model: which pipeline, and which of its weights.
        config: the stage's own settings, which extend MonitorConfig.
        encoding: how prompts and images are encoded.
        size: height and width that are fixed, pixels; None: aspect buckets.
        planned: for `prx-post plan`, for which neither weights nor data need be there.
    """

    name: ClassVar[str]
    configs: ClassVar[tuple[type, ...]]

    def __init__(
        self,
        model: ModelConfig,
        config: Any,
        encoding: EncodersConfig,
        size: Size | None,
        planned: bool = False,
    ) -> None:
        self.model, self.config, self.encoding, self.size = model, config, encoding, size
        self.cache_dir = Path(encoding.cache_dir).expanduser()
        pipeline = open_pipeline(str(model.model_name_or_path), model.model_revision, weights=not planned)
        self.pipeline = lora.with_adapter(pipeline, model.adapter)
        if model.use_peft:
            lora.check_targets(self.pipeline, model.lora_target_modules)
        self.judges = Judges([], {}) if planned else Judges.open(config)
        self.cleaner = PromptCleaner(encoding.skip_text_cleaning)
        self.anchor = self._open_anchor(planned)

    def _open_anchor(self, planned: bool) -> Anchor | None:
        """A distillation that is trained along, of the same kind of network."""
        if not isinstance(self.config, AnchorConfig) or self.config.anchor_config is None:
            return None
        anchor = Anchor(self, planned)
        check_fit(self.pipeline, anchor.stage.teacher_pipeline, "anchor's teacher")
        return anchor

    @cached_property
    def scheduler(self) -> Any:
        """The one that is emitted."""
        changes = self.config.scheduler_changes if isinstance(self.config, SchedulerConfig) else {}
        scheduler = self.pipeline.load_scheduler()
        return rescheduled(scheduler, **changes) if changes else scheduler

    def grid(self, num_steps: int) -> Tensor:
        """Noise levels [N + 1] that the emitted scheduler visits. Raises ConfigError if it cannot give so many."""
        try:
            return inference_sigmas(self.scheduler, num_steps)
        except ValueError as error:
            last = self.scheduler.config.shift_terminal
            raise ConfigError(
                f"the emitted scheduler cannot sample in {num_steps} steps with shift_terminal {last}: {error}. Change "
                f"one of them."
            ) from error

    @property
    def bases(self) -> tuple[PipelineFolder, ...]:
        """Pipelines whose transformers the run depends on."""
        return (self.pipeline,)

    @property
    def encoder_pipeline(self) -> PipelineFolder:
        """Whose text encoder and VAE are used."""
        return self.pipeline

    @property
    def largest_size(self) -> Size:
        return self.size or self.pipeline.resolve_size(None, None)

    def text_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.bf16 else torch.float32

    def encoders(self, run: Run) -> Encoders:
        """Each loaded at its first use."""
        if run.ranks.is_main:
            self.cleaner.warn_of_lost(self.shown_prompts())
        return self.encoders_on(run.device)

    def encoders_on(self, device: torch.device) -> Encoders:
        given = self.encoding
        return Encoders(
            *(self.encoder_pipeline, self.cleaner, device, self.text_dtype()),
            batch_size=given.encode_batch_size,
            num_workers=given.dataloader_num_workers,
        )

    def shown_prompts(self) -> list[str]:
        """Prompts of grids and evaluations, which are to be embedded with the data's own."""
        return [*self.config.sample_prompts, *self.judges.prompts]

    def policy(self, run: Run) -> Any:
        """The network in training, with what is to be trained unfrozen."""
        return make_trainable(run.transformer(self.pipeline), self.model, self.config)

    def steps_per_epoch(self, run: Run, data: Encoded) -> float:
        return len(data.samples) / run.global_batch_size

    def identity(self, run: Run, data: Encoded) -> dict[str, str]:
        """Writes samples.jsonl, a line per sample."""
        return {
            "data": run.ranks.on_main(lambda: _record_samples(run, data)),
            "base": run.ranks.on_main(lambda: self._check_base(run)),
        }

    def base_digest(self) -> str:
        """Of the weights that the run depends on."""
        return fingerprint(self.cache_dir, *(part for folder in self.bases for part in folder.transformer_files))

    def _check_base(self, run: Run) -> str:
        """An adapter of another base would sit on weights that it was not trained with."""
        digest = self.base_digest()
        if run.saved is not None and run.saved.info["base"] != digest:
            raise PrxPostError(
                f"model_name_or_path is {self.pipeline.source!r}, but {run.saved.folder} was trained from another "
                f"transformer. Set it back, or start a new run."
            )
        return digest

    def batch_options(self, run: Run) -> dict[str, Any]:
        """What every LatentSource of the stage is told: how a global batch is split, and padded."""
        return {
            "micro_batch_size": self.config.per_device_train_batch_size,
            "rank": run.ranks.rank,
            "world_size": run.ranks.world,
            # torch.compile specialises on shapes, so it gets one text length
            "pad_length": self.pipeline.max_prompt_tokens if self.config.torch_compile else None,
        }

    def sampler(self, network: Any, run: Run) -> Sampler:
        """As the emitted pipeline generates."""
        config, pipeline = self.config, self.pipeline
        return Sampler(
            transformer=network,
            scheduler=self.scheduler,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            latent_shape=pipeline.latent_shape(*pipeline.resolve_size(*(self.size or (None, None)))),
            device=run.device,
            pad_length=pipeline.max_prompt_tokens,
            autocast=config.bf16,
        )

    def monitor(self, run: Run, data: Encoded, objective: Objective) -> Monitor:
        return ImageMonitor(run, self.config, self.sampler(objective.policy, run), data, **self.watched(data))

    def watched(self, data: Encoded) -> dict[str, Any]:
        """The monitor's judges and prompts."""
        prompts = self.config.sample_prompts or (data.captions() if self.config.sample_steps else [])
        judges, config = self.judges, self.config
        wants_images = judges.rewards or config.eval_encoder or not getattr(config, "eval_rows", 0)
        if config.eval_steps and not judges.prompts and wants_images:
            judges = Judges(data.captions(), judges.rewards)
            for reward in judges.rewards.values():
                reward.check(judges.prompts)
        return {"judges": judges, "grid_prompts": prompts}

    def emit(self, run: Run, data: Encoded, weights: dict[str, Tensor], metrics: dict[str, Any]) -> None:
        """`final/`, a complete pipeline; for LoRA with the adapter merged, and the adapter in `final-adapter/`."""
        _check_finite(weights, run)
        self.write(run.final, self.card(run.output_dir.name, run.settings, data.described, metrics), weights)

    def write(self, folder: Path, card: ModelCard, weights: dict[str, Tensor]) -> None:
        """A pipeline with trained weights, by name; an adapter beside it, its folder called so and then `-adapter`."""
        checkpoint = load(self.pipeline)
        network = with_weights(checkpoint.transformer, self.model, weights)
        if self.model.use_peft:
            lora.save_adapter(network, folder.with_name(f"{folder.name}-adapter"), card.render_adapter())
            network = merge(network)
        checkpoint.transformer, checkpoint.scheduler, checkpoint.card = network, self.scheduler, card.render()
        checkpoint.inference = Inference(
            card.num_inference_steps, card.guidance_scale, card.height, card.width, card.skip_text_cleaning
        )
        emit(checkpoint, folder, self.config.emit_dtype)

    def card(self, title: str, settings: dict[str, Any], data: str, metrics: dict[str, Any]) -> ModelCard:
        """Of a pipeline, by what it was trained with and on, and by how that went."""
        config, loss = self.config, metrics["loss"]
        height, width = self.size or (None, None)
        return ModelCard(
            title=title,
            stage=self.name,
            base=self.pipeline.source,
            base_adapter=self.model.adapter,
            base_is_on_hub=self.pipeline.is_from_hub,
            data=data,
            licence=self.pipeline.licence,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            dtype=config.emit_dtype,
            height=height,
            width=width,
            skip_text_cleaning=self.cleaner.skip_text_cleaning,
            example=next(iter(config.sample_prompts), ModelCard.example),
            config=settings,
            metrics={
                "optimizer steps": metrics["step"],
                "final training loss": "unknown" if loss is None else f"{loss:.4f}",
                **_best_of(metrics["best"], config.metric_for_best_model),
            },
        )

    def example(self, run: Run) -> tuple[Any, Batch]:
        return None, self.example_batch(run)

    def example_batch(self, run: Run) -> Batch:
        """Latents and prompts of the largest micro-batch, the prompts of the greatest length."""
        count, pipeline, device = self.config.per_device_train_batch_size, self.pipeline, run.device
        tokens, width = pipeline.max_prompt_tokens, pipeline.configs["transformer"]["context_in_dim"]
        return {
            "latents": torch.empty(count, *pipeline.latent_shape(*self.largest_size), device=device),
            "prompt_embeds": torch.empty(count, tokens, width, dtype=self.text_dtype(), device=device),
            "prompt_mask": torch.ones(count, tokens, dtype=torch.bool, device=device),
            "seeds": list(range(count)),
            "rows": list(range(count)),
            "step": 0,
        }

    def cache_size(self) -> Any:
        return None

    def rollout_work(self) -> RolloutWork | None:
        return None


def _best_of(best: dict[str, Any] | None, metric: str | None) -> dict[str, Any]:
    """What a card says of the best weights, which are those emitted."""
    if best is None:
        return {}
    values = {name: value for name, value in best["metrics"].items() if f"/{metric}" in name}
    return {"best weights": f"of step {best['step']}", **{name: f"{value:.4g}" for name, value in values.items()}}


def _record_samples(run: Run, data: Encoded) -> str:
    """Write what is trained on to samples.jsonl; returns its digest.

    Raises:
        DataError: the run is resumed on other data than it began with; names the first sample that differs.
    """
    samples, name_of = data.samples, data.name_of
    keys = [(s.image_key, s.prompt_key) for s in samples]
    whole = keys if data.told is None else [keys, list(data.told)]
    digest, path = content_key(json.dumps(whole)), run.output_dir / "samples.jsonl"
    if run.saved is not None and run.saved.info["data"] != digest:
        before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        known, present = {(line["image"], line["prompt_key"]) for line in before}, set(keys)
        odd = [name_of(s) for s in samples if (s.image_key, s.prompt_key) not in known]
        odd += [line["name"] for line in before if (line["image"], line["prompt_key"]) not in present]
        others = "their order" if data.told is None else "their order, or what is told of them (labels, seeds, scores)"
        raise DataError(
            f"the data set holds other data than {run.saved.folder} was trained on: {len(samples)} samples, "
            f"{len(before)} before; {odd[0] if odd else others} differs. "
            f"Restore it, or start a new run from the emitted pipeline."
        )
    lines = [
        {"name": name_of(s), "size": s.size, "image": s.image_key, "prompt_key": s.prompt_key, "prompt": s.prompt}
        for s in samples
    ]
    write_jsonl(path, lines)
    return digest


def _check_finite(weights: dict[str, Tensor], run: Run) -> None:
    """Raise PrxPostError, naming the last checkpoint, for a weight that is not finite: nothing such is emitted."""
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        saved = sorted(run.output_dir.glob("checkpoint-*"))
        raise PrxPostError(
            f"{len(bad)} of {len(weights)} trained weights are not finite, first {bad[0]}, so no pipeline was emitted. "
            f"Lower learning_rate; "
            + (
                f"the last checkpoint is {saved[-1].name}, look whether an earlier one is sound."
                if saved
                else "begin again."
            )
        )
