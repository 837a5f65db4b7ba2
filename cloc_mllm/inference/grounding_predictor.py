"""Questions about pictures, answered by the MLLM: where is it, what is it, what is there."""

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
from cloc_mllm.data.images import decode_image
from cloc_mllm.data.records import Box
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

Picture = Image.Image | str | Path


@dataclass(frozen=True)
class ChatRequest:
    """One question about one picture.

    Args:
        region: one box, point or mask that the question's `<region>` stands for; None without a
            `<region>`.
    """

    image: Image.Image
    question: str
    region: Regions = None


@dataclass(frozen=True)
class GroundedAnswer:
    """What the model wrote, and the boxes if that is what it wrote.

    Args:
        boxes: normalised to the picture; none of them if `failure`.
        failure: why the text is not boxes (see `mllm.coordinates.ParsedBoxes`), None if it is.
        confidence: what a box head says, or else the geometric mean of the probabilities of the
            answer's tokens, 0..1; None for an empty answer.
    """

    raw_text: str
    boxes: Boxes
    failure: str | None
    confidence: float | None


class GroundingPredictor:
    """Holds an MLLM and its processor. Answers are greedy, so the same question has one answer.

    Questions of one call that share a picture (the same object) encode it once, and the language
    model reads it once (`shared_prefix`).
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
        """Load a directory that stage 2 wrote, in float32.

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
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = ClocMllmForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        processor = ClocMllmProcessor.from_pretrained(directory)
        torch.nn.Module.to(model, device)
        return cls(model, processor)

    def ground(self, image: Picture, phrases: Sequence[str]) -> list[GroundedAnswer]:
        """Where is each phrase? One box each; decoding allows nothing else (`BoxGrammar`), but for
        `not in the image` where the model was taught to say so."""
        return self.answer(ground_requests(load_picture(image), phrases), boxes_only=True)

    def refer(self, image: Picture, regions: Boxes | Sequence[RegionLike]) -> list[str]:
        """What is in each region? Boxes are clipped to the picture.

        Args:
            regions: boxes, or a list of boxes, points and masks (see `mllm.regions.RegionLike`).

        Raises:
            ValueError: a region that cannot be used (a box inverted, outside or under a pixel; a
                point outside; a mask empty or of another size), or points and masks that this model
                does not know (`mllm.regions.check_takes_masks`); says why.
        """
        picture = load_picture(image)
        if isinstance(regions, Boxes):
            regions = regions.to_normalized().xyxy.tolist()
        requests = [self.refer_request(picture, region) for region in regions]
        return [answer.raw_text for answer in self.answer(requests)]

    def caption(self, image: Picture) -> str:
        """What is in the whole picture?"""
        return self.ask(image, PROMPTS["caption"]).raw_text

    def ask(self, image: Picture, question: str) -> GroundedAnswer:
        """Any question about the picture; `failure` is set unless the answer is boxes."""
        return self.answer([ChatRequest(load_picture(image), question)])[0]

    def refer_request(self, image: Image.Image, region: RegionLike) -> ChatRequest:
        """The question what is in a region: a normalised box is clipped to the picture, of a point
        or a mask the words tell the box around it."""
        mask = as_mask(region, image.size)
        box = _checked_box(region, image) if mask is None else around(mask)
        question = PROMPTS["refer"].format(box=self.processor.coordinates.encode(box))
        return ChatRequest(image, question, [box if mask is None else mask])

    def answer(
        self,
        requests: Sequence[ChatRequest],
        *,
        max_new_tokens: int = _TEXT_TOKENS,
        boxes_only: bool = False,
        batch_size: int = _BATCH_SIZE,
    ) -> list[GroundedAnswer]:
        """Answer any questions, batched; all other methods are thin wrappers of this one.

        Args:
            batch_size: questions at a time.
            boxes_only: each answer is one box (see `ground`), of as many tokens as that takes.
        """
        answers: list[GroundedAnswer] = []
        for start in range(0, len(requests), batch_size):
            reading = self.read(requests[start : start + batch_size])
            answers += self.write(reading, max_new_tokens=max_new_tokens, boxes_only=boxes_only)
        return answers

    def stream(self, image: Picture, question: str) -> Iterator[str]:
        """The text of `ask` in pieces as it is written; joined and stripped, they are `raw_text`.

        Raises what `ask` raises, once the first piece is asked for.
        """
        reading = self.read([ChatRequest(load_picture(image), question)])
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
        """One batch for `write`: a picture that several questions share is read already."""
        return prefill_shared(self.model, self.prepare(requests))

    def write(
        self,
        reading: Mapping[str, Any],
        *,
        max_new_tokens: int = _TEXT_TOKENS,
        boxes_only: bool = False,
    ) -> list[GroundedAnswer]:
        """Answers to what `read` returned, whose key-value cache they continue: it serves once."""
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
        """Questions as the model reads them: chat template, `<image>` expanded, one batch."""
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
        """Of one row: int64[T] tokens, float[T] log-probabilities and, for a model with a box head,
        float[T, H] hidden states that wrote them."""
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
        """What the box head reads for each `<box>` of an answer: boxes normalised to the picture,
        and confidences. Nothing for a model without a head.

        Args:
            tokens: int64[T] generated ids.
            hidden: float[T or more, H] that wrote them.
        """
        if hidden is None:
            return [], []
        wrote_box = tokens.to(hidden.device) == self.model.config.box_token_id
        boxes, logits = self.model.box_head(hidden[: len(tokens)][wrote_box])
        return boxes.tolist(), logits.detach().sigmoid().tolist()


def checked_box(box_px: Sequence[float], width: int, height: int) -> Box:
    """A box in pixels -> clipped to the picture and normalised.

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


def ground_requests(image: Image.Image, phrases: Sequence[str]) -> list[ChatRequest]:
    """The questions where each phrase is; a blank one is a ValueError."""
    if blank := [index for index, phrase in enumerate(phrases) if not phrase.strip()]:
        raise ValueError(f"phrase {blank[0]} is blank; say what to look for")
    questions = [PROMPTS["ground"].format(phrase=phrase.strip()) for phrase in phrases]
    return [ChatRequest(image, question) for question in questions]


def load_picture(image: Picture) -> Image.Image:
    """A PIL image as it is, or the RGB picture in a JPEG, PNG or WebP file."""
    if isinstance(image, Image.Image):
        return image
    return decode_image(Path(image).read_bytes(), str(image))


def _checked_box(box: RegionLike, image: Image.Image) -> Box:
    """A normalised box, clipped to the picture."""
    width, height = image.size
    sides = torch.tensor([width, height] * 2, dtype=torch.float64)
    return checked_box((torch.as_tensor(box, dtype=torch.float64) * sides).tolist(), width, height)
