"""Supervised fine-tuning of a PRX transformer by flow matching, of all weights or a LoRA adapter."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prx_post.base.parsing import parse
from prx_post.base.settings import doc, require, require_one_of
from prx_post.data.buckets import Buckets
from prx_post.data.config import DataConfig
from prx_post.data.encoding import Encoders, prepare
from prx_post.data.immiscible import immiscible_order
from prx_post.data.readers import PictureRows, read_rows
from prx_post.engine.config import TrainConfig
from prx_post.engine.processes import on_main, output_folder, seed_everything
from prx_post.engine.protocols import Batch
from prx_post.engine.run import Run, open_run
from prx_post.engine.tracking import RunLog, check_trackers
from prx_post.engine.trainer import Trainer
from prx_post.flow import interpolate, sample_timesteps, velocity_target
from prx_post.model import lora
from prx_post.model.card import ModelCard
from prx_post.model.checkpoint import PipelineFolder, load, open_pipeline
from prx_post.model.config import ModelConfig
from prx_post.model.denoiser import predict_velocity
from prx_post.model.text import PromptCleaner
from prx_post.objectives.flow_matching import contrastive_term, flow_matching_loss, min_snr_weight
from prx_post.stages.common import GridDrawer, build_source, check_base, emit_trained, prepare_network, record_samples


@dataclass
class SFTConfig(TrainConfig):
    """Flow-matching settings, on top of the training loop's. Defaults are PRX's pretraining distribution."""

    caption_dropout: float = doc(
        "Share of samples trained on the encoded empty prompt, for guidance.", 0.1, between=(0, 1)
    )
    timestep_mean: float = doc("Mean of the normal variable whose sigmoid is t.", 0.0)
    timestep_std: float = doc("Standard deviation of that variable.", 1.0, above=0)
    timestep_shift: float = doc("t -> shift·t / (1 + (shift - 1)·t); above 1 favours noise.", 1.0, above=0)
    timestep_uniform_fraction: float = doc("Share of samples whose t is uniform instead.", 0.1, between=(0, 1))
    loss_weighting: str = doc("`none`, or `min_snr` (Hang et al. 2023).", "none")
    min_snr_gamma: float = doc("Cap of the signal-to-noise weight for `min_snr`.", 5.0, above=0)
    contrastive_weight: float = doc(
        "Weight of contrastive flow matching's negative term; 0.05 in its paper, 0: off.", 0.0, at_least=0
    )
    immiscible: bool = doc("Assign each micro-batch's noises to its samples by least distance.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("loss_weighting", self.loss_weighting, ("none", "min_snr"))
        require(
            self.contrastive_weight == 0 or self.per_device_train_batch_size > 1,
            "per_device_train_batch_size",
            self.per_device_train_batch_size,
            "2 or more",
            "contrastive_weight compares a sample with another of its batch",
            "Raise it, or set contrastive_weight to 0",
        )


class FlowMatchingObjective(nn.Module):
    """x_t = (1 - t) x0 + t noise; the transformer's output is regressed onto noise - x0."""

    def __init__(self, transformer: nn.Module, config: SFTConfig) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = config

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch` as made by BatchSource. A sample's noise and timestep derive from its seed (see `immiscible`)."""
        x0 = batch["latents"].float()
        noise, t = self.draw(batch["seeds"], x0)
        target = velocity_target(x0, noise)
        velocity = predict_velocity(
            self.transformer, interpolate(x0, noise, t), t, batch["prompt_embeds"], batch["prompt_mask"]
        )
        weight = min_snr_weight(t, self.config.min_snr_gamma) if self.config.loss_weighting == "min_snr" else None
        loss, metrics = flow_matching_loss(velocity, target, weight)
        if self.config.contrastive_weight:
            loss = loss - self.config.contrastive_weight * contrastive_term(velocity, target)
        return loss, metrics

    def draw(self, seeds: Sequence[int], x0: Tensor) -> tuple[Tensor, Tensor]:
        """noise like x0 and t [B], on x0's device."""
        config = self.config
        ts, noises = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            ts.append(
                sample_timesteps(
                    1,
                    mean=config.timestep_mean,
                    std=config.timestep_std,
                    shift=config.timestep_shift,
                    uniform_fraction=config.timestep_uniform_fraction,
                    generator=generator,
                )
            )
            noises.append(torch.randn(x0.shape[1:], generator=generator))
        noise = torch.stack(noises).to(x0.device)
        if config.immiscible:
            noise = noise[immiscible_order(x0, noise)]
        return noise, torch.cat(ts).to(x0.device)


def run(args: Sequence[str]) -> None:
    """`prx-post sft`"""
    train(*check(args))


def check(args: Sequence[str]) -> tuple[ModelConfig, DataConfig, SFTConfig]:
    """Read and check the settings. Raises ConfigError."""
    model, data, config = parse([ModelConfig, DataConfig, SFTConfig], args, "prx-post sft")
    return model, data, config


def train(model: ModelConfig, data: DataConfig, config: SFTConfig) -> Path:
    """Check everything, bring the cache up to date, fit, emit. Returns the emitted pipeline's folder."""
    pipeline = open_pipeline(str(model.model_name_or_path), model.model_revision)
    buckets = Buckets(pipeline, data.height, data.width)
    if model.use_peft:
        lora.check_targets(pipeline, model.lora_target_modules)
    check_trackers(config.report_to)
    rows = read_rows(data)
    settings = {k: v for part in (model, data, config) for k, v in dataclasses.asdict(part).items()}
    with open_run(config, settings) as run:
        if not run.is_finished:
            _train(run, pipeline, buckets, rows, (model, data, config))
        run.accelerator.print(f"pipeline in {run.final}")
    return run.final


def _train(
    run: Run,
    pipeline: PipelineFolder,
    buckets: Buckets,
    rows: PictureRows,
    configs: tuple[ModelConfig, DataConfig, SFTConfig],
) -> None:
    model, data, config = configs
    accelerator = run.accelerator
    cleaner = PromptCleaner(data.skip_text_cleaning)
    if accelerator.is_main_process:
        cleaner.warn_of_lost(config.sample_prompts)
    encoders = Encoders(
        pipeline, cleaner, accelerator.device, text_dtype=torch.bfloat16 if config.bf16 else torch.float32
    )
    samples, cache = prepare(
        data, rows, encoders, buckets, run.output_dir / "bad_rows.jsonl", config.sample_prompts, run.ranks
    )
    digest = on_main(accelerator, lambda: record_samples(run, samples, lambda sample: rows.name(sample.row)))
    base = on_main(accelerator, lambda: check_base(run, pipeline, Path(data.cache_dir).expanduser()))
    if cache is not None:
        encoders.free()

    seed_everything(config)
    network = prepare_network(load(pipeline).transformer, model, config)
    seed_everything(config, accelerator.process_index)
    source = build_source(samples, rows, cache, encoders, config, accelerator, config.caption_dropout)
    log = RunLog(accelerator, run, config)
    draw_grid = GridDrawer(network, pipeline, (data.height, data.width), encoders, cache, config, log)
    identity = {"stage": "sft", "settings": run.settings, "data": digest, "base": base}
    trainer = Trainer(config, accelerator, FlowMatchingObjective(network, config), source, log, draw_grid, identity)
    try:
        if run.saved:
            trainer.resume(run.saved)
        metrics = trainer.fit()
        weights = trainer.averaged_weights()
        readme = card(model, data, config, run.settings, metrics, (len(samples), len(rows)), pipeline)
        on_main(accelerator, lambda: emit_trained(pipeline, model, weights, run, config.emit_dtype, readme))
    finally:
        log.close()


def card(
    model: ModelConfig,
    data: DataConfig,
    config: SFTConfig,
    settings: dict[str, Any],
    metrics: dict[str, Any],
    used_of_rows: tuple[int, int],
    pipeline: PipelineFolder,
) -> ModelCard:
    steps, loss = config.max_steps, metrics["loss"]
    last_loss = "unknown" if loss is None else f"{loss:.4f}"
    return ModelCard(
        title=output_folder(config).name,
        stage="sft",
        base=str(model.model_name_or_path),
        base_is_on_hub=pipeline.is_from_hub,
        data="{} ({} of {} pictures)".format(data.dataset_name, *used_of_rows),
        licence=pipeline.licence,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        dtype=config.emit_dtype,
        height=data.height,
        width=data.width,
        skip_text_cleaning=data.skip_text_cleaning,
        example=next(iter(config.sample_prompts), ModelCard.example),
        config=settings,
        metrics={"optimizer steps": steps, "final training loss": last_loss},
    )
