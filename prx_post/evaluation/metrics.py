"""Statistics of an evaluation: intervals, paired differences, Fréchet distance. Pure numpy and scipy.

Scores come in clusters (a number asked for in six forms, a prompt drawn from several seeds). Pictures of a cluster
share what makes it hard, so intervals resample whole clusters.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def mean_estimate(
    scores: np.ndarray, clusters: Sequence[Hashable] | None = None, *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of scores [N] with the percentile bootstrap's interval over clusters.

    Scores of 0 and 1 without clusters, or with one score in each, get Wilson's interval.
    """
    clusters = range(len(scores)) if clusters is None else clusters
    value = float(scores.mean())
    if len(set(clusters)) == len(scores) and np.isin(scores, (0.0, 1.0)).all():
        interval = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(method="wilson")
        return Estimate(value, float(interval.low), float(interval.high))
    low, high = np.percentile(_bootstrap_means(scores, clusters, resamples, seed), (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of second - first, with the percentile bootstrap's interval over clusters of pairs.

    Args:
        first, second: scores [N] of the same prompts and seeds, in the same order.
    """
    if first.shape != second.shape:
        raise ValueError(f"paired scores must have one shape, not {first.shape} and {second.shape}")
    difference = second - first
    clusters = range(len(difference)) if clusters is None else clusters
    low, high = np.percentile(_bootstrap_means(difference, clusters, resamples, seed), (2.5, 97.5))
    return Estimate(float(difference.mean()), float(low), float(high))


def _bootstrap_means(values: np.ndarray, clusters: Sequence[Hashable], resamples: int, seed: int) -> np.ndarray:
    """Means of `resamples` draws of clusters with replacement, each cluster whole."""
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    of_value = [number[cluster] for cluster in clusters]
    sums, counts = np.bincount(of_value, weights=values), np.bincount(of_value)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    return sums[drawn].sum(1) / counts[drawn].sum(1)


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """FID's distance between Gaussians fitted to two sets of features, [N, D] and [M, D] (Heusel et al. 2017, eq. 6).

    |mu_a - mu_b|² + tr(C_a + C_b - 2 (C_a C_b)^½); the trace of the root is the sum of the roots of C_a C_b's
    eigenvalues, which are real and not negative because both factors are positive semi-definite.
    """
    mean_a, mean_b = features_a.mean(0), features_b.mean(0)
    cov_a, cov_b = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (features_a, features_b))
    root_trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace)


def frechet_estimate(features: np.ndarray, reference: np.ndarray, *, resamples: int = 100, seed: int = 0) -> Estimate:
    """Fréchet distance to a reference, ± 1.96 bootstrap standard deviations.

    Not the percentile interval: resampling repeats pictures, which alone raises the distance. For the same reason,
    compare distances of equally many pictures only.
    """
    value = frechet_distance(features, reference)
    rng = np.random.default_rng(seed)
    draws = [features[rng.integers(len(features), size=len(features))] for _ in range(resamples)]
    spread = Z_95 * float(np.std([frechet_distance(draw, reference) for draw in draws]))
    return Estimate(value, max(0.0, value - spread), value + spread)
