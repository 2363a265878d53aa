"""Statistics of scores: means, paired differences and win rates, with intervals. Pure numpy.

Scores come in clusters (a number asked for in six forms, a prompt with several seeds). Images of a cluster
share what makes it hard, so intervals resample whole clusters, and none is given for fewer than MIN_CLUSTERS.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
MIN_CLUSTERS = 10
"""With fewer, resampling clusters gives intervals that are clearly too narrow."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, or without one where too little is known for it."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, sign: str = "") -> str:
        """As `0.817 [0.764, 0.869]`, or the value alone where there is no interval. `sign`: of a number format."""
        if self.low is None or self.high is None:
            return f"{self.value:{sign}.3f}"
        return f"{self.value:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"

    @property
    def is_significant(self) -> bool:
        """Of a difference: whether 0 lies outside its interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_estimate(
    scores: np.ndarray, clusters: Sequence[Hashable] | None = None, *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of scores [N] with the percentile bootstrap's interval over clusters.

    Scores of 0 and 1 without clusters, or with one score in each, get Wilson's interval.
    """
    clusters = range(len(scores)) if clusters is None else clusters
    value, count = float(scores.mean()), len(set(clusters))
    if count < MIN_CLUSTERS:
        return Estimate(value)
    if count == len(scores) and np.isin(scores, (0.0, 1.0)).all():
        return Estimate(value, *wilson_interval(value, count))
    low, high = np.percentile(_bootstrap_means(scores, clusters, resamples, seed), (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def wilson_interval(fraction: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction out of `count` independent trials (Wilson 1927)."""
    z2 = Z_95**2 / count
    half = Z_95 * np.sqrt(fraction * (1 - fraction) / count + z2 / (4 * count))
    centre = fraction + z2 / 2
    return max(0.0, float((centre - half) / (1 + z2))), min(1.0, float((centre + half) / (1 + z2)))


def win_rate(first: np.ndarray, second: np.ndarray, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Fraction of pairs in which `second` scores higher, a tie counting half, with Wilson's interval.

    Args:
        first, second: scores [N] of the same prompts and seeds, in the same order.
    """
    _require_pairs(first, second)
    return win_fraction((second > first) + 0.5 * (second == first), clusters)


def win_fraction(wins: np.ndarray, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Mean of wins [N] in [0, 1] with Wilson's interval.

    Wilson's number of trials is that of the pairs, divided by the design effect of their clusters (Kish 1965): the
    variance of the fraction over clusters against that of independent pairs.
    """
    fraction, number = float(wins.mean()), len(wins)
    clusters = range(number) if clusters is None else clusters
    sums, counts = _cluster_sums(wins, clusters)
    if len(sums) < MIN_CLUSTERS:
        return Estimate(fraction)
    variance = ((sums - fraction * counts) ** 2).sum() / number**2 * len(sums) / (len(sums) - 1)
    trials = min(number, fraction * (1 - fraction) / variance) if variance > 0 else len(sums)
    return Estimate(fraction, *wilson_interval(fraction, trials))


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
    _require_pairs(first, second)
    difference = second - first
    clusters = range(len(difference)) if clusters is None else clusters
    if len(set(clusters)) < MIN_CLUSTERS:
        return Estimate(float(difference.mean()))
    low, high = np.percentile(_bootstrap_means(difference, clusters, resamples, seed), (2.5, 97.5))
    return Estimate(float(difference.mean()), float(low), float(high))


def _require_pairs(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape:
        raise ValueError(f"paired scores must have one shape, not {first.shape} and {second.shape}")


def _cluster_sums(values: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster."""
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    of_value = [number[cluster] for cluster in clusters]
    return np.bincount(of_value, weights=values), np.bincount(of_value)


def _bootstrap_means(values: np.ndarray, clusters: Sequence[Hashable], resamples: int, seed: int) -> np.ndarray:
    """Means of `resamples` draws of clusters with replacement, each cluster whole."""
    sums, counts = _cluster_sums(values, clusters)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    return sums[drawn].sum(1) / counts[drawn].sum(1)
