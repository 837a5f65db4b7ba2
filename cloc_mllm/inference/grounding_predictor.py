"""Questions about images, answered by the MLLM: where is it, what is it, what is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, TextIteratorStreamer

from cloc_mllm.data.conversations import NOT_THERE, PROMPTS
from cloc_mllm.data.images import ImageSource, open_image
from cloc_mllm.data.records import Box
from cloc_mllm.devices import choose_device
from cloc_mllm.geometry import Boxes, clean_box
from cloc_mllm.inference.shared_prefix import prefill_shared
from cloc_mllm.mllm.box_grammar import BoxGrammar, BoxLogitsProcessor
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.mllm.regions import RegionLike, Regions, around, as_mask
from cloc_mllm.models.build import check_fingerprint
from cloc_mllm.shipped import shipped_directory

_BATCH_SIZE = 64
_TEXT_TOKENS = 48


@dataclass(frozen=True)
class ChatRequest:
    """One question about one image.

    Args:
        image: what `open_image` takes; requests that share the object encode it once.
        region: the one box, point or mask that the question's `<region>` stands for, in the frame
            of the upright picture; None without a `<region>`.
    """

    image: ImageSource
    question: str
    region: Regions = None


@dataclass(frozen=True)
class GroundedAnswer:
    """What the model wrote, and the boxes if that is what it wrote.

    Args:
        boxes: normalised to the upright picture; empty if there is a `failure`.
        failure: why the text is not boxes (see `mllm.coordinates.ParsedBoxes`), None if it is.
        confidence: the box head's confidence, or without a head the geometric mean of the
            probabilities of the answer's tokens, in 0..1; None for an empty answer.
    """

    raw_text: str
    boxes: Boxes
    failure: str | None
    confidence: float | None


class GroundingPredictor:
    """Holds an MLLM and its processor. Answers are greedy, so the same question has one answer.

    An image is whatever `open_image` takes: a path, the bytes of a file, a PIL image or an array.
    Boxes, points and masks are in the frame of the upright picture, for a photo with an EXIF
    orientation the turned one. Questions of one call that share an image (the same object) encode
    it once, and the language model reads it once (`shared_prefix`).
    """

    def __init__(
        self, model: ClocMllmForConditionalGeneration, processor: ClocMllmProcessor
    ) -> None:
        check_fingerprint(model.config.fingerprint, processor.fingerprint, "the model")
        self.model = model.eval()
        self.processor = processor
        instead = NOT_THERE if model.config.says_not_there else ""
        self.grammar = BoxGrammar(processor.tokenizer, processor.coordinates, instead)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path | None = None, *, device: torch.device | str | None = None
    ) -> GroundingPredictor:
        """Loads a directory that stage 2 wrote, in float32.

        Args:
            directory: None takes the weights that ship with the package.
            device: None takes a GPU if there is one.

        Raises:
            FileNotFoundError: there is no model in the directory, or none ships.
            ValueError: model and processor do not belong together; names the difference.
        """
        directory = Path(directory) if directory else shipped_directory("mllm")
        if not (directory / "processor_config.json").is_file():
            raise FileNotFoundError(
                f"{directory} is no MLLM directory (processor_config.json is missing); expected "
                "what stage 2 writes to OUTPUT_DIR/model"
            )
        model = ClocMllmForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        processor = ClocMllmProcessor.from_pretrained(directory)
        torch.nn.Module.to(model, choose_device(device))
        return cls(model, processor)

    def ground(self, image: ImageSource, phrases: Sequence[str]) -> list[GroundedAnswer]:
        """Finds each phrase: one box per phrase.

        Decoding allows nothing but a box (`BoxGrammar`), or `not in the image` where the model was
        taught to say so.
        """
        return self.answer(ground_requests(image, phrases), boxes_only=True)

    def refer(self, image: ImageSource, regions: Boxes | Sequence[RegionLike]) -> list[str]:
        """Says what is in each region.

        Args:
            regions: boxes, or a list of boxes, points and masks (see `mllm.regions.RegionLike`),
                in the frame of the upright picture. Boxes are clipped to it.

        Raises:
            ValueError: a region that cannot be used (a box inverted, outside, under a pixel or in
                the frame of the picture before its turn; a point outside; a mask empty or of
                another size), or points and masks that this model does not know
                (`mllm.regions.check_takes_masks`); says why.
        """
        picture = open_image(image)
        if isinstance(regions, Boxes):
            regions.check_not_turned(*picture.size)
            regions = regions.to_normalized().xyxy.tolist()
        requests = [self.refer_request(picture, region) for region in regions]
        return [answer.raw_text for answer in self.answer(requests)]

    def caption(self, image: ImageSource) -> str:
        """Describes the whole image."""
        return self.ask(image, PROMPTS["caption"]).raw_text

    def ask(self, image: ImageSource, question: str) -> GroundedAnswer:
        """Answers any question about the image; `failure` is set unless the answer is boxes."""
        return self.answer([ChatRequest(open_image(image), question)])[0]

    def refer_request(self, image: ImageSource, region: RegionLike) -> ChatRequest:
        """Makes the question what is in a region.

        Args:
            region: a normalised box, which is clipped to the upright picture, or a point or mask,
                whose surrounding box is written in the question.
        """
        picture = open_image(image)
        mask = as_mask(region, picture.size)
        box = _checked_box(region, picture) if mask is None else around(mask)
        question = PROMPTS["refer"].format(box=self.processor.coordinates.encode(box))
        return ChatRequest(picture, question, [box if mask is None else mask])

    def answer(
        self,
        requests: Sequence[ChatRequest],
        *,
        max_new_tokens: int = _TEXT_TOKENS,
        boxes_only: bool = False,
    ) -> list[GroundedAnswer]:
        """Answers any questions in batches; all other methods are thin wrappers of this one.

        Args:
            boxes_only: each answer is one box (see `ground`), and as long as a box.
        """
        answers: list[GroundedAnswer] = []
        for start in range(0, len(requests), _BATCH_SIZE):
            reading = self.read(requests[start : start + _BATCH_SIZE])
            answers += self.write(reading, max_new_tokens=max_new_tokens, boxes_only=boxes_only)
        return answers

    def stream(self, image: ImageSource, question: str) -> Iterator[str]:
        """Yields the text of `ask` in pieces, as it is written.

        Joined and stripped, the pieces are `raw_text`. Raises what `ask` raises, once the first
        piece is asked for.
        """
        reading = self.read([ChatRequest(open_image(image), question)])
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(self._generate, reading, _TEXT_TOKENS, streamer=streamer)
            # also ends the loop below if `generate` raised and so never ended the stream
            writing.add_done_callback(lambda _: streamer.end())
            yield from (piece for piece in streamer if piece)
            writing.result()

    @torch.inference_mode()
    def read(self, requests: Sequence[ChatRequest]) -> Mapping[str, Any]:
        """Makes one batch for `write`; an image that several questions share is read already."""
        return prefill_shared(self.model, self.prepare(requests))

    def write(
        self,
        reading: Mapping[str, Any],
        *,
        max_new_tokens: int = _TEXT_TOKENS,
        boxes_only: bool = False,
    ) -> list[GroundedAnswer]:
        """Answers what `read` returned; it can be used once, because its cache is continued."""
        prompt_length = reading["input_ids"].shape[1]
        if boxes_only:
            max_new_tokens = self.grammar.max_tokens
        with self.model.hidden_states_of_answers() as states:
            output = self._generate(
                reading,
                max_new_tokens,
                boxes_only=boxes_only,
                output_logits=True,
                return_dict_in_generate=True,
            )
        log_probs = self.model.compute_transition_scores(
            output.sequences, output.logits, normalize_logits=True
        )
        new_tokens = output.sequences[:, prompt_length:]
        hidden = torch.stack(states, 1) if states else [None] * len(new_tokens)
        return [self._answer(*row) for row in zip(new_tokens, log_probs, hidden, strict=True)]

    def prepare(self, requests: Sequence[ChatRequest]) -> BatchFeature:
        """Makes one batch as the model reads it: chat template applied, `<image>` expanded."""
        return self.processor(
            [request.image for request in requests],
            [self._prompt(request.question) for request in requests],
            [request.region for request in requests],
        ).to(self.model.device)

    @torch.inference_mode()
    def _generate(
        self,
        reading: Mapping[str, Any],
        max_new_tokens: int,
        *,
        boxes_only: bool = False,
        **options: Any,
    ) -> Any:
        prompt_length = reading["input_ids"].shape[1]
        held = BoxLogitsProcessor(self.grammar, prompt_length, boxes_only=boxes_only)
        return self.model.generate(
            **reading, max_new_tokens=max_new_tokens, logits_processor=[held], **options
        )

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.render(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    def _answer(self, tokens: Tensor, log_probs: Tensor, hidden: Tensor | None) -> GroundedAnswer:
        """Reads one row.

        Args:
            tokens: int64[T], generated ids.
            log_probs: float[T], their log-probabilities.
            hidden: float[T, H], the hidden states that wrote them; None without a box head.
        """
        length = self.processor.answer_length(tokens.tolist())
        text = self.processor.decode_answer(tokens)
        confidence = float(log_probs[:length].mean().exp()) if length else None
        regressed, confidences = self.read_boxes(tokens[:length], hidden)
        confidence = min(confidences, default=confidence)
        parsed = self.processor.coordinates.parse(text, regressed)
        return GroundedAnswer(text, Boxes.normalized(parsed.boxes), parsed.failure, confidence)

    def read_boxes(
        self, tokens: Tensor, hidden: Tensor | None
    ) -> tuple[list[list[float]], list[float]]:
        """Reads each `<box>` of an answer with the box head.

        Args:
            tokens: int64[T], generated ids.
            hidden: float[T or more, H], the hidden states that wrote them; None without a head.

        Returns:
            boxes, normalised to the upright picture, and their confidences; both empty without a
            head.
        """
        if hidden is None:
            return [], []
        wrote_box = tokens.to(hidden.device) == self.model.config.box_token_id
        boxes, logits = self.model.box_head(hidden[: len(tokens)][wrote_box])
        return boxes.tolist(), logits.detach().sigmoid().tolist()


def checked_box(box_px: Sequence[float], width: int, height: int) -> Box:
    """Clips a box in pixels to a `width` x `height` picture and normalises it.

    Raises:
        ValueError: it cannot be used (inverted, outside, under a pixel); says why.
    """
    cleaned, reason = clean_box(box_px, width, height)
    if cleaned is None:
        shown = ", ".join(f"{value:.1f}" for value in box_px)
        raise ValueError(
            f"box [{shown}] px of a {width} x {height} picture cannot be used: {reason}; "
            "give x1 y1 x2 y2 with x1 < x2 and y1 < y2 that overlap the picture"
        )
    return cleaned


def ground_requests(image: ImageSource, phrases: Sequence[str]) -> list[ChatRequest]:
    """Makes the questions where each phrase is.

    Raises:
        ValueError: a phrase is blank.
    """
    if blank := [index for index, phrase in enumerate(phrases) if not phrase.strip()]:
        raise ValueError(f"phrase {blank[0]} is blank; say what to look for")
    questions = [PROMPTS["ground"].format(phrase=phrase.strip()) for phrase in phrases]
    picture = open_image(image)
    return [ChatRequest(picture, question) for question in questions]


def _checked_box(box: RegionLike, image: Image.Image) -> Box:
    """Clips a normalised box to the picture."""
    width, height = image.size
    sides = torch.tensor([width, height] * 2, dtype=torch.float64)
    return checked_box((torch.as_tensor(box, dtype=torch.float64) * sides).tolist(), width, height)
