"""Distillation of a PRX transformer into a student of few steps without guidance."""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prx_post.base.settings import require
from prx_post.data.plan import MixedPlan
from prx_post.data.readers import read_rows
from prx_post.data.scan import Sample
from prx_post.data.sizes import CacheSize
from prx_post.data.source import LatentSource
from prx_post.engine.protocols import Batch, Monitor, Objective
from prx_post.engine.run import Run
from prx_post.flow import interpolate, sample_timesteps
from prx_post.model.card import ModelCard
from prx_post.model.checkpoint import PipelineFolder
from prx_post.model.config import ModelConfig
from prx_post.model.heads import DiscriminatorHeads, check_blocks
from prx_post.model.sampler import Sampler
from prx_post.model.text import pad_embeddings
from prx_post.model.trainable import make_trainable
from prx_post.stages.base import Encoded, PipelineStage
from prx_post.stages.compatibility import check_fit, check_same_encoders
from prx_post.stages.distill.config import CONFIGS, DistillConfig, TeacherConfig
from prx_post.stages.distill.latents import read_training_prompts, teacher_latents, with_real_images
from prx_post.stages.distill.levels import Levels, Randomness
from prx_post.stages.distill.monitor import StudentMonitor
from prx_post.stages.distill.objective import DistillationObjective, Teacher, Term
from prx_post.stages.distill.pipelines import open_teacher, student_scheduler
from prx_post.stages.distill.terms import Adversarial, DistributionMatching, Trajectory

CALIBRATION_SAMPLES = 64
"""Latents from which the heads' channel statistics are taken."""


