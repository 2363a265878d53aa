"""The images of an evaluation on disk: generated once, reused by a later run of the same settings.

images/<checkpoint>/drawn.json                                what they were generated with
images/<checkpoint>/speed.jsonl                              a line per process and run: images, seconds
images/<checkpoint>/<set>/<index>-seed<s>.png                 each with its settings in its metadata
trajectories/<checkpoint>/<set>/<index>-seed<s>/<step>.png    the image expected at each step
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from prx_post.base.errors import PrxPostError
from prx_post.base.files import json_line, make_folder, write_bytes
from prx_post.base.progress import Progress
from prx_post.base.ranks import Ranks
from prx_post.data.cache import fingerprint
from prx_post.data.encoders import Encoders
from prx_post.evaluation.config import CheckpointSpec, EvalConfig
from prx_post.evaluation.jobs import Job
from prx_post.flow import inference_sigmas, x0_from_velocity
from prx_post.model.checkpoint import DTYPES, PipelineFolder, load, open_pipeline
from prx_post.model.codec import to_images
from prx_post.model.inference import Inference, choose, describe
from prx_post.model.lora import with_adapter
from prx_post.model.sampler import Sampler, build_sampler, default_device, generate_images, png_info
from prx_post.model.scheduler import rescheduled
from prx_post.model.text import PromptCleaner


@dataclass
class Gallery:
    """One checkpoint's images.

    Attributes:
        settings: that they are generated with; `own` names those that are the checkpoint's.
    """

    spec: CheckpointSpec
    pipeline: PipelineFolder
    settings: Inference
    own: Sequence[str]
    size: tuple[int, int]
    output_dir: Path

    @classmethod
    def open(cls, spec: CheckpointSpec, config: EvalConfig, output_dir: Path) -> "Gallery":
        """Raises PrxPostError for a checkpoint that is missing or cannot generate the size asked for."""
        pipeline = with_adapter(open_pipeline(spec.source), spec.adapter)
        steps, guidance = spec.num_inference_steps, spec.guidance_scale
        asked = replace(config, num_inference_steps=steps, guidance_scale=guidance)
        settings, own = choose(asked, pipeline.inference)
        size = pipeline.resolve_size(settings.height, settings.width)
        return cls(spec, pipeline, settings, own, size, output_dir)

    def describe(self) -> str:
        sampler = self.spec.sampler or self.pipeline.sampler
        said = describe(self.size, self.settings, sampler, self.own, self.spec.noise_level)
        return f"{self.spec.name}: {said}"

    @property
    def folder(self) -> Path:
        return self.output_dir / "images" / self.spec.name

    def path(self, job: Job) -> Path:
        return self.folder / job.file

    def trajectory(self, job: Job) -> list[Path]:
        """The images expected at each step of a job's sampling, which exist if it is among the first few."""
        folder = (self.output_dir / "trajectories" / self.spec.name / job.file).with_suffix("")
        return [folder / f"{step:03d}.png" for step in range(self.settings.num_inference_steps)]

    def image(self, job: Job) -> Image.Image:
        """The image of a job that has been generated."""
        with Image.open(self.path(job)) as image:
            return image.convert("RGB")

    def images(self, jobs: Sequence[Job]) -> Iterator[Image.Image]:
        return (self.image(job) for job in jobs)

    def has(self, job: Job) -> bool:
        """Whether the job's image is there, whole, and of this prompt and noise."""
        try:
            with Image.open(self.path(job)) as image:
                image.load()
                text = getattr(image, "text", {})
        except (FileNotFoundError, UnidentifiedImageError, OSError, SyntaxError):
            return False  # missing, or incomplete: generated again
        return text.get("prompt") == job.prompt and text.get("seed") == str(job.noise_seed)

    def claim(self, config: EvalConfig) -> None:
        """Note what the images are drawn with. Raises PrxPostError if some are there that were generated with else."""
        make_folder(self.folder)
        path = self.folder / "drawn.json"
        transformer, *adapter = self.pipeline.transformer_files
        weights = [transformer, self.pipeline.path / "scheduler", self.pipeline.path / "vae", *adapter]
        wanted = {
            "weights": fingerprint(self.output_dir, *weights),
            "num_inference_steps": self.settings.num_inference_steps,
            "guidance_scale": self.settings.guidance_scale,
            **self.spec.scheduler_changes,
            **({} if self.spec.noise_level is None else {"noise_level": self.spec.noise_level}),
            "height": self.size[0],
            "width": self.size[1],
            "dtype": config.dtype,
            "batch_size": config.batch_size,
            "skip_text_cleaning": self.settings.skip_text_cleaning,
        }
        drawn = json.loads(path.read_text(encoding="utf-8")) if path.exists() else wanted
        drawn.pop("checkpoint", None)  # its path, of an earlier version's: weights count, wherever they lie
        differing = [key for key in wanted | drawn if drawn.get(key) != wanted.get(key)]
        if differing:
            key = differing[0]
            raise PrxPostError(
                f"output_dir is {str(self.output_dir)!r}, whose images of {self.spec.name} were generated with {key} "
                f"{drawn.get(key)!r}, but now {key} is {wanted.get(key)!r}. Choose another output_dir, or "
                f"another name for the checkpoint."
            )
        write_bytes(path, (json.dumps(wanted, indent=2) + "\n").encode())

    def timing(self) -> dict[str, float] | None:
        """`images_per_second` of all ranks together, `seconds_per_image` of one; None if nothing was generated."""
        path = self.folder / "speed.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if not lines:
            return None
        ranks: dict[int, tuple[int, float]] = {}
        for line in lines:
            count, seconds = ranks.get(line["rank"], (0, 0.0))
            ranks[line["rank"]] = count + line["images"], seconds + line["seconds"]
        total, seconds = (sum(values) for values in zip(*ranks.values(), strict=True))
        rate = sum(count / spent for count, spent in ranks.values())
        return {"images_per_second": round(rate, 3), "seconds_per_image": round(seconds / total, 4)}


