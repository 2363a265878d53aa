import numpy as np
import pytest

from prx_post.evaluation.metrics import frechet_distance, frechet_estimate, mean_estimate, paired_difference


def test_frechet_distance_of_two_lines_by_hand():
    # a: mean 0, variance 2 (values ±1, n - 1 = 1); b: mean 3, variance 8 (1 and 5)
    # (0 - 3)² + 2 + 8 - 2·sqrt(2·8) = 9 + 10 - 8 = 11
    a, b = np.array([[-1.0], [1.0]]), np.array([[1.0], [5.0]])
    assert frechet_distance(a, b) == pytest.approx(11.0)


def test_frechet_distance_of_rotated_gaussians_equals_the_closed_form():
    # Covariances diag(1, 4) and diag(4, 1) commute: sum of (sqrt a - sqrt b)² = 1 + 1 = 2, means equal
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 2)) * [1, 2]
    b = rng.normal(size=(200_000, 2)) * [2, 1]
    assert frechet_distance(a, b) == pytest.approx(2.0, abs=0.05)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_frechet_interval_contains_the_value_and_shrinks_with_more_pictures():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(1000, 4))
    few, many = (frechet_estimate(rng.normal(0.5, 1, size=(n, 4)), reference) for n in (100, 4000))
    assert few.low <= few.value <= few.high
    assert few.high - few.low > 3 * (many.high - many.low)


def test_shares_get_wilsons_interval():
    # Wilson, 7 of 10, z = 1.96: centre (0.7 + 0.19207)/(1 + 0.38415) = 0.64451,
    # half width 1.96/1.38415·sqrt(0.021 + 0.0096) = 0.24775
    scores = np.array([1.0] * 7 + [0.0] * 3)
    estimate = mean_estimate(scores)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.7, 0.3968, 0.8922), abs=2e-4)
    perfect = mean_estimate(np.ones(50))
    assert perfect.low < 0.94 < perfect.high == 1.0


def test_other_scores_get_an_interval_of_about_two_standard_errors():
    scores = np.random.default_rng(0).normal(5, 2, size=400)
    estimate = mean_estimate(scores)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)


def test_clusters_that_always_agree_count_once():
    # 40 numbers in 6 forms, all forms of a number right or wrong together: as wide as 40 independent scores
    rng = np.random.default_rng(0)
    numbers = rng.random(40) < 0.7
    scores, clusters = np.repeat(numbers.astype(float), 6), [i for i in range(40) for _ in range(6)]
    clustered, naive = mean_estimate(scores, clusters), mean_estimate(scores)
    assert clustered.value == naive.value
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(6**0.5, rel=0.15)
    ones = mean_estimate(numbers.astype(float), list(range(40)))
    assert (ones.high - ones.low) / (clustered.high - clustered.low) == pytest.approx(1.0, rel=0.15)


def test_clusters_of_unequal_size_weigh_by_their_scores():
    scores, clusters = np.array([0.0, 0.0, 0.0, 4.0]), ["a", "a", "a", "b"]
    estimate = mean_estimate(scores, clusters)
    assert estimate.value == 1.0  # the mean of scores, not of cluster means
    assert (estimate.low, estimate.high) == (0.0, 4.0)  # only a's drawn, only b's drawn: 1/4 of draws each


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, size=200)
    difference = paired_difference(hard, hard + 1 + rng.normal(0, 0.1, size=200))
    assert difference.low > 0.97
    assert difference.high < 1.03
    with pytest.raises(ValueError, match="one shape"):
        paired_difference(hard, hard[:-1])
