import numpy as np
import pytest

from cloc_mllm.evaluation.stats.bootstrap import (
    Bootstrap,
    QueryScores,
    bootstrap_interval,
    difference_interval,
    group_intervals,
)


def random_scores(num_images=40, per_image=5, groups=False, seed=0):
    rng = np.random.default_rng(seed)
    image_ids = [f"i{index}" for index in range(num_images) for _ in range(per_image)]
    values = (rng.random(len(image_ids)) < 0.4).astype(float)
    names = [f"c{value}" for value in rng.integers(4, size=len(image_ids))] if groups else None
    return QueryScores(values, image_ids, names)


def naive_mean(values, groups):
    if groups is None:
        return sum(values) / len(values)
    by_group = {}
    for value, group in zip(values, groups, strict=True):
        by_group.setdefault(group, []).append(value)
    return sum(sum(v) / len(v) for v in by_group.values()) / len(by_group)


@pytest.mark.parametrize("groups", [False, True], ids=["micro", "macro"])
def test_interval_equals_a_naive_bootstrap_over_images(groups):
    scores = random_scores(groups=groups)
    samples = 2000
    rng = np.random.default_rng(1)
    images = np.unique(scores.image_ids)
    members = {image: np.flatnonzero(np.array(scores.image_ids) == image) for image in images}
    means = []
    for _ in range(samples):
        chosen = np.concatenate([members[image] for image in rng.choice(images, len(images))])
        names = None if scores.groups is None else [scores.groups[index] for index in chosen]
        means.append(naive_mean(scores.values[chosen], names))
    actual = bootstrap_interval(scores, Bootstrap(samples, 2))
    assert actual.value == pytest.approx(naive_mean(scores.values, scores.groups))
    # two independent bootstraps of 2000 samples differ by at most 0.007 here over 20 seeds; a
    # bootstrap over queries of a clustered sample is off by 0.05 and more (test below)
    np.testing.assert_allclose(
        (actual.ci_low, actual.ci_high), np.quantile(means, [0.025, 0.975]), atol=0.01
    )
    assert (actual.n, actual.n_images) == (200, 40)


def test_queries_of_one_image_count_as_one_cluster():
    values = np.repeat([0.0, 1.0] * 10, 50)
    clustered = QueryScores(values, [f"i{index // 50}" for index in range(1000)])
    independent = QueryScores(values, [f"i{index}" for index in range(1000)])
    wide, narrow = bootstrap_interval(clustered), bootstrap_interval(independent)
    assert wide.ci_high - wide.ci_low > 5 * (narrow.ci_high - narrow.ci_low)


@pytest.mark.parametrize(
    ("num_images", "least"),
    [(20, 0.90), (50, 0.92), (100, 0.93), (300, 0.93)],  # few images give too narrow intervals
)
def test_95_of_100_intervals_hold_the_truth(num_images, least):
    """2000 simulated benchmarks of 1 to 12 queries an image, images of unequal difficulty.

    Each is a group, so all of them are one call. Resampling queries in place of images covers
    0.75 here.
    """
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(num_images), rng.integers(1, 13, size=num_images))
    truth, num_benchmarks = 0.7, 2000
    rate = rng.beta(3 * truth, 3 * (1 - truth), size=(num_benchmarks, num_images))
    right = rng.random((num_benchmarks, len(image))) < rate[:, image]
    scores = QueryScores(
        right.astype(float).ravel(),
        np.tile(image, num_benchmarks),
        np.repeat(np.arange(num_benchmarks), len(image)),
    )
    intervals = group_intervals(scores).values()
    coverage = np.mean([entry.ci_low <= truth <= entry.ci_high for entry in intervals])
    assert least <= coverage <= 0.97


def test_interval_of_a_group_is_that_of_its_queries():
    scores = random_scores(groups=True)
    for name, actual in group_intervals(scores, Bootstrap(500)).items():
        chosen = np.flatnonzero(np.array(scores.groups) == name)
        images = [scores.image_ids[index] for index in chosen]
        expected = bootstrap_interval(QueryScores(scores.values[chosen], images), Bootstrap(500))
        assert (actual.value, actual.n, actual.n_images) == pytest.approx(
            (expected.value, expected.n, expected.n_images)
        )
        # other resamples of the images, of which some hold none of the group
        assert actual.ci_low == pytest.approx(expected.ci_low, abs=0.05)
        assert actual.ci_high == pytest.approx(expected.ci_high, abs=0.05)
    whole = QueryScores(scores.values, scores.image_ids, ["all"] * len(scores.values))
    assert group_intervals(whole)["all"] == bootstrap_interval(whole)


def test_perfect_scores_have_no_width():
    interval = bootstrap_interval(QueryScores(np.ones(6), list("aabbcc"), list("xyxyxy")))
    assert (interval.value, interval.ci_low, interval.ci_high) == (1.0, 1.0, 1.0)


def test_the_same_seed_gives_the_same_interval():
    scores = random_scores()
    assert bootstrap_interval(scores, Bootstrap(seed=3)) == bootstrap_interval(
        scores, Bootstrap(seed=3)
    )
    assert bootstrap_interval(scores, Bootstrap(seed=3)) != bootstrap_interval(
        scores, Bootstrap(seed=4)
    )


def test_paired_difference_is_sharper_than_two_intervals():
    a = random_scores(seed=1)
    worse = a.values.copy()
    worse[np.flatnonzero(worse)[:10]] = 0
    b = QueryScores(worse, a.image_ids)
    difference = difference_interval(a, b)
    assert difference.value == pytest.approx(a.mean() - b.mean()) == pytest.approx(10 / 200)
    assert difference.ci_low > 0
    assert bootstrap_interval(a).ci_low < bootstrap_interval(b).ci_high  # these overlap


def test_difference_needs_the_same_queries():
    a = QueryScores(np.ones(2), ["a", "b"])
    with pytest.raises(ValueError, match="same queries"):
        difference_interval(a, QueryScores(np.ones(2), ["a", "c"]))
    with pytest.raises(ValueError, match="same queries"):
        difference_interval(a, QueryScores(np.ones(2), ["a", "b"], ["x", "y"]))


def test_scores_need_queries_of_equal_length():
    with pytest.raises(ValueError, match="one value, image and group per query"):
        QueryScores(np.ones(2), ["a"])
    with pytest.raises(ValueError, match="one value, image and group per query"):
        QueryScores(np.ones(0), [])
