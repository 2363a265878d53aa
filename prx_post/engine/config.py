"""Settings of the training loop. Imports neither torch nor accelerate."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prx_post.base.settings import check_fields, doc, require, require_one_of

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
DECAY: dict[str, Any] = {
    "at_least": 0,
    "below": 1,
    "reason": "an average that keeps everything never moves",
    "action": "Set it to 0.9 or 0.99, for instance",
}


@dataclass
class TrainConfig:
    """The optimisation loop. Every stage's own configuration extends this one."""

    group = "training"

    output_dir: str | None = doc(
        "Folder of the run; must be new or empty, unless a run in it is resumed.",
        None,
        required=("a folder", "the run is written there"),
        resume="free",
        group="saving",
    )
    max_steps: int = doc("Optimizer steps.", 1000, above=0)
    num_train_epochs: float | None = doc(
        "Passes over the data; if given, max_steps follows from it, and what is set there is not used.", None, above=0
    )
    per_device_train_batch_size: int = doc("Samples per device and micro-batch.", 8, above=0, resume="free")
    gradient_accumulation_steps: int = doc("Micro-batches per optimizer step.", 1, above=0, resume="free")
    learning_rate: float = doc("Peak learning rate.", 1e-5, above=0)
    optim: str = doc(
        "`adamw`, or `muon` for the blocks' 2-D weights with AdamW for the rest.",
        "adamw",
        one_of=("adamw", "muon"),
        resume="fixed",
    )
    adam_beta1: float = doc("AdamW's first moment decay.", 0.9, **DECAY)
    adam_beta2: float = doc("AdamW's second moment decay.", 0.999, **DECAY)
    adam_epsilon: float = doc("AdamW's denominator offset.", 1e-8, above=0)
    weight_decay: float = doc("Decoupled weight decay.", 0.0, at_least=0)
    lr_scheduler_type: str = doc(
        "A schedule of transformers' `get_scheduler`.", "constant_with_warmup", one_of=SCHEDULES
    )
    warmup_steps: int = doc("Optimizer steps of linear warm-up.", 0, at_least=0)
    max_grad_norm: float = doc("Clip the gradient's global norm; 0 switches clipping off.", 1.0, at_least=0)
    ema_decay: float = doc(
        "Decay of the weights' moving average, which is what is emitted; 0 switches it off.", 0.999, **DECAY
    )
    ema_update_steps: int = doc("Optimizer steps between two updates of the average.", 1, above=0)
    max_nonfinite_steps: int = doc(
        "A step whose gradient is not finite is skipped and written to nonfinite.jsonl; stop after this many in a row.",
        3,
        above=0,
    )
    bf16: bool = doc("bfloat16 autocast; the weights and optimizer state stay fp32.", False)
    gradient_checkpointing: bool = doc("Recompute activations in the backward pass to save memory.", False)
    torch_compile: bool = doc("Compile each transformer block.", False)
    seed: int = doc("Seed of data order, noise, timesteps and caption dropout.", 0, at_least=0, resume="fixed")
    logging_steps: int = doc(
        "Optimizer steps between two lines of metrics.", 10, above=0, resume="free", group="saving"
    )
    report_to: list[str] = doc(
        "Trackers by accelerate's names (tensorboard, wandb, trackio), or `none`.",
        ["tensorboard"],
        one_of=TRACKERS,
        resume="free",
        group="saving",
    )
    run_name: str | None = doc(
        "Name of the run in the trackers; null: the output folder's name.", None, resume="free", group="saving"
    )
    project: str = doc("Project of the run in the trackers.", "prx-post", resume="free", group="saving")
    entity: str | None = doc(
        "W&B's user or team; null: the one that is logged in.", None, resume="free", group="saving"
    )
    sample_steps: int = doc(
        "Optimizer steps between two sample grids; 0 for none at all.", 250, at_least=0, group="validation"
    )
    sample_prompts: list[str] = doc("Prompts of the sample grid.", [], group="validation")
    sample_seeds: list[int] = doc("Noise seeds of the sample grid, one column each.", [0, 1, 2, 3], group="validation")
    num_inference_steps: int = doc(
        "Sampler steps for sample grids, and what the model card recommends.", 28, above=0, group="validation"
    )
    guidance_scale: float = doc(
        "Guidance for sample grids, and what the model card recommends.",
        5.0,
        at_least=1,
        reason="the pipeline refuses less",
        action="Set guidance_scale to 1 to sample without guidance",
        group="validation",
    )
    emit_dtype: str = doc(
        "Storage type of the emitted transformer: `float32` or `bfloat16`.",
        "float32",
        one_of=("float32", "bfloat16"),
        group="saving",
    )
    num_threads: int = doc(
        "CPU threads torch may use; 0 leaves torch's own choice.", 0, at_least=0, resume="free", group="processes"
    )
    deepspeed: str | None = doc(
        "`zero1`, `zero2`, `zero3`, `zero2_offload`, `zero3_offload` (optimizer on the CPU), or a DeepSpeed JSON file; "
        "null: what `accelerate launch` says, or none.",
        None,
        resume="free",
        group="processes",
    )
    ddp_timeout: int = doc(
        "Seconds after which processes that wait for another give up.", 1800, above=0, resume="free", group="processes"
    )
    save_steps: int = doc(
        "Optimizer steps between two checkpoints to resume from; 0 saves on a signal only.",
        500,
        at_least=0,
        resume="free",
        group="saving",
    )
    save_total_limit: int | None = doc(
        "Checkpoints kept, the newest ones; null keeps all.", 2, above=0, resume="free", group="saving"
    )
    resume_from_checkpoint: str | None = doc(
        "`latest` (of output_dir; a fresh start if it has none), or a checkpoint folder.",
        None,
        resume="free",
        group="saving",
    )
    resume_past_damage: bool = doc(
        "With `latest`: if the newest checkpoint is damaged, take the one before.", False, resume="free", group="saving"
    )

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if self.report_to == ["none"]:  # as in TrainingArguments
            self.report_to = []
        check_fields(self)
        if self.deepspeed is not None:
            if not self.deepspeed.endswith(".json"):
                require_one_of("deepspeed", self.deepspeed, DEEPSPEED_STAGES)
            require_whole_matrices(self.optim)

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(str(self.output_dir)).expanduser()

    @property
    def smallest_batch(self) -> int:
        """What per_device_train_batch_size must be a multiple of."""
        return 1

    def settle(self, world_size: int) -> None:
        """Set what follows from the number of processes. Raises ConfigError if it does not come out even."""

    def check_zero(self, stage: int, offload: bool) -> None:
        """Raise ConfigError if the stage cannot be trained under this ZeRO stage."""


def require_whole_matrices(optim: str) -> None:
    """For training with ZeRO."""
    reason = "ZeRO flattens and splits the weights, and Muon needs whole matrices"
    require(optim != "muon", "optim", optim, "adamw with deepspeed", reason, "Set it, or train without deepspeed")
