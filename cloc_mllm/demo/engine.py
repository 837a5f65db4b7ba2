"""Asks the predictors the questions of the demo, without Gradio.

Boxes are xyxy, normalised to the picture.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cloc_mllm.box import Box
from cloc_mllm.data.scenes import CONCEPTS
from cloc_mllm.data.wordings import IMAGE_TOKEN, REGION_TOKEN
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.inputs import EncodedImage

MAX_PHRASE_CHARS = 300
MAX_NAMES = 200
_NUM_CACHED_PICTURES = 8
_NUM_CLOSEST = 8


@dataclass(frozen=True)
class FoundBoxes:
    """One model's answer to "where is it?".

    Args:
        boxes: all boxes of the answer; empty if it has no usable one, and `failure` says why.
        text: what the language model wrote; "" from CLOC's head, which answers with numbers.
        confidence: the mean probability of the language model's tokens, or of CLOC's head the
            cosine of the embeddings of box and text; None if there is none.
    """

    boxes: tuple[Box, ...]
    text: str
    confidence: float | None
    failure: str | None
    milliseconds: float


@dataclass(frozen=True)
class Found:
    """The place of a phrase.

    Args:
        language_model: None if none is loaded.
        encode_ms: what encoding the picture took; about 0 for a known picture.
    """

    cloc_head: FoundBoxes
    language_model: FoundBoxes | None
    encode_ms: float


@dataclass(frozen=True)
class Named:
    """The names of the content of a box.

    Args:
        answer: the language model's words; None if none is loaded.
        closest: names with CLOC's score for them, best first.
        measure: what the scores are: `probability` among the given names, or `similarity` (the
            cosine) where the model chose from its own list of phrases.
    """

    answer: str | None
    closest: tuple[tuple[str, float], ...]
    measure: str
    answer_ms: float
    closest_ms: float
    encode_ms: float


class _Encoded(NamedTuple):
    """A picture as each of the predictors has encoded it."""

    cloc: EncodedImage
    grounding: EncodedImage | None


class DemoEngine:
    """Encodes each picture once and answers any number of prompts about it.

    It may be called from several threads. Questions are answered one at a time, because the
    predictors share the CPU anyway.
    """

    def __init__(self, cloc: ClocPredictor, grounding: GroundingPredictor | None = None) -> None:
        self.cloc = cloc
        self.grounding = grounding
        self._encoded: OrderedDict[str, _Encoded] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, picture: Picture, phrase: str) -> Found:
        """Says where a phrase is. Raises `ValueError` for an empty or overlong phrase."""
        phrase = checked_phrase(phrase)
        with self._lock:
            image, encode_ms = self._encode(picture)
            started = time.perf_counter()
            located = self.cloc.locate(image.cloc, [phrase])
            head = FoundBoxes(
                boxes=_usable(located.boxes),
                text="",
                confidence=float(located.scores[0]),
                failure=None,
                milliseconds=_ms_since(started),
            )
            return Found(head, self._ask_language_model(image.grounding, phrase), encode_ms)

    def _ask_language_model(self, image: EncodedImage | None, phrase: str) -> FoundBoxes | None:
        if self.grounding is None or image is None:
            return None
        started = time.perf_counter()
        questions = self.grounding.ground_questions(image, [phrase])
        (answer,) = self.grounding.answer(questions, boxes_only=True)
        boxes = _usable(answer.boxes)
        failure = answer.failure or (None if boxes else "no box in the answer")
        return FoundBoxes(boxes, answer.text, answer.confidence, failure, _ms_since(started))

    def name(self, picture: Picture, names: Sequence[str]) -> Named:
        """Says what is in `picture.box`; CLOC ranks the names.

        Without names it ranks its own list of phrases, or else the things of the built-in scenes.
        """
        if picture.box is None:
            raise ValueError("there is no box yet; click two opposite corners on the picture")
        boxes = Boxes.normalized([picture.box])
        with self._lock:
            image, encode_ms = self._encode(picture)
            started = time.perf_counter()
            closest, measure = self._rank(image.cloc, boxes, names)
            closest_ms = _ms_since(started)
            started = time.perf_counter()
            answer = None
            if self.grounding is not None and image.grounding is not None:
                answer = self.grounding.refer(image.grounding, boxes).labels[0]
            answer_ms = _ms_since(started)
        return Named(answer, closest, measure, answer_ms, closest_ms, encode_ms)

    def _rank(
        self, image: EncodedImage, boxes: Boxes, names: Sequence[str]
    ) -> tuple[tuple[tuple[str, float], ...], str]:
        if not names and self.cloc.phrases is not None:
            found = self.cloc.closest(image, boxes, count=_NUM_CLOSEST)
            return tuple(zip(found.labels, found.scores.tolist(), strict=True)), "similarity"
        names = list(names or CONCEPTS)
        probabilities = self.cloc.classify(image, boxes, names).probabilities
        assert probabilities is not None
        ranked = sorted(zip(names, probabilities[0].tolist(), strict=True), key=lambda p: -p[1])
        return tuple(ranked[:_NUM_CLOSEST]), "probability"

    def _encode(self, picture: Picture) -> tuple[_Encoded, float]:
        """Encodes a picture unless it is known, and says how many milliseconds that took."""
        started = time.perf_counter()
        known = self._encoded.pop(picture.key, None)
        if known is None:
            known = _Encoded(
                self.cloc.encode(picture.image),
                None if self.grounding is None else self.grounding.encode(picture.image),
            )
        self._encoded[picture.key] = known
        if len(self._encoded) > _NUM_CACHED_PICTURES:
            self._encoded.popitem(last=False)
        return known, _ms_since(started)


def checked_phrase(phrase: str) -> str:
    """Returns a phrase without outer blanks. Raises `ValueError` if it cannot be asked."""
    phrase = phrase.strip()
    if not phrase:
        raise ValueError("type what to look for, for example: the smaller crab")
    if len(phrase) > MAX_PHRASE_CHARS:
        raise ValueError(
            f"the phrase has {len(phrase)} characters; at most {MAX_PHRASE_CHARS} are read, "
            "shorten it"
        )
    if any("\ud800" <= character <= "\udfff" for character in phrase):
        raise ValueError("the phrase holds half a character (a lone surrogate); type it again")
    if reserved := [token for token in (IMAGE_TOKEN, REGION_TOKEN) if token in phrase]:
        raise ValueError(
            f"the phrase holds {reserved[0]}, which stands for a picture; leave it out"
        )
    return phrase


def parse_names(text: str) -> tuple[str, ...]:
    """Reads names separated by commas or line ends; a blank text is no name."""
    if len(text) > MAX_NAMES * MAX_PHRASE_CHARS:
        raise ValueError(f"the list of names has {len(text)} characters; shorten it")
    parts = (part.strip() for part in text.replace("\n", ",").split(","))
    names = tuple(dict.fromkeys(part for part in parts if part))
    if len(names) > MAX_NAMES:
        raise ValueError(f"got {len(names)} names; at most {MAX_NAMES} are compared at once")
    return tuple(checked_phrase(name) for name in names)


def _usable(boxes: Boxes) -> tuple[Box, ...]:
    """Returns the boxes whose numbers can be drawn: finite and not inverted."""
    return tuple(
        (x1, y1, x2, y2)
        for x1, y1, x2, y2 in boxes.to_normalized().xyxy.tolist()
        if all(map(math.isfinite, (x1, y1, x2, y2))) and x1 <= x2 and y1 <= y2
    )


def _ms_since(started: float) -> float:
    return 1000 * (time.perf_counter() - started)
