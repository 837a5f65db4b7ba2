import pytest

from cloc_mllm.data.records import Region
from cloc_mllm.evaluation.tasks import rec
from tests.evaluation.helpers import LEFT, RIGHT, means, pair, query_sets, record

BOX, OTHER = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)


def test_rec_breaks_down_by_kind():
    pairs = [
        pair({"boxes": [BOX]}, boxes=[BOX], kind="size"),
        pair({"boxes": [OTHER]}, boxes=[BOX], kind="size"),
        pair({"boxes": [(0.1, 0.1, 0.5, 0.4)]}, boxes=[BOX], kind="unique", image_id="i2"),
    ]
    assert means(rec.score(pairs)) == pytest.approx(
        {
            "acc_at_0_5": 2 / 3,
            "acc_at_0_7": 2 / 3,
            "acc_at_0_9": 1 / 3,
            "mean_iou": 1.75 / 3,
            "acc_at_0_5/size": 1 / 2,
            "acc_at_0_5/unique": 1,
        }
    )
    assert rec.score(pairs)["acc_at_0_5/unique"].image_ids == ["i2"]


def test_every_expression_of_every_region_is_asked():
    regions = [
        Region(LEFT, "bowl", expressions=["bowl", "white bowl", "bowl"]),
        Region(RIGHT, "bowl", expressions=["bowl"]),
    ]
    (asked,) = query_sets(rec.Rec(), [record("p0", regions, source="refcoco")])
    assert [(row.labels[0], row.boxes, row.kind) for row in asked.references] == [
        ("bowl", [LEFT], "refcoco"),
        ("white bowl", [LEFT], "refcoco"),
        ("bowl", [LEFT], "refcoco"),
        ("bowl", [RIGHT], "refcoco"),
    ]
    assert [(query.id, query.text) for query in asked.queries] == [
        (f"rec/p0/{number}", text)
        for number, text in enumerate(["bowl", "white bowl", "bowl", "bowl"])
    ]
    assert (asked.answer, asked.answered_by) == ("box", "mllm")
