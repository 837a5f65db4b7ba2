"""Turns chats with images and regions into the tensors that the model reads.

Letters: B rows, I distinct images, S canvas side, N tokens of an image, T text tokens, R regions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AddedToken, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from cloc_mllm.data.images import ImageSource
from cloc_mllm.data.wordings import (
    FIRST_WORDINGS,
    IMAGE_TOKEN,
    REGION_TOKEN,
    SINGLE,
    Task,
    Wordings,
)
from cloc_mllm.geometry import Boxes
from cloc_mllm.mllm.chat_images import open_rows
from cloc_mllm.mllm.coordinates import BOX_TOKEN, BoxFormat
from cloc_mllm.mllm.image_processing import ClocMllmImageProcessor
from cloc_mllm.mllm.losses import IGNORE_INDEX
from cloc_mllm.mllm.regions import (
    Regions,
    check_placeholders,
    place_regions,
    regions_by_image,
)
from cloc_mllm.mllm.time_limit import time_limit
from cloc_mllm.mllm.views import View, image_views
from cloc_mllm.models.build import check_fingerprint
from cloc_mllm.models.phrases import Phrases

# for language models that have no chat template
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)
# Most chat templates know texts alone, so image items first become placeholders.
_FLATTEN_CONTENT = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set text = message['content'] -%}{%- else -%}"
    "{%- set text -%}{%- for item in message['content'] -%}"
    f"{{{{- '{IMAGE_TOKEN}' if item['type'] == 'image' else item['text'] -}}}}"
    "{%- endfor -%}{%- endset -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text}] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)

Messages = Sequence[dict[str, Any]]
_RENDER_SECONDS = 10.0  # the longest chats take milliseconds


class ClocMllmProcessor(ProcessorMixin):
    """Prepares images, expands each `<image>` to N tokens, moves regions to the canvas.

    Args:
        tokenizer: the language model's, with the tokens that `add_special_tokens` adds.
        image_processor: prepares the pixels; by default one of `image_size`.
        image_size: S in pixels, where there is no `image_processor` (processors that were saved
            before it existed have none).
        num_image_tokens: N, the number of tokens that the model's projector makes per image.
        box_format, num_bins, box_head: how boxes are written, see `mllm/coordinates.py`.
        max_tiles: the largest number of tiles that show parts of a larger image beside the whole
            of it, N tokens per tile (`mllm/views.py`); 0 shows the whole alone.
        wordings: `Wordings.to_dict` of the words that the model was taught to be asked in; None is
            one wording per task, the package's first ones.
        taught: the tasks of several boxes, links and so on that the model was taught beyond the
            first ones (`teach`).
        fingerprint: what training used; any difference to this processor is a `ValueError`.
        chat_template: by default the tokenizer's, made to understand image items, or a plain one
            where the tokenizer has none.

    Attributes:
        phrases: by which the vision encoder names regions; None where it has no such list.
    """

    def __init__(  # noqa: PLR0913  Transformers saves a processor as its arguments
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: ClocMllmImageProcessor | None = None,
        image_size: int | None = None,
        num_image_tokens: int = 64,
        box_format: str = "location_tokens",
        num_bins: int = 100,
        box_head: bool = False,
        max_tiles: int = 0,
        wordings: dict[str, Any] | None = None,
        taught: Sequence[Task] = (),
        fingerprint: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if chat_template is None:
            chat_template = _FLATTEN_CONTENT + (tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE)
        if image_processor is None:
            image_processor = ClocMllmImageProcessor(image_size or 128)
        elif image_size is not None and image_size != image_processor.size["height"]:
            raise ValueError(
                f"image_size is {image_size}, but the image processor's is {image_processor.size}; "
                "pass one of the two"
            )
        super().__init__(tokenizer, image_processor, chat_template=chat_template)
        self.num_image_tokens = num_image_tokens
        self.box_format = box_format
        self.num_bins = num_bins
        self.box_head = box_head
        self.max_tiles = max_tiles
        self.image_token = IMAGE_TOKEN
        self.image_token_id: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.phrases: Phrases | None = None
        self.teach(Wordings.from_dict(wordings) if wordings else SINGLE, taught)
        if fingerprint is not None:
            check_fingerprint(fingerprint, self.fingerprint, "the saved processor")

    def teach(self, asked_in: Wordings, taught: Sequence[Task]) -> None:
        """Takes down what a model is taught; the fingerprint follows.

        Args:
            asked_in: the words of its questions.
            taught: its tasks that are none of `wordings.FIRST_TASKS`.
        """
        self.asked_in = asked_in
        self.wordings = None if asked_in == SINGLE else asked_in.to_dict()
        self.taught: list[Task] = sorted(taught)
        self.fingerprint = self._fingerprint()

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Writes the files of the tokenizer, of the images and of the phrases."""
        written = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        if self.phrases is not None:
            self.phrases.save(Path(save_directory))
        return written

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> Self:
        """Reads what `save_pretrained` wrote."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor.phrases = Phrases.load(Path(pretrained_model_name_or_path))
        return processor

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> Any:
        """Loads the tokenizer, and the image processor unless the files are older than it."""
        name, saved = pretrained_model_name_or_path, processor_dict.get("image_processor")
        kwargs["trust_remote_code"] = False
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", name, **kwargs)
        return [tokenizer, ClocMllmImageProcessor(**saved) if saved else None]

    def placeholder_ids(self) -> tuple[int, int, int | None]:
        """The ids of `<image>`, `<region>` and, with a box head, `<box>`."""
        region_id, box_id = self.tokenizer.convert_tokens_to_ids([REGION_TOKEN, BOX_TOKEN])
        return self.image_token_id, region_id, box_id if self.box_head else None

    @property
    def image_size(self) -> int:
        """S in pixels."""
        return self.image_processor.size["height"]

    @property
    def coordinates(self) -> BoxFormat:
        return BoxFormat(self.box_format, self.num_bins, self.box_head)  # type: ignore[arg-type]

    def __call__(
        self,
        images: ImageSource | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        regions: Sequence[Regions] | None = None,
        *,
        image_features: Tensor | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Makes one batch for generation; rows are padded on the left.

        Args:
            images: for each row an image, a list of images, or None for text alone. An image is
                what `open_image` takes, an address or base64 (`open_chat_image`).
            text: one per row, with one `<image>` per image and one `<region>` per region.
            regions: for each row its regions, in the frame of the upright image: `Boxes`, or a
                list of boxes, points and masks (`RegionLike`). A row of several images has a list
                with the regions of each; its `<region>` tokens stand for those of the first image,
                then of the second, and so on.
            image_features: float[I, N, D], what the model's image encoder has made of the views of
                the distinct images, in their order; they stand in the place of the pixels then.
            kwargs: accepted for `apply_chat_template`; padding and tensors are always made.

        Returns:
            input_ids, attention_mask int64[B, T]; with images also pixel_values float[I, 3, S, S],
            image_frame float[I, 4], image_index int64[K], region_boxes float[R, 4],
            region_image_index int64[R], and with points or masks region_masks float[R, S, S] (see
            `VisionInputs`). An image object that occurs several times is prepared once.

        Raises:
            ImageError: an image cannot be used.
            ValueError: images, regions and placeholders do not match, or a region does not fit its
                image; names the sample.
        """
        if text is None or return_tensors != "pt":
            raise ValueError("pass `text` (one per row); the result is always torch tensors ('pt')")
        texts = [text] if isinstance(text, str) else list(text)
        pictures = open_rows(images, len(texts))
        expanded = self._expand(texts, pictures)
        inputs = self.pad([self.tokenize(row) for row in expanded], side="left")
        if not any(pictures):
            return BatchFeature(inputs)
        given = regions or [None] * len(texts)
        vision = self.vision_inputs(pictures, given, image_features)
        for row, (text, row_regions) in enumerate(zip(texts, given, strict=True)):
            check_placeholders(row, text, regions_by_image(row_regions, len(pictures[row])))
        return BatchFeature({**inputs, **vision})

    def vision_inputs(
        self,
        images: Sequence[ImageSource | Sequence[ImageSource]],
        regions: Sequence[Regions | Sequence[Regions]],
        image_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Prepares the images and regions of rows; see `__call__` for what it takes and returns."""
        if len(images) != len(regions):
            raise ValueError(f"got regions for {len(regions)} samples but {len(images)} images")
        rows = open_rows(images, len(images))
        distinct = {id(image): image for row in rows for image in row}
        views = {key: self.views(image.size) for key, image in distinct.items()}
        if image_features is None:
            prepared = [
                self.image_processor.prepare(view.crop(distinct[key]))
                for key, image_views in views.items()
                for view in image_views
            ]
            image_features = torch.stack(prepared)
        number = {key: index for index, key in enumerate(distinct)}
        placed = place_regions(
            list(views.values()),
            [[number[id(image)] for image in row] for row in rows],
            [regions_by_image(given, len(row)) for row, given in zip(rows, regions, strict=True)],
        )
        return {"pixel_values": image_features, **placed}

    def views(self, image_wh: tuple[int, int]) -> list[View]:
        """Lists the views, of N tokens each, that show an image of this size (`mllm/views.py`)."""
        resize = self.image_processor.resize
        return image_views(image_wh, self.image_size, self.max_tiles, resize)

    def tokenize(self, text: str) -> list[int]:
        """Splits a rendered chat into token ids; the template has written all special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_conversation(
        self, messages: Messages, image_sizes: Iterable[tuple[int, int]] = ()
    ) -> tuple[list[int], list[int]]:
        """Turns a chat with answers into (input ids, labels), for training.

        Each answer and its end-of-sequence token are labels, all else is `IGNORE_INDEX`. The
        chat is tokenised in pieces, cut where an answer starts and ends: what the model learns to
        continue is then token for token what it sees when it generates.

        Args:
            image_sizes: (width, height) of the chat's images in order; needed for tiles alone.

        Raises:
            ValueError: the chat template changes earlier messages when one is added.
        """
        parts = list(self.encode_exchanges(messages, image_sizes))
        return [i for ids, _ in parts for i in ids], [i for _, labels in parts for i in labels]

    def encode_exchanges(
        self, messages: Messages, image_sizes: Iterable[tuple[int, int]] = ()
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yields what `encode_conversation` joins, each answer with what stands before it."""
        rendered, sizes = "", iter(image_sizes)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:turn], add_generation_prompt=True)
            through_answer = self.render(messages[: turn + 1])
            if not (prompt.startswith(rendered) and through_answer.startswith(prompt)):
                raise ValueError(
                    f"the chat template rewrites earlier messages when message {turn} is added, "
                    "so the answer's tokens cannot be told; use a template that only appends"
                )
            question_ids = self.tokenize(self._expand_images(prompt[len(rendered) :], sizes))
            answer_ids = self.tokenize(through_answer[len(prompt) :])
            ignored = [IGNORE_INDEX] * len(question_ids)
            yield question_ids + answer_ids, ignored + self._answer_labels(answer_ids)
            rendered = through_answer

    def encode_prompt(
        self, messages: Messages, image_sizes: Iterable[tuple[int, int]] = ()
    ) -> list[int]:
        """Turns a chat that the model is to continue into input ids.

        Earlier questions and answers have the ids that `encode_conversation` gives them: a
        tokenizer may split a text differently where a question ends and its answer starts. A
        template that rewrites earlier messages leaves no such pieces, and all is split at once.

        Args:
            image_sizes: see `encode_conversation`.
        """
        sizes = list(image_sizes)
        prompt = self.render(messages, add_generation_prompt=True)
        ids: list[int] = []
        rendered, left = "", iter(sizes)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if turn == 0:  # templates render nothing of no message
                return self.tokenize(self._expand_images(prompt, iter(sizes)))
            question = self.render(messages[:turn], add_generation_prompt=True)
            through_answer = self.render(messages[: turn + 1])
            starts = (rendered, question, through_answer, prompt)
            if not all(b.startswith(a) for a, b in itertools.pairwise(starts)):
                return self.tokenize(self._expand_images(prompt, iter(sizes)))
            ids += self.tokenize(self._expand_images(question[len(rendered) :], left))
            ids += self.tokenize(through_answer[len(question) :])
            rendered = through_answer
        return ids + self.tokenize(self._expand_images(prompt[len(rendered) :], left))

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Writes a chat as text by the template, one `<image>` per image.

        Raises:
            TimeLimitExceeded: the template takes longer than `_RENDER_SECONDS`.
        """
        told = "the chat template, which is the model's: its directory may be damaged or hostile"
        with time_limit(_RENDER_SECONDS, told):
            return self.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
            )

    def pad(
        self,
        rows: Sequence[Sequence[int]],
        *,
        labels: Sequence[Sequence[int]] | None = None,
        side: str = "right",
    ) -> dict[str, Tensor]:
        """Pads rows of ids to input_ids and attention_mask int64[B, T], and labels if given."""
        length = max(map(len, rows))

        def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            fillers = [[fill] * (length - len(row)) for row in values]
            pairs = zip(fillers, map(list, values), strict=True)
            return torch.tensor([f + v if side == "left" else v + f for f, v in pairs])

        batch = {
            "input_ids": padded(rows, self.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in rows], 0),
        }
        if labels is not None:
            batch["labels"] = padded(labels, IGNORE_INDEX)
        return batch

    def decode_answer(self, ids: Sequence[int] | Tensor) -> str:
        """Decodes generated ids up to the end of sequence; location tokens are kept."""
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return self.decode_ids(values[: self.answer_length(values)]).strip()

    def decode_ids(self, ids: Sequence[int]) -> str:
        """Decodes generated ids with outer blanks; location tokens are kept."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def post_process_grounding(
        self,
        outputs: Tensor | Sequence[Sequence[int]] | Sequence[str],
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        *,
        num_prompt_tokens: int = 0,
    ) -> list[dict[str, Any]]:
        """Reads the boxes of answers, as the detectors of Transformers post-process theirs.

        Args:
            outputs: what `generate` returned (int64[B, T] or lists of ids), or the decoded texts.
            target_sizes: (height, width) in pixels of each row's upright image, a list or
                int64[B, 2]. None leaves the boxes in 0..1.
            num_prompt_tokens: how many ids of each row are the prompt's and are skipped
                (`inputs["input_ids"].shape[1]`, where `outputs` still has the prompt).

        Returns:
            for each row a dict of `boxes` float[R, 4] xyxy, those anywhere in the text; `text`; and
            `failure`, why the text is not boxes and nothing else (see `ParsedBoxes`), or None.

        Raises:
            ValueError: the number of sizes differs, or the boxes are not in the text because the
                model answers them with a box head.
        """
        if self.box_head:
            raise ValueError(
                "this model's box head reads its boxes off hidden states, so they are not in the "
                "text; ask with cloc_mllm.GroundingPredictor"
            )
        rows = outputs.tolist() if isinstance(outputs, Tensor) else outputs
        texts = [
            row if isinstance(row, str) else self.decode_answer(row[num_prompt_tokens:])
            for row in rows
        ]
        sizes = [None] * len(texts) if target_sizes is None else list(target_sizes)
        if len(sizes) != len(texts):
            raise ValueError(f"got {len(texts)} answers but {len(sizes)} target_sizes")
        results = []
        for text, size in zip(texts, sizes, strict=True):
            boxes = Boxes.normalized([box for _, _, box in self.coordinates.find(text)[0]])
            if size is not None:
                boxes = boxes.to_pixels(width=float(size[1]), height=float(size[0]))
            failure = self.coordinates.parse(text).failure
            results.append({"boxes": boxes.xyxy.float(), "text": text, "failure": failure})
        return results

    def answer_length(self, ids: Sequence[int]) -> int:
        """Counts the generated ids before the end of sequence."""
        ends = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return next((place for place, value in enumerate(ids) if value in ends), len(ids))

    def _expand(self, texts: list[str], images: Sequence[Sequence[Any]]) -> list[str]:
        for row, (text, row_images) in enumerate(zip(texts, images, strict=True)):
            if text.count(IMAGE_TOKEN) != len(row_images):
                raise ValueError(
                    f"sample {row} has {text.count(IMAGE_TOKEN)} {IMAGE_TOKEN} placeholders but "
                    f"{len(row_images)} images; write one placeholder per image"
                )
        sizes = (image.size for row_images in images for image in row_images)
        return [self._expand_images(text, sizes) for text in texts]

    def _expand_images(self, text: str, sizes: Iterator[tuple[int, int]]) -> str:
        """Repeats each `<image>` N times per view of its image."""
        if not self.max_tiles:
            return text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.num_image_tokens)
        before, *after = text.split(IMAGE_TOKEN)
        counts = (len(self.views(next(sizes))) * self.num_image_tokens for _ in after)
        return before + "".join(IMAGE_TOKEN * next(counts) + piece for piece in after)

    def _answer_labels(self, answer_ids: list[int]) -> list[int]:
        """Labels up to the first end of sequence; what a template writes after it is no answer."""
        eos = self.tokenizer.eos_token_id
        end = answer_ids.index(eos) + 1 if eos in answer_ids else len(answer_ids)
        return answer_ids[:end] + [IGNORE_INDEX] * (len(answer_ids) - end)

    def _fingerprint(self) -> dict[str, Any]:
        """Names what must be equal in training and use (contract C7)."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        template = str(self.chat_template)
        # These came later. Each is left out at the value that all models had before, so that older
        # ones still load.
        later = {
            "box_head": (self.box_head, False),
            "max_tiles": (self.max_tiles, 0),
            "prompts": (self.asked_in.digest(), FIRST_WORDINGS),
            "taught": (self.taught, []),
            "links": ("<p>phrase</p>BOXES" if "grounded_caption" in self.taught else "", ""),
        }
        return {
            **{name: value for name, (value, first) in later.items() if value != first},
            "image_size": self.image_size,
            "num_image_tokens": self.num_image_tokens,
            "resize": self.image_processor.preprocessing.pixel_fingerprint()["resize"],
            "padding_rgb": self.image_processor.padding_rgb,
            "pixel_mean": self.image_processor.image_mean,
            "pixel_std": self.image_processor.image_std,
            "box_frame": "original image, xyxy, 0..1",
            "box_format": self.box_format,
            "num_bins": self.coordinates.num_bins,
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
            "chat_template": hashlib.sha256(template.encode()).hexdigest()[:16],
        }


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, box_format: BoxFormat) -> None:
    """Adds the placeholders and the location tokens to a language model's tokenizer.

    Location tokens are ordinary tokens, so that decoding with `skip_special_tokens` keeps them.
    """
    special = [IMAGE_TOKEN, REGION_TOKEN]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in special], True)
    written = [*box_format.tokens(), *([BOX_TOKEN] if box_format.head else [])]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in written])
    ids = token_ids(tokenizer, box_format.tokens())
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(
            "the tokenizer already has some of the location tokens, but not all in a row; "
            "use a tokenizer without <loc_*> tokens, or another num_bins"
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Looks up tokens of the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]
