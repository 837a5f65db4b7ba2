"""Asks the MLLM about images: where phrases are, what is in regions, and any other question.

Letters: T new tokens, K `<box>` tokens of an answer, H width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BatchFeature, LogitsProcessor, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from cloc_mllm.config import ModelDtype
from cloc_mllm.data.conversations import MAX_BOXES, SEVERAL_BOXES
from cloc_mllm.data.images import open_image
from cloc_mllm.data.wordings import NOT_THERE, Task, asked
from cloc_mllm.devices import choose_device
from cloc_mllm.geometry import Boxes, elementwise_iou
from cloc_mllm.hub import upload_model
from cloc_mllm.inference.answers import Generation, read_answer
from cloc_mllm.inference.inputs import (
    EncodedImage,
    ImageInput,
    RegionsInput,
    as_list,
    check_phrases,
    check_regions,
    one_question,
    open_input,
    upright_picture,
)
from cloc_mllm.inference.known_starts import KnownStarts
from cloc_mllm.inference.naming import NamingLogitsProcessor, PhraseTree, embed_regions_of
from cloc_mllm.inference.results import Answer, GroundingResult
from cloc_mllm.inference.shared_prefix import prefill_known, prefill_shared
from cloc_mllm.mllm.adapter import ADAPTER_CONFIG
from cloc_mllm.mllm.answer_boxes import SeenImages
from cloc_mllm.mllm.assembled import assembled
from cloc_mllm.mllm.box_grammar import BoxGrammar, BoxLogitsProcessor
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.mllm.regions import Regions
from cloc_mllm.models.build import check_fingerprint
from cloc_mllm.shipped import find_model

_BATCH_SIZE = 64
_TEXT_TOKENS = 48
_SAME_BOX = 0.7  # IoU above which two boxes are one
_KNOWN_BYTES = 256 * 2**20  # for what the language model has read of encoded images


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Args:
        image: what `open_image` takes, or what `GroundingPredictor.encode` returned. Questions that
            share the object encode it once.
        text: the question, with one `<region>` per region.
        regions: the regions that the `<region>` of the text stand for, in the frame of the upright
            picture: boxes, or a list of boxes, points and masks; None where there are none.
        names_region: the answer is a name of the one region, so that its words are weighed by what
            CLOC makes of it (`inference/naming.py`), if the model has CLOC's list of phrases.
    """

    image: ImageInput
    text: str
    regions: Regions = None
    names_region: bool = False


class Reading(NamedTuple):
    """A batch of questions that the model has read, ready to be answered.

    Attributes:
        inputs: arguments of `generate`.
        sizes: width and height of each question's picture.
        num_prompt_tokens: the length of each question's prompt.
        images: of the questions; encoded, if boxes are looked for in them.
        named: embeddings float[E] of the regions to name, by the place of their question.
    """

    inputs: Mapping[str, Any]
    sizes: Sequence[tuple[int, int]]
    num_prompt_tokens: Sequence[int]
    images: Sequence[ImageInput]
    named: dict[int, Tensor]


def whole_mllm(named: str | Path | None) -> Path:
    """Finds the directory of an MLLM, see `GroundingPredictor.from_pretrained`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is an adapter without its language model.
    """
    directory = assembled(find_model("mllm", named))
    if (directory / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{directory} is an adapter; put it onto its language model first: "
            f"cloc-mllm export --mllm {directory} --merge --output_dir DIR"
        )
    if not (directory / "processor_config.json").is_file():
        raise FileNotFoundError(
            f"{directory} is no MLLM directory (processor_config.json is missing); expected "
            "what stage 2 writes to OUTPUT_DIR/model"
        )
    return directory


