"""VESL for a batch of images: captions -> phrases -> boxes -> records, without any state.

A record's labels depend on this record alone, so any cut into batches and shards gives the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from cloc_mllm.data.records import Record, Region
from cloc_mllm.vesl.captioner import Captioner
from cloc_mllm.vesl.detector import Detections, Detector
from cloc_mllm.vesl.phrases import DroppedPhrase, PhraseExtractor, Phrases

SOURCE_SUFFIX = "+vesl"


@dataclass(frozen=True)
class Selection:
    """Which of a detector's boxes become regions.

    Args:
        threshold: smallest confidence (0.1 in the paper).
        nms_iou: of two boxes with the same phrase and at least this overlap the better is kept.
    """

    threshold: float = 0.1
    nms_iou: float = 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.threshold <= 1 and 0 < self.nms_iou <= 1):
            raise ValueError(
                f"threshold must lie in 0..1 and nms_iou in 0..1 without 0, got {self.threshold} "
                f"and {self.nms_iou}"
            )


@dataclass(frozen=True)
class Labelled:
    """A record with its new regions, and everything that did not become one.

    Attributes:
        dropped: every phrase of the captions that no region carries, with its reason: those of
            `PhraseExtractor`, and `below_threshold` (no box reaches the threshold), `outscored`
            (each of its boxes suits another phrase better).
        boxes: what became of the detector's boxes: `kept`, `below_threshold`, `suppressed`.
        num_queries: phrases that the detector was asked for.
    """

    record: Record
    dropped: list[DroppedPhrase]
    boxes: Counter[str]
    num_queries: int


class Labeller:
    """Holds the three models of VESL.

    Args:
        captioner: None keeps the given captions; otherwise its caption comes before them.
    """

    def __init__(
        self,
        extractor: PhraseExtractor,
        detector: Detector,
        selection: Selection,
        captioner: Captioner | None = None,
    ) -> None:
        self.extractor = extractor
        self.detector = detector
        self.selection = selection
        self.captioner = captioner

    def label(self, records: Sequence[Record]) -> list[Labelled]:
        """Records (through `validate_record`) with new regions in the place of theirs."""
        images = [record.load_image() for record in records]
        captions = [record.captions for record in records]
        if self.captioner is not None:
            new = self.captioner.caption(images)
            captions = [
                [*([text] if text else []), *given]
                for text, given in zip(new, captions, strict=True)
            ]
        phrases = self.extractor.extract(captions)
        asked = [index for index, found in enumerate(phrases) if found.queries]
        detections = (
            self.detector.detect([images[i] for i in asked], [phrases[i].queries for i in asked])
            if asked
            else []
        )
        of_image = dict(zip(asked, detections, strict=True))
        nothing = Detections(torch.empty(0, 4), torch.empty(0, 0))
        return [
            _labelled(
                replace(record, captions=captions[i], source=record.source + SOURCE_SUFFIX),
                phrases[i],
                select_regions(phrases[i].queries, of_image.get(i, nothing), self.selection),
            )
            for i, record in enumerate(records)
        ]


@dataclass(frozen=True)
class Selected:
    """Regions, best first; the queries that none carries; and what became of the boxes."""

    regions: list[Region]
    dropped: list[DroppedPhrase]
    boxes: Counter[str]


def select_regions(
    queries: Sequence[str], detections: Detections, selection: Selection
) -> Selected:
    """The best phrase of each box, then the threshold, then suppression within a phrase."""
    if not len(detections.boxes):
        dropped = [DroppedPhrase(query, "below_threshold") for query in queries]
        return Selected([], dropped, Counter())
    scores, best = detections.scores.max(dim=1)
    sure = (scores >= selection.threshold).nonzero()[:, 0]
    kept = sure[batched_nms(detections.boxes[sure], scores[sure], best[sure], selection.nms_iou)]
    regions = [
        Region(box=_box(detections.boxes[k]), phrase=queries[int(best[k])], score=float(scores[k]))
        for k in kept
    ]
    boxes = {
        "kept": len(kept),
        "below_threshold": len(scores) - len(sure),
        "suppressed": len(sure) - len(kept),
    }
    return Selected(regions, _without_box(queries, detections, regions, selection), Counter(boxes))


def _without_box(
    queries: Sequence[str], detections: Detections, regions: Sequence[Region], selection: Selection
) -> list[DroppedPhrase]:
    carried = {region.phrase for region in regions}
    highest = detections.scores.amax(dim=0)
    return [
        DroppedPhrase(query, "outscored" if score >= selection.threshold else "below_threshold")
        for query, score in zip(queries, highest, strict=True)
        if query not in carried
    ]


def _box(xyxy: Tensor) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = xyxy.tolist()
    return x1, y1, x2, y2


def _labelled(record: Record, phrases: Phrases, selected: Selected) -> Labelled:
    return Labelled(
        replace(record, regions=selected.regions),
        [*phrases.dropped, *selected.dropped],
        selected.boxes,
        len(phrases.queries),
    )
