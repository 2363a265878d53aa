"""What a running distillation is judged by: the averaged student's pictures, and the discriminator's accuracy."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.files import json_line, replacing, write_json
from prx_post.data.cache import content_key
from prx_post.data.encoding import EncodedCache, Encoders
from prx_post.data.prompts import read_prompt_rows
from prx_post.distillation.config import DistillConfig
from prx_post.evaluation.distances import diversity, frechet_distance
from prx_post.evaluation.features import Encoder, encode, open_encoder
from prx_post.evaluation.jobs import SEED_STRIDE, spread_over_groups
from prx_post.model.sampler import Sampler, generate_images, grid
from prx_post.rewards.registry import parse_specs
from prx_post.rewards.reward import Reward

PICTURES_A_PROMPT = 2


class TrainingStopped(PrxPostError):
    """A run that is not worth going on with. Its state is saved."""


def read_eval_prompts(config: DistillConfig) -> list[str]:
    """Spread evenly over the file. Raises PrxPostError if it is missing or empty."""
    if not config.eval_steps:
        return []
    path = Path(str(config.eval_prompts_file)).expanduser()
    rows = read_prompt_rows(path) if path.is_file() else []
    if not rows:
        raise PrxPostError(f"eval_prompts_file is {str(path)!r}, which is missing or has no prompts. Check the path.")
    return [rows[i]["prompt"] for i in spread_over_groups(rows, config.eval_num_prompts)]


def open_eval_rewards(config: DistillConfig, prompts: Sequence[str]) -> dict[str, Reward]:
    """Raises PrxPostError if one is not installed, or cannot score the prompts."""
    if not config.eval_steps:
        return {}
    rewards = {spec.label: spec.load() for spec in parse_specs(config.eval_rewards)}
    for reward in rewards.values():
        reward.check(prompts)
    return rewards


@dataclass
class StudentMonitor:
    """Draws held-out prompts with the student at several numbers of steps, and compares with the teacher's pictures.

    Args:
        student, teacher: samplers of the two; the student's steps are set here.
        output_dir: of the run; evaluations.jsonl, samples/eval-*.png and best.* are written there.
    """

    config: DistillConfig
    student: Sampler
    teacher: Sampler
    prompts: Sequence[str]
    rewards: dict[str, Reward]
    encoders: Encoders
    cache: EncodedCache
    output_dir: Path
    _of_teacher: dict[str, Any] = field(default_factory=dict)
    _saturated: int = 0

    def __post_init__(self) -> None:
        name = self.config.eval_encoder
        device = self.encoders.device
        self._encoder: Encoder | None = open_encoder(name, device, "float32", 16) if name else None

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics by `eval/<name>/<n>_steps`. Keeps the student's weights if they are the best so far.

        Raises:
            TrainingStopped: the student draws the same picture whatever the noise.
        """
        metrics: dict[str, float] = {}
        columns = [self._teachers_pictures()]
        for num_steps in self.config.eval_num_inference_steps:
            self.student.num_inference_steps = num_steps
            images = self._draw(self.student)
            columns.append(images)
            found = self._measure(images, self._of_teacher["features"])
            metrics |= {f"eval/{name}/{num_steps}_steps": value for name, value in found.items()}
        metrics |= {f"eval/{name}/teacher": value for name, value in self._of_teacher["metrics"].items()}
        self._save_sheet(step, columns)
        self.encoders.free()
        with (self.output_dir / "evaluations.jsonl").open("a") as file:
            file.write(json_line({"step": step, **metrics}))
        if self.config.load_best_model_at_end:
            self._keep_if_best(step, metrics[f"eval/{self.config.metric_for_best_model}/{self._own_steps}_steps"])
        self._check_diversity(step, metrics)
        return metrics

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        """Look at a window of training metrics. Raises TrainingStopped if the discriminator has long been perfect."""
        limit, patience = self.config.max_discriminator_accuracy, self.config.saturation_patience
        accuracy = metrics.get("discriminator_accuracy", 0.0)
        is_perfect = limit < 1 and accuracy >= limit and step > self.config.discriminator_warmup_steps
        self._saturated = self._saturated + 1 if is_perfect else 0
        if self._saturated >= patience:
            raise TrainingStopped(
                f"the discriminator told real from fake with accuracy {accuracy:.3f} (max_discriminator_accuracy) in "
                f"{patience} logged windows in a row, so the student learns nothing from it; stopped at step {step}. "
                f"Lower discriminator_learning_rate, or raise renoise_mean or r1_weight."
            )

    def best_weights(self) -> dict[str, Tensor] | None:
        """Those of the best evaluation, by name; None if none was kept."""
        path = self.output_dir / "best.safetensors"
        return load_file(path) if path.is_file() else None

    def forget_after(self, step: int) -> None:
        """Drop the best student if it is later than `step`, from which the run goes on, and will be found again."""
        mark = self.output_dir / "best.json"
        if mark.is_file() and json.loads(mark.read_text())["step"] > step:
            mark.unlink()
            (self.output_dir / "best.safetensors").unlink(missing_ok=True)

    @property
    def _own_steps(self) -> int:
        return self.config.num_inference_steps

    def _embed(self, prompt: str) -> Tensor:
        return self.cache.embeddings[content_key(self.encoders.cleaner(prompt))]

    def _draw(self, sampler: Sampler) -> list[Image.Image]:
        """Every prompt with its first noise, then every prompt with its second."""
        prompts = list(self.prompts) * PICTURES_A_PROMPT
        count = len(self.prompts)
        seeds = [copy * SEED_STRIDE + i for copy in range(PICTURES_A_PROMPT) for i in range(count)]
        batch = self.config.per_device_train_batch_size
        return list(generate_images(sampler, self._embed, self.encoders.codec.decode, prompts, seeds, batch))

    def _teachers_pictures(self) -> list[Image.Image]:
        if not self._of_teacher:
            images = self._draw(self.teacher)
            features = encode(self._encoder, iter(images)) if self._encoder else None
            self._of_teacher = {"images": images, "features": features}
            self._of_teacher["metrics"] = self._measure(images, None)
        return self._of_teacher["images"]

    def _measure(self, images: list[Image.Image], teachers: np.ndarray | None) -> dict[str, float]:
        prompts = list(self.prompts) * PICTURES_A_PROMPT
        found = {name: float(reward(images, prompts).mean()) for name, reward in self.rewards.items()}
        if self._encoder is not None:
            features = encode(self._encoder, iter(images)).astype(np.float64)
            found["diversity"] = diversity(features, prompts).value
            if teachers is not None:
                found["fid"] = frechet_distance(features, teachers.astype(np.float64))
        return found

    def _check_diversity(self, step: int, metrics: dict[str, float]) -> None:
        name = f"eval/diversity/{self._own_steps}_steps"
        if name not in metrics or step == 0:
            return
        own, teachers = metrics[name], metrics["eval/diversity/teacher"]
        if own < self.config.min_diversity * teachers:
            raise TrainingStopped(
                f"the student's pictures of one prompt differ by {own:.4f} at step {step}, the teacher's by "
                f"{teachers:.4f} (min_diversity {self.config.min_diversity}): it has collapsed. Lower "
                f"learning_rate, or begin again with a student from `method: trajectory`."
            )

    def _keep_if_best(self, step: int, value: float) -> None:
        mark, metric = self.output_dir / "best.json", self.config.metric_for_best_model
        best = json.loads(mark.read_text()) if mark.is_file() else {}
        sign = -1 if metric == "fid" else 1
        if best.get("metric") == metric and not sign * value > sign * best["value"]:
            return
        named = self.student.transformer.named_parameters()
        weights = {f"transformer.{name}": p.detach().cpu().contiguous() for name, p in named if p.requires_grad}
        with replacing(self.output_dir / "best.safetensors") as partial:
            save_file(weights, partial)
        write_json(mark, {"step": step, "metric": metric, "value": value})

    def _save_sheet(self, step: int, columns: list[list[Image.Image]], rows: int = 8) -> None:
        """A row a prompt: the teacher's picture, then the student's at each number of steps."""
        shown = min(rows, len(self.prompts))
        sheet = grid([images[row] for row in range(shown) for images in columns], len(columns))
        folder = self.output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"eval-{step:06d}.png")
