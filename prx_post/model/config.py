"""Which checkpoint, which of its weights are trained, how images are generated. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prx_post
from prx_post.base.settings import check_fields, doc, require

EMBEDDED = Path(prx_post.__file__).parent / "tiny" / "weights"
"""The embedded world's weights; `tiny` names the pipeline in its folder `base`."""
DTYPE_NAMES = ("float32", "bfloat16")
SAMPLERS = ("euler", "renoise")
"""`euler` follows the flow; `renoise` goes to x0 at every step and back up with new noise."""
GENERATION_SAMPLERS = (*SAMPLERS, "cps")
"""`cps` stands between them; no scheduler of diffusers has it, so no checkpoint names it as its own."""
NOISE_LEVEL = 0.5
"""Of `cps`, where none is given: 0 is `euler`, 1 is `renoise`."""
ATTENTION_HEADS = 4
"""Of a discriminator head's cross-attention."""
GUIDANCE: dict[str, Any] = {
    "at_least": 1,
    "reason": "the pipeline refuses less",
    "action": "Set guidance_scale to 1 to sample without guidance",
}


@dataclass
class ModelConfig:
    """Which PRX checkpoint to start from, and which of its weights to train."""

    group = "model"

    model_name_or_path: str | None = doc(
        "Folder or Hub id of a PRX pipeline; `tiny` is the embedded base.",
        None,
        required=("a folder or a Hub id", "training starts from a checkpoint"),
        action="Set model_name_or_path, for example to Photoroom/prx-512-t2i",
    )
    model_revision: str | None = doc("Hub revision (branch, tag or commit) of the checkpoint.", None)
    adapter: str | None = doc(
        "Folder of a LoRA adapter that is merged into it first, such as an earlier run's final-adapter.", None
    )
    use_peft: bool = doc("Train a LoRA adapter instead of every weight.", False, resume="fixed")
    lora_r: int = doc("LoRA rank.", 16, above=0, resume="fixed")
    lora_alpha: int = doc(
        "LoRA alpha; the adapter's output is scaled by lora_alpha / lora_r.", 32, above=0, resume="fixed"
    )
    lora_dropout: float = doc("Dropout on the adapter's input.", 0.0, between=(0, 1), resume="fixed")
    lora_target_modules: list[str] | None = doc(
        "Linear layers that get an adapter; null: every attention and MLP projection of the blocks.", None
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass
class DrawConfig:
    """How images are generated, and where they go; `generate` and `eval` extend it."""

    num_inference_steps: int | None = doc("Sampler steps; null: the checkpoint's own, or 28.", None, above=0)
    guidance_scale: float | None = doc(
        "Classifier-free guidance; 1 switches it off. null: the checkpoint's own, or 5.", None, **GUIDANCE
    )
    seeds: list[int] = doc(
        "Noise seeds; every prompt gets one image for each.", [0], required=("set", "the command needs it")
    )
    height: int | None = doc("Height, pixels; null: the checkpoint's own, or its default_sample_size.", None, above=0)
    width: int | None = doc("Width, pixels; null: the checkpoint's own, or its default_sample_size.", None, above=0)
    batch_size: int = doc("Images at a time.", 8, above=0)
    skip_text_cleaning: bool | None = doc("Only light prompt cleaning; null: as the checkpoint was trained.", None)
    dtype: str = doc(
        "Precision of the transformer and text encoder: `float32` or `bfloat16`.", "float32", one_of=DTYPE_NAMES
    )
    output_dir: str | None = doc(
        "Folder for what is made; must be new or empty.", None, required=("set", "the command needs it")
    )
    num_threads: int = doc("CPU threads torch may use; 0 leaves torch's own choice.", 0, at_least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        for seed in self.seeds:
            rule, reason = "from 0 to 2^31 - 1", "noise seeds are made of it"
            require(0 <= seed < 2**31, "seeds", seed, rule, reason, "Choose other seeds")


@dataclass
class SchedulerConfig:
    """How the emitted pipeline steps from noise to data, where it is not as the checkpoint's own."""

    shift_terminal: float | None = doc(
        "Last noise level before 0 of the emitted scheduler's grid, on which images are generated in training, too; "
        "null: as it is.",
        None,
    )
    sampler: str | None = doc(
        "Of the emitted scheduler: `euler`, or `renoise`, every step of which goes to x0 and back up with new noise; "
        "null: as it is.",
        None,
        one_of=SAMPLERS,
    )

    def check_scheduler(self) -> None:
        """Raise ConfigError for a level that is none."""
        last, reason, action = self.shift_terminal, "it is a noise level between data and noise", "Set it to 0.3"
        require(last is None or 0 < last < 1, "shift_terminal", last, "between 0 and 1", reason, action)

    @property
    def scheduler_changes(self) -> dict[str, Any]:
        """As `rescheduled` takes them."""
        changes = {"shift_terminal": self.shift_terminal, "sampler": self.sampler}
        return {name: value for name, value in changes.items() if value is not None}


def noise_level_of(sampler: str | None, noise_level: float | None) -> float | None:
    """What a sampler's `noise_level` is: None, but for `cps`. Raises ConfigError if one is given for another."""
    reason, action = f"sampler is {sampler!r}", "Set sampler to cps, or leave it out"
    require(noise_level is None or sampler == "cps", "noise_level", noise_level, "null", reason, action)
    return (NOISE_LEVEL if noise_level is None else noise_level) if sampler == "cps" else None
