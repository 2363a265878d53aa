"""`prx-post eval`: checkpoints on the same prompts and seeds, scored, compared, reported.

    output_dir/results.json, report.html    what came out
    output_dir/images/, trajectories/       the images (gallery.py)
    output_dir/scores/                      every score, by image and prompt (rewards/cache.py)

Run again with the same settings, or with another checkpoint, reward or metric, it reuses the images and scores.
"""

import json
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from prx_post import __version__
from prx_post.base.errors import PrxPostError
from prx_post.base.files import FolderLock, make_folder, require_empty, write_bytes
from prx_post.base.parsing import parse
from prx_post.base.ranks import Ranks, launched_ranks
from prx_post.evaluation.config import EvalConfig
from prx_post.evaluation.gallery import Gallery, fill
from prx_post.evaluation.jobs import Job, read_jobs
from prx_post.evaluation.metrics import Estimate, win_fraction
from prx_post.evaluation.report import write_report
from prx_post.evaluation.scoring import (
    Metrics,
    Scores,
    check_reference,
    compare,
    measure,
    open_encoders,
    open_rewards,
    reference_paths,
    score,
)
from prx_post.evaluation.summary import Slice, slices
from prx_post.model.text import PromptCleaner
from prx_post.rewards.judges.config import VisionJudgeConfig
from prx_post.rewards.judges.pairwise import position_bias
from prx_post.rewards.judges.vision_judge import VisionJudge

MARK = "evaluation.json"


def check(args: Sequence[str]) -> tuple[EvalConfig, VisionJudgeConfig]:
    """The command's settings, checked as far as they can be without any file they name."""
    config, judge = parse([EvalConfig, VisionJudgeConfig], args, "prx-post eval")
    if judge.judge_url is not None and len(config.checkpoints) < 2:
        raise PrxPostError("judge_url is set, but there is one checkpoint and nothing to compare it with. Add another.")
    return config, judge


def run(args: Sequence[str]) -> None:
    """`prx-post eval`"""
    evaluate(*check(args))


def evaluate(config: EvalConfig, judge_config: VisionJudgeConfig | None = None) -> dict[str, Any]:
    """Generate, score, compare, report. Returns what results.json holds.

    Args:
        judge_config: of a vision-language judge that compares checkpoints too, if its judge_url is set.

    Raises:
        PrxPostError: something that the settings name is missing or unfit, before anything is generated; a reward gives
            no finite score or cannot be reached, after which what was generated and scored is kept.
    """
    jobs = read_jobs(config)
    output_dir = _claimable(config)
    galleries = [Gallery.open(spec, config, output_dir) for spec in config.checkpoint_specs()]
    reference, encoders = reference_paths(config), open_encoders(config)
    if reference and len(jobs) < 2:
        raise PrxPostError("distances need two or more images, but there is 1 prompt and seed. Leave out metrics.")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    rewards, applies = open_rewards(config, jobs)
    judge = VisionJudge(judge_config) if judge_config is not None and judge_config.judge_url is not None else None
    with ExitStack() as stack:
        ranks = stack.enter_context(launched_ranks())
        if ranks.rank == 0:
            stack.enter_context(FolderLock(_claim(output_dir)))
            for gallery in galleries:
                gallery.claim(config)
                print(gallery.describe())
            _say_what_is_left_out(config, galleries, jobs, applies)
        check_reference(reference, ranks)  # which waits until the folders are there
        for gallery in galleries:
            fill(gallery, jobs, config, ranks)
        ranks.wait()  # until every image is there
        scores = score(galleries, jobs, rewards, applies, output_dir, ranks)
        metrics = measure(galleries, jobs, reference, config, encoders, ranks)
        parts = slices(scores, jobs)
        judged = None
        if judge is not None and judge_config is not None:
            judged = _judge(judge, str(judge_config.judge_model), galleries, jobs, parts[0], ranks)
        summary = _summary(config, jobs, galleries, parts, metrics, applies, ranks) | {"judge": judged}
        if ranks.rank == 0:
            _write(output_dir, summary, parts, jobs, galleries, scores)
    return summary


