"""Validation while training: images of held-out prompts by the averaged weights, scored, compared and kept as sheets.

Generating and scoring are split over the ranks by whole batches, so an image does not depend on their number.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.files import replacing
from prx_post.data.cache import content_key
from prx_post.data.prompts import read_prompt_file
from prx_post.engine.run import Run
from prx_post.engine.signals import StopEarly, StopRequested, StopTraining
from prx_post.evaluation.distances import diversity, frechet_distance
from prx_post.evaluation.features import Encoder, encode, open_encoder
from prx_post.evaluation.jobs import SEED_STRIDE, spread_over_groups
from prx_post.evaluation.monitor_config import LOWER_IS_BETTER, WINS, MonitorConfig
from prx_post.evaluation.pixels import STATISTICS, image_statistics
from prx_post.evaluation.sheets import Sheet
from prx_post.model.codec import to_images
from prx_post.model.sampler import Sampler
from prx_post.rewards.registry import parse_specs
from prx_post.rewards.reward import Reward, check_rows, score_rows

IMAGES_PER_PROMPT = 2
SHEET_ROWS = 8
START = "start.safetensors"
"""Metrics, scores and features of the policy as it was."""
SCORES = "scores/"
"""Before a reward's name there."""
MADE_WITH = "made_with"
"""Key of that file's metadata."""


