"""Distillation of a PRX transformer into a student of few steps without guidance."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prx_post.base.parsing import parse
from prx_post.base.ranks import launched_ranks
from prx_post.base.settings import require
from prx_post.data.cache import content_key
from prx_post.data.encoding import EncodedCache, Encoders, Sample
from prx_post.data.readers import PictureRows, read_rows
from prx_post.data.source import BatchSource, MixedPlan
from prx_post.distillation.config import DistillConfig, TeacherConfig
from prx_post.distillation.monitor import StudentMonitor, open_eval_rewards, read_eval_prompts
from prx_post.distillation.objective import DistillationObjective, Teacher
from prx_post.distillation.pipelines import Pipelines, check_same_encoders
from prx_post.distillation.teacher import Prompt, read_training_prompts, teacher_latents, with_real_pictures
from prx_post.engine.processes import on_main, output_folder, seed_everything
from prx_post.engine.run import Run, open_run
from prx_post.engine.tracking import RunLog, check_trackers
from prx_post.engine.trainer import Trainer
from prx_post.evaluation.features import open_encoder
from prx_post.flow import interpolate, sample_timesteps
from prx_post.model.card import ModelCard
from prx_post.model.checkpoint import load
from prx_post.model.config import ModelConfig
from prx_post.model.heads import DiscriminatorHeads, check_blocks
from prx_post.model.sampler import Sampler, default_device
from prx_post.model.text import PromptCleaner, pad_embeddings
from prx_post.stages.common import GridDrawer, check_base, emit_trained, prepare_network, record_samples

CALIBRATION_SAMPLES = 64
"""Latents from which the heads' channel statistics are taken."""

Configs = tuple[ModelConfig, TeacherConfig, DistillConfig]


def run(args: Sequence[str]) -> None:
    """`prx-post distill`"""
    train(*check(args))


def check(args: Sequence[str]) -> Configs:
    """Read and check the settings. Raises ConfigError."""
    model, teacher, config = parse([ModelConfig, TeacherConfig, DistillConfig], args, "prx-post distill")
    return model, teacher, config


def train(model: ModelConfig, teacher: TeacherConfig, config: DistillConfig) -> Path:
    """Check everything, make what is missing of the teacher's latents, fit, emit. Returns the pipeline's folder."""
    pipelines = Pipelines.open(model, teacher, config)
    check_trackers(config.report_to)
    if config.eval_encoder:
        open_encoder(config.eval_encoder, torch.device("cpu"), "float32", 16)
    prompts = read_training_prompts(teacher, PromptCleaner(teacher.skip_text_cleaning))
    rows = read_rows(teacher.real_pictures(pipelines.size)) if teacher.real_fraction else None
    eval_prompts = read_eval_prompts(config)
    open_eval_rewards(config, eval_prompts)
    settings = {k: v for part in (model, teacher, config) for k, v in dataclasses.asdict(part).items()}
    with open_run(config, settings) as run:
        if teacher.teacher_guidance_scale <= 1 and run.accelerator.is_main_process:
            print(
                f"warning: teacher_guidance_scale is {teacher.teacher_guidance_scale:g}, so the student learns from "
                f"unguided pictures; PRX checkpoints are meant to be guided, by 4 or 5."
            )
        if not run.is_finished:
            _Distillation(run, pipelines, (model, teacher, config), prompts, rows, eval_prompts).train()
        run.accelerator.print(f"pipeline in {run.final}")
    return run.final


def make_latents(args: Sequence[str]) -> None:
    """`prx-post data teacher-latents`: a distillation's latents, and every prompt's embeddings, ahead of it."""
    model, teacher, config = check(args)
    pipelines = Pipelines.open(model, teacher, config)
    prompts = read_training_prompts(teacher, PromptCleaner(teacher.skip_text_cleaning))
    with launched_ranks() as ranks:
        frozen = _Frozen(pipelines, teacher, config, default_device())
        samples, cache = teacher_latents(
            *(teacher, prompts, frozen.encoders, pipelines.size, frozen.sampler, ranks),
            [*config.sample_prompts, *read_eval_prompts(config)],
        )
        if ranks.rank == 0:
            print(f"{len(samples)} latents in {cache.latents.folder}")


