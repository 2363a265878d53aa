"""Settings of `prx-post distill` and their checks."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from prx_post.base.errors import ConfigError
from prx_post.base.settings import check_fields, doc, require
from prx_post.data.config import DataConfig, EncodersConfig
from prx_post.evaluation.monitor_config import MonitorConfig
from prx_post.model.config import ATTENTION_HEADS, SAMPLERS, ModelConfig

METHODS = ("trajectory", "ladd", "dmd2")
BY_LEVEL = "from noise to data"
WITH_NETWORK = ("ladd", "dmd2")
"""Methods that train a network of their own beside the student."""


@dataclass
class TeacherConfig(EncodersConfig):
    """The teacher, and the latents that it makes of prompts."""

    group = "data"

    teacher_model_name_or_path: str | None = doc("Folder or Hub id of the teacher; null: model_name_or_path.", None)
    teacher_model_revision: str | None = doc("Hub revision of the teacher.", None)
    teacher_num_inference_steps: int = doc("Sampler steps of the teacher's latents.", 28, above=0)
    teacher_guidance_scale: float = doc(
        "The teacher's guidance, in its latents and wherever it is followed.",
        5.0,
        at_least=1,
        reason="the pipeline refuses less",
    )
    teacher_batch_size: int = doc("Latents that the teacher makes at a time.", 16, above=0)
    prompts_file: str | None = doc(
        "Training prompts: text with one on each line, or .jsonl, .json, .csv, .tsv with a `prompt` each.",
        None,
        required=("a file", "the teacher makes a latent of each"),
        action="Set it to a file of prompts",
    )
    latents_per_prompt: int = doc("Latents for each prompt, from different noise.", 1, above=0)
    latents_seed: int = doc("Seed of the noise that the teacher's latents begin with.", 0, at_least=0)
    height: int | None = doc("Height, pixels; null: the checkpoint's default_sample_size.", None, above=0)
    width: int | None = doc("Width, pixels; null: the checkpoint's default_sample_size.", None, above=0)
    cache: str = doc("`disk`, and nothing else: latents and embeddings are read from the cache.", "disk")
    real_fraction: float = doc(
        "Fraction of each batch that are real images, of dataset_name, not the teacher's.", 0.0, between=(0, 1)
    )
    dataset_name: str | None = doc("Real images: an image folder, parquet, or a Hub id.", None)
    dataset_split: str | None = doc("Split of them to read; null: all, or of the Hub train.", None)
    image_column: str = doc("Column with the images.", "image")
    prompt_column: str | None = doc("Column with their captions; null: `prompt`, else `text`, else `caption`.", None)
    max_bad_fraction: float = doc(
        "Stop when more than this fraction of the real rows cannot be used.", 0.01, between=(0, 1)
    )

    def __post_init__(self) -> None:
        check_fields(self)
        reason = "every step reads the teacher's latents and the prompts' embeddings, which are made once"
        require(self.cache == "disk", "cache", self.cache, "disk", reason, "Set it, or leave it out")
        has_images = self.dataset_name is not None
        reason, action = f"real_fraction is {self.real_fraction}", "Set both, or neither"
        require(has_images == (self.real_fraction > 0), "dataset_name", self.dataset_name, "set", reason, action)

    def real_images(self, size: tuple[int, int]) -> DataConfig:
        """How the real images are read; `real_fraction` must be above 0."""
        return DataConfig(
            dataset_name=self.dataset_name,
            dataset_split=self.dataset_split,
            image_column=self.image_column,
            prompt_column=self.prompt_column,
            height=size[0],
            width=size[1],
            skip_text_cleaning=self.skip_text_cleaning,
            cache_dir=self.cache_dir,
            encode_batch_size=self.encode_batch_size,
            dataloader_num_workers=self.dataloader_num_workers,
            max_bad_fraction=self.max_bad_fraction,
        )


@dataclass
class DistillConfig(MonitorConfig):
    """How the student learns, on top of the training loop's settings."""

    method: list[str] = doc(
        "One or more of `trajectory`, `ladd`, `dmd2`; their losses are added.",
        ["trajectory"],
        one_of=METHODS,
        resume="fixed",
    )
    method_weights: list[float] | None = doc("Weight of each method's loss for the student; null: 1 each.", None)
    num_inference_steps: int = doc(
        "Steps that the student samples in; it is trained on exactly their noise levels.", 8, above=0
    )
    guidance_scale: float = doc("1, and nothing else: the student's images are made without guidance.", 1.0)
    shift_terminal: float | None = doc(
        "Last noise level before 0 in the emitted scheduler, which stretches the others to it; null: not stretched, so "
        "that the last step can be idle.",
        0.3,
    )
    sampler: str = doc(
        "`euler`, or `renoise`: every step goes to x0 and back up with new noise.", "euler", one_of=SAMPLERS
    )
    timestep_weights: list[float] | None = doc(
        "How often each noise level of the grid is trained, from noise to data; null: equally.", None
    )
    real_timestep_weights: list[float] | None = doc(
        "The same for real images (real_fraction); null: as for the teacher's latents.", None
    )
    warmup_timestep_weights: list[float] | None = doc("The same during timestep_warmup_steps, for all.", None)
    timestep_warmup_steps: int = doc("Steps for which warmup_timestep_weights hold.", 0, at_least=0)
    trajectory_levels: list[float] | None = doc(
        "Weight of trajectory's loss at each noise level of the grid, 0 where it is not trained; null: 1 at all.", None
    )
    ladd_levels: list[float] | None = doc("The same of ladd's loss for the student.", None)
    dmd2_levels: list[float] | None = doc("The same of dmd2's.", None)
    own_state_levels: list[float] | None = doc(
        "At each noise level, the fraction of the student's inputs that are states which it gets to itself, by "
        "`sampler`, in place of noised latents; null: none.",
        None,
    )
    trajectory_teacher_steps: int = doc("Guided steps of the teacher that one step of the student follows.", 4, above=0)
    velocity_weight: float = doc(
        "Weight of the squared error to the teacher's guided velocity; 0: off.", 0.0, at_least=0
    )
    head_blocks: list[int] | None = doc(
        "Teacher's blocks, counted from 0, whose tokens a discriminator head judges; null: the last of each quarter.",
        None,
        resume="fixed",
    )
    head_width: int = doc("Channels of a discriminator head.", 64, above=0, resume="fixed")
    discriminator_learning_rate: float = doc(
        "Learning rate of the heads, or of DMD2's fake-score network.", 1e-4, above=0
    )
    discriminator_warmup_steps: int = doc("Steps at the start in which those learn alone.", 0, at_least=0)
    discriminator_steps_per_generator: int = doc(
        "Steps of those for each step that the student learns in, too.", 1, above=0
    )
    renoise_mean: float = doc(
        "Mean of the normal variable whose sigmoid is the noise level that is judged.", 1.0, resume="fixed"
    )
    renoise_std: float = doc("Standard deviation of that variable.", 1.0, above=0, resume="fixed")
    mismatch_fraction: float = doc(
        "Fraction of real latents under another prompt of the batch among the discriminator's fakes; 0: none.",
        0.0,
        between=(0, 1),
    )
    r1_weight: float = doc(
        "Weight of the approximate R1 penalty on the squared slope (it is divided by r1_noise²); 0: off.",
        0.0,
        at_least=0,
    )
    r1_noise: float = doc("Standard deviation of that penalty's perturbation of real latents.", 0.05, above=0)
    eval_num_inference_steps: list[int] | None = doc(
        "Numbers of steps at which the student is evaluated; null: num_inference_steps.", [8, 4, 2, 1]
    )
    min_diversity: float = doc(
        "Stop when diversity falls below this fraction of the teacher's; 0: never.", 0.5, between=(0, 1)
    )
    max_discriminator_accuracy: float = doc(
        "Stop when the discriminator is this accurate, 1: never ...", 0.98, between=(0, 1)
    )
    saturation_patience: int = doc("... for this many logged windows in a row.", 10, above=0)

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            self.method = [self.method]
        super().__post_init__()
        self._check_methods()
        self._check_grid()
        self._check_levels()
        self._check_adversary()
        self._check_evaluation()

    def _check_methods(self) -> None:
        rule, reason = "one or more different methods", "each adds a loss"
        require(0 < len(set(self.method)) == len(self.method), "method", self.method, rule, reason, "Correct it")
        weights, count = self.method_weights, len(self.method)
        if weights is not None:
            rule, action = f"{count} numbers above 0", "Give one for each method, or leave it out"
            ok = len(weights) == count and all(0 < weight < math.inf for weight in weights)
            require(ok, "method_weights", weights, rule, f"method is {self.method}", action)
        reason, action = (
            "a distilled student has guidance built in",
            "Leave it out; teacher_guidance_scale is what counts",
        )
        require(self.guidance_scale == 1, "guidance_scale", self.guidance_scale, "1", reason, action)

    def _check_grid(self) -> None:
        steps = self.num_inference_steps
        if self.shift_terminal is not None:
            reason, action = "it is a noise level between data and noise", "Set it to 0.3, or to null"
            require(
                0 < self.shift_terminal < 1, "shift_terminal", self.shift_terminal, "between 0 and 1", reason, action
            )
            reason = "the scheduler divides by zero when it stretches a single level"
            action = "Set it to null: one step has no level to end at"
            require(steps > 1, "shift_terminal", self.shift_terminal, "null for one step", reason, action)
        of_methods = [f"{method}_levels" for method in METHODS]
        for name in ("timestep_weights", "real_timestep_weights", "warmup_timestep_weights", *of_methods):
            weights = getattr(self, name)
            if weights is not None:
                rule, reason = f"{steps} numbers, 0 or more, not all 0", f"num_inference_steps is {steps}"
                ok = len(weights) == steps and all(0 <= w < math.inf for w in weights) and sum(weights) > 0
                require(ok, name, weights, rule, reason, f"Give one for each step, {BY_LEVEL}")
        reason, action = "it says for how long warmup_timestep_weights hold", "Set both, or neither"
        both = (self.timestep_warmup_steps > 0) == (self.warmup_timestep_weights is not None)
        require(both, "timestep_warmup_steps", self.timestep_warmup_steps, "set with the weights", reason, action)

    def _check_levels(self) -> None:
        """What is trained at which level; after _check_grid."""
        for method in METHODS:
            weights, reason = getattr(self, f"{method}_levels"), f"method is {self.method}"
            ok, action = weights is None or method in self.method, "Leave it out, or add the method"
            require(ok, f"{method}_levels", weights, "null", reason, action)
        everywhere = [1.0] * self.num_inference_steps
        more = [weights for weights in (self.real_timestep_weights, self.warmup_timestep_weights) if weights]
        drawn = [self.timestep_weights or everywhere, *more]
        trained = [getattr(self, f"{method}_levels") or everywhere for method in self.method]
        reason, action = "samples are drawn there", "Let a method train it, or set its timestep weights to 0"
        for level in range(self.num_inference_steps):
            ok = any(w[level] > 0 for w in trained) or not any(w[level] > 0 for w in drawn)
            rule = f"above 0 at level {level}, {BY_LEVEL}"
            require(ok, f"{self.method[0]}_levels", trained[0], rule, reason, action)
        own = self.own_state_levels
        if own is not None:
            rule = f"{self.num_inference_steps} fractions, the first of them 0"
            ok = len(own) == self.num_inference_steps and all(0 <= part <= 1 for part in own) and own[0] == 0
            reason, action = "the first level's state is noise, whoever goes there", f"Give one for each, {BY_LEVEL}"
            require(ok, "own_state_levels", own, rule, reason, action)
            reason = "it would be compiled anew for each number of own states"
            require(not self.torch_compile, "torch_compile", True, "false with own_state_levels", reason, "Change one")

    def _check_adversary(self) -> None:
        value, action = self.head_width, f"Use {-(-self.head_width // ATTENTION_HEADS) * ATTENTION_HEADS}"
        rule, reason = (
            f"a multiple of {ATTENTION_HEADS}",
            "the heads look the prompt up by attention with as many heads",
        )
        require(value % ATTENTION_HEADS == 0, "head_width", value, rule, reason, action)
        has_network = any(name in WITH_NETWORK for name in self.method)
        for name, plain in (("discriminator_warmup_steps", 0), ("discriminator_steps_per_generator", 1)):
            value, reason = getattr(self, name), f"method is {self.method}, which has no discriminator"
            require(has_network or value == plain, name, value, str(plain), reason, "Leave it out")
        first = self.discriminator_warmup_steps + self.discriminator_steps_per_generator
        reason, action = "the student learns in that step for the first time", "Raise it, or let the student wait less"
        require(first <= self.max_steps, "max_steps", self.max_steps, f"{first} or more", reason, action)
        rule, reason = "2 or more", "mismatch_fraction takes another prompt of the batch"
        batch, action = self.per_device_train_batch_size, "Raise it, or set mismatch_fraction to 0"
        ok = batch > 1 or not self.mismatch_fraction
        require(ok, "per_device_train_batch_size", batch, rule, reason, action)
        if self.deepspeed is not None:
            self.check_zero(*_zero_of(self.deepspeed))

    def check_zero(self, stage: int, offload: bool) -> None:
        """Raise ConfigError for what the stage cannot do under DeepSpeed."""
        reason = (
            "the frozen teacher is whole in every process anyway, and a discriminator's weights are used both as they "
            "are and without gradient, which split weights cannot be"
        )
        require(stage < 3, "deepspeed", f"zero{stage}", "zero1 or zero2", reason, "Set it")
        waits = self.discriminator_warmup_steps > 0 or self.discriminator_steps_per_generator > 1
        reason = "the student waits in some steps, and the optimizer on the CPU counts steps for all weights together"
        require(not (offload and waits), "deepspeed", "an optimizer on the CPU", "zero1 or zero2", reason, "Change it")

    def _check_evaluation(self) -> None:
        value, reason, action = self.eval_prompts_file, "evaluations need prompts", "Set it, or eval_steps: 0"
        require(bool(value) or not self.eval_steps, "eval_prompts_file", value, "a file", reason, action)

    @property
    def level_weights(self) -> dict[str, list[float]]:
        """Weights by level of the methods that have any."""
        given = {method: getattr(self, f"{method}_levels") for method in self.method}
        return {method: weights for method, weights in given.items() if weights is not None}

    def student_learns(self, step: int) -> bool:
        """Whether optimizer step `step`, counted from 0, changes the student, or only the discriminator."""
        after = step - self.discriminator_warmup_steps
        return after >= 0 and (after + 1) % self.discriminator_steps_per_generator == 0


def _zero_of(deepspeed: str) -> tuple[int, bool]:
    """Stage, and whether the optimizer is on the CPU; a JSON file is only looked at, its faults are told later."""
    if not deepspeed.endswith(".json"):
        return int(deepspeed[4]), deepspeed.endswith("_offload")
    try:
        zero = json.loads(Path(deepspeed).expanduser().read_text(encoding="utf-8")).get("zero_optimization", {})
        return int(zero.get("stage", 0)), (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"deepspeed is {deepspeed!r}, which cannot be read: {error}. Check the path.") from error


CONFIGS = (ModelConfig, TeacherConfig, DistillConfig)