class Images(Protocol):
    """What turns prompts into embeddings and latents into pixels."""

    def embed(self, prompt: str) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def free(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """An image to generate."""

    prompt: str
    seed: int


@dataclass
class Judges:
    """What images are judged by, opened and checked before anything is trained."""

    prompts: list[str]
    rewards: dict[str, Reward]
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of prompts that come from a file: their rows, which some rewards read."""

    @classmethod
    def open(cls, config: MonitorConfig) -> "Judges":
        """Raises PrxPostError if the prompts are missing, or a reward is not installed or cannot score them."""
        if not config.eval_steps:
            return cls([], {})
        rows = _read_prompts(config) if config.eval_prompts_file else []
        rewards = {spec.label: spec.load() for spec in parse_specs(config.evaluated_rewards)}
        for name, reward in rewards.items():
            check_rows(reward, name, rows, "eval_prompts_file")
        if config.eval_encoder:
            open_encoder(config.eval_encoder, torch.device("cpu"), "float32", 16)
        return cls([row["prompt"] for row in rows], rewards, {row["prompt"]: row for row in rows})


def _read_prompts(config: MonitorConfig) -> list[dict[str, Any]]:
    """Rows, spread evenly over the file."""
    path = Path(str(config.eval_prompts_file)).expanduser()
    rows = read_prompt_file(path) if path.is_file() else []
    if not rows:
        raise PrxPostError(f"eval_prompts_file is {str(path)!r}, which is missing or has no prompts. Check the path.")
    return [rows[i] for i in spread_over_groups(rows, config.eval_num_prompts)]


def win_rate(scores: np.ndarray, others: np.ndarray) -> float:
    """Fraction of images that score higher than the other of the same prompt and noise; a tie counts half. Both [N]."""
    return float(((scores > others) + 0.5 * (scores == others)).mean())


@dataclass
class Measured:
    """Of one set of images, the same on all ranks.

    Attributes:
        features: [N, D]; None without an encoder.
        scores: of each reward, [N] fp64.
        shown: the images of sheets.
    """

    metrics: dict[str, float]
    features: np.ndarray | None
    scores: dict[str, np.ndarray]
    shown: list[Image.Image] = field(default_factory=list)


@dataclass
class ImageMonitor:
    """Sample grids every `sample_steps`, evaluations every `eval_steps`.

    Args:
        sampler: generates with the policy in training; its number of steps is set here.
        reference: generates what images are compared with; None: the policy itself, as it was at step 0.
        reference_name: how metrics and sheets call it.
        validation_loss: a loss on held-out data, alike on all ranks; None: there is none.
    """

    run: Run
    config: MonitorConfig
    sampler: Sampler
    images: Images
    judges: Judges
    grid_prompts: Sequence[str]
    reference: Sampler | None = None
    reference_name: str = "start"
    validation_loss: Callable[[], float] | None = None
    _reference: Measured | None = None
    _best: float | None = None
    _evaluations_since_best: int = 0

    def __post_init__(self) -> None:
        name = self.config.eval_encoder if self.config.eval_steps else None
        self._encoder: Encoder | None = open_encoder(name, self.run.device, "float32", 16) if name else None

    @property
    def keeps_best(self) -> bool:
        return self.config.load_best_model_at_end

    def is_due(self, step: int) -> bool:
        return self._is_grid_due(step) or self._is_due(self.config.eval_steps, step)

    def validate(self, step: int) -> dict[str, float]:
        """A sheet, or metrics by `eval/<name>/<n>_steps`, or both."""
        if self._is_grid_due(step):
            self._grid(step)
        metrics = self._evaluate(step) if self._is_due(self.config.eval_steps, step) else {}
        self.images.free()
        return metrics

    def is_best(self, metrics: dict[str, float]) -> bool:
        name = self.config.metric_for_best_model
        if not self.config.eval_steps or self._key(name) not in metrics:
            return False
        is_new = self._note(metrics)
        return is_new and self.keeps_best

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        patience, name = self.config.early_stopping_patience, self.config.metric_for_best_model
        if patience and self._key(name) in metrics and self._evaluations_since_best >= patience:
            raise StopEarly(
                f"stopped early at step {step}: {name} has not been better than {self._best:.4g} for {patience} "
                f"evaluations in a row (early_stopping_patience)"
            )
        self._check_diversity(step, metrics)

    def resume(self, evaluations: list[dict[str, Any]], logged: list[dict[str, Any]]) -> None:
        for line in evaluations:
            if self._key(self.config.metric_for_best_model) in line:
                self._note(line)

    def forget_best(self) -> None:
        self._best, self._evaluations_since_best = None, 0

    def _is_due(self, every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.config.max_steps)

    def _is_grid_due(self, step: int) -> bool:
        return bool(self.grid_prompts) and self._is_due(self.config.sample_steps, step)

    def _key(self, name: str | None) -> str:
        at = "" if name == "validation_loss" else f"/{self.config.num_inference_steps}_steps"
        return f"eval/{name}{at}"

    def _note(self, metrics: dict[str, Any]) -> bool:
        """Whether these metrics are a new best; a tie is none."""
        name = self.config.metric_for_best_model
        value, sign = metrics[self._key(name)], -1 if name in LOWER_IS_BETTER else 1
        is_new = self._best is None or sign * value > sign * self._best
        self._best = value if is_new else self._best
        self._evaluations_since_best = 0 if is_new else self._evaluations_since_best + 1
        return is_new

    def _evaluate(self, step: int) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.validation_loss is not None:
            metrics["eval/validation_loss"] = self.validation_loss()
        if not self.judges.prompts:
            return metrics
        if self.reference is not None and self._reference is None:
            self._reference = self._measure(self.reference, None)
        columns: list[tuple[str, list[Image.Image]]] = []
        steps_of_its_own = self.sampler.num_inference_steps
        for num_steps in self.config.eval_num_inference_steps or []:
            self.sampler.num_inference_steps = num_steps
            measured = self._measure(self.sampler, self._compared_with(step))
            found = dict(measured.metrics)
            if self.reference is None and self._reference is None and num_steps == steps_of_its_own:
                self._keep_start(measured, step)
                found |= {f"{name}{WINS}": 0.5 for name in measured.scores}  # a tie with itself
            metrics |= {f"eval/{name}/{num_steps}_steps": value for name, value in found.items()}
            columns.append((f"{num_steps} steps", measured.shown))
        self.sampler.num_inference_steps = steps_of_its_own
        if self._reference is not None:
            of_reference = self._reference.metrics
            metrics |= {f"eval/{name}/{self.reference_name}": value for name, value in of_reference.items()}
            columns.insert(0, (self.reference_name, self._reference.shown))
        self._save_sheet(step, "eval", [column for column in columns if column[1]], self._jobs())
        return metrics

    def _jobs(self) -> list[Job]:
        """Every prompt with its first noise, then every prompt with its second."""
        prompts = self.judges.prompts
        return [
            Job(prompt, copy * SEED_STRIDE + i) for copy in range(IMAGES_PER_PROMPT) for i, prompt in enumerate(prompts)
        ]

    def _compared_with(self, step: int) -> Measured | None:
        """The start or the reference, if it has been measured; by this run, or by that which it resumes."""
        if self._reference is None and self.reference is None and step:
            kept = self.run.ranks.on_main(self._kept_start)
            if kept is not None:
                features = kept.pop("features").numpy() if "features" in kept else None
                scores = {
                    name.removeprefix(SCORES): kept.pop(name).numpy() for name in list(kept) if name.startswith(SCORES)
                }
                self._reference = Measured({name: kept[name].item() for name in sorted(kept)}, features, scores)
        return self._reference

    def _kept_start(self) -> dict[str, Tensor] | None:
        """What an earlier part of the run kept of the start; None if it is of other prompts, noise or sampler.

        Without the scores of rewards that have changed since.
        """
        path = self.run.output_dir / START
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            made_with = json.loads((file.metadata() or {}).get(MADE_WITH, "{}"))
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        own = self._made_with()
        if any(made_with.get(name) != own[name] for name in ("images", "encoder")):
            return None
        changed = {name for name in self.judges.rewards if made_with["rewards"].get(name) != own["rewards"][name]}
        return {name: value for name, value in kept.items() if name.removeprefix(SCORES) not in changed}

    def _made_with(self) -> dict[str, Any]:
        """What the start's images, scores and features depend on, besides its weights."""
        sampler = self.sampler
        images = [[job.prompt, job.seed] for job in self._jobs()]
        settings = [images, self.config.num_inference_steps, sampler.guidance_scale, sampler.latent_shape]
        return {
            "images": content_key(json.dumps(settings)),
            "encoder": self.config.eval_encoder,
            "rewards": {name: reward.identity for name, reward in self.judges.rewards.items()},
        }

    def _keep_start(self, measured: Measured, step: int) -> None:
        """So that a resumed run, whose policy has moved, still compares with the start."""
        self._reference = measured
        if step and self.run.log is not None:
            self.run.log.say(f"the {self.reference_name} was not evaluated by this run: compared is with step {step}")
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in measured.metrics.items()}
        tensors |= {f"{SCORES}{name}": torch.from_numpy(values) for name, values in measured.scores.items()}
        if measured.features is not None:
            tensors["features"] = torch.from_numpy(measured.features)

        def write() -> None:
            with replacing(self.run.output_dir / START) as partial:
                save_file(tensors, partial, metadata={MADE_WITH: json.dumps(self._made_with())})

        self.run.ranks.on_main(write)

    def _measure(self, sampler: Sampler, reference: Measured | None) -> Measured:
        """Generate and measure every job, each rank its part; with win rates and distance to the reference's images."""
        jobs, ranks = self._jobs(), self.run.ranks
        images = self._generate(sampler, jobs)

        def score() -> tuple[list[int], dict[str, list[float]], np.ndarray | None, dict[int, Image.Image]]:
            own = [images[i] for i in images]
            rows = [self.judges.columns.get(jobs[i].prompt, {"prompt": jobs[i].prompt}) for i in images]
            scores = {
                name: score_rows(reward, name, own, rows).tolist() if own else []
                for name, reward in self.judges.rewards.items()
            }
            features = encode(self._encoder, iter(own)) if self._encoder is not None and own else None
            found = image_statistics(own) | scores
            return list(images), found, features, {i: images[i] for i in images if i < SHEET_ROWS}

        parts = ranks.together(score)
        order = np.argsort([i for indices, *_ in parts for i in indices])
        found = {
            name: np.array([value for _, values, *_ in parts for value in values[name]], dtype=np.float64)[order]
            for name in {**self.judges.rewards, **STATISTICS}
        }
        metrics = {name: float(values.mean()) for name, values in found.items()}
        scores = {name: found[name] for name in self.judges.rewards}
        known = {} if reference is None else reference.scores
        for name, values in scores.items():
            if name in known:  # a resumed run may ask other rewards than its start did
                metrics[f"{name}{WINS}"] = win_rate(values, known[name])
        features = None
        if self._encoder is not None:
            features = np.concatenate([part for _, _, part, _ in parts if part is not None])[order]
            precise = features.astype(np.float64)
            metrics["diversity"] = diversity(precise, [job.prompt for job in jobs]).estimate().value
            if reference is not None and reference.features is not None:
                metrics["fid"] = frechet_distance(precise, reference.features.astype(np.float64))
        shown = {i: image for *_, some in parts for i, image in some.items()}
        return Measured(metrics, features, scores, [shown[i] for i in sorted(shown)])

    def _generate(self, sampler: Sampler, jobs: Sequence[Job]) -> dict[int, Image.Image]:
        """This rank's images, by the place of their job.

        Every rank runs as many batches, for under ZeRO-3 they gather the weights together; a surplus one is dropped.

        Raises:
            StopRequested: on all ranks, if one was asked to stop.
        """
        ranks, size = self.run.ranks, self.config.per_device_train_batch_size
        batches = [range(start, min(start + size, len(jobs))) for start in range(0, len(jobs), size)]
        images: dict[int, Image.Image] = {}
        for first in range(0, len(batches), ranks.world):

            def work(mine: int = first + ranks.rank) -> int:
                chosen = batches[min(mine, len(batches) - 1)]
                made = self._generate_batch(sampler, [jobs[i] for i in chosen])
                if mine < len(batches):
                    images.update(zip(chosen, made, strict=True))
                return self.run.signals.received

            if any(ranks.together(work)):
                raise StopRequested("a stop signal was received while images were generated")
        return images

    def _generate_batch(self, sampler: Sampler, jobs: Sequence[Job]) -> list[Image.Image]:
        embeddings = [self.images.embed(job.prompt) for job in jobs]
        latents = sampler.latents(embeddings, self.images.embed(""), [job.seed for job in jobs])
        return to_images(self.images.decode(latents))

    def _grid(self, step: int) -> None:
        """`sample_prompts` × `sample_seeds`, a row per prompt."""
        jobs = [Job(prompt, seed) for prompt in self.grid_prompts for seed in self.config.sample_seeds]
        mine = self._generate(self.sampler, jobs)
        found = {i: image for part in self.run.ranks.together(lambda: mine) for i, image in part.items()}
        count = len(self.config.sample_seeds)
        rows = [(jobs[i].prompt, [found[i + k] for k in range(count)]) for i in range(0, len(jobs), count)]
        columns = [f"seed {seed}" for seed in self.config.sample_seeds]
        self._write(step, "grid", Sheet(f"step {step}", columns, rows))

    def _save_sheet(
        self, step: int, name: str, columns: list[tuple[str, list[Image.Image]]], jobs: Sequence[Job]
    ) -> None:
        count = min(len(images) for _, images in columns)
        rows = [(f"{jobs[i].prompt}, seed {jobs[i].seed}", [images[i] for _, images in columns]) for i in range(count)]
        self._write(step, name, Sheet(f"step {step}", [title for title, _ in columns], rows))

    def _write(self, step: int, name: str, sheet: Sheet) -> None:
        """On the main process; if that fails, all know."""
        info = sheet.info(step=step, guidance_scale=self.sampler.guidance_scale, run=self.run.output_dir.name)
        if self.run.log is not None:
            self.run.ranks.on_main(lambda: self.run.log.image(step, name, sheet.image(), info))

    def _check_diversity(self, step: int, metrics: dict[str, float]) -> None:
        own = metrics.get(f"eval/diversity/{self.config.num_inference_steps}_steps")
        other = metrics.get(f"eval/diversity/{self.reference_name}")
        if own is None or other is None or step == 0 or own >= self.config.min_diversity * other:
            return
        raise StopTraining(
            f"images of one prompt differ by {own:.4f} at step {step}, the {self.reference_name}'s by {other:.4f} "
            f"(min_diversity {self.config.min_diversity}): they have collapsed. {self.remedy}"
        )

    remedy = "Lower learning_rate."
    """What a user may try when images collapse."""