class Distill(PipelineStage):
    name, configs = "distill", CONFIGS

    def __init__(
        self, model: ModelConfig, teacher: TeacherConfig, config: DistillConfig, *, planned: bool = False
    ) -> None:
        super().__init__(model, config, teacher, None, planned)
        self.teacher_config = teacher
        self.teacher_pipeline: PipelineFolder = open_teacher(teacher, self.pipeline, planned)
        check_fit(self.pipeline, self.teacher_pipeline, "teacher")
        if "ladd" in config.method:
            check_blocks(config.head_blocks, self.teacher_pipeline.configs["transformer"]["depth"])
        self.student_scheduler, self.sigmas = student_scheduler(self.teacher_pipeline, config)
        reason, given = f"real_fraction is {teacher.real_fraction}", config.real_timestep_weights
        ok, action = given is None or teacher.real_fraction > 0, "Leave it out, or set real_fraction"
        require(ok, "real_timestep_weights", given, "null", reason, action)
        self.image_size = self.size = self.teacher_pipeline.resolve_size(teacher.height, teacher.width)
        self.prompts = [] if planned else read_training_prompts(teacher, self.cleaner)
        self.rows = read_rows(teacher.real_images(self.image_size)) if teacher.real_fraction and not planned else None
        self._teacher_network: Any = None

    @cached_property
    def scheduler(self) -> Any:
        return self.student_scheduler

    @property
    def bases(self) -> tuple[PipelineFolder, ...]:
        return self.pipeline, self.teacher_pipeline

    def data(self, run: Run) -> Encoded:
        """The teacher's latents, missing ones generated, and the real ones."""
        self._check_real_fraction(run)
        if self.teacher_config.teacher_guidance_scale <= 1 and run.ranks.is_main:
            print(
                f"warning: teacher_guidance_scale is {self.teacher_config.teacher_guidance_scale:g}, so the student "
                f"learns from unguided images; PRX checkpoints are meant to be guided, by 4 or 5."
            )
        run.ranks.on_main(lambda: check_same_encoders(self.pipeline, self.teacher_pipeline, "teacher", self.cache_dir))
        encoders = self.encoders(run)
        samples, cache = teacher_latents(
            *(self.teacher_config, self.prompts, encoders, self.image_size),
            *(lambda: self.teacher_sampler(run), run.ranks, self.shown_prompts()),
        )
        if self.rows is not None:
            bad_rows = run.output_dir / "bad_rows.jsonl"
            samples, cache = with_real_images(
                *(self.teacher_config, self.rows, samples, cache, encoders, self.image_size, bad_rows, run.ranks)
            )
        encoders.free()
        teacher = self.teacher_config
        described = (
            f"{len(samples)} latents, of {self.teacher_pipeline.source} (guidance {teacher.teacher_guidance_scale:g}, "
            f"{teacher.teacher_num_inference_steps} steps) for the prompts of {teacher.prompts_file}"
        )
        return Encoded(samples, self.rows, cache, encoders, self._name_of, described)

    @property
    def encoder_pipeline(self) -> PipelineFolder:
        return self.teacher_pipeline

    def objective(self, run: Run, data: Encoded) -> DistillationObjective:
        return self.objective_for(self.policy(run), run, data)

    def objective_for(self, policy: Any, run: Run, data: Encoded) -> DistillationObjective:
        """Of a student that another stage trains, too."""
        config, shape = self.config, self.teacher_pipeline.configs["transformer"]
        null, guidance = data.embed("").to(run.device), self.teacher_config.teacher_guidance_scale
        teacher = Teacher(self.teacher_network(run), null, guidance, shape["patch_size"])
        terms: dict[str, Term] = {}
        networks: dict[str, nn.Module] = {}
        if "ladd" in config.method:
            blocks = check_blocks(config.head_blocks, shape["depth"])
            heads = DiscriminatorHeads(blocks, shape["hidden_size"], shape["context_in_dim"], config.head_width)
            networks["ladd"] = run.place(heads)
            if not run.is_planned:
                self._calibrate(heads, teacher, data)
        if "dmd2" in config.method:
            fake = run.transformer(self.teacher_pipeline)
            networks["dmd2"] = make_trainable(fake, self.model, config)
        for method in config.method:
            terms[method] = self._term(method, teacher, networks.get(method))
        return DistillationObjective(
            *(policy, teacher, self.sigmas, terms, networks),
            learning_rate=config.learning_rate,
            network_learning_rate=config.discriminator_learning_rate,
            weights=dict(zip(config.method, config.method_weights or [1.0] * len(config.method), strict=True)),
            learns=config.student_learns,
            velocity_weight=config.velocity_weight,
            renoises=config.sampler == "renoise",
        )

    def _term(self, method: str, teacher: Teacher, network: Any) -> Term:
        config = self.config
        if method == "trajectory":
            return Trajectory(teacher, config.trajectory_teacher_steps)
        if method == "dmd2":
            return DistributionMatching(teacher, network)
        return Adversarial(
            *(teacher, network),
            mismatch_fraction=config.mismatch_fraction,
            r1_weight=config.r1_weight,
            r1_noise=config.r1_noise,
        )

    def source(self, run: Run, data: Encoded, objective: Objective) -> LatentSource:
        config = self.config
        plan = MixedPlan(
            first=len(self.prompts),
            second=len(data.samples) - len(self.prompts),
            second_fraction=self.teacher_config.real_fraction,
            global_batch_size=run.global_batch_size,
            seed=config.seed,
            num_steps=config.max_steps,
        )
        return LatentSource(
            *(data.samples, None, data.cache, data.encoders, plan),
            **self.batch_options(run),
            randomness=self.randomness(),
            arrange=Levels(config.level_weights).arrange,
        )

    def randomness(self) -> Randomness:
        config = self.config
        renoising = {
            "ladd": {"mean": config.renoise_mean, "std": config.renoise_std},
            "dmd2": {"uniform_fraction": 1.0},
        }
        chosen = {name: density for name, density in renoising.items() if name in config.method}
        return Randomness(
            level_weights=torch.tensor(config.timestep_weights or [1.0] * config.num_inference_steps),
            warmup_level_weights=_tensor(config.warmup_timestep_weights),
            num_warmup_steps=config.timestep_warmup_steps,
            real_level_weights=_tensor(config.real_timestep_weights),
            first_real=len(self.prompts),
            renoising=chosen,
            has_r1="ladd" in config.method and config.r1_weight > 0,
            own_fractions=_tensor(config.own_state_levels),
            own_is_random=config.sampler == "renoise",
        )

    def monitor(self, run: Run, data: Encoded, objective: Objective) -> Monitor:
        config = self.config
        return StudentMonitor(
            *(run, config, self.sampler(objective.policy, run), data),
            **self.watched(data),
            reference=self.teacher_sampler(run),
            reference_name="teacher",
            max_accuracy=config.max_discriminator_accuracy,
            patience=config.saturation_patience,
            warmup_steps=config.discriminator_warmup_steps,
        )

    def teacher_network(self, run: Run) -> Any:
        """Frozen, in the precision that it is asked in."""
        if self._teacher_network is None:
            network = run.place(run.transformer(self.teacher_pipeline, self.text_dtype())).eval().requires_grad_(False)
            if self.config.gradient_checkpointing:
                network.enable_gradient_checkpointing()
            self._teacher_network = network
        return self._teacher_network

    def teacher_sampler(self, run: Run) -> Sampler:
        """As the teacher generates: its own scheduler, steps and guidance."""
        folder, teacher = self.teacher_pipeline, self.teacher_config
        return Sampler(
            transformer=self.teacher_network(run),
            scheduler=folder.load_scheduler(),
            num_inference_steps=teacher.teacher_num_inference_steps,
            guidance_scale=teacher.teacher_guidance_scale,
            latent_shape=folder.latent_shape(*self.image_size),
            device=run.device,
            pad_length=folder.max_prompt_tokens,
            autocast=self.config.bf16,
        )

    def card(self, title: str, settings: dict[str, Any], data: str, metrics: dict[str, Any]) -> ModelCard:
        teacher, card = self.teacher_config, super().card(title, settings, data, metrics)
        given = (teacher.height, teacher.width) if teacher.height and teacher.width else (None, None)
        return dataclasses.replace(
            card,
            height=given[0],
            width=given[1],
            metrics={
                "method": ", ".join(self.config.method),
                "noise levels": ", ".join(f"{s:.4f}" for s in self.sigmas.tolist()),
                **card.metrics,
            },
        )

    def example(self, run: Run) -> tuple[Any, Batch]:
        """The step in which the student learns: the dearest."""
        config, batch = self.config, self.example_batch(run)
        levels = self.typical_levels(len(batch["latents"]))
        shares = Levels(config.level_weights).share_out(levels, self._typically_own(levels))
        drawn = {"level": torch.tensor(levels), **shares}
        drawn = {k: v.to(run.device) if isinstance(v, Tensor) else v for k, v in drawn.items()}
        drawn["noise"] = drawn["r1_noise"] = torch.empty_like(batch["latents"])
        for name in self.randomness().renoising:
            drawn[f"{name}_t"] = torch.empty(len(batch["latents"]), device=run.device)
            drawn[f"{name}_noise"] = torch.empty_like(batch["latents"])
        if config.own_state_levels is not None and config.sampler == "renoise":
            between = len(config.own_state_levels) - 1
            drawn["own_noise"] = torch.stack([torch.empty_like(batch["latents"])] * between, dim=1)
        step = next(step for step in range(config.max_steps) if config.student_learns(step))
        null = batch["prompt_embeds"][0]
        return _Planned(null), {**batch, **drawn, "step": step}

    def typical_levels(self, count: int) -> list[int]:
        """Noise levels of `count` samples, as often as each is drawn after the warm-up."""
        config, fraction = self.config, self.teacher_config.real_fraction
        of_teachers = config.timestep_weights or [1.0] * config.num_inference_steps
        of_real = config.real_timestep_weights or of_teachers
        often = [  # without tensors, whose values a plan does not know
            (1 - fraction) * here / sum(of_teachers) + fraction * there / sum(of_real)
            for here, there in zip(of_teachers, of_real, strict=True)
        ]
        upper, middles = list(itertools.accumulate(often)), [(i + 0.5) / count for i in range(count)]
        return [min(bisect.bisect(upper, middle), len(upper) - 1) for middle in middles]

    def _typically_own(self, levels: list[int]) -> list[bool]:
        """Of the samples of each level, the first ones."""
        fractions = self.config.own_state_levels or [0.0] * self.config.num_inference_steps
        return [i - levels.index(level) < fractions[level] * levels.count(level) for i, level in enumerate(levels)]

    def cache_size(self) -> CacheSize | str:
        path = Path(str(self.teacher_config.prompts_file)).expanduser()
        if not path.is_file():
            return f"{path} is not on this machine"
        prompts = read_training_prompts(self.teacher_config, self.cleaner)
        channels, height, width = self.pipeline.latent_shape(*self.image_size)
        embedding = self.pipeline.max_prompt_tokens * self.pipeline.configs["transformer"]["context_in_dim"]
        latents = len(prompts) * torch.float32.itemsize * channels * height * width
        unique = len({prompt.key for prompt in prompts})
        embeddings = unique * self.text_dtype().itemsize * embedding
        return CacheSize(len(prompts), len(prompts), latents, embeddings, entries=len(prompts))

    def _check_real_fraction(self, run: Run) -> None:
        fraction, size = self.teacher_config.real_fraction, run.global_batch_size
        is_whole_or_mixed = fraction in (0, 1) or 0 < round(fraction * size) < size
        rule, reason = "enough for one sample or more of each kind", f"a step takes {size} samples"
        action = "Raise per_device_train_batch_size, or choose another fraction"
        require(is_whole_or_mixed, "real_fraction", fraction, rule, reason, action)

    def _name_of(self, sample: Sample) -> str:
        """What a sample is called in samples.jsonl: its line in the prompt file, or its image."""
        if self.rows is not None and not sample.image_key.startswith(sample.prompt_key):
            return self.rows.name(sample.row)
        return f"{Path(str(self.teacher_config.prompts_file)).name}:{sample.row + 1}"

    def _calibrate(self, heads: DiscriminatorHeads, teacher: Teacher, data: Encoded) -> None:
        """Set the heads' channel statistics from some latents, noised as in training; the same on every process."""
        config, cache, size = self.config, data.cache, self.teacher_config.teacher_batch_size
        assert cache is not None
        assert teacher.null is not None
        chosen = data.samples[:: max(1, len(data.samples) // CALIBRATION_SAMPLES)][:CALIBRATION_SAMPLES]
        device, generator = teacher.null.device, torch.Generator().manual_seed(config.seed)

        def batches() -> Iterator[Tensor]:
            for start in range(0, len(chosen), size):
                part = chosen[start : start + size]
                x0 = torch.stack([cache.latents[s.image_key] for s in part])
                prompts = pad_embeddings([cache.embeddings[s.prompt_key].to(device) for s in part])
                t = sample_timesteps(len(part), mean=config.renoise_mean, std=config.renoise_std, generator=generator)
                x_t = interpolate(x0, torch.randn(x0.shape, generator=generator), t)
                yield teacher.tokens(heads.blocks, x_t.to(device), t.to(device), prompts)

        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            heads.calibrate(batches())


def _tensor(values: list[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values)


@dataclasses.dataclass
class _Planned:
    """Stands for the data where nothing is trained."""

    null: Tensor

    def embed(self, prompt: str) -> Tensor:
        return self.null


STAGE = Distill
