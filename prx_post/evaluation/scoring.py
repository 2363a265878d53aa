"""Scores and features of an evaluation's images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from prx_post.base.errors import PrxPostError
from prx_post.base.progress import Progress
from prx_post.base.ranks import Ranks
from prx_post.data.images import decode
from prx_post.evaluation.config import EvalConfig
from prx_post.evaluation.distances import PerPrompt, Resampled, diversity, frechet, mean_of_prompts, mmd
from prx_post.evaluation.features import NEEDS_REFERENCE, PIXELS, Encoder, MetricSpec, encode, open_encoder
from prx_post.evaluation.gallery import Gallery
from prx_post.evaluation.jobs import Job
from prx_post.evaluation.metrics import Estimate
from prx_post.evaluation.pixels import STATISTICS
from prx_post.model.sampler import default_device
from prx_post.rewards.cache import CachedReward, ScoreCache
from prx_post.rewards.judges.pairwise import PairwiseJudge
from prx_post.rewards.registry import parse_specs
from prx_post.rewards.reward import Reward, score_rows

CHUNK = 64
"""Images in memory at a time."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")

Scores = dict[str, dict[str, np.ndarray]]
"""checkpoint -> reward -> [N], NaN for images of prompt sets that the reward does not score"""


@dataclass(frozen=True)
class Metrics:
    """Of checkpoints by name, metrics by name."""

    values: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    """Of each later checkpoint to the first."""


def open_rewards(config: EvalConfig, jobs: Sequence[Job]) -> tuple[dict[str, Reward], dict[str, list[str]]]:
    """The rewards, and the prompt sets that each scores: those of which it can score every prompt.

    Raises:
        PrxPostError: a reward's library or weights are not there, or it can score no set.
    """
    prompts: dict[str, list[str]] = {}
    for job in jobs:
        prompts.setdefault(job.prompt_set, []).append(job.prompt)
    rewards, applies = {}, {}
    for spec in parse_specs(config.rewards):
        reward = spec.load(device=str(default_device()), dtype=config.reward_dtype, batch_size=config.reward_batch_size)
        refusals = {name: _refusal(reward, given) for name, given in prompts.items()}
        applies[spec.label] = [name for name, refusal in refusals.items() if refusal is None]
        if not applies[spec.label]:
            raise PrxPostError(f"the reward {spec.label} cannot score the prompts: {next(iter(refusals.values()))}")
        rewards[spec.label] = reward
    return rewards, applies


def _refusal(reward: Reward, prompts: Sequence[str]) -> str | None:
    try:
        reward.check(prompts)
    except PrxPostError as error:
        return str(error)
    return None


def score(
    galleries: Sequence[Gallery],
    jobs: Sequence[Job],
    rewards: dict[str, Reward],
    applies: dict[str, list[str]],
    output_dir: Path,
    ranks: Ranks,
) -> Scores:
    """Every reward of every image; what was scored before is read from `output_dir/scores`.

    One reward at a time, and let go of afterwards, so that their models need not fit in memory together.
    """
    cache = ScoreCache(output_dir / "scores")
    scores: Scores = {gallery.spec.name: {} for gallery in galleries}
    for name in list(rewards):
        reward = rewards.pop(name)
        known = reward if getattr(reward, "takes_columns", False) else CachedReward(reward, name, cache)
        own = ranks.share([i for i, job in enumerate(jobs) if job.prompt_set in applies[name]])
        for gallery in galleries:
            found: list[tuple[int, float]] = []
            title = f"{name} of {gallery.spec.name}"
            for start in Progress(range(0, len(own), CHUNK), desc=title, disable=ranks.hides_progress, leave=False):
                part = own[start : start + CHUNK]
                found += zip(part, _score_chunk(known, name, gallery, [jobs[i] for i in part]), strict=True)
            values = np.full(len(jobs), np.nan)
            for i, value in ranks.gather(found):
                values[i] = value
            scores[gallery.spec.name][name] = values
        del reward, known
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return scores


def _score_chunk(reward: Reward, name: str, gallery: Gallery, jobs: Sequence[Job]) -> list[float]:
    rows = [{**job.columns, "prompt": job.prompt} for job in jobs]
    return score_rows(reward, name, list(gallery.images(jobs)), rows).tolist()


def compare(
    galleries: Sequence[Gallery], jobs: Sequence[Job], judge: PairwiseJudge, ranks: Ranks
) -> dict[str, np.ndarray]:
    """How sure a judge is that a later checkpoint's image beats the first's: checkpoint -> [N] in [0, 1]."""
    baseline, *others = galleries
    own = ranks.share(range(len(jobs)))
    found = {}
    for gallery in others:
        wins: list[tuple[int, float]] = []
        title = f"judging {gallery.spec.name}"
        for start in Progress(range(0, len(own), CHUNK), desc=title, disable=ranks.hides_progress, leave=False):
            part = own[start : start + CHUNK]
            of = [jobs[i] for i in part]
            first, second = list(baseline.images(of)), list(gallery.images(of))
            wins += zip(part, (1 - judge([job.prompt for job in of], first, second)).tolist(), strict=True)
        found[gallery.spec.name] = np.array([value for _, value in sorted(ranks.gather(wins))])
    return found


