"""Asks the predictors the questions of the demo, without Gradio.

Boxes are xyxy, normalised to the picture.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

from cloc_mllm.box import Box
from cloc_mllm.data.scenes import CONCEPTS
from cloc_mllm.data.wordings import IMAGE_TOKEN, REGION_TOKEN
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.demo.strokes import Stroke
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.inputs import EncodedImage
from cloc_mllm.mllm.regions import takes_masks
from cloc_mllm.models.region_encoders.clip_tokens import ClipTokenEncoder
from cloc_mllm.models.region_encoders.prompter import PrompterEncoder
from cloc_mllm.models.region_encoders.roi_align import RoIAlignEncoder
from cloc_mllm.models.region_like import RegionLike

MAX_PHRASE_CHARS = 300
MAX_PHRASES = 8
MAX_NAMES = 200
_NUM_CACHED_PICTURES = 16
_NUM_CLOSEST = 8

_REGION_ENCODERS = {
    PrompterEncoder: "Prompter",
    RoIAlignEncoder: "RoI-Align, trained",
    ClipTokenEncoder: "CLIP's tokens",
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class FoundBoxes:
    """One model's answer to "where is it?".

    Args:
        boxes: all boxes of the answer; empty if it has no usable one, and `failure` says why.
        scores: of each box: the language model's confidence in 0..1, or of CLOC the cosine of the
            embeddings of box and text.
        text: what the language model wrote; "" from CLOC's head, which answers with numbers.
    """

    boxes: tuple[Box, ...]
    scores: tuple[float, ...]
    text: str
    failure: str | None
    milliseconds: float


@dataclass(frozen=True)
class Found:
    """The places of one phrase.

    Args:
        language_model: None if none is loaded, or if it has not finished.
    """

    phrase: str
    cloc: FoundBoxes
    language_model: FoundBoxes | None = None


@dataclass(frozen=True)
class Grounding:
    """The places of all phrases, so far.

    Args:
        writing: what the language model has written of its next answer; None if it writes nothing.
        encode_ms: what encoding the picture took; about 0 for a known picture.
    """

    found: tuple[Found, ...]
    writing: str | None
    encode_ms: float


@dataclass(frozen=True)
class Named:
    """The names of the content of a region.

    Args:
        closest: names with CLOC's score for them, best first.
        measure: what the scores are: `probability` among the given names, or `similarity` (the
            cosine) where the model chose from its own list of phrases.
        num_names: how many names it chose from.
        box: what was read instead of a point or scribble, by models that learnt boxes alone; None
            if the region itself was.
        answer: the language model's words so far; None if none is loaded.
    """

    closest: tuple[tuple[str, float], ...]
    measure: str
    num_names: int
    box: Box | None
    answer: str | None
    encode_ms: float
    closest_ms: float
    answer_ms: float = 0.0


class Encoded(NamedTuple):
    """A picture as each of the predictors has encoded it."""

    cloc: EncodedImage
    grounding: EncodedImage | None


class DemoEngine:
    """Encodes each picture once and answers any number of prompts about it.

    It may be called from several threads. Questions are answered one at a time, because the
    predictors share the CPU anyway.

    Args:
        knows: what the models know, for people; "" if that is not known.
        names: the names or directories that load the two models.
    """

    def __init__(
        self,
        cloc: ClocPredictor,
        grounding: GroundingPredictor | None = None,
        knows: str = "",
        names: tuple[str, str] = ("photos", "scenes"),
    ) -> None:
        self.cloc = cloc
        self.grounding = grounding
        self.knows = knows
        self.names = names
        self._encoded: OrderedDict[str, Encoded] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(4, "demo")

    @contextmanager
    def cloc_image(self, picture: Picture) -> Iterator[EncodedImage]:
        """Gives a picture as CLOC has encoded it; nobody else asks a model meanwhile."""
        with self._lock:
            yield self.encode(picture)[0].cloc

    @property
    def region_encoder_name(self) -> str:
        kind = type(self.cloc.model.vision.region_encoder)
        return _REGION_ENCODERS.get(kind, kind.__name__)

    def ground(self, picture: Picture, phrases: Sequence[str]) -> Iterator[Grounding]:
        """Says where phrases are: first CLOC for all, then the language model, while it writes."""
        with self._lock:
            image, encode_ms = self.encode(picture)
            started = time.perf_counter()
            located = self.cloc.locate(image.cloc, phrases)
            elapsed_ms = _ms_since(started) / len(phrases)
        found = []
        for phrase, place in zip(phrases, located, strict=True):
            boxes, scores = usable_boxes(place.boxes), tuple(place.scores.tolist())
            cloc = FoundBoxes(boxes, scores, "", place.failures[0], elapsed_ms)
            found.append(Found(phrase, cloc))
        if self.grounding is None:
            yield Grounding(tuple(found), None, encode_ms)
            return
        for index, one in enumerate(found):
            yield Grounding(tuple(found), "", encode_ms)
            started = time.perf_counter()
            writing = self._write_boxes(self.grounding, picture, one.phrase)
            try:
                while True:
                    yield Grounding(tuple(found), next(writing), encode_ms)
            except StopIteration as end:
                answer = replace(end.value, milliseconds=_ms_since(started))
            found[index] = replace(one, language_model=answer)
        yield Grounding(tuple(found), None, encode_ms)

    def _write_boxes(
        self, grounding: GroundingPredictor, picture: Picture, phrase: str
    ) -> Generator[str, None, FoundBoxes]:
        def work(say: Callable[[str], None]) -> FoundBoxes:
            image, _ = self.encode(picture)
            assert image.grounding is not None
            reading = grounding.read(grounding.ground_questions(image.grounding, [phrase]))
            (answer,) = grounding.write(reading, boxes_only=True, on_text=say)
            boxes = usable_boxes(answer.boxes)
            failure = answer.failure or (None if boxes else "no box in the answer")
            return FoundBoxes(boxes, tuple(answer.scores.tolist()), answer.text, failure, 0.0)

        return (yield from self.streamed(work))

    def name(self, picture: Picture, stroke: Stroke, names: Sequence[str]) -> Iterator[Named]:
        """Says what is in a region: CLOC ranks the names, then the language model writes.

        Without names CLOC ranks its own list of phrases, or else the things of the built-in scenes.
        """
        with self._lock:
            image, encode_ms = self.encode(picture)
            started = time.perf_counter()
            region, box = self._region(picture, stroke, self._cloc_takes_masks)
            closest, measure, num_names = self._rank(image.cloc, region, names)
            closest_ms = _ms_since(started)
        writes = "" if self.grounding is not None else None
        named = Named(closest, measure, num_names, box, writes, encode_ms, closest_ms)
        yield named
        if self.grounding is None:
            return
        wording = self.grounding.processor.asked_in.first("refer")
        started = time.perf_counter()
        for text in self._write(picture, stroke, wording):
            yield replace(named, answer=text, answer_ms=_ms_since(started))

    def ask_about(self, picture: Picture, stroke: Stroke, question: str) -> Iterator[str]:
        """Yields the language model's answer to a question about a region, while it writes."""
        if self.grounding is None:
            raise ValueError("questions in words need a language model")
        question = checked_phrase(question)
        braced = question.replace("{", "{{").replace("}", "}}")
        return self._write(picture, stroke, braced + " {box} " + REGION_TOKEN)

    def _write(self, picture: Picture, stroke: Stroke, wording: str) -> Iterator[str]:
        grounding = self.grounding
        assert grounding is not None

        def work(say: Callable[[str], None]) -> str:
            image, _ = self.encode(picture)
            assert image.grounding is not None
            model = grounding.model
            masks = takes_masks(model.config.region_features, model.vision)
            region, _ = self._region(picture, stroke, masks)
            questions = grounding.refer_questions(
                image.grounding, [region], wording, names=not wording
            )
            (answer,) = grounding.write(grounding.read(questions), on_text=say)
            return answer.text

        yield (yield from self.streamed(work))

    @property
    def _cloc_takes_masks(self) -> bool:
        return self.cloc.model.vision.region_encoder.takes_masks

    def _region(
        self, picture: Picture, stroke: Stroke, masks: bool
    ) -> tuple[RegionLike, Box | None]:
        """Makes what a model reads of a stroke, and the box that stands for it if it must."""
        if masks or stroke.kind == "box":
            return stroke.region(picture.image.size), None
        box = stroke.box(picture.image.size)
        return box, box

    def _rank(
        self, image: EncodedImage, region: RegionLike, names: Sequence[str]
    ) -> tuple[tuple[tuple[str, float], ...], str, int]:
        own = self.cloc.phrases
        if not names and own is not None:
            found = self.cloc.closest(image, [region], count=_NUM_CLOSEST)
            ranked = zip(found.labels, found.scores.tolist(), strict=True)
            return tuple(ranked), "similarity", len(own.texts)
        names = list(names or CONCEPTS)
        probabilities = self.cloc.classify(image, [region], names).probabilities
        assert probabilities is not None
        best = sorted(zip(names, probabilities[0].tolist(), strict=True), key=lambda p: -p[1])
        return tuple(best[:_NUM_CLOSEST]), "probability", len(names)

    def streamed(
        self, work: Callable[[Callable[[str], None]], Result]
    ) -> Generator[str, None, Result]:
        """Yields the texts that `work` says, and returns what it returns.

        `work` holds the lock in a thread of its own, so a visitor who leaves holds up nobody.
        """
        said: SimpleQueue[str | None] = SimpleQueue()

        def run() -> Result:
            try:
                with self._lock:
                    return work(said.put)
            finally:
                said.put(None)

        future = self._pool.submit(run)
        while (text := said.get()) is not None:
            yield text
        return future.result()

    def encode(self, picture: Picture) -> tuple[Encoded, float]:
        """Encodes a picture unless it is known, and says how many milliseconds that took.

        Only what holds the lock may call it, such as the work of `streamed`.
        """
        started = time.perf_counter()
        known = self._encoded.pop(picture.key, None)
        if known is None:
            known = Encoded(
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


def parse_phrases(text: str) -> tuple[str, ...]:
    """Reads the phrases to look for. Raises `ValueError` for none, or too many to tell apart."""
    phrases = parse_names(text)
    if len(phrases) > MAX_PHRASES:
        raise ValueError(f"got {len(phrases)} phrases; at most {MAX_PHRASES} are shown at once")
    return phrases or (checked_phrase(text),)


def parse_names(text: str) -> tuple[str, ...]:
    """Reads names separated by commas or line ends; a blank text is no name."""
    if len(text) > MAX_NAMES * MAX_PHRASE_CHARS:
        raise ValueError(f"the list of names has {len(text)} characters; shorten it")
    parts = (part.strip() for part in text.replace("\n", ",").split(","))
    names = tuple(dict.fromkeys(part for part in parts if part))
    if len(names) > MAX_NAMES:
        raise ValueError(f"got {len(names)} names; at most {MAX_NAMES} are compared at once")
    return tuple(checked_phrase(name) for name in names)


def usable_boxes(boxes: Boxes) -> tuple[Box, ...]:
    """Returns the boxes whose numbers can be drawn: finite and not inverted."""
    return tuple(
        (x1, y1, x2, y2)
        for x1, y1, x2, y2 in boxes.to_normalized().xyxy.tolist()
        if all(map(math.isfinite, (x1, y1, x2, y2))) and x1 <= x2 and y1 <= y2
    )


def _ms_since(started: float) -> float:
    return 1000 * (time.perf_counter() - started)
