import numpy as np
import pytest

from cloc_mllm.evaluation.tasks import referring
from tests.evaluation.helpers import pair


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red crab.", "red crab"),
        ("  a   CRAB! ", "crab"),
        ("an", "an"),
        ("theatre", "theatre"),
        ("t-shirt", "t shirt"),
        ("...", ""),
    ],
)
def test_normalise(text, expected):
    assert referring.normalise(text) == expected


def test_referring_takes_any_phrase_and_no_substring():
    pairs = [
        pair({"raw_text": "A crab."}, labels=["lobster", "the crab"]),
        pair({"raw_text": "cat"}, labels=["catalog"]),
        pair({"raw_text": "red crab"}, labels=["crab"]),
        pair({"raw_text": "crab", "failure": "too_long"}, labels=["crab"]),
        pair({"raw_text": " . "}, labels=["crab"]),
    ]
    scores = referring.score(pairs)
    np.testing.assert_allclose(scores["exact_match"].values, [1, 0, 0, 0, 0])
    np.testing.assert_allclose(scores["word_f1"].values, [1, 0, 2 / 3, 0, 0])
    assert [referring.is_failure(item) for item in pairs] == [False] * 3 + [True] * 2
