import numpy as np
import pytest
from scipy import stats

from prx_post.evaluation import distances
from prx_post.evaluation.distances import diversity, frechet, frechet_distance, mean_of_prompts, mmd
from prx_post.evaluation.metrics import Estimate, mean_estimate, paired_difference, wilson_interval, win_rate


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


def test_frechet_interval_contains_the_value_and_shrinks_with_more_images():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(1000, 4))
    few, many = (frechet(rng.normal(0.5, 1, size=(n, 4)), reference).estimate() for n in (100, 4000))
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
    # 10 clusters of three 0s and 10 of one 4: the mean of scores is 40/40, that of cluster means would be 2
    scores = np.array([0.0] * 30 + [4.0] * 10)
    clusters = [i // 3 for i in range(30)] + list(range(10, 20))
    estimate = mean_estimate(scores, clusters)
    assert estimate.value == 1.0
    assert estimate.low < 0.6
    assert 1.5 < estimate.high < 2.5


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, size=200)
    difference = paired_difference(hard, hard + 1 + rng.normal(0, 0.1, size=200))
    assert difference.low > 0.97
    assert difference.high < 1.03
    with pytest.raises(ValueError, match="one shape"):
        paired_difference(hard, hard[:-1])


def test_fewer_than_ten_clusters_get_no_interval():
    scores = np.arange(27.0)
    for count in (1, 9):
        clusters = [i % count for i in range(27)]
        assert mean_estimate(scores, clusters) == Estimate(13.0)
        assert paired_difference(scores, scores + 1, clusters) == Estimate(1.0)
        assert win_rate(scores, scores + 1, clusters) == Estimate(1.0)
    assert mean_estimate(scores, [i % 10 for i in range(27)]).low is not None
    assert not Estimate(1.0).is_significant
    assert Estimate(1.0).text() == "1.000"


@pytest.mark.parametrize(("wins", "of"), [(0, 20), (7, 10), (50, 50), (123, 400)])
def test_wilsons_interval_is_scipys(wins, of):
    expected = stats.binomtest(wins, of).proportion_ci(method="wilson")
    assert wilson_interval(wins / of, of) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_tie_is_half_a_win():
    first, second = np.zeros(40), np.array([1.0] * 20 + [0.0] * 10 + [-1.0] * 10)
    estimate = win_rate(first, second)
    assert estimate.value == 25 / 40
    independent = stats.binomtest(25, 40).proportion_ci(method="wilson")
    assert (estimate.low, estimate.high) == pytest.approx((independent.low, independent.high), abs=1e-3)
    assert win_rate(second, first).value == pytest.approx(1 - estimate.value)


def test_wins_of_clusters_that_always_agree_count_once():
    # 40 clusters of 6 pairs, all six won or lost together: the variance, and so Wilson's width, of 40 pairs
    rng = np.random.default_rng(0)
    won = rng.random(40) < 0.6
    first, second = np.zeros(240), np.repeat(np.where(won, 1.0, -1.0), 6)
    clustered = win_rate(first, second, [i for i in range(40) for _ in range(6)])
    alone = win_rate(np.zeros(40), np.where(won, 1.0, -1.0))
    assert clustered.value == pytest.approx(alone.value)
    assert clustered.low == pytest.approx(alone.low, abs=0.01)
    assert clustered.high == pytest.approx(alone.high, abs=0.01)
    assert win_rate(first, np.ones(240), [i // 6 for i in range(240)]).low == pytest.approx(wilson_interval(1.0, 40)[0])


def unit_rows(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_mmd_is_the_double_sum_of_its_definition():
    rng = np.random.default_rng(0)
    a, b = unit_rows(rng.normal(size=(12, 5))), unit_rows(rng.normal(0.5, 1, size=(15, 5)))

    def mean_kernel(x, y):
        total = 0.0
        for row in x:
            for other in y:
                total += np.exp(-sum((p - q) ** 2 for p, q in zip(row, other, strict=True)) / 200)
        return total / (len(x) * len(y))

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    estimate = mmd(a, b).estimate()
    assert estimate.value == pytest.approx(expected, rel=1e-6)
    assert estimate.low < estimate.value < estimate.high
    assert mmd(a, a).value == pytest.approx(0.0, abs=1e-9)


def test_mmd_of_two_opposite_points_by_hand():
    # |a - b|² = 4, so 1000·(1 + 1 - 2·exp(-4/200)) = 2000·(1 - exp(-0.02)) = 39.6027
    assert mmd(np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]])).value == pytest.approx(39.6027, abs=1e-3)


def test_diversity_is_the_mean_cosine_distance_within_a_prompt():
    # prompt a: 0° and 90° (distance 1); b: 0°, 180°, 0° (pairs 2, 0, 2: mean 4/3); c has one image
    features = np.array([[1, 0], [0, 2], [1, 0], [-3, 0], [1, 0], [0, 1]], float)
    assert diversity(features, ["a", "a", "b", "b", "b", "c"]).estimate().value == pytest.approx((1 + 4 / 3) / 2)
    assert diversity(np.ones((6, 2)), ["a", "a", "b", "b", "b", "c"]).estimate().value == pytest.approx(0.0, abs=1e-12)


def test_a_statistic_is_averaged_within_a_prompt_first():
    found = mean_of_prompts(np.array([1.0, 3.0, 8.0]), ["a", "a", "b"])
    assert found.values.tolist() == [2.0, 8.0]
    assert found.estimate().value == 5.0
    assert found.minus(mean_of_prompts(np.array([1.0, 1.0, 2.0]), ["a", "a", "b"])).value == 3.5


def test_wide_features_get_a_distance_without_an_interval():
    rng = np.random.default_rng(0)
    estimate = frechet(rng.normal(size=(20, 600)), rng.normal(size=(20, 600))).estimate()
    assert estimate.low is None


def test_mmd_in_blocks_is_mmd_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(25, 4)), rng.normal(size=(18, 4))
    whole = mmd(a, b).estimate()
    monkeypatch.setattr(distances, "BLOCK", 7)
    parts = mmd(a, b).estimate()
    assert [parts.value, parts.low, parts.high] == pytest.approx([whole.value, whole.low, whole.high], rel=1e-9)
    assert whole.low < whole.value < whole.high
