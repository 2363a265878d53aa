"""Configuration shared by the stages, and its checks, which run before any model loads.

Names are those of TRL and of transformers' TrainingArguments wherever one exists.
"""

import dataclasses
import difflib
import importlib.util
import os
import sys
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self


class PrxPostError(Exception):
    """An error in what the user gave, or in the world around. Shown as one line, without a traceback."""

    exit_code = 2
    _is_printed_elsewhere = False

    def raised_by_all(self, is_main: bool) -> Self:
        """Mark as raised alike by every process of a run, so that only the main one prints it."""
        self._is_printed_elsewhere = not is_main
        return self

    def report(self) -> str | None:
        """The line to print; None if another process prints it: the first of a machine, before processes have met."""
        rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
        distributed = sys.modules.get("torch.distributed")
        have_met = distributed is not None and distributed.is_available() and distributed.is_initialized()
        if self._is_printed_elsewhere or (local_rank != "0" and not have_met):
            return None
        return f"error: {self}" if rank == "0" else f"error on rank {rank}: {self}"


class ConfigError(PrxPostError):
    """A setting that cannot be used."""


def doc(help: str, default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A dataclass field with its documentation, shown by `--help`."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **kwargs})
    return field(default=default, metadata={"help": help, **kwargs})


def require(ok: bool, name: str, value: Any, rule: str, reason: str, action: str) -> None:
    """Raise ConfigError `{name} is {value}, but must be {rule} because {reason}. {action}.` unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}, but must be {rule} because {reason}. {action}.")


def require_one_of(name: str, value: str, choices: Collection[str]) -> None:
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    hint = f"Did you mean {close[0]!r}" if close else "Choose one of these"
    listed = ", ".join(choices)
    require(value in choices, name, value, f"one of {listed}", "nothing else is implemented", hint)


def require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, name, value, "above 0", "it counts or scales something", f"Set {name} to a positive number")


def require_not_negative(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(
            value >= 0, name, value, "0 or more", "a negative value has no meaning", f"Set {name} to 0 to switch it off"
        )


def require_guidance(value: float) -> None:
    reason, action = "the pipeline refuses less", "Set guidance_scale to 1 to sample without guidance"
    require(value >= 1, "guidance_scale", value, "1 or more", reason, action)


def require_whole_matrices(optim: str) -> None:
    """For training with ZeRO."""
    reason = "ZeRO flattens and splits the weights, and Muon needs whole matrices"
    require(optim != "muon", "optim", optim, "adamw with deepspeed", reason, "Set it, or train without deepspeed")


def require_fraction(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, name, value, "between 0 and 1", "it is a share", f"Set {name} to a share such as 0.1")


def check_types(config: Any) -> None:
    """Check every field's value against its annotation (YAML values reach a dataclass unchecked).

    Integers are accepted, and converted, where a float is expected, also in a list.
    Raises ConfigError naming the first wrong field.
    """
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, int) and not isinstance(value, bool) and float in _alternatives(hints[f.name]):
            setattr(config, f.name, float(value))
        elif isinstance(value, list) and list[float] in _alternatives(hints[f.name]):
            setattr(config, f.name, [float(v) if type(v) is int else v for v in value])
            _check_type(config, f.name, hints[f.name])
        else:
            _check_type(config, f.name, hints[f.name])


def _check_type(config: Any, name: str, hint: Any) -> None:
    value = getattr(config, name)
    if any(_is_a(value, kind) for kind in _alternatives(hint)):
        return
    expected = _describe(hint)
    wrong = f"it was given as {type(value).__name__}"
    if elements := _wrong_elements(value, hint):
        wrong = f"its element {elements[0]!r} is {type(elements[0]).__name__}"
    require(False, name, value, expected, wrong, f"Write {name} as {expected}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return isinstance(value, list) and all(_is_a(v, item) for v in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, kind)


def _wrong_elements(value: Any, hint: Any) -> list[Any]:
    """The elements that keep `value` from being the kind of list in the annotation, if both are lists."""
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is list and isinstance(value, list):
            (item,) = typing.get_args(kind)
            return [element for element in value if not _is_a(element, item)]
    return []


def _describe(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    described = []
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is list:
            described.append(f"a list, each {_describe(typing.get_args(kind)[0])}")
        else:
            described.append(names[kind])
    return " or ".join(described)


@dataclass
class ModelConfig:
    """Which PRX checkpoint to start from, and which of its weights to train."""

    model_name_or_path: str | None = doc("Folder or Hub id of a PRX pipeline; `tiny` is the embedded base.", None)
    model_revision: str | None = doc("Hub revision (branch, tag or commit) of the checkpoint.", None)
    use_peft: bool = doc("Train a LoRA adapter instead of every weight.", False)
    lora_r: int = doc("LoRA rank.", 16)
    lora_alpha: int = doc("LoRA alpha; the adapter's output is scaled by lora_alpha / lora_r.", 32)
    lora_dropout: float = doc("Dropout on the adapter's input.", 0.0)
    lora_target_modules: list[str] | None = doc(
        "Linear layers that get an adapter; null: every attention and MLP projection of the blocks.", None
    )

    def __post_init__(self) -> None:
        check_types(self)
        require(
            bool(self.model_name_or_path),
            "model_name_or_path",
            self.model_name_or_path,
            "a folder or a Hub id",
            "training starts from a checkpoint",
            "Set model_name_or_path, for example to Photoroom/prx-512-t2i",
        )
        require_positive(self, "lora_r", "lora_alpha")
        require_fraction(self, "lora_dropout")


@dataclass
class DataConfig:
    """Pictures with captions, and how they become latents and embeddings."""

    dataset_name: str | None = doc("An image folder, a parquet file or a folder of them, or a Hub id.", None)
    dataset_split: str = doc("Split to read.", "train")
    image_column: str = doc("Column with the pictures.", "image")
    prompt_column: str = doc("Column with the captions.", "prompt")
    height: int | None = doc("Train at this height, pixels; null: aspect buckets of the checkpoint's size.", None)
    width: int | None = doc("Train at this width, pixels; set both or neither.", None)
    skip_text_cleaning: bool = doc(
        "Only light prompt cleaning, as the pipeline's flag of this name; use the same value at inference.", False
    )
    cache: str = doc("`disk`: encode once, reuse across runs and stages; `none`: encode on the fly.", "disk")
    cache_dir: str = doc("Folder of the latent and embedding cache.", "~/.cache/prx-post")
    max_bad_fraction: float = doc("Stop when more than this share of the rows cannot be used.", 0.01)

    def __post_init__(self) -> None:
        check_types(self)
        require(
            bool(self.dataset_name),
            "dataset_name",
            self.dataset_name,
            "a folder, a parquet file or a Hub id",
            "there is nothing to train on",
            "Set dataset_name",
        )
        require_one_of("cache", self.cache, ("disk", "none"))
        require_fraction(self, "max_bad_fraction")
        require(
            (self.height is None) == (self.width is None),
            "height",
            self.height,
            "set together with width",
            f"width is {self.width!r}",
            "Set both for one fixed size, or neither for aspect buckets",
        )
        if self.height is not None:
            require_positive(self, "height", "width")


SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
"""Those of transformers' `get_scheduler` that need no settings beyond warm-up and length."""
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
DEEPSPEED_STAGES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@dataclass
class TrainConfig:
    """The optimisation loop. Every stage's own configuration extends this one."""

    output_dir: str | None = doc("Folder of the run; must be new or empty, unless a run in it is resumed.", None)
    max_steps: int = doc("Optimizer steps.", 1000)
    per_device_train_batch_size: int = doc("Samples a device and micro-batch.", 8)
    gradient_accumulation_steps: int = doc("Micro-batches an optimizer step.", 1)
    learning_rate: float = doc("Peak learning rate.", 1e-5)
    optim: str = doc("`adamw`, or `muon` for the blocks' 2-D weights with AdamW for the rest.", "adamw")
    adam_beta1: float = doc("AdamW's first moment decay.", 0.9)
    adam_beta2: float = doc("AdamW's second moment decay.", 0.999)
    adam_epsilon: float = doc("AdamW's denominator offset.", 1e-8)
    weight_decay: float = doc("Decoupled weight decay.", 0.0)
    lr_scheduler_type: str = doc("A schedule of transformers' `get_scheduler`.", "constant_with_warmup")
    warmup_steps: int = doc("Optimizer steps of linear warm-up.", 0)
    max_grad_norm: float = doc("Clip the gradient's global norm; 0 switches clipping off.", 1.0)
    ema_decay: float = doc("Decay of the weights' moving average, which is what is emitted; 0 switches it off.", 0.999)
    ema_update_steps: int = doc("Optimizer steps between two updates of the average.", 1)
    max_nonfinite_steps: int = doc(
        "A step whose gradient is not finite is skipped and written to nonfinite.jsonl; stop after this many in a row.",
        3,
    )
    bf16: bool = doc("bfloat16 autocast; the weights and optimizer state stay fp32.", False)
    gradient_checkpointing: bool = doc("Recompute activations in the backward pass to save memory.", False)
    torch_compile: bool = doc("Compile each transformer block.", False)
    seed: int = doc("Seed of data order, noise, timesteps and caption dropout.", 0)
    logging_steps: int = doc("Optimizer steps between two lines of metrics.", 10)
    report_to: list[str] = doc(
        "Trackers by accelerate's names (tensorboard, wandb, trackio), or `none`.", ["tensorboard"]
    )
    run_name: str | None = doc("Name of the run in the trackers; null: the output folder's name.", None)
    sample_steps: int = doc("Optimizer steps between two sample grids; 0 for none at all.", 250)
    sample_prompts: list[str] = doc("Prompts of the sample grid.", [])
    sample_seeds: list[int] = doc("Noise seeds of the sample grid, one column each.", [0, 1, 2, 3])
    num_inference_steps: int = doc("Sampler steps for sample grids, and what the model card recommends.", 28)
    guidance_scale: float = doc("Guidance for sample grids, and what the model card recommends.", 5.0)
    emit_dtype: str = doc("Storage type of the emitted transformer: `float32` or `bfloat16`.", "float32")
    num_threads: int = doc("CPU threads torch may use; 0 leaves torch's own choice.", 0)
    deepspeed: str | None = doc(
        "`zero1`, `zero2`, `zero3`, `zero2_offload`, `zero3_offload` (optimizer on the CPU), or a DeepSpeed JSON file; "
        "null: what `accelerate launch` says, or none.",
        None,
    )
    ddp_timeout: int = doc("Seconds after which processes that wait for another give up.", 1800)
    save_steps: int = doc("Optimizer steps between two checkpoints to resume from; 0 saves on a signal only.", 500)
    save_total_limit: int | None = doc("Checkpoints kept, the newest ones; null keeps all.", 2)
    resume_from_checkpoint: str | None = doc(
        "`latest` (of output_dir; a fresh start if it has none), or a checkpoint folder.", None
    )
    resume_past_damage: bool = doc("With `latest`: if the newest checkpoint is damaged, take the one before.", False)

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if self.report_to == ["none"]:  # as in TrainingArguments
            self.report_to = []
        check_types(self)
        require(
            bool(self.output_dir),
            "output_dir",
            self.output_dir,
            "a folder",
            "the run is written there",
            "Set output_dir",
        )
        require_positive(
            self,
            *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
            *("adam_epsilon", "ema_update_steps", "logging_steps", "num_inference_steps"),
            *("max_nonfinite_steps", "ddp_timeout"),
        )
        require_not_negative(self, "weight_decay", "warmup_steps", "max_grad_norm", "sample_steps", "num_threads")
        require_not_negative(self, "seed", "save_steps")
        if self.save_total_limit is not None:
            require_positive(self, "save_total_limit")
        self._check_deepspeed()
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            reason, action = "an average that keeps everything never moves", f"Set {name} to 0.9 or 0.99, for instance"
            require(0 <= value < 1, name, value, "at least 0 and below 1", reason, action)
        require_one_of("optim", self.optim, ("adamw", "muon"))
        require_one_of("emit_dtype", self.emit_dtype, ("float32", "bfloat16"))
        require_one_of("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        for tracker in self.report_to:
            require_one_of("report_to", tracker, TRACKERS)
        require_guidance(self.guidance_scale)

    def learning_rates(self) -> dict[str, float]:
        """Peak learning rates by the beginning of a weight's name in the objective; "" stands for all others."""
        return {"": self.learning_rate}

    def waiting(self, step: int) -> tuple[str, ...]:
        """Which of `learning_rates` have no part in optimizer step `step`, counted from 0: their weights stay."""
        return ()

    def check_zero(self, stage: int, offload: bool) -> None:
        """Raise ConfigError if the stage cannot be trained under this ZeRO stage."""

    def _check_deepspeed(self) -> None:
        if self.deepspeed is None:
            return
        if not self.deepspeed.endswith(".json"):
            require_one_of("deepspeed", self.deepspeed, DEEPSPEED_STAGES)
        require_whole_matrices(self.optim)


def require_empty(output_dir: str | None) -> Path:
    """The folder as a path; raises PrxPostError if it holds anything but what an earlier try left before training."""
    path = Path(str(output_dir)).expanduser()
    if path.is_file() or (path.exists() and any(p.name not in ("bad_rows.jsonl", ".lock") for p in path.iterdir())):
        raise PrxPostError(
            f"output_dir is {str(output_dir)!r}, but must be new or empty because nothing is overwritten. "
            f"Choose another output_dir, move this one away, or go on with its run by resume_from_checkpoint: latest."
        )
    return path


def make_folder(path: Path) -> Path:
    """Create `path`; raises PrxPostError if that is not allowed, before hours of work meant for it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrxPostError(f"{path} cannot be made: {error.strerror}. Choose another folder.") from error
    if not os.access(path, os.W_OK):
        raise PrxPostError(f"{path} cannot be written to. Choose another folder.")
    return path


def require_installed(module: str, what: str, extra: str) -> None:
    """Raise PrxPostError unless `module`, which `what` needs and the extra `extra` installs, can be imported."""
    if importlib.util.find_spec(module) is None:
        raise PrxPostError(f"{what} needs {module}. Install the extra: pip install 'prx-post[{extra}]'.")
