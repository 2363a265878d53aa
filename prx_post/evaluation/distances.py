"""Distances between two sets of images, from their features; and the diversity within one.

FID, CMMD and DINO-MMD are the three that PRX's makers report of their models. What differs is the encoder and, of the
first, the distance: see docs/evaluation.md.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from prx_post.evaluation.metrics import MIN_CLUSTERS, Z_95, Estimate, mean_estimate

RESAMPLES = 100
MAX_RESAMPLED_WIDTH = 512
"""Wider features (InceptionV3's 2,048) get a Fréchet distance without an interval: each resample would take seconds."""
MMD_SIGMA, MMD_SCALE = 10.0, 1000.0


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """FID's distance between Gaussians fitted to two sets of features, [N, D] and [M, D] (Heusel et al. 2017, eq. 6).

    |mu_a - mu_b|² + tr(C_a + C_b - 2 (C_a C_b)^½); the trace of the root is the sum of the roots of C_a C_b's
    eigenvalues, which are real and not negative because both factors are positive semi-definite.
    """
    mean_a, mean_b = features_a.mean(0), features_b.mean(0)
    cov_a, cov_b = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (features_a, features_b))
    root_trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace)


def frechet_estimate(features: np.ndarray, reference: np.ndarray, *, seed: int = 0) -> Estimate:
    """Fréchet distance to a reference, ± 1.96 bootstrap standard deviations.

    Not the percentile interval: resampling repeats images, which alone raises the distance. For the same reason,
    compare distances of equally many images only.
    """
    value = frechet_distance(features, reference)
    if features.shape[1] > MAX_RESAMPLED_WIDTH or len(features) < MIN_CLUSTERS:
        return Estimate(value)
    rng = np.random.default_rng(seed)
    draws = [features[rng.integers(len(features), size=len(features))] for _ in range(RESAMPLES)]
    return _plus_minus(value, [frechet_distance(draw, reference) for draw in draws])


def mmd_estimate(features: np.ndarray, reference: np.ndarray, *, seed: int = 0) -> Estimate:
    """Squared maximum mean discrepancy to a reference, × 1000, ± 1.96 bootstrap standard deviations.

    CMMD's estimator (Jayasumana et al. 2024, eq. 4, and their published code): Gaussian kernel of width 10 on
    normalised features, means over all pairs, an image with itself included.

    Args:
        features, reference: [N, D] and [M, D], each row of length 1.
    """
    within, across = _kernel(features, features), _kernel(features, reference).mean(1)
    of_reference = _kernel(reference, reference).mean()

    def distance(weights: np.ndarray) -> float:
        return MMD_SCALE * float(weights @ within @ weights + of_reference - 2 * weights @ across)

    count = len(features)
    value = distance(np.full(count, 1 / count))
    if count < MIN_CLUSTERS:
        return Estimate(value)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
    return _plus_minus(value, [distance(weights) for weights in draws])


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(-|a_i - b_j|² / 2 sigma²), [N, M]."""
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    return np.exp(-squared / (2 * MMD_SIGMA**2))


def _plus_minus(value: float, draws: Sequence[float]) -> Estimate:
    spread = Z_95 * float(np.std(draws))
    return Estimate(value, max(0.0, value - spread), value + spread)


def diversity(features: np.ndarray, prompts: Sequence[Hashable]) -> Estimate:
    """How unlike each other one prompt's images are: 1 - cosine of their features, over all pairs, then prompts.

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
            spreads.append(1 - (total - count) / (count * (count - 1)))
    return mean_estimate(np.array(spreads))
