"""`prx-post eval`: checkpoints on the same prompts and seeds, scored, compared, reported."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from prx_post import __version__
from prx_post.config import PrxPostError, check_types, doc, parse, require, require_one_of, require_positive
from prx_post.data.encoding import Encoders
from prx_post.evaluation.metrics import Estimate, frechet_estimate, mean_estimate, paired_difference
from prx_post.evaluation.report import write_report
from prx_post.generate import (
    build_sampler,
    default_device,
    generate_images,
    png_info,
    require_empty,
    resolve_size,
    warn_lost_prompts,
)
from prx_post.model.checkpoint import DTYPES, PipelineFolder, load, open_pipeline
from prx_post.model.text import PromptCleaner
from prx_post.rewards import base

SEED_STRIDE = 100_000
"""Noise seed of prompt i under seed s is s·SEED_STRIDE + i: no two pictures of an evaluation share their noise."""


@dataclass
class EvalConfig:
    """Checkpoints, prompts and scorers. The first checkpoint is what the others are compared with."""

    checkpoints: list[str] = doc("`name=folder or Hub id`, one or more; the first is the baseline.", [])
    prompts_file: str | None = doc("JSON lines, each with `prompt` and, optionally, `group`.", None)
    num_prompts: int | None = doc("Use this many prompts, spread evenly over the file; null: all.", None)
    seeds: list[int] = doc("Every prompt is drawn once with each.", [0])
    rewards: list[str] = doc("Scorers by name.", ["ocr_exact", "ocr_graded", "judge_exact", "judge_graded"])
    reference_dir: str | None = doc("Real pictures for FID on the embedded judge's features; null: no FID.", None)
    num_inference_steps: int = doc("Sampler steps.", 28)
    guidance_scale: float = doc("Classifier-free guidance; 1 switches it off.", 5.0)
    height: int | None = doc("Height, pixels; null: the checkpoint's default_sample_size.", None)
    width: int | None = doc("Width, pixels; null: the checkpoint's default_sample_size.", None)
    batch_size: int = doc("Pictures at a time.", 64)
    skip_text_cleaning: bool = doc("Only light prompt cleaning; as in training.", False)
    dtype: str = doc("Precision of the transformer and text encoder: `float32` or `bfloat16`.", "float32")
    output_dir: str | None = doc("Folder for pictures, results.json and report.html; must be new or empty.", None)
    num_threads: int = doc("CPU threads torch may use; 0 leaves torch's own choice.", 0)

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("checkpoints", "prompts_file", "output_dir", "seeds", "rewards"):
            value = getattr(self, name)
            require(bool(value), name, value, "set", "an evaluation needs it", f"Set {name}")
        require_positive(self, "num_inference_steps", "batch_size")
        if self.num_prompts is not None:
            require_positive(self, "num_prompts")
        require_one_of("dtype", self.dtype, tuple(DTYPES))
        for reward in self.rewards:
            require_one_of("rewards", reward, tuple(base.REGISTRY))
        require(
            self.guidance_scale >= 1,
            *("guidance_scale", self.guidance_scale, "1 or more", "less is not defined", "Set 1 for no guidance"),
        )
        names = [name for name, _ in self.named_checkpoints()]
        action = "Write them as name=path with different names"
        require(len(set(names)) == len(names), "checkpoints", names, "distinctly named", "names label results", action)

    def named_checkpoints(self) -> list[tuple[str, str]]:
        pairs = [c.split("=", 1) if "=" in c else (Path(c).name, c) for c in self.checkpoints]
        return [(name, path) for name, path in pairs]


@dataclass
class Job:
    """One picture to be made, of one prompt from one seed, by every checkpoint."""

    prompt: str
    group: str
    noise_seed: int


def read_jobs(config: EvalConfig) -> list[Job]:
    """Prompts × seeds. Raises PrxPostError if the file is missing, empty, or a line is no prompt."""
    path = Path(str(config.prompts_file)).expanduser()
    if not path.is_file():
        raise PrxPostError(f"prompts_file is {config.prompts_file!r}, but there is no such file. Check the path.")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append({"group": "all", **json.loads(line)})
            rows[-1]["prompt"].strip()
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise PrxPostError(
                f'{path}, line {number} is no prompt, but must be JSON such as {{"prompt": "a red cube"}}. Correct it.'
            ) from error
    if not rows:
        raise PrxPostError(f"prompts_file is {config.prompts_file!r}, which has no prompts. Choose another file.")
    count = min(config.num_prompts or len(rows), len(rows))
    chosen = [rows[round(i)] for i in np.linspace(0, len(rows) - 1, count)]
    return [
        Job(row["prompt"], row["group"], seed * SEED_STRIDE + i)
        for seed in config.seeds
        for i, row in enumerate(chosen)
    ]


def read_reference(config: EvalConfig) -> list[Image.Image]:
    if config.reference_dir is None:
        return []
    folder = Path(config.reference_dir).expanduser()
    paths = sorted(p for p in folder.glob("**/*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if len(paths) < 2:
        raise PrxPostError(
            f"reference_dir is {config.reference_dir!r}, which has {len(paths)} pictures, but must have two or more "
            f"because FID compares distributions. Check the path, or leave it out."
        )
    return [Image.open(path).convert("RGB") for path in paths]


def run(args: Sequence[str]) -> None:
    """`prx-post eval`"""
    (config,) = parse([EvalConfig], args, "prx-post eval")
    jobs = read_jobs(config)
    pipelines = {name: open_pipeline(path) for name, path in config.named_checkpoints()}
    sizes = {name: resolve_size(pipeline, config.height, config.width) for name, pipeline in pipelines.items()}
    output_dir = require_empty(config.output_dir)
    reference = read_reference(config)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    scorers = {name: base.load(name) for name in config.rewards}
    warn_lost_prompts(PromptCleaner(config.skip_text_cleaning), [job.prompt for job in jobs])

    pictures, results = {}, {}
    for name, pipeline in pipelines.items():
        folder = output_dir / "images" / name
        pictures[name], seconds = draw(name, pipeline, sizes[name], jobs, config, folder)
        results[name] = {"images_per_second": len(jobs) / seconds, **score(pictures[name], jobs, scorers, reference)}
    summary = {
        "settings": asdict(config),
        "versions": versions(),
        "num_pictures": len(jobs),
        "checkpoints": {name: summarise(result, jobs) for name, result in results.items()},
        "differences": differences(results),
    }
    (output_dir / "results.json").write_text(json.dumps(summary, indent=2, default=vars, ensure_ascii=False) + "\n")
    scores = {name: result["scores"] for name, result in results.items()}
    write_report(output_dir / "report.html", summary, jobs, pictures, scores)
    print_summary(summary)
    print(f"report in {output_dir / 'report.html'}")


def draw(
    name: str, pipeline: PipelineFolder, size: tuple[int, int], jobs: list[Job], config: EvalConfig, folder: Path
) -> tuple[list[Image.Image], float]:
    """Every job's picture by one checkpoint, saved with its settings. Returns pictures and seconds of sampling."""
    device, dtype = default_device(), DTYPES[config.dtype]
    encoders = Encoders(pipeline, PromptCleaner(config.skip_text_cleaning), device, dtype)
    checkpoint = load(str(pipeline.path), dtype)
    sampler = build_sampler(checkpoint, size, config.num_inference_steps, config.guidance_scale, device)
    folder.mkdir(parents=True)
    prompts, seeds = [job.prompt for job in jobs], [job.noise_seed for job in jobs]
    images: list[Image.Image] = []
    began = time.perf_counter()
    made = generate_images(sampler, encoders.prompts, encoders.codec.decode, prompts, seeds, config.batch_size)
    for job, image in zip(jobs, tqdm(made, total=len(jobs), desc=f"drawing {name}", unit="image"), strict=True):
        settings = {"prompt": job.prompt, "seed": job.noise_seed, "checkpoint": pipeline.source}
        settings |= {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
        image.save(folder / f"{len(images):05d}.png", pnginfo=png_info(settings))
        images.append(image)
    return images, time.perf_counter() - began


def score(
    images: list[Image.Image], jobs: list[Job], scorers: dict[str, base.Reward], reference: list[Image.Image]
) -> dict[str, Any]:
    """Scores by reward, [N] each, and FID if there are reference pictures."""
    prompts = [job.prompt for job in jobs]
    scores = {}
    for name, scorer in scorers.items():
        values = scorer(images, prompts).double().numpy()
        if values.shape != (len(jobs),) or not np.isfinite(values).all():
            raise PrxPostError(
                f"the reward {name} gave {values.shape} scores, some of them not finite. Mend the reward."
            )
        scores[name] = values
    result: dict[str, Any] = {"scores": scores}
    if reference:
        from prx_post.tiny.judge import judge_features

        result["fid"] = frechet_estimate(judge_features(images).numpy(), judge_features(reference).numpy())
    return result


def summarise(result: dict[str, Any], jobs: list[Job]) -> dict[str, Any]:
    groups = np.array([job.group for job in jobs])
    by_group = {
        group: {name: mean_estimate(values[groups == group]) for name, values in result["scores"].items()}
        for group in dict.fromkeys(groups.tolist())
    }
    summary = {
        "images_per_second": round(result["images_per_second"], 2),
        "rewards": {name: mean_estimate(values) for name, values in result["scores"].items()},
        "by_group": by_group,
    }
    return summary | ({"fid": result["fid"]} if "fid" in result else {})


def differences(results: dict[str, Any]) -> dict[str, dict[str, Estimate]]:
    """Each later checkpoint minus the first, by reward, paired by prompt and seed."""
    (_, baseline), *others = results.items()
    return {
        name: {
            reward: paired_difference(baseline["scores"][reward], values) for reward, values in other["scores"].items()
        }
        for name, other in others
    }


def versions() -> dict[str, str]:
    import diffusers
    import transformers

    modules = {"torch": torch, "diffusers": diffusers, "transformers": transformers}
    found = {name: module.__version__ for name, module in modules.items()}
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"prx-post": __version__, **found, "python": platform.python_version(), "date": today}


def print_summary(summary: dict[str, Any]) -> None:
    for name, result in summary["checkpoints"].items():
        rows = {**result["rewards"], **({"fid": result["fid"]} if "fid" in result else {})}
        shown = "  ".join(f"{reward} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for reward, e in rows.items())
        print(f"{name}: {shown}")
    for name, rewards in summary["differences"].items():
        shown = "  ".join(f"{reward} {e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" for reward, e in rewards.items())
        print(f"{name} - {next(iter(summary['checkpoints']))}: {shown}")
