"""Wiring that stages share: what is trained, the batches, the sample grids, what is emitted."""

from pathlib import Path
from typing import Any

from torch import Tensor

from prx_post.config import ModelConfig, TrainConfig
from prx_post.data.cache import content_key
from prx_post.data.encoding import EncodedCache, Encoders, Sample
from prx_post.data.readers import PictureRows
from prx_post.data.source import BatchSource, DrawPlan
from prx_post.engine.tracking import RunLog, grid
from prx_post.generate import Sampler, generate_images
from prx_post.model import lora
from prx_post.model.checkpoint import Checkpoint, PipelineFolder, emit


def prepare_network(transformer: Any, model: ModelConfig, config: TrainConfig) -> Any:
    """The transformer with what is to be trained unfrozen: itself, or a PeftModel around it."""
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if config.torch_compile:
        for block in transformer.blocks:
            block.compile()
    if model.use_peft:
        return lora.attach(transformer, model)
    return transformer.train().requires_grad_(True)


def build_source(
    samples: list[Sample],
    rows: PictureRows,
    cache: EncodedCache | None,
    encoders: Encoders,
    config: TrainConfig,
    accelerator: Any,
    caption_dropout: float = 0.0,
) -> BatchSource:
    world = accelerator.num_processes
    size = config.per_device_train_batch_size
    plan = DrawPlan(
        [s.size for s in samples], size * world * config.gradient_accumulation_steps, config.seed, config.max_steps
    )
    return BatchSource(
        samples,
        rows,
        cache,
        encoders,
        plan,
        micro_batch_size=size,
        num_steps=config.max_steps,
        rank=accelerator.process_index,
        world_size=world,
        caption_dropout=caption_dropout,
        # torch.compile specialises on shapes, so it gets one text length
        pad_length=encoders.pipeline.max_prompt_tokens if config.torch_compile else None,
    )


class GridDrawer:
    """Draws `sample_prompts` × `sample_seeds`, a row a prompt, each time the trainer asks."""

    def __init__(
        self,
        network: Any,
        pipeline: PipelineFolder,
        size: tuple[int | None, int | None],
        encoders: Encoders,
        cache: EncodedCache | None,
        config: TrainConfig,
        log: RunLog,
    ) -> None:
        self.encoders, self.cache, self.config, self.log = encoders, cache, config, log
        self.sampler = Sampler(
            transformer=network,
            scheduler=pipeline.load_scheduler(),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            latent_shape=pipeline.latent_shape(*pipeline.resolve_size(*size)),
            device=encoders.device,
            pad_length=pipeline.max_prompt_tokens,
            autocast=config.bf16,
        )

    def _embed(self, prompt: str) -> Tensor:
        if self.cache is None:
            return self.encoders.prompts(prompt)
        return self.cache.embeddings[content_key(self.encoders.cleaner(prompt))]

    def __call__(self, step: int) -> None:
        config = self.config
        jobs = [(prompt, seed) for prompt in config.sample_prompts for seed in config.sample_seeds]
        if not jobs:
            return
        prompts, seeds = [prompt for prompt, _ in jobs], [seed for _, seed in jobs]
        decode, batch = self.encoders.codec.decode, config.per_device_train_batch_size
        images = list(generate_images(self.sampler, self._embed, decode, prompts, seeds, batch))
        if self.cache is not None:
            self.encoders.free()
        self.log.picture(step, "grid", grid(images, columns=len(config.sample_seeds)))


def emit_trained(checkpoint: Checkpoint, network: Any, output_dir: Path, dtype: str) -> None:
    """`final/`, a complete pipeline; for LoRA with the adapter merged, and the adapter itself in `final-adapter/`."""
    if network is not checkpoint.transformer:
        lora.save_adapter(network, output_dir / "final-adapter", checkpoint.card)
        checkpoint.transformer = lora.merge(network)
    emit(checkpoint, output_dir / "final", dtype)
