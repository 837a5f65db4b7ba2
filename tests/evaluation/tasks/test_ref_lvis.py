from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cloc_mllm.data.shapes import MASK_SIZE, polygon_mask
from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.tasks.ref_lvis import (
    RefLvis,
    class_name,
    enclosing_box,
    is_failure,
    read_choice,
    score,
)
from tests.evaluation.helpers import means, pair, query_sets

TRIANGLE = [0, 0, 50, 0, 0, 50]  # in pixels of a 100 x 50 image


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("It is a cat.", ["cat", "dog"], "cat"),
        ("CAT", ["cat", "dog"], "cat"),
        ("a catalog", ["cat", "dog"], None),
        ("a catalog", ["cat", "catalog"], "catalog"),
        ("a tomcat", ["cat", "dog"], None),
        ("a cat or a dog", ["cat", "dog"], None),
        ("It is not a cat but a dog", ["cat", "dog"], None),
        ("a bird", ["cat", "dog"], None),
        ("", ["cat", "dog"], None),
        ("an apple juice", ["apple", "apple juice"], "apple juice"),
        ("an apple", ["apple", "apple juice"], "apple"),
        ("an apple in apple juice", ["apple", "apple juice"], None),
        ("an alarm-clock", ["alarm clock", "dog"], "alarm clock"),
        ("an alarm_clock", ["alarm clock", "dog"], "alarm clock"),
        ("t.v.", ["t.v.", "dog"], "t.v."),
        ("tXvX", ["t.v.", "dog"], None),
    ],
)
def test_one_name_in_whole_words_is_a_choice(text, choices, expected) -> None:
    assert read_choice(text, choices) == expected
    assert read_choice(text, choices[::-1]) == expected


def make_pairs(*answers: str, kinds: tuple[str, ...] = ("box",)) -> list[ScoredPair]:
    """Things whose true name is cat: answers to `cat or dog`, `dog or cat`, in turn."""
    pairs = []
    for index, text in enumerate(answers):
        row_id = f"ref_lvis/{index // 2}/{kinds[index // 2 % len(kinds)]}/{index % 2}"
        choices = ["cat", "dog"] if index % 2 == 0 else ["dog", "cat"]
        pairs.append(
            pair(
                {"raw_text": text},
                query_id=row_id,
                image_id=f"i{index // 2}",
                labels=["cat"],
                choices=choices,
                kind=row_id.split("/")[2],
            )
        )
    return pairs


def test_both_orders_make_a_pair() -> None:
    pairs = make_pairs("cat", "cat", "cat", "dog", "catalog", "cat")
    actual = means(score(pairs))
    assert actual == pytest.approx(
        {
            "acc": 4 / 6,
            "pair_acc": 1 / 3,
            "first_rate": 3 / 5,
            "acc/true_first": 2 / 3,
            "acc/true_second": 2 / 3,
        }
    )
    assert [is_failure(pair) for pair in pairs] == [False] * 4 + [True, False]


def test_a_model_that_always_names_the_first_shows_its_bias() -> None:
    actual = means(score(make_pairs("cat", "dog", "cat", "dog")))
    assert (actual["acc"], actual["pair_acc"], actual["first_rate"]) == (0.5, 0, 1)
    assert (actual["acc/true_first"], actual["acc/true_second"]) == (1, 0)


def test_kinds_of_region_prompts_are_told_apart() -> None:
    actual = score(make_pairs("cat", "cat", "dog", "dog", kinds=("box", "point")))
    assert (actual["pair_acc/box"].mean(), actual["acc/point"].mean()) == (1, 0)


def test_a_thing_asked_in_one_order_is_no_pair() -> None:
    assert "pair_acc" not in score(make_pairs("cat"))


def write_annotations(path: Path, annotations: list[dict[str, Any]], num_images: int = 1) -> Path:
    images = [
        {"id": i, "width": 100, "height": 50, "coco_url": f"http://x/val2017/{i}.jpg"}
        for i in range(num_images)
    ]
    names = ["cat", "bat_(animal)", "apple_juice", "owl"]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    table = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(table))
    return path


def thing(thing_id: int, category: int, image: int = 0, **changes: Any) -> dict[str, Any]:
    row = {"bbox": [0, 0, 50, 50], "segmentation": [TRIANGLE]}
    return {"id": thing_id, "image_id": image, "category_id": category, **row, **changes}


def asked(annotations: Path, images: Path, **options: Any) -> QuerySet:
    (query_set,) = query_sets(RefLvis(annotations, images, **options))
    return query_set


def test_a_thing_is_asked_in_both_orders_and_three_kinds(tmp_path: Path, photos) -> None:
    path = write_annotations(tmp_path / "lvis.json", [thing(7, 0), thing(8, 1)])
    actual = asked(path, photos("0.jpg"))
    actual.check_coverage(allow_partial=False)
    assert [row.id for row in actual.queries[:6]] == [
        f"ref_lvis/7/{kind}/{order}" for kind in ("box", "point", "free_form") for order in (0, 1)
    ]
    assert actual.queries[0].text == "Is the object <region> a cat or a bat?"
    assert actual.queries[1].text == "Is the object <region> a bat or a cat?"
    assert actual.queries[6].text == "Is the object <region> a bat or a cat?"
    first, second = actual.references[:2]
    assert first.labels == second.labels == ["cat"]
    assert (first.choices, second.choices) == (["cat", "bat"], ["bat", "cat"])
    assert first.boxes == [pytest.approx((0, 0, 0.5, 1))]
    assert (first.width, first.height, first.kind) == (100, 50, "box")