class _Frozen:
    """The teacher's weights and encoders, each loaded when first needed."""

    def __init__(
        self, pipelines: Pipelines, teacher: TeacherConfig, config: DistillConfig, device: torch.device
    ) -> None:
        self._pipelines, self._teacher, self._config, self._device = pipelines, teacher, config, device
        self._loaded: Any = None
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.encoders = Encoders(pipelines.teacher, PromptCleaner(teacher.skip_text_cleaning), device, text_dtype=dtype)

    @property
    def transformer(self) -> Any:
        if self._loaded is None:
            dtype = torch.bfloat16 if self._config.bf16 else torch.float32
            loaded = load(self._pipelines.teacher, dtype).transformer.to(self._device).eval().requires_grad_(False)
            if self._config.gradient_checkpointing:
                loaded.enable_gradient_checkpointing()
            self._loaded = loaded
        return self._loaded

    def sampler(self) -> Sampler:
        """As the teacher draws: its own scheduler, steps and guidance."""
        folder = self._pipelines.teacher
        return Sampler(
            transformer=self.transformer,
            scheduler=folder.load_scheduler(),
            num_inference_steps=self._teacher.teacher_num_inference_steps,
            guidance_scale=self._teacher.teacher_guidance_scale,
            latent_shape=folder.latent_shape(*self._pipelines.size),
            device=self._device,
            pad_length=folder.max_prompt_tokens,
            autocast=self._config.bf16,
        )


