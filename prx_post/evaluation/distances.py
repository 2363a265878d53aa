"""Distances between two sets of images, from their features; and the diversity within one.

FID, CMMD and DINO-MMD are the three that PRX's makers report of their models. What differs is the encoder and, of the
first, the distance: see docs/evaluation.md.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prx_post.evaluation.metrics import MIN_CLUSTERS, Z_95, Estimate, mean_estimate, paired_difference

RESAMPLES = 100
MAX_RESAMPLED_WIDTH = 512
"""Wider features (InceptionV3's 2,048) get a Fréchet distance without an interval: each resample would take seconds."""
MMD_SIGMA, MMD_SCALE = 10.0, 1000.0
BLOCK = 1000


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """FID's distance between Gaussians fitted to two sets of features, [N, D] and [M, D] (Heusel et al. 2017, eq. 6).

    |mu_a - mu_b|² + tr(C_a + C_b - 2 (C_a C_b)^½); the trace of the root is the sum of the roots of C_a C_b's
    eigenvalues, which are real and not negative because both factors are positive semi-definite.
    """
    mean_a, mean_b = features_a.mean(0), features_b.mean(0)
    cov_a, cov_b = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (features_a, features_b))
    root_trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace)


@dataclass(frozen=True)
class Resampled:
    """A distance of a set of images, and those of its resamples, which draw the same places of every set of as many.

    Its interval is ± 1.96 standard deviations of these, not their percentiles: resampling repeats images, which alone
    raises a distance. For the same reason, compare distances of equally many images only.
    """

    value: float
    draws: np.ndarray
    """[RESAMPLES]; empty where an interval would say nothing, or takes too long."""

    def estimate(self) -> Estimate:
        made = _plus_minus(self.value, self.draws)
        return made if made.low is None else replace(made, low=max(0.0, made.low))

    def minus(self, first: "Resampled") -> Estimate:
        """The difference to another set, of the same prompts and noise."""
        return _plus_minus(self.value - first.value, self.draws - first.draws)


@dataclass(frozen=True)
class PerPrompt:
    """What is measured of each prompt's images, [P]."""

    values: np.ndarray

    def estimate(self) -> Estimate:
        return mean_estimate(self.values)

    def minus(self, first: "PerPrompt") -> Estimate:
        """The difference to another set, of the same prompts and noise."""
        return paired_difference(first.values, self.values)


def frechet(features: np.ndarray, reference: np.ndarray, *, seed: int = 0) -> Resampled:
    """Fréchet distance to a reference."""
    value = frechet_distance(features, reference)
    if features.shape[1] > MAX_RESAMPLED_WIDTH or len(features) < MIN_CLUSTERS:
        return Resampled(value, np.zeros(0))
    rng = np.random.default_rng(seed)
    draws = [features[rng.integers(len(features), size=len(features))] for _ in range(RESAMPLES)]
    return Resampled(value, np.array([frechet_distance(draw, reference) for draw in draws]))


def mmd(features: np.ndarray, reference: np.ndarray, *, seed: int = 0) -> Resampled:
    """Squared maximum mean discrepancy to a reference, × 1000.

    CMMD's estimator (Jayasumana et al. 2024, eq. 4, and their published code): Gaussian kernel of width 10 on
    normalised features, means over all pairs, an image with itself included.

    Args:
        features, reference: [N, D] and [M, D], each row of length 1.
    """
    count = len(features)
    even = np.full((1, count), 1 / count)
    drawn = (
        np.random.default_rng(seed).multinomial(count, even[0], size=RESAMPLES if count >= MIN_CLUSTERS else 0) / count
    )
    weights = np.concatenate([even, drawn])  # a row for the value, and one for each draw
    of_reference = sum(_kernel(part, reference).sum() for part in _blocks(reference)) / len(reference) ** 2
    within, across = np.zeros(len(weights)), np.zeros(len(weights))
    for part, own in zip(_blocks(features), _blocks(weights.T), strict=True):
        within += np.einsum("bd,bd->d", own, _kernel(part, features) @ weights.T)
        across += own.T @ _kernel(part, reference).mean(1)
    values = MMD_SCALE * (within + of_reference - 2 * across)
    return Resampled(float(values[0]), values[1:])


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    """So that a kernel of tens of thousands of images need not be in memory whole."""
    return [rows[first : first + BLOCK] for first in range(0, len(rows), BLOCK)]


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(-|a_i - b_j|² / 2 sigma²), [N, M]."""
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    return np.exp(-squared / (2 * MMD_SIGMA**2))


def _plus_minus(value: float, draws: np.ndarray) -> Estimate:
    if not len(draws):
        return Estimate(value)
    spread = Z_95 * float(np.std(draws))
    return Estimate(value, value - spread, value + spread)


def diversity(features: np.ndarray, prompts: Sequence[Hashable]) -> PerPrompt:
    """How unlike each other one prompt's images are: 1 - cosine of their features, over all pairs.

    Args:
        features: [N, D]; prompts: of each image. Prompts with one image are left out.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    members: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(i)
    spreads = []
    for indices in members.values():
        count = len(indices)
        if count > 1:
            # sum of all cosines is |sum of unit vectors|², of which `count` are images with themselves
            total = float((unit[indices].sum(0) ** 2).sum())
            spreads.append(max(0.0, 1 - (total - count) / (count * (count - 1))))  # not -0 of rounding
    return PerPrompt(np.array(spreads))


def mean_of_prompts(values: np.ndarray, prompts: Sequence[Hashable]) -> PerPrompt:
    """A statistic of images [N], its mean over those of each prompt."""
    members: dict[Hashable, list[float]] = {}
    for prompt, value in zip(prompts, values.tolist(), strict=True):
        members.setdefault(prompt, []).append(value)
    return PerPrompt(np.array([np.mean(of_prompt) for of_prompt in members.values()]))
