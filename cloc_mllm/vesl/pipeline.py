"""VESL for a batch of images: captions -> phrases -> boxes -> records, without any state.

A record's labels depend on that record alone, so batches and shards may be cut anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torchvision.ops import batched_nms

from cloc_mllm.box import Box
from cloc_mllm.data.records import Record, Region, check_box
from cloc_mllm.vesl.captioner import Captioner
from cloc_mllm.vesl.detector import Detections, Detector
from cloc_mllm.vesl.phrases import DroppedPhrase, PhraseExtractor, Phrases

SOURCE_SUFFIX = "+vesl"


@dataclass(frozen=True)
class Selection:
    """Which of a detector's boxes become regions.

    Args:
        threshold: smallest confidence (0.1 in the paper).
        nms_iou: IoU from which on only the better of two boxes of one phrase is kept.
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
        dropped: every phrase of the captions that no region carries, with its reason: one of
            `PhraseExtractor`, `below_threshold` (no box reaches the threshold), `outscored`
            (each of its boxes suits another phrase better) or `unusable_box`.
        boxes: number of the detector's boxes by what became of them: `kept`, `below_threshold`,
            `suppressed`, or a reason of `validate_record` (`outside`, `too_small`, ...).
        num_queries: number of phrases that the detector was asked for.
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
        """Replaces the regions of records that passed `validate_record` by new ones."""
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
        detected = dict(zip(asked, detections, strict=True))
        nothing = Detections(torch.empty(0, 4), torch.empty(0, 0))
        return [
            _labelled(
                replace(record, captions=captions[i], source=record.source + SOURCE_SUFFIX),
                phrases[i],
                select_regions(
                    phrases[i].queries,
                    detected.get(i, nothing),
                    self.selection,
                    images[i].size,
                ),
            )
            for i, record in enumerate(records)
        ]


@dataclass(frozen=True)
class Selected:
    """Regions, best first; the queries without a region; and what became of the boxes."""

    regions: list[Region]
    dropped: list[DroppedPhrase]
    boxes: Counter[str]


def select_regions(
    queries: Sequence[str], detections: Detections, selection: Selection, image_wh: tuple[int, int]
) -> Selected:
    """Takes the best phrase of each box, applies the threshold, then suppresses within a phrase.

    Boxes are clipped to the image. Those that no record may hold are left out before the
    suppression and counted under the reason of `validate_record`.
    """
    if not len(detections.boxes):
        dropped = [DroppedPhrase(query, "below_threshold") for query in queries]
        return Selected([], dropped, Counter())
    scores, best = detections.scores.max(dim=1)
    fates: Counter[str] = Counter()
    found: list[tuple[Box, float, int]] = []  # box, score, its phrase
    for xyxy, score, phrase in zip(
        detections.boxes.tolist(), scores.tolist(), best.tolist(), strict=True
    ):
        if not score >= selection.threshold:  # also true of NaN
            fates["below_threshold"] += 1
            continue
        box, fault = check_box(xyxy, image_wh)
        if box is None:
            fates[str(fault)] += 1
        else:
            found.append((box, score, phrase))
    regions = _suppressed(found, queries, selection.nms_iou)
    fates["suppressed"] += len(found) - len(regions)
    fates["kept"] += len(regions)
    named = {queries[phrase] for phrase in best[scores >= selection.threshold].tolist()}
    carried = {region.phrase for region in regions}
    highest = dict(zip(queries, detections.scores.amax(dim=0).tolist(), strict=True))
    dropped = [
        DroppedPhrase(query, _why(query in named, score >= selection.threshold))
        for query, score in highest.items()
        if query not in carried
    ]
    return Selected(regions, dropped, fates)


def _suppressed(
    found: Sequence[tuple[Box, float, int]], queries: Sequence[str], nms_iou: float
) -> list[Region]:
    """Leaves out boxes that overlap a better one of their phrase; best first."""
    boxes = torch.tensor([box for box, *_ in found], dtype=torch.float64).reshape(-1, 4)
    scores = torch.tensor([score for _, score, _ in found], dtype=torch.float64)
    phrases = torch.tensor([phrase for *_, phrase in found], dtype=torch.int64)
    kept = batched_nms(boxes, scores, phrases, nms_iou).tolist()
    return [Region(found[k][0], queries[found[k][2]], found[k][1]) for k in kept]


def _why(is_best_of_a_box: bool, is_sure: bool) -> str:
    """The reason why a phrase that was asked for has no region."""
    if is_best_of_a_box:  # yet no record may hold any of these boxes
        return "unusable_box"
    return "outscored" if is_sure else "below_threshold"


def _labelled(record: Record, phrases: Phrases, selected: Selected) -> Labelled:
    return Labelled(
        replace(record, regions=selected.regions),
        [*phrases.dropped, *selected.dropped],
        selected.boxes,
        len(phrases.queries),
    )