class _Distillation:
    """One run, from its settings to the emitted pipeline."""

    def __init__(
        self,
        run: Run,
        pipelines: Pipelines,
        configs: Configs,
        prompts: list[Prompt],
        rows: PictureRows | None,
        eval_prompts: list[str],
    ) -> None:
        self.run, self.pipelines = run, pipelines
        self.prompts, self.rows, self.eval_prompts = prompts, rows, eval_prompts
        self.model, self.teacher, self.config = configs
        self.accelerator = run.accelerator
        self._check_real_fraction()
        self.frozen = _Frozen(pipelines, self.teacher, self.config, run.accelerator.device)

    def _check_real_fraction(self) -> None:
        fraction, size = self.teacher.real_fraction, self._global_batch_size
        is_whole_or_mixed = fraction in (0, 1) or 0 < round(fraction * size) < size
        rule, reason = "enough for one sample or more of each kind", f"a step takes {size} samples"
        action = "Raise per_device_train_batch_size, or choose another share"
        require(is_whole_or_mixed, "real_fraction", fraction, rule, reason, action)

    @property
    def _global_batch_size(self) -> int:
        """Samples of one optimizer step on all processes."""
        config = self.config
        return config.per_device_train_batch_size * self.accelerator.num_processes * config.gradient_accumulation_steps

    def train(self) -> None:
        config, accelerator, run = self.config, self.accelerator, self.run
        cache_dir = Path(self.teacher.cache_dir).expanduser()
        pipelines = self.pipelines
        on_main(accelerator, lambda: check_same_encoders(pipelines.student, pipelines.teacher, cache_dir))
        base = on_main(accelerator, lambda: check_base(run, pipelines.student, cache_dir, pipelines.teacher))
        samples, cache = self._data()
        digest = on_main(accelerator, lambda: record_samples(run, samples, self._name_of))
        self.frozen.encoders.free()

        seed_everything(config)
        network = prepare_network(load(self.pipelines.student).transformer, self.model, config)
        objective = self._objective(network, samples, cache)
        seed_everything(config, accelerator.process_index)
        source = self._source(samples, cache)
        log = RunLog(accelerator, run, config)
        monitor = self._monitor(network, cache)
        size = self.pipelines.size
        draw_grid = GridDrawer(network, self.pipelines.student, size, self.frozen.encoders, cache, config, log)
        draw_grid.sampler.scheduler = self.pipelines.scheduler
        identity = {"stage": "distill", "settings": run.settings, "data": digest, "base": base}
        trainer = Trainer(
            *(config, accelerator, objective, source, log, draw_grid, identity),
            evaluate=monitor.evaluate,
            eval_every=config.eval_steps,
            watch=monitor.watch,
        )
        try:
            if run.saved:
                trainer.resume(run.saved)
            if accelerator.is_main_process:
                monitor.forget_after(trainer.step)
            metrics = trainer.fit()
            weights = trainer.averaged_weights()
            readme = self._card(metrics, len(samples))
            on_main(
                accelerator,
                lambda: emit_trained(
                    self.pipelines.student,
                    self.model,
                    (monitor.best_weights() if config.load_best_model_at_end else None) or weights,
                    run,
                    config.emit_dtype,
                    readme,
                    self.pipelines.scheduler,
                ),
            )
        finally:
            log.close()

    def _data(self) -> tuple[list[Sample], EncodedCache]:
        """The teacher's latents, made as far as they are missing, and the real ones."""
        teacher, run, encoders = self.teacher, self.run, self.frozen.encoders
        size, extra = self.pipelines.size, [*self.config.sample_prompts, *self.eval_prompts]
        if self.accelerator.is_main_process:
            encoders.cleaner.warn_of_lost(extra)
        samples, cache = teacher_latents(teacher, self.prompts, encoders, size, self.frozen.sampler, run.ranks, extra)
        if self.rows is None:
            return samples, cache
        bad_rows = run.output_dir / "bad_rows.jsonl"
        return with_real_pictures(teacher, self.rows, samples, cache, encoders, size, bad_rows, run.ranks)

    def _name_of(self, sample: Sample) -> str:
        """What a sample is called in samples.jsonl: its line in the prompt file, or its picture."""
        if self.rows is not None and not sample.image_key.startswith(sample.prompt_key):
            return self.rows.name(sample.row)
        return f"{Path(str(self.teacher.prompts_file)).name}:{sample.row + 1}"

    def _objective(self, network: Any, samples: list[Sample], cache: EncodedCache) -> DistillationObjective:
        config, folder = self.config, self.pipelines.teacher
        shape = folder.configs["transformer"]
        device = self.accelerator.device
        teacher = Teacher(
            self.frozen.transformer,
            cache.embeddings[content_key("")].to(device),
            self.teacher.teacher_guidance_scale,
            shape["patch_size"],
        )
        networks: dict[str, Any] = {}
        if "ladd" in config.method:
            blocks = check_blocks(config.head_blocks, shape["depth"])
            heads = DiscriminatorHeads(blocks, shape["hidden_size"], shape["context_in_dim"], config.head_width)
            _calibrate(heads.to(device), teacher, samples, cache, config, self.teacher.teacher_batch_size)
            networks["ladd"] = heads
        if "dmd2" in config.method:
            networks["dmd2"] = prepare_network(load(folder).transformer, self.model, config)
        return DistillationObjective(network, teacher, self.pipelines.sigmas, networks, config)

    def _source(self, samples: list[Sample], cache: EncodedCache) -> BatchSource:
        config, world, size = self.config, self.accelerator.num_processes, self.config.per_device_train_batch_size
        count = len(self.prompts)
        plan = MixedPlan(
            first=count,
            second=len(samples) - count,
            second_fraction=self.teacher.real_fraction,
            global_batch_size=self._global_batch_size,
            seed=config.seed,
            num_steps=config.max_steps,
        )
        return BatchSource(
            *(samples, None, cache, self.frozen.encoders, plan),
            micro_batch_size=size,
            num_steps=config.max_steps,
            rank=self.accelerator.process_index,
            world_size=world,
            pad_length=self.pipelines.teacher.max_prompt_tokens if config.torch_compile else None,
        )

    def _monitor(self, network: Any, cache: EncodedCache) -> StudentMonitor:
        teachers = self.frozen.sampler()
        students = dataclasses.replace(
            teachers, transformer=network, scheduler=self.pipelines.scheduler, guidance_scale=1.0
        )
        return StudentMonitor(
            config=self.config,
            student=students,
            teacher=teachers,
            prompts=self.eval_prompts,
            rewards=open_eval_rewards(self.config, self.eval_prompts),
            encoders=self.frozen.encoders,
            cache=cache,
            output_dir=self.run.output_dir,
        )

    def _card(self, metrics: dict[str, Any], num_samples: int) -> ModelCard:
        config, teacher, model = self.config, self.teacher, self.model
        last_loss = "unknown" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        height, width = (teacher.height, teacher.width) if teacher.height and teacher.width else (None, None)
        return ModelCard(
            title=output_folder(config).name,
            stage="distill",
            base=str(model.model_name_or_path),
            base_is_on_hub=self.pipelines.student.is_from_hub,
            data=f"{num_samples} latents, of {self.pipelines.teacher.source} (guidance "
            f"{teacher.teacher_guidance_scale:g}, {teacher.teacher_num_inference_steps} steps) for the prompts of "
            f"{teacher.prompts_file}",
            licence=self.pipelines.student.licence,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=1.0,
            dtype=config.emit_dtype,
            height=height,
            width=width,
            skip_text_cleaning=teacher.skip_text_cleaning,
            example=next(iter(config.sample_prompts), ModelCard.example),
            config=self.run.settings,
            metrics={
                "method": ", ".join(config.method),
                "noise levels": ", ".join(f"{s:.4f}" for s in self.pipelines.sigmas.tolist()),
                "optimizer steps": config.max_steps,
                "final training loss": last_loss,
            },
        )


def _calibrate(
    heads: DiscriminatorHeads,
    teacher: Teacher,
    samples: list[Sample],
    cache: EncodedCache,
    config: DistillConfig,
    batch_size: int,
) -> None:
    """Set the heads' channel statistics from some latents, noised as in training; the same on every process."""
    chosen = samples[:: max(1, len(samples) // CALIBRATION_SAMPLES)][:CALIBRATION_SAMPLES]
    device, generator = teacher.null.device, torch.Generator().manual_seed(config.seed)

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            x0 = torch.stack([cache.latents[s.image_key] for s in part])
            prompts = pad_embeddings([cache.embeddings[s.prompt_key].to(device) for s in part])
            t = sample_timesteps(len(part), mean=config.renoise_mean, std=config.renoise_std, generator=generator)
            x_t = interpolate(x0, torch.randn(x0.shape, generator=generator), t)
            yield teacher.tokens(heads.blocks, x_t.to(device), t.to(device), prompts)

    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        heads.calibrate(batches())
