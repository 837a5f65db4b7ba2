"""Every image is classified against all class names; classes of one name are one class. macro_acc:
mean over the classes that occur; micro_acc and top5_acc: share of all images (ImageNet's top-1 and
top-5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloc_mllm.evaluation.queries import Candidates, Query, QuerySet, pair
from cloc_mllm.evaluation.scores import classification
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task
from cloc_mllm.evaluation.words import clean_text

if TYPE_CHECKING:
    from cloc_mllm.evaluation.record_index import RecordIndex

TASK = "zero_shot_classification"
SCORERS = {
    TASK: Scorer(
        "Zero-shot image classification",
        __doc__,
        "micro_acc",
        classification.score,
        truth=("labels",),
        chance=classification.chance,
        example_metric="micro_acc",
        drawn="nothing",
    )
}


@dataclass
class ZeroShotClassification(Task):
    """CLOC names each image of an image folder (`data build image-folder`).

    Args:
        class_names: file of class names to choose from, JSON or lines `folder name`; "" takes
            those that occur.
    """

    class_names: str = ""

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        """
        Raises:
            ValueError: the file lacks the class of an image.
        """
        classes = _classes(data.index)
        names = self._names(set(classes.values()))
        pairs = (
            pair(Query(f"{TASK}/{i}", i, TASK), labels=[name], num_candidates=len(names))
            for i, name in classes.items()
        )
        notes = {"classes": len(names), "classes_that_occur": len(set(classes.values()))}
        candidates = Candidates("class_names", names)
        return [
            data.index.query_set(TASK, "label", "cloc", pairs, candidates=candidates, notes=notes)
        ]

    def _names(self, occurring: set[str]) -> list[str]:
        if not self.class_names:
            return sorted(occurring)
        from cloc_mllm.data.readers.image_folder import read_class_names

        names = {clean_text(name) for name in read_class_names(self.class_names).values()}
        if unknown := sorted(occurring - names):
            raise ValueError(f"{self.class_names} lacks the classes {unknown[:5]} of these images")
        return sorted(names)


def _classes(index: RecordIndex) -> dict[str, str]:
    """The class of each image of an image folder, which is its caption."""
    from cloc_mllm.data.readers.image_folder import SOURCE

    return {
        image_id: captions[0]
        for image_id, captions in index.captions.items()
        if captions and index.sources[image_id] == SOURCE
    }