class GroundingPredictor:
    """Holds an MLLM and its processor. Answers are greedy, so the same question has one answer.

    An image is whatever `open_image` takes (a path, the bytes of a file, a PIL image, an array), or
    what `encode` returned, which spares its encoding, and from the second question on its reading
    by the language model. Boxes, points and masks are in the frame of the upright picture: a photo
    with an EXIF orientation is turned first. Every method that takes an image raises `ImageError`
    if it cannot be used. Questions of one call that share an image (the same object) encode it
    once, and the language model reads it once (`shared_prefix`).

    Example:
        predictor = GroundingPredictor.from_pretrained("runs/stage2/model")
        predictor.ground("photo.jpg", ["the smaller crab"]).boxes.to_pixels()
    """

    def __init__(
        self, model: ClocMllmForConditionalGeneration, processor: ClocMllmProcessor
    ) -> None:
        check_fingerprint(model.config.fingerprint, processor.fingerprint, "the model")
        self.model = model.eval()
        self.processor = processor
        self._known = KnownStarts(_KNOWN_BYTES)
        self.directory: Path | None = None  # where the model was loaded from
        instead = NOT_THERE if model.config.says_not_there else ""
        taught = set(processor.taught)
        self.grammar = BoxGrammar(
            processor.tokenizer,
            processor.coordinates,
            instead,
            max_boxes=1 if taught.isdisjoint(SEVERAL_BOXES) else MAX_BOXES,
            points="point" in taught,
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | ModelDtype = "float32",
        attn_implementation: str | None = None,
    ) -> GroundingPredictor:
        """Loads a directory that stage 2 wrote.

        Args:
            directory: or `hf-hub:OWNER/NAME`; None takes the one that ships, which knows the
                built-in `scenes`; `photos` puts the shipped adapter onto its language model first,
                once.
            device: None takes a GPU if there is one.
            dtype: of the language model and the vision encoder; `auto` is what the files hold. What
                reads or writes coordinates stays float32.
            attn_implementation: of the language model, as in Transformers (`sdpa`, `eager`,
                `flash_attention_2`); None lets Transformers choose.

        Raises:
            FileNotFoundError: there is no model in the directory, or none ships, or the language
                model of a shipped adapter is not at hand.
            ValueError: model and processor do not belong together; names the difference.
        """
        directory = whole_mllm(directory)
        model = ClocMllmForConditionalGeneration.from_pretrained(
            directory, dtype=dtype, attn_implementation=attn_implementation
        )
        processor = ClocMllmProcessor.from_pretrained(directory)
        torch.nn.Module.to(model, choose_device(device))
        predictor = cls(model, processor)
        predictor.directory = directory
        return predictor

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Uploads the directory that the model was loaded from; see `hub.upload_model`."""
        return upload_model(self.directory, repo_id, private=private, token=token)

    @cached_property
    def _phrases(self) -> PhraseTree | None:
        return PhraseTree.of(self.processor)

    @torch.inference_mode()
    def encode(self, image: ImageInput) -> EncodedImage:
        """Encodes an image once for any number of questions; with tiles, all its views."""
        encoder = self.model.vision.encoder
        if isinstance(image, EncodedImage):
            image.check_encoder(encoder)
            return image
        picture = open_image(image)
        pixels = self.processor.vision_inputs([picture], [None])["pixel_values"]
        features = self.model.encode_images(pixels.to(self.model.device))
        return EncodedImage(picture, features, encoder)

    def ground(self, image: ImageInput, phrases: str | Sequence[str]) -> GroundingResult:
        """Finds each phrase: all of its boxes where the model was taught several, else one.

        Decoding allows nothing but boxes (`BoxGrammar`), or `not in the image` where the model was
        taught to say so; that phrase has no box then. Several boxes come from left to right, each
        with its own score.

        Raises:
            ValueError: a phrase cannot be looked for (see `check_phrases`).
        """
        image, phrases = open_input(image), as_list(phrases)
        answers = self.answer(self.ground_questions(image, phrases), boxes_only=True)
        found = [answer for answer in answers if answer.failure is None]
        num_boxes = torch.tensor([0 if a.failure else len(a.boxes) for a in answers]).long()
        query_index = torch.arange(len(answers)).repeat_interleave(num_boxes)
        picture = upright_picture(image)
        return GroundingResult(
            picture,
            Boxes.normalized([b for a in found for b in a.boxes.xyxy.tolist()], picture.size),
            torch.tensor([score for a in found for score in a.scores.tolist()]),
            [phrases[query] for query in query_index.tolist()],
            [answer.text for answer in answers],
            query_index,
            [answer.failure for answer in answers],
        )

    def refer(self, image: ImageInput, regions: RegionsInput) -> GroundingResult:
        """Says what is in each region.

        Args:
            regions: boxes, or a list of boxes, points and masks (`models.region_like`).
                Boxes are clipped to the picture; of a point or mask the result has the box around
                it.

        Raises:
            ValueError: a region cannot be used (see `check_regions`), or points and masks that this
                model does not know (`mllm.regions.check_takes_masks`).
        """
        image = open_input(image)
        picture = upright_picture(image)
        boxes, masks = check_regions(regions, picture.size)
        answers = self.answer(self._refer_questions(image, boxes, masks))
        return GroundingResult(
            picture,
            boxes,
            torch.tensor([answer.confidence or 0.0 for answer in answers]),
            [answer.text for answer in answers],
            [answer.text for answer in answers],
            torch.arange(len(answers)),
            [None if answer.text else "empty" for answer in answers],
        )

    def caption(self, image: ImageInput) -> Answer:
        """Describes the whole image."""
        return self.ask(image, self.processor.asked_in.first("caption"))

    def point(self, image: ImageInput, phrase: str) -> tuple[float, float] | None:
        """Points at a phrase.

        Returns:
            x and y, normalised to the upright picture; None if the answer is no point.

        Raises:
            ValueError: the model was not taught to point, or the phrase cannot be looked for.
        """
        if "point" not in self.processor.taught:
            raise ValueError(
                "this model was not taught to point; train one with conversations.point, or take "
                "the middle of what `ground` returns"
            )
        (answer,) = self.answer(self._questions("point", open_input(image), [phrase]))
        return self.processor.coordinates.parse_point(answer.text)

    def ask(self, image: ImageInput, question: str, regions: Regions = None) -> Answer:
        """Answers any question about an image, and about regions of it; see `Question`."""
        return self.answer([Question(image, question, regions)])[0]

    def ground_questions(
        self, image: ImageInput, phrases: Sequence[str], wordings: Sequence[str] = ()
    ) -> list[Question]:
        """Makes the questions where each phrase is.

        Args:
            wordings: one per phrase, with `{phrase}` where it goes; by default the one that the
                model was taught first.

        Raises:
            ValueError: a phrase cannot be looked for (see `check_phrases`).
        """
        return self._questions("ground", open_input(image), phrases, wordings)

    def _questions(
        self, task: Task, image: ImageInput, phrases: Sequence[str], wordings: Sequence[str] = ()
    ) -> list[Question]:
        check_phrases(phrases)
        wordings = wordings or [self.processor.asked_in.first(task)] * len(phrases)
        return [
            Question(image, asked(wording, phrase=phrase.strip()))
            for wording, phrase in zip(wordings, phrases, strict=True)
        ]

    def refer_questions(
        self, image: ImageInput, regions: RegionsInput, wording: str = "", *, names: bool = True
    ) -> list[Question]:
        """Makes the questions what is in each region; see `refer`.

        Args:
            wording: with `{box} <region>` where the region goes; by default the one that the model
                was taught first.
            names: the answers are names (`Question.names_region`).
        """
        image = open_input(image)
        checked = check_regions(regions, upright_picture(image).size)
        return self._refer_questions(image, *checked, wording, names=names)

    def answer(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int = _TEXT_TOKENS,
        boxes_only: bool = False,
        batch_size: int = _BATCH_SIZE,
    ) -> list[Answer]:
        """Answers any questions in batches; all other methods are thin wrappers of this one.

        Args:
            batch_size: questions at a time.
            boxes_only: each answer is boxes alone, or that there are none (see `ground`).
        """
        answers: list[Answer] = []
        for start in range(0, len(questions), batch_size):
            reading = self.read(questions[start : start + batch_size])
            answers += self.write(reading, max_new_tokens=max_new_tokens, boxes_only=boxes_only)
        return answers

    def stream(self, image: ImageInput, question: str) -> Iterator[str]:
        """Yields the text of `ask` in pieces, as it is written.

        Joined and stripped, the pieces are `text`. Raises what `ask` raises, once the first piece
        is asked for.
        """
        reading = self.read([Question(image, question)])
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        with ThreadPoolExecutor(1) as pool, self.model.hidden_states_of_answers() as states:
            writing = pool.submit(self._generate, reading, _TEXT_TOKENS, states, streamer=streamer)
            # also ends the loop below if `generate` raised and so never ended the stream
            writing.add_done_callback(lambda _: streamer.end())
            yield from (piece for piece in streamer if piece)
            writing.result()

    @torch.inference_mode()
    def read(self, questions: Sequence[Question]) -> Reading:
        """Makes one batch for `write`; an image that several questions share is read already, and
        an encoded one, if a single question is asked, only the first time."""
        questions = _open_images(questions)
        alone = questions[0].image if len(questions) == 1 else None
        named = [place for place, q in enumerate(questions) if q.names_region and self._phrases]
        if self.model.looks_for_boxes or named:
            encoded = {id(q.image): q.image for q in questions}
            encoded = {key: self.encode(image) for key, image in encoded.items()}
            questions = [replace(q, image=encoded[id(q.image)]) for q in questions]
        inputs = self.prepare(questions)
        return Reading(
            prefill_known(self.model, inputs, alone, self._known)
            if isinstance(alone, EncodedImage)
            else prefill_shared(self.model, inputs),
            [upright_picture(question.image).size for question in questions],
            inputs["attention_mask"].sum(1).tolist(),
            [question.image for question in questions],
            embed_regions_of(self.model, named, inputs),
        )

    def write(
        self,
        reading: Reading,
        *,
        max_new_tokens: int = _TEXT_TOKENS,
        boxes_only: bool = False,
        on_text: Callable[[str], object] | None = None,
    ) -> list[Answer]:
        """Answers what `read` returned; it can be used once, because its cache is continued.

        Args:
            on_text: called after each token with the text so far; for a reading of one question.
        """
        prompt_length = reading.inputs["input_ids"].shape[1]
        if boxes_only:
            max_new_tokens = self.grammar.max_tokens
        listener = None if on_text is None else _TextListener(self.processor, on_text)
        with self.model.hidden_states_of_answers() as states:
            output = self._generate(
                reading,
                max_new_tokens,
                states,
                boxes_only=boxes_only,
                streamer=listener,
                output_logits=True,
                return_dict_in_generate=True,
            )
        log_probs = self.model.compute_transition_scores(
            output.sequences, output.logits, normalize_logits=True
        )
        new_tokens = output.sequences[:, prompt_length:]
        hidden = torch.stack(states, 1) if states else [None] * len(new_tokens)
        facts = zip(reading.num_prompt_tokens, reading.sizes, reading.images, strict=True)
        answers = []
        for ids, probs, state, (num_prompt_tokens, size, image) in zip(
            new_tokens, log_probs, hidden, facts, strict=True
        ):
            head = self.read_boxes(ids, state, [image])
            written = Generation(ids.tolist(), probs, *head, num_prompt_tokens, max_new_tokens)
            answers.append(read_answer(self.processor, written, size))
        return answers

    def prepare(self, questions: Sequence[Question]) -> BatchFeature:
        """Makes one batch as the model reads it: chat template applied, `<image>` expanded."""
        questions = _open_images(questions)
        images = [question.image for question in questions]
        features = None
        if any(isinstance(image, EncodedImage) for image in images):
            distinct = {id(upright_picture(image)): image for image in images}
            encoded = [self.encode(image) for image in distinct.values()]
            features = torch.cat([image.features.tokens for image in encoded])
        return self.processor(
            [upright_picture(image) for image in images],
            [self._prompt(question.text) for question in questions],
            [question.regions for question in questions],
            image_features=features,
        ).to(self.model.device)

    @torch.inference_mode()
    def _generate(
        self,
        reading: Reading,
        max_new_tokens: int,
        states: list[Tensor],
        *,
        boxes_only: bool = False,
        **options: Any,
    ) -> Any:
        """Runs `generate`; `states` is the list that `hidden_states_of_answers` fills."""
        prompt_length = reading.inputs["input_ids"].shape[1]
        held: list[LogitsProcessor] = [
            BoxLogitsProcessor(self.grammar, prompt_length, boxes_only=boxes_only)
        ]
        if self.grammar.box_token is not None:
            held.append(_NoBoxTwice(self, reading, states))
        if reading.named and self._phrases:
            held.append(NamingLogitsProcessor(self._phrases, reading.named, prompt_length))
        return self.model.generate(
            **reading.inputs, max_new_tokens=max_new_tokens, logits_processor=held, **options
        )

    def _refer_questions(
        self,
        image: ImageInput,
        boxes: Boxes,
        masks: Sequence[Tensor | None],
        wording: str = "",
        *,
        names: bool = True,
    ) -> list[Question]:
        """Makes one question per box; a mask goes in with the box around it written out."""
        write_box = self.processor.coordinates.encode
        wording = wording or self.processor.asked_in.first("refer")
        return [
            Question(
                image,
                asked(wording, box=write_box(box)),
                [box if mask is None else mask],
                names,
            )
            for box, mask in zip(boxes.xyxy.tolist(), masks, strict=True)
        ]

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": one_question(question)}]
        messages = [{"role": "user", "content": content}]
        return self.processor.render(messages, add_generation_prompt=True)

    def read_boxes(
        self, tokens: Tensor, hidden: Tensor | None, images: Sequence[ImageInput]
    ) -> tuple[list[list[float]], list[float]]:
        """Reads each `<box>` of an answer with the box head.

        Args:
            tokens: int64[T], generated ids.
            hidden: float[T or more, H], the hidden states that wrote them; None without a head.
            images: that the answer is about; encoded, if boxes are looked for in them. Each box is
                then one of the image whose region is most like what it was looked for by.

        Returns:
            boxes, normalised to the upright picture, and their confidences; both empty without a
            head.
        """
        if hidden is None or (self.model.looks_for_boxes and not images):
            return [], []
        wrote_box = tokens.to(hidden.device) == self.model.config.box_token_id
        boxes, logits = self.model.read_answer_boxes(
            hidden[: len(tokens)][wrote_box], self._seen(images)
        )
        return boxes.tolist(), logits.detach().sigmoid().tolist()

    @torch.inference_mode()
    def may_write_box(
        self, ids: Sequence[int], hidden: Tensor, images: Sequence[ImageInput]
    ) -> bool:
        """Whether a `<box>` token may follow: its box repeats none of those right before it, and
        they are not as many yet as an answer has at most. Without it a model that likes to go on
        after a box writes the same one for ever.

        Args:
            ids: the answer so far.
            hidden: float[len(ids) + 1, H], the hidden states that wrote it and write what follows.
            images: as for `read_boxes`.
        """
        token, before = self.model.config.box_token_id, 0
        while before < len(ids) and ids[-1 - before] == token:
            before += 1
        if not before:
            return True
        if before >= self.grammar.max_boxes > 1:
            return False
        boxes = self.read_boxes(torch.full((before + 1,), token), hidden[-1 - before :], images)[0]
        rows = torch.tensor(boxes)
        return not (elementwise_iou(rows[:-1], rows[-1:].expand(before, 4)) > _SAME_BOX).any()

    def _seen(self, images: Sequence[ImageInput]) -> SeenImages | None:
        """The whole views of images, for a box head that looks for boxes in them."""
        if not self.model.looks_for_boxes:
            return None
        encoded = [image for image in images if isinstance(image, EncodedImage)]
        assert len(encoded) == len(images)
        tokens = torch.cat([image.features.tokens[:1] for image in encoded])
        pooled = torch.cat([image.features.image_features[:1] for image in encoded])
        frames = [self.processor.views(image.image.size)[0].frame() for image in encoded]
        features = encoded[0].features._replace(image_features=pooled, tokens=tokens)
        return SeenImages(features, torch.cat(frames).to(tokens.device))


class _NoBoxTwice(LogitsProcessor):
    """Bars the `<box>` tokens that `may_write_box` refuses."""

    def __init__(
        self, predictor: GroundingPredictor, reading: Reading, states: list[Tensor]
    ) -> None:
        self.predictor, self.reading, self.states = predictor, reading, states

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.predictor.grammar.box_token
        answers = input_ids[:, self.reading.inputs["input_ids"].shape[1] :].tolist()
        again = [
            row
            for row, likeliest in enumerate(scores.argmax(1).tolist())
            if likeliest == token and answers[row][-1:] == [token]
        ]
        for row in again:
            hidden = torch.stack([state[row] for state in self.states])
            if not self.predictor.may_write_box(answers[row], hidden, [self.reading.images[row]]):
                scores[row, token] = -torch.inf
        return scores


class _TextListener(BaseStreamer):
    """Tells `on_text` the text of an answer after each of its tokens."""

    def __init__(self, processor: ClocMllmProcessor, on_text: Callable[[str], object]) -> None:
        self.processor = processor
        self.on_text = on_text
        self.ids: list[int] | None = None

    def put(self, value: Tensor) -> None:
        if self.ids is None:  # `generate` puts the prompt first
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        length = self.processor.answer_length(self.ids)
        self.on_text(self.processor.decode_ids(self.ids[:length]).strip())

    def end(self) -> None:
        pass


def _open_images(questions: Sequence[Question]) -> list[Question]:
    """Opens the images that are not open yet; questions that share one still share it."""
    opened: dict[int, ImageInput] = {}
    for question in questions:
        if id(question.image) not in opened:
            opened[id(question.image)] = open_input(question.image)
    return [replace(question, image=opened[id(question.image)]) for question in questions]
