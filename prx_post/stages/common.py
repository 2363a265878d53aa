"""Wiring that stages share: what is trained, the batches, the sample grids, what is emitted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.files import write_jsonl
from prx_post.data.cache import content_key, fingerprint
from prx_post.data.encoding import EncodedCache, Encoders, Sample
from prx_post.data.readers import DataError, PictureRows
from prx_post.data.source import BatchSource, DrawPlan
from prx_post.engine.config import TrainConfig
from prx_post.engine.run import Run
from prx_post.engine.tracking import RunLog
from prx_post.model import lora
from prx_post.model.card import ModelCard
from prx_post.model.checkpoint import PipelineFolder, emit, load
from prx_post.model.config import ModelConfig
from prx_post.model.sampler import Sampler, generate_images, grid


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


def record_samples(run: Run, samples: list[Sample], name_of: Callable[[Sample], str]) -> str:
    """Write what is trained on to samples.jsonl, a line a sample; returns its digest.

    Raises:
        DataError: the run is resumed on other data than it began with; names the first sample that differs.
    """
    keys = [(s.image_key, s.prompt_key) for s in samples]
    digest, path = content_key(json.dumps(keys)), run.output_dir / "samples.jsonl"
    if run.saved is not None and run.saved.info["data"] != digest:
        before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        known = {(line["image"], line["prompt_key"]) for line in before}
        odd = [name_of(s) for s in samples if (s.image_key, s.prompt_key) not in known]
        odd += [line["name"] for line in before if (line["image"], line["prompt_key"]) not in set(keys)]
        raise DataError(
            f"the data set holds other data than {run.saved.folder} was trained on: {len(samples)} samples, "
            f"{len(before)} before; {odd[0] if odd else 'their order'} differs. "
            f"Restore it, or start a new run from the emitted pipeline."
        )
    lines = [
        {"name": name_of(s), "size": s.size, "image": s.image_key, "prompt_key": s.prompt_key, "prompt": s.prompt}
        for s in samples
    ]
    write_jsonl(path, lines)
    return digest


def check_base(run: Run, pipeline: PipelineFolder, cache_dir: Path, *others: PipelineFolder) -> str:
    """The digest of the transformer that is post-trained, and of others that it depends on, such as a teacher's.

    Raises:
        PrxPostError: the run is resumed on another one: an adapter would then sit on weights it was not trained with.
    """
    digest = fingerprint(cache_dir, *(folder.path / "transformer" for folder in (pipeline, *others)))
    if run.saved is not None and run.saved.info["base"] != digest:
        raise PrxPostError(
            f"model_name_or_path is {pipeline.source!r}, but {run.saved.folder} was trained from another transformer. "
            f"Set it back, or start a new run."
        )
    return digest


def emit_trained(
    pipeline: PipelineFolder,
    model: ModelConfig,
    weights: dict[str, Tensor],
    run: Run,
    dtype: str,
    card: ModelCard,
    scheduler: Any = None,
) -> None:
    """`final/`, a complete pipeline; for LoRA with the adapter merged, and the adapter itself in `final-adapter/`.

    The trained `weights` go into a fresh copy of the network on the CPU: the one in training may be split, compiled or
    wrapped.

    Args:
        scheduler: emitted in the place of the pipeline's own.
    """
    checkpoint = load(pipeline)
    checkpoint.scheduler = scheduler or checkpoint.scheduler
    checkpoint.card = card.render()
    network = lora.attach(checkpoint.transformer, model) if model.use_peft else checkpoint.transformer
    names = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            names[name.removeprefix("transformer.")].copy_(value)
    if model.use_peft:
        lora.save_adapter(network, run.output_dir / "final-adapter", card.render_adapter())
        checkpoint.transformer = lora.merge(network)
    emit(checkpoint, run.final, dtype)
