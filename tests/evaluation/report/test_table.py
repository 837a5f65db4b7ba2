import pytest

from cloc_mllm.evaluation.report.table import metric_title


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        ("acc_at_0_5/size", "Acc@0.5, size"),
        ("r_at_10", "R@10"),
        ("macro_acc", "macro accuracy"),
        ("new_metric", "new_metric"),
    ],
)
def test_metric_titles(metric, title):
    assert metric_title(metric) == title