def fill(gallery: Gallery, jobs: Sequence[Job], config: EvalConfig, ranks: Ranks) -> None:
    """Generate this process's part of the images that are missing, and the trajectories.

    Batches are the same however a run was interrupted or split, so that the images are, to the bit.
    """
    batches = [jobs[start : start + config.batch_size] for start in range(0, len(jobs), config.batch_size)]
    missing = [batch for batch in ranks.share(batches) if not all(gallery.has(job) for job in batch)]
    shown = [] if ranks.rank else jobs[: config.trajectory_prompts]
    strips = [job for job in shown if not gallery.trajectory(job)[-1].exists()]
    if not missing and not strips:
        return
    device, dtype = default_device(), DTYPES[config.dtype]
    encoders = Encoders(gallery.pipeline, PromptCleaner(gallery.settings.skip_text_cleaning), device, dtype)
    checkpoint = load(gallery.pipeline, dtype)
    spec = gallery.spec
    checkpoint.scheduler = rescheduled(checkpoint.scheduler, **spec.scheduler_changes)
    steps, guidance = gallery.settings.num_inference_steps, gallery.settings.guidance_scale
    sampler = build_sampler(checkpoint, gallery.size, steps, guidance, device, spec.noise_level)
    encoders.prompts, encoders.codec  # load both before the clock starts  # noqa: B018
    embed = _Memo(encoders)
    count, seconds = 0, 0.0
    for batch in Progress(missing, desc=f"generating {spec.name}", unit="batch", disable=ranks.hides_progress):
        began = time.perf_counter()
        prompts, seeds = [job.prompt for job in batch], [job.noise_seed for job in batch]
        images = list(generate_images(sampler, embed, encoders.codec.decode, prompts, seeds, len(batch)))
        seconds, count = seconds + time.perf_counter() - began, count + len(batch)
        _save(gallery, batch, images)
    if count:
        line = {"rank": ranks.rank, "images": count, "seconds": seconds}
        with (gallery.folder / "speed.jsonl").open("a") as file:
            file.write(json_line(line))
    for job in strips:
        _save_trajectory(gallery, job, sampler, embed, encoders)


class _Memo:
    """Embeddings by prompt, computed once."""

    def __init__(self, encoders: Encoders) -> None:
        self._encoders = encoders
        self._known: dict[str, Tensor] = {}

    def __call__(self, prompt: str) -> Tensor:
        if prompt not in self._known:
            self._known[prompt] = self._encoders.prompts(prompt)
        return self._known[prompt]


def _save(gallery: Gallery, batch: Sequence[Job], images: Sequence[Image.Image]) -> None:
    settings: dict[str, Any] = {
        "checkpoint": gallery.spec.source,
        "num_inference_steps": gallery.settings.num_inference_steps,
        "guidance_scale": gallery.settings.guidance_scale,
    }
    for job, image in zip(batch, images, strict=True):
        path = gallery.path(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        info = png_info({"prompt": job.prompt, "seed": job.noise_seed, **settings})
        image.save(partial, format="PNG", pnginfo=info)
        partial.replace(path)


@torch.no_grad()
def _save_trajectory(gallery: Gallery, job: Job, sampler: Sampler, embed: _Memo, encoders: Encoders) -> None:
    """The clean image that each step's velocity points to; the last is the image itself."""
    paths = gallery.trajectory(job)
    make_folder(paths[0].parent)
    for path, x0 in zip(paths, expected_images(sampler, embed(job.prompt), embed(""), job.noise_seed), strict=True):
        (image,) = to_images(encoders.codec.decode(x0))
        image.save(path)


def expected_images(sampler: Sampler, embedding: Tensor, null: Tensor, seed: int) -> list[Tensor]:
    """x0 [1, C, H/f, W/f] that the velocity of each sampler step points to, for one prompt and noise."""
    steps: list[tuple[Tensor, Tensor]] = []
    sampler.latents([embedding], null, [seed], record=lambda x_t, velocity: steps.append((x_t, velocity)))
    sigmas = inference_sigmas(sampler.scheduler, sampler.num_inference_steps)
    return [
        x0_from_velocity(x_t.float(), velocity.float(), torch.full((1,), sigma, device=x_t.device))
        for (x_t, velocity), sigma in zip(steps, sigmas[:-1].tolist(), strict=True)
    ]
