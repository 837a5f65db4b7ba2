"""The results of the predictors: `GroundingResult` for regions of an image, `Answer` for words.

Letters: Q queries, R boxes, C names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cloc_mllm.geometry import Boxes

if TYPE_CHECKING:
    import supervision

_MIN_DRAWN_PX = 640
_MAX_DRAWN_PX = 1600


@dataclass(frozen=True, eq=False)
class GroundingResult:
    """Boxes in an image and what belongs to them.

    `ground` and `locate` return the boxes they found for phrases; `refer`, `classify` and `closest`
    return the boxes they were asked about and name them. A query is one phrase or one region. The
    length of a result is its number of queries, and `result[i]` is the result of query i alone.

    Attributes:
        image: the upright RGB picture.
        boxes: R boxes, normalised; they know the size of the picture, so `boxes.to_pixels()` works.
        scores: float[R]. Of the language model the confidence in 0..1 of each box (`ground`) or of
            the words for it (`refer`); of CLOC the cosine in -1..1 of phrase and box (`locate`,
            `closest`) or the probability of the name (`classify`).
        labels: R texts: the phrase, the words or the name.
        text: Q texts, what the language model wrote; "" from CLOC, which writes nothing.
        query_index: int64[R], the query that each box belongs to.
        failures: for each of the Q queries why it has no box or no words, such as `not_there`
            (see `mllm.coordinates.ParsedBoxes`); None where it has.
        probabilities: float[R, C] of `classify`, of each name for each box; None otherwise.
    """

    image: Image.Image
    boxes: Boxes
    scores: Tensor
    labels: Sequence[str]
    text: Sequence[str]
    query_index: Tensor
    failures: Sequence[str | None]
    probabilities: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, query: int) -> GroundingResult:
        query = range(len(self))[query]
        mine = (self.query_index == query).nonzero().flatten()
        return GroundingResult(
            self.image,
            Boxes(self.boxes.xyxy[mine], self.boxes.frame),
            self.scores[mine],
            [self.labels[index] for index in mine.tolist()],
            [self.text[query]],
            torch.zeros_like(mine),
            [self.failures[query]],
            None if self.probabilities is None else self.probabilities[mine],
        )

    def __iter__(self) -> Iterator[GroundingResult]:
        return (self[query] for query in range(len(self)))

    def draw(self, *, long_side: int | None = None) -> Image.Image:
        """Draws the boxes with their labels on a copy of the image.

        Args:
            long_side: of the drawing in pixels; by default that of the image, but at least 640 and
                at most 1600.
        """
        from cloc_mllm.data.drawing import draw_regions

        default = min(max(_MIN_DRAWN_PX, *self.image.size), _MAX_DRAWN_PX)
        return draw_regions(self.image, self.boxes, self.labels, long_side=long_side or default)

    def to_supervision(self) -> supervision.Detections:
        """Converts to the `Detections` of supervision (Roboflow), boxes in pixels.

        `class_id` numbers the distinct labels of this result in their order; `data` holds
        `class_name` and `query_index`.

        Raises:
            ModuleNotFoundError: supervision, which is optional, is not installed.
        """
        try:
            import supervision
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_supervision needs supervision; run: pip install supervision", name=error.name
            ) from error
        number = {label: index for index, label in enumerate(dict.fromkeys(self.labels))}
        return supervision.Detections(
            xyxy=self.boxes.to_pixels().xyxy.float().numpy(),
            confidence=self.scores.float().numpy(),
            class_id=np.array([number[label] for label in self.labels], dtype=int),
            data={
                "class_name": np.array(self.labels, dtype=str),
                "query_index": self.query_index.numpy(),
            },
        )

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """Converts to rows of a COCO results file, one per box.

        `bbox` is left, top, width and height in pixels. The rows name their category
        (`category_name`), because what was looked for is free text; evaluating them with
        pycocotools takes a `category_id` of your annotation file in addition.
        """
        bboxes, scores = self.boxes.to_pixels().xywh.tolist(), self.scores.tolist()
        return [
            {"image_id": image_id, "category_name": label, "bbox": bbox, "score": score}
            for label, bbox, score in zip(self.labels, bboxes, scores, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Converts to what JSON holds.

        Returns:
            `width` and `height` of the upright picture; for each query its `text` and `failure`;
            for each box its `query` (a position in `queries`), `phrase`, `score`, and xyxy in
            0..1 (`box_norm`) and in pixels (`box_px`).
        """
        rows = zip(
            self.query_index.tolist(),
            self.labels,
            self.scores.tolist(),
            self.boxes.to_normalized().xyxy.tolist(),
            self.boxes.to_pixels().xyxy.tolist(),
            strict=True,
        )
        names = ("query", "phrase", "score", "box_norm", "box_px")
        queries = zip(self.text, self.failures, strict=True)
        return {
            "width": self.image.width,
            "height": self.image.height,
            "queries": [{"text": text, "failure": failure} for text, failure in queries],
            "boxes": [dict(zip(names, row, strict=True)) for row in rows],
        }


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer of the language model.

    Attributes:
        text: its words; location tokens are kept.
        boxes: the R boxes in the text, in order, normalised. They know the size of the picture if
            the question was about one image.
        scores: float64[R] in 0..1, the confidence of each box: what the box head says, or without
            one the geometric mean of the probabilities of the tokens that write it.
        spans: where each box is written: `text[start:end]`.
        confidence: the least of the box head's confidences, or else the geometric mean of the
            probabilities of all tokens, in 0..1; None for an empty answer.
        failure: why the text is not boxes and nothing else (see `mllm.coordinates.ParsedBoxes`);
            None if it is.
        box_failures: why what looks like other boxes in the text is none: the grammar does not
            hold integers, and any box may be cut at the answer's limit.
        finish_reason: `length` if the limit or the context ended the answer.
        num_prompt_tokens, num_new_tokens: counts that include image tokens and the end of sequence.
        phrases: the phrase that the text links each box to (`<p>a crab</p>BOX`); "" for none.
    """

    text: str
    boxes: Boxes
    scores: Tensor
    spans: Sequence[tuple[int, int]]
    confidence: float | None
    failure: str | None
    box_failures: Sequence[str] = ()
    finish_reason: Literal["stop", "length"] = "stop"
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    phrases: Sequence[str] = ()