def reference_paths(config: EvalConfig) -> list[Path]:
    """Images under `reference_dir`, unread. Raises PrxPostError if there are fewer than two."""
    if config.reference_dir is None:
        return []
    folder = Path(config.reference_dir).expanduser()
    paths = sorted(path for path in folder.glob("**/*") if path.suffix.lower() in ENDINGS)
    if len(paths) < 2:
        raise PrxPostError(
            f"reference_dir is {config.reference_dir!r}, which has {len(paths)} images, but must have two or more "
            f"because distributions are compared. Check the path, or leave it out."
        )
    return paths


def check_reference(paths: Sequence[Path], ranks: Ranks) -> None:
    """Decode every image, each rank its part: raises PrxPostError on all of them, naming one that cannot be read."""

    def decode_own() -> None:
        own = ranks.share(paths)
        for path in Progress(
            own, desc="reading reference_dir", unit="image", leave=False, disable=ranks.hides_progress
        ):
            _image(path)

    ranks.together(decode_own)


def open_encoders(config: EvalConfig) -> dict[str, Encoder]:
    """The metrics' encoders by name. Raises PrxPostError if what one needs is not there."""
    names = dict.fromkeys(spec.encoder for spec in config.metric_specs())
    device = default_device()
    return {name: open_encoder(name, device, config.reward_dtype, config.reward_batch_size) for name in names}


def measure(
    galleries: Sequence[Gallery],
    jobs: Sequence[Job],
    reference: Sequence[Path],
    config: EvalConfig,
    encoders: dict[str, Encoder],
    ranks: Ranks,
) -> Metrics:
    """Every metric of every checkpoint, and the differences of the later ones to the first."""
    specs, names = config.metric_specs(), [gallery.spec.name for gallery in galleries]
    found: dict[str, dict[str, Estimate]] = {name: {} for name in names}
    differences: dict[str, dict[str, Estimate]] = {name: {} for name in names[1:]}
    for encoder_name in list(encoders):
        encoder = encoders.pop(encoder_name)
        wanted = [spec for spec in specs if spec.encoder == encoder_name]
        compares = any(spec.metric in NEEDS_REFERENCE for spec in wanted)
        real = _features(encoder, reference, ranks) if compares else None
        first: dict[str, Any] = {}
        for gallery in galleries:
            features = _features(encoder, [gallery.path(job) for job in jobs], ranks)
            for spec in wanted:
                made = ranks.on_main(partial(_measured, spec, features, real, jobs))
                found[gallery.spec.name][spec.metric] = made.estimate()
                start = first.setdefault(spec.metric, made)
                if gallery.spec.name in differences:
                    differences[gallery.spec.name][spec.metric] = made.minus(start)
        if ranks.is_main and real is not None and any(spec.metric == "fid" for spec in wanted):
            _warn_of_few(len(jobs), *real.shape)
    in_order = [spec.metric for spec in specs]
    return Metrics(*({n: {m: of[m] for m in in_order} for n, of in part.items()} for part in (found, differences)))


def _warn_of_few(images: int, references: int, width: int) -> None:
    """The rank of a covariance is below its width where there are not more images."""
    if min(images, references) <= width:
        print(
            f"warning: fid fits Gaussians to {width} features from {images} images and {references} of the reference. "
            f"With fewer images than features it comes out too high; compare it only with figures of as many."
        )


def _measured(
    spec: MetricSpec, features: np.ndarray, real: np.ndarray | None, jobs: Sequence[Job]
) -> Resampled | PerPrompt:
    prompts = [(job.prompt_set, job.index) for job in jobs]
    if spec.encoder == PIXELS:
        return mean_of_prompts(features[:, list(STATISTICS).index(spec.metric)], prompts)
    if spec.metric == "diversity":
        return diversity(features, prompts)
    assert real is not None  # a reference was required
    if spec.metric == "fid":
        return frechet(features.astype(np.float64), real.astype(np.float64))
    return mmd(_unit(features), _unit(real))


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True).astype(np.float64)


def _image(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise PrxPostError(f"{path} cannot be read as an image: {error}. Replace or remove it.") from error


def _features(encoder: Encoder, paths: Sequence[Path], ranks: Ranks) -> np.ndarray:
    """Features [N, D] in the order of `paths`, each rank encoding its part."""
    positions = list(ranks.share(range(len(paths))))
    own = encode(encoder, (_image(paths[i]) for i in positions)) if positions else np.zeros((0, 0))
    rows: list[tuple[int, np.ndarray]] = ranks.gather(list(zip(positions, own, strict=True)))
    return np.stack([row for _, row in sorted(rows, key=lambda pair: pair[0])])