def _judge(
    judge: VisionJudge, model: str, galleries: Sequence[Gallery], jobs: Sequence[Job], overall: Slice, ranks: Ranks
) -> dict[str, Any]:
    """Adds the judge's win rates to `overall`. Returns who judged, and what was asked and answered."""
    label, clusters = f"judge {model.rpartition('/')[2]}", [job.cluster for job in jobs]
    for name, wins in compare(galleries, jobs, judge, ranks).items():
        overall.wins.setdefault(name, {})[label] = win_fraction(wins, clusters)
    counts = ranks.gather([{**asdict(judge.counts), "position_bias": position_bias(judge.counts)}])
    return {"model": model, "identity": judge.identity, "counts_by_process": counts}


def _claimable(config: EvalConfig) -> Path:
    """output_dir. Raises PrxPostError unless it is new, empty, or an evaluation's."""
    folder = Path(str(config.output_dir)).expanduser()
    return folder if (folder / MARK).is_file() else require_empty(config.output_dir)


def _claim(folder: Path) -> Path:
    make_folder(folder)
    write_bytes(folder / MARK, (json.dumps({"prx_post": __version__}) + "\n").encode())
    return folder


def _say_what_is_left_out(
    config: EvalConfig, galleries: Sequence[Gallery], jobs: Sequence[Job], applies: dict[str, list[str]]
) -> None:
    for is_light in {gallery.settings.skip_text_cleaning for gallery in galleries}:
        PromptCleaner(is_light).warn_of_lost(job.prompt for job in jobs)
    names = [name for name, _ in config.prompt_sets()]
    for reward, scored in applies.items():
        if left_out := [name for name in names if name not in scored]:
            print(f"{reward} does not score {', '.join(left_out)}: it has prompts that this reward cannot score")


def _summary(
    config: EvalConfig,
    jobs: Sequence[Job],
    galleries: Sequence[Gallery],
    parts: Sequence[Slice],
    metrics: Metrics,
    applies: dict[str, list[str]],
    ranks: Ranks,
) -> dict[str, Any]:
    overall = parts[0]
    checkpoints = {}
    for gallery in galleries:
        spec = gallery.spec
        checkpoints[spec.name] = {
            **asdict(spec),
            "num_inference_steps": gallery.settings.num_inference_steps,
            "guidance_scale": gallery.settings.guidance_scale,
            "num_network_evaluations": gallery.settings.num_network_evaluations,
            "height": gallery.size[0],
            "width": gallery.size[1],
            "timing": gallery.timing(),
            "rewards": overall.means[spec.name],
            "metrics": metrics.values[spec.name],
        }
    return {
        "settings": asdict(config),
        "versions": versions(),
        "num_processes": ranks.world,
        "num_images": len(jobs),
        "rewards_score": applies,
        "checkpoints": checkpoints,
        "differences": {
            name: {**overall.differences.get(name, {}), **of_metrics}
            for name, of_metrics in metrics.differences.items()
        },
        "wins": overall.wins,
        "slices": [asdict(part) for part in parts[1:]],
    }


def versions() -> dict[str, str]:
    import diffusers
    import transformers

    modules = {"torch": torch, "diffusers": diffusers, "transformers": transformers}
    found = {name: module.__version__ for name, module in modules.items()}
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"prx-post": __version__, **found, "python": platform.python_version(), "device": device, "date": today}


def _write(
    output_dir: Path,
    summary: dict[str, Any],
    parts: Sequence[Slice],
    jobs: Sequence[Job],
    galleries: Sequence[Gallery],
    scores: Scores,
) -> None:
    text = json.dumps(summary, indent=2, default=vars, ensure_ascii=False, allow_nan=False)
    write_bytes(output_dir / "results.json", (text + "\n").encode("utf-8", "replace"))
    write_report(output_dir / "report.html", summary, parts, jobs, galleries, scores)
    _print_summary(summary)
    print(f"report in {output_dir / 'report.html'}")


def _print_summary(summary: dict[str, Any]) -> None:
    def line(title: str, estimates: dict[str, Estimate], sign: str = "") -> None:
        if estimates:
            print(f"{title}: " + "  ".join(f"{name} {estimate.text(sign)}" for name, estimate in estimates.items()))

    baseline = next(iter(summary["checkpoints"]))
    for name, result in summary["checkpoints"].items():
        line(name, {**result["rewards"], **result["metrics"]})
    for name, rewards in summary["differences"].items():
        line(f"{name} - {baseline}", rewards, "+")
    for name, rewards in summary["wins"].items():
        line(f"{name} wins over {baseline}", rewards)
