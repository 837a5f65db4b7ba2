import numpy as np
import pytest
from scipy.stats import permutation_test

from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.stats.paired import paired_test, sign_flip_p


def answers(win_rate, lose_rate, num_models=1, seed=0):
    """float[I, M] differences of 10,000 paired answers in M comparisons, by image.

    One to five answers an image; with a chance of 0.2 an answer fares like a drawn other one of
    its image, so the answers of an image are alike.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, size=5000)
    image = np.repeat(np.arange(5000), sizes)[:10_000]
    shared = rng.random((5000, num_models))[image]
    alike = rng.random((10_000, num_models)) < 0.2
    fate = np.where(alike, shared, rng.random((10_000, num_models)))
    difference = (fate < win_rate).astype(float) - (fate > 1 - lose_rate)
    by_image = np.zeros((5000, num_models))
    np.add.at(by_image, image, difference)
    return by_image / 10_000


def rejected(p_values):
    return float((p_values < 0.05).mean())


# `win_rate` and `lose_rate`: two Qwen2.5-VL checkpoints of one training run on RefCOCO val differ
# on 5.3 % of the answers (3.2 % to 2.1 %), an untrained and a trained one on RefCOCOg on 10.2 %
@pytest.mark.parametrize(
    ("win_rate", "lose_rate", "least_power"),
    [(0.032, 0.022, 0.95), (0.056, 0.046, 0.80)],
    ids=["one run", "two models"],
)
def test_a_difference_of_one_point_on_10k_answers_is_found(win_rate, lose_rate, least_power):
    p_values = sign_flip_p(answers(win_rate, lose_rate, num_models=300), samples=1000)
    assert rejected(p_values) >= least_power  # measured: 0.98 and 0.85


def test_without_a_difference_one_in_twenty_is_called_one():
    p_values = sign_flip_p(answers(0.05, 0.05, num_models=1000), samples=1000)
    assert 0.03 <= rejected(p_values) <= 0.07  # 0.05 +- 3 standard errors of 1000 comparisons


@pytest.mark.parametrize("num_images", [3, 8])
def test_the_p_value_equals_the_exact_test_of_scipy(num_images):
    contributions = np.random.default_rng(num_images).integers(-2, 4, size=num_images) + 0.5
    exact = permutation_test(
        (contributions,), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    actual = sign_flip_p(contributions[:, None], samples=20_000)[0]
    # standard error of 20,000 signs is at most 0.0036; `>` in place of `>=` is off by 0.04 and more
    assert actual == pytest.approx(exact.pvalue, abs=0.012)


def test_images_are_swapped_whole():
    """20 images of 50 alike answers are 20 observations, not 1000."""
    image_ids = [f"i{index // 50}" for index in range(1000)]
    ones, zeros = np.ones(50), np.zeros(50)
    a = QueryScores(np.concatenate([ones, zeros] * 7 + [zeros] * 6), image_ids)
    b = QueryScores(np.concatenate([zeros, ones] * 5 + [zeros] * 10), image_ids)
    result = paired_test(a, b)
    assert (result.wins, result.losses) == (350, 250)
    assert result.p_value > 0.5 and result.mcnemar_p < 1e-3


def test_a_macro_average_is_compared_as_a_macro_average():
    """One rare class decides although micro there is no difference."""
    image_ids = [f"i{index}" for index in range(200)]
    groups = ["rare"] * 20 + ["common"] * 180
    a = QueryScores(np.array([1.0] * 20 + [0.0] * 20 + [1.0] * 160), image_ids, groups)
    b = QueryScores(np.array([0.0] * 20 + [1.0] * 180), image_ids, groups)
    assert paired_test(a, b).p_value < 0.01
    assert paired_test(a, b).mcnemar_p is None
    micro = [QueryScores(scores.values, image_ids) for scores in (a, b)]
    assert paired_test(*micro).p_value == 1


def test_equal_models_do_not_differ():
    scores = QueryScores(np.array([0.0, 1.0, 0.3]), list("abc"))
    result = paired_test(scores, scores)
    assert (result.p_value, result.wins, result.losses, result.mcnemar_p) == (1, 0, 0, None)
    right = QueryScores(np.ones(3), list("abc"))
    assert paired_test(right, right).mcnemar_p == 1


def test_the_queries_must_be_the_same():
    a, b = QueryScores(np.ones(2), ["a", "b"]), QueryScores(np.ones(2), ["b", "a"])
    with pytest.raises(ValueError, match="same queries in the same order"):
        paired_test(a, b)
