"""Every annotated box is classified against all class names, its region embedded by CLOC's region
encoder (RecCOCO and RecLVIS of the paper), by RoI-Align of the tower's tokens, as a crop encoded
like an image, or from the tokens under its mask. macro_acc: mean over the classes that occur of the
share of their boxes named right (mAcc); micro_acc and top5_acc: share of all boxes. After the
slash: boxes of LVIS's frequent, common or rare classes alone, still against all class names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloc_mllm.data.values import id_key
from cloc_mllm.evaluation.benchmark_files import usable_box
from cloc_mllm.evaluation.queries import (
    Candidates,
    Query,
    QueryPair,
    QuerySet,
    RegionFeatures,
    pair,
)
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.scores import classification
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task
from cloc_mllm.evaluation.words import clean_text

if TYPE_CHECKING:
    from cloc_mllm.evaluation.record_index import RecordIndex

BANDS = {"f": "frequent", "c": "common", "r": "rare"}  # of LVIS's training set
NO_RECORD = "no_record"
_TITLES: dict[RegionFeatures, str] = {
    "cloc": "CLOC's region encoder",
    "roi_align": "RoI-Align of the tower's tokens",
    "crop": "each crop as an image",
    "mask": "tokens pooled under the mask",
}


def row_task(features: RegionFeatures) -> str:
    return f"true_box_{features}"


SCORERS = {
    row_task(features): Scorer(
        f"True boxes: {title}",
        __doc__,
        "macro_acc",
        classification.score,
        chance=classification.chance,
        example_metric="micro_acc",
        drawn="asked",
    )
    for features, title in _TITLES.items()
}


@dataclass
class AnnotatedBoxes:
    """All boxes to name and the names to choose from.

    Args:
        class_names: each once, in the order of the file.
        boxes: a query of no task yet, with the id `IMAGE#ANNOTATION`, and the true class.
        band_of_class: `frequent`, `common` or `rare`; empty without bands (COCO).
        dropped: annotations that are not asked, by reason.
    """

    class_names: list[str]
    boxes: list[tuple[Query, str]]
    band_of_class: dict[str, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    def notes(self) -> dict[str, Any]:
        """Counts for the report; kept and dropped add up to the annotations of the file."""
        return {
            "boxes": len(self.boxes),
            "dropped": dict(self.dropped.most_common()),
            "classes": len(self.class_names),
            "classes_that_occur": len({name for _, name in self.boxes}),
        }


@dataclass
class TrueBoxes(Task):
    """CLOC names annotated boxes, with several ways to embed a region side by side.

    Args:
        features: how regions are embedded.
        annotations: COCO or LVIS instances JSON; its images are the records of `--data`. "" takes
            the records' own regions and categories.
        keep_crowd: asks boxes around a crowd (`iscrowd` 1), too.
        min_box_side_px: leaves out boxes with a shorter side, in pixels of the annotated image.
    """

    features: list[RegionFeatures] = field(default_factory=lambda: list(_TITLES))
    annotations: str = ""
    keep_crowd: bool = False
    min_box_side_px: float = 1.0

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        boxes = self._boxes(data.index)
        candidates = Candidates("class_names", boxes.class_names)
        return [
            data.index.query_set(
                row_task(features),
                "label",
                "cloc",
                _pairs(boxes, row_task(features)),
                candidates=candidates,
                region_features=features,
                notes=boxes.notes(),
            )
            for features in self.features
        ]

    def more_scores(
        self, pairs: Sequence[ScoredPair]
    ) -> tuple[dict[str, QueryScores], dict[str, Any]]:
        """Counts the boxes that were pooled under their `segmentation`, and under the `box`."""
        used = Counter(pair.prediction.settings.get("mask", "") for pair in pairs)
        del used[""]
        return {}, {"mask_pooling": dict(used)} if used else {}

    def _boxes(self, index: RecordIndex) -> AnnotatedBoxes:
        if self.annotations:
            return self.read_annotations(self.annotations, index.image_ids)
        regions = [region for region in index.regions if region.category]
        boxes = [
            (Query(region.id, region.image_id, "", boxes=(region.box,)), region.category)
            for region in regions
        ]
        return AnnotatedBoxes(index.class_names, boxes)

    def read_annotations(self, path: str | Path, image_ids: Collection[str]) -> AnnotatedBoxes:
        """Boxes of the images that have a record, and all class names of the file.

        An annotation is not asked, and counted, if it is of an `unknown_category` or
        `unknown_image`, of an image without a record (`no_record`), a `crowd`, or if its box is
        `not_finite`, `inverted`, of `zero_area`, `outside` the image or `too_small`.

        Raises:
            ValueError: no COCO or LVIS file, two classes of one name, or none of its images has a
                record.
        """
        from cloc_mllm.data.readers.coco import group_by_image, read_table

        table = read_table(path, "images", "annotations", "categories")
        names = _names(table["categories"], path)
        boxes = AnnotatedBoxes(list(names.values()), [], _bands(table["categories"], names))
        annotations_by_image = group_by_image(table["annotations"])
        wanted = set(image_ids)
        for image in table["images"]:
            annotations = annotations_by_image.pop(str(id_key(image.get("id"))), [])
            if id_key(image.get("id")) not in wanted:
                boxes.dropped[NO_RECORD] += len(annotations)
                continue
            boxes.boxes += self._image_boxes(image, annotations, names, boxes.dropped)
        boxes.dropped["unknown_image"] += sum(map(len, annotations_by_image.values()))
        boxes.dropped += Counter()  # leaves out what is 0
        if not boxes.boxes:
            raise ValueError(
                f"{path} has no box to ask on these records (not used: {dict(boxes.dropped)}); "
                "build the records from this very file: cloc-mllm data build coco --instances FILE"
            )
        return boxes

    def _image_boxes(
        self,
        image: dict[str, Any],
        annotations: Sequence[dict[str, Any]],
        names: dict[str, str],
        dropped: Counter[str],
    ) -> Iterator[tuple[Query, str]]:
        for row in annotations:
            category = str(id_key(row.get("category_id")))
            box, fault = usable_box(row, image, self.min_box_side_px)
            if category not in names:
                fault = "unknown_category"
            elif row.get("iscrowd") and not self.keep_crowd:
                fault = "crowd"
            if box is None or fault:
                dropped[fault] += 1
                continue
            query = Query(
                f"{id_key(image['id'])}#{row.get('id')}",
                str(id_key(image["id"])),
                "",
                boxes=(box,),
                segmentation=row.get("segmentation"),
                image_hw=(int(image["height"]), int(image["width"])),
            )
            yield query, names[category]


def _pairs(boxes: AnnotatedBoxes, task: str) -> Iterator[QueryPair]:
    """A query per box; the reference's kind is the band of its class."""
    for query, name in boxes.boxes:
        yield pair(
            replace(query, id=f"{task}/{query.id}", task=task),
            boxes=list(query.boxes),
            labels=[name],
            kind=boxes.band_of_class.get(name, ""),
            num_candidates=len(boxes.class_names),
        )


def _names(categories: Sequence[dict[str, Any]], path: str | Path) -> dict[str, str]:
    """Category id (its `id_key`) -> name, lower-case, underscores as spaces."""
    from cloc_mllm.data.readers.coco import class_name

    names = {
        str(id_key(row.get("id"))): clean_text(str(class_name(row.get("name"))))
        for row in categories
    }
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice or not names:
        raise ValueError(f"{path}: expected categories of different names, got {twice or 'none'}")
    return names


def _bands(categories: Sequence[dict[str, Any]], names: dict[str, str]) -> dict[str, str]:
    return {
        names[str(id_key(row.get("id")))]: BANDS[row["frequency"]]
        for row in categories
        if row.get("frequency") in BANDS
    }