def test_shapes_lie_on_the_thing_and_are_enclosed(tmp_path: Path, photos) -> None:
    things = [thing(i, i % 2) for i in range(40)]
    path = write_annotations(tmp_path / "lvis.json", things)
    actual = asked(path, photos("0.jpg"))
    mask = polygon_mask([(0, 0), (0.5, 0), (0, 1)])
    points = [row for row in actual.queries if "/point/" in row.id]
    for row in points:
        (box,) = row.boxes
        assert box[2] - box[0] == box[3] - box[1] == 1 / MASK_SIZE
        assert mask[int(box[1] * MASK_SIZE), int(box[0] * MASK_SIZE)] == 1
        assert row.region_prompt == "point on the thing, as its enclosing box"
    assert len({row.boxes for row in points}) > 20
    scribbles = [row.boxes[0] for row in actual.queries if "/free_form/" in row.id]
    assert all(0 <= x1 < x2 <= 0.53 and y2 <= 1 for x1, _, x2, y2 in scribbles)
    assert actual.queries == asked(path, photos("0.jpg")).queries
    assert actual.queries != asked(path, photos("0.jpg"), draw_seed=1).queries


def test_without_polygons_shapes_are_drawn_in_the_box(tmp_path: Path, photos) -> None:
    things = [thing(1, 0, segmentation={"counts": [1]}), thing(2, 1, segmentation=[])]
    path = write_annotations(tmp_path / "lvis.json", things)
    boxes = [row.boxes[0] for row in asked(path, photos("0.jpg")).queries]
    assert all(x2 <= 0.53 for _, _, x2, _ in boxes)


def test_the_distractor_is_of_the_image_if_it_can_be(tmp_path: Path, photos) -> None:
    things = [thing(1, 0), thing(2, 0), thing(3, 2), *(thing(i, 3, image=1) for i in range(4, 9))]
    path = write_annotations(tmp_path / "lvis.json", things, num_images=2)
    actual = asked(path, photos("0.jpg", "1.jpg"), kinds=["box"])
    offered = {row.id.split("/")[1]: set(row.choices) for row in actual.references}
    assert offered["1"] == offered["2"] == offered["3"] == {"cat", "apple juice"}
    alone = [offered[str(i)] - {"owl"} for i in range(4, 9)]
    assert set.union(*alone) == {"cat", "apple juice"}
    assert "an owl" in actual.queries[-1].text
    assert [row.num_distractors for row in actual.references[::2]] == [1, 1, 0, 4, 4, 4, 4, 4]


def test_things_that_cannot_be_asked_are_none(tmp_path: Path, photos) -> None:
    broken = [
        thing(2, 1, iscrowd=1),
        thing(3, 1, bbox=[0, 0, 0, 10]),
        thing(4, 1, bbox=None),
        thing(5, 99),
        thing(6, 1, image=99),
    ]
    path = write_annotations(tmp_path / "lvis.json", [thing(0, 0), thing(1, 1), *broken])
    actual = asked(path, photos("0.jpg"), kinds=["box"])
    assert str(actual.coverage) == "4 of 4 questions"
    assert actual.notes["not_asked_by_protocol"] == {
        "crowd": 1,
        "zero_area": 1,
        "not_finite": 1,
        "unknown_category": 1,
        "unknown_image": 1,
    }
    lone = write_annotations(tmp_path / "lone.json", [thing(0, 0), thing(1, 0)])
    with pytest.raises(ValueError, match=r"things of two classes or more, got \['cat'\]"):
        asked(lone, photos("0.jpg"))


def test_everyone_draws_the_same_things(tmp_path: Path, photos) -> None:
    things = [thing(i, i % 2, image=i % 2) for i in range(20)]
    path = write_annotations(tmp_path / "lvis.json", things, num_images=2)
    some = asked(path, photos("0.jpg"), kinds=["box"], num_things=8)
    assert some.coverage.num_declared == 16
    assert some.coverage.left_out["missing_image"] == 16 - len(some.queries)
    whole = asked(path, photos("0.jpg", "1.jpg"), kinds=["box"], num_things=8)
    assert set(some.queries) < set(whole.queries) and len(whole.queries) == 16


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bat_(animal)", "bat"), ("apple_juice", "apple juice"), ("(x)", "(x)"), ("owl", "owl")],
)
def test_class_names_are_words(name: str, expected: str) -> None:
    assert class_name(name) == expected


def test_a_box_encloses_what_is_on() -> None:
    mask = torch.zeros(4, 4)
    mask[1, 2] = mask[2, 0] = 1
    assert enclosing_box(mask) == (0, 0.25, 0.75, 0.75)


def test_the_real_files(shared_data: Path) -> None:
    formats = shared_data / "formats"
    photos = formats / "coco_mini_images_val2017_24.tar"
    lvis = asked(formats / "lvis_val_100.json", photos, num_things=0)
    # one of the 100 images is here, with 5 of the 977 things
    assert str(lvis.coverage) == "30 of 5,862 questions (missing_image 5,832)"
    coco = asked(formats / "coco_mini_instances_val2017.json", photos, num_things=0)
    assert len(coco.records) == 24 and coco.notes["not_asked_by_protocol"] == {"crowd": 5}
