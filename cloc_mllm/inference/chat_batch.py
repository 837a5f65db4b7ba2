"""Answers several chats together, token by token; chats join and leave between two tokens.

Each step runs the language model once for all rows, which takes little longer than for one. Chats
that join at the same time are read together, and what several start with, their images, is read
once (`known_starts`). An answer does not depend on which chats are answered beside it or before it,
but for rounding.

Letters: B rows, T tokens of the longest row, P of them read already, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from cloc_mllm.inference.answers import Generation, read_answer
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.inputs import EncodedImage
from cloc_mllm.inference.known_starts import KnownStarts, Start
from cloc_mllm.inference.results import Answer
from cloc_mllm.inference.sampling import Sampling
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.mllm.vision_inputs import VisionInputs

_BROKEN_CHARACTER = "\ufffd"  # how the first tokens of a character of several bytes decode
_MAX_TOKENS = 16_384  # B x T, prompts and answers, so that the cache stays small


@dataclass(eq=False)
class Row:
    """A chat and its answer so far.

    Args:
        inputs: what the processor made of it, for one row; its images are encoded.
        images: the images in the order of their views in `inputs`.
        image_wh: size of the picture that boxes are of; None if there is not exactly one.
        limit: the largest number of new tokens.
        on_token: see `answer_chat`.

    Attributes:
        ids: the new tokens, with the end of sequence.
        log_probs: their log-probabilities, before temperature and top_p.
        hidden: the hidden state float[H] that wrote each; empty without a box head.
        text: the decoded `ids`, with outer blanks and what follows a stop word.
        cut: the position in `text` of the first stop word, None without one.
        error: what `on_token` raised; the answer ends there.
    """

    processor: ClocMllmProcessor
    inputs: Mapping[str, Tensor]
    images: Sequence[EncodedImage]
    image_wh: tuple[int, int] | None
    sampling: Sampling
    limit: int
    on_token: Callable[[str], None]
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    text: str = ""
    cut: int | None = None
    error: Exception | None = None
    is_done: bool = False
    num_shown: int = 0

    def __post_init__(self) -> None:
        self.generator: torch.Generator | None = None
        if not self.sampling.is_greedy and self.sampling.seed is not None:
            self.generator = torch.Generator().manual_seed(self.sampling.seed)

    @property
    def num_prompt_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def choose(self, scores: Tensor) -> int:
        """Chooses the next token by the scores float[V]."""
        if self.sampling.is_greedy:
            return int(scores.argmax())
        warped = scores[None]
        warped = TemperatureLogitsWarper(self.sampling.temperature)(None, warped)
        warped = TopPLogitsWarper(self.sampling.top_p)(None, warped)
        return int(torch.multinomial(warped[0].softmax(-1).cpu(), 1, generator=self.generator))

    def add(self, token: int, log_prob: float, ends: bool) -> None:
        """Adds a token, and tells the listener what text has become certain by it."""
        self.ids.append(token)
        self.log_probs.append(log_prob)
        self.text = self.processor.decode_ids(self.ids[: self.processor.answer_length(self.ids)])
        places = [place for word in self.sampling.stop if (place := self.text.find(word)) >= 0]
        self.cut = min(places, default=None)
        self.is_done = ends or self.cut is not None or len(self.ids) == self.limit
        try:
            self._show(self._certain())
            if self.is_done:
                self._show(self.visible)
        except Exception as error:  # noqa: BLE001  `answer` raises it
            self.error, self.is_done = error, True

    @property
    def visible(self) -> str:
        return self.text[: self.cut].strip()

    @torch.inference_mode()
    def answer(self, predictor: GroundingPredictor) -> Answer:
        """Reads the finished answer. Raises what the listener raised."""
        if self.error is not None:
            raise self.error
        hidden = torch.stack(self.hidden) if self.hidden else None
        head = predictor.read_boxes(torch.tensor(self.ids), hidden, self.images)
        log_probs = torch.tensor(self.log_probs)
        written = Generation(self.ids, log_probs, *head, self.num_prompt_tokens, self.limit)
        return read_answer(self.processor, written, self.image_wh, self.cut)

    def _certain(self) -> str:
        """The visible text without an end that the next token may still change into a stop word."""
        text = self.text.lstrip()
        if self.cut is not None:
            return self.visible
        held = max((_overlap(text, word) for word in self.sampling.stop), default=0)
        return text[: len(text) - held].rstrip().rstrip(_BROKEN_CHARACTER).rstrip()

    def _show(self, text: str) -> None:
        self.on_token(text[self.num_shown :])
        self.num_shown = max(self.num_shown, len(text))


class ChatBatch:
    """The chats that are being answered.

    Language models with a sliding window answer one chat at a time: in their caches rows of
    different lengths cannot stand beside each other.

    Args:
        known_bytes: memory for how chats started that have left; the next ones with the same images
            continue from there.

    Raises:
        ValueError: the language model keeps a state instead of a cache (Mamba).
    """

    def __init__(self, predictor: GroundingPredictor, known_bytes: int = 0) -> None:
        if predictor.model.language_model._is_stateful:
            raise ValueError(
                "the language model keeps a state, which chats cannot continue token by token yet; "
                "ask with GroundingPredictor.ask"
            )
        self.predictor = predictor
        self.rows: list[Row] = []
        model = predictor.model
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._ends.add(predictor.processor.tokenizer.eos_token_id)
        self._text_config = model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=self._text_config).layers
        is_plain = all(type(layer) is DynamicLayer for layer in layers)
        self._takes_several = is_plain
        self._known = KnownStarts(known_bytes)
        self._attention_mask: Tensor
        self._cache: DynamicCache

    def has_room(self, row: Row, joining: Sequence[Row] = ()) -> bool:
        """Whether a row can join, beside those that `joining` names."""
        rows = [*self.rows, *joining, row]
        if len(rows) == 1:
            return True
        longest = max(one.num_prompt_tokens + one.limit for one in rows)
        return self._takes_several and len(rows) * longest <= _MAX_TOKENS

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> list[Row]:
        """Reads the chats of rows and writes their first tokens; returns the rows that end."""
        keys = {row: self._key(row) for row in rows}
        starts = {key: self._known.get(key) for key in keys.values() if key is not None}
        whole: dict[Row, Hashable] = {}  # the first rows with a start that is not known yet
        for row, key in keys.items():
            if key is None or (starts[key] is None and key not in whole.values()):
                whole[row] = key
        rest = [row for row in rows if row not in whole]
        ended = self._read_whole(whole, starts) if whole else []
        return ended + (self._read_rest(rest, [starts[keys[row]] for row in rest]) if rest else [])

    def _key(self, row: Row) -> Hashable | None:
        """Names how a chat starts, up to its last image; None if it has no start to share: there is
        no image, or a region lies before the last one."""
        length = self._start_length(row)
        if not length:
            return None
        images = tuple(id(image) for image in row.images)
        places = row.inputs["image_index"].tolist()
        return images, tuple(places), tuple(row.inputs["input_ids"][0, :length].tolist())

    def _start_length(self, row: Row) -> int:
        """Counts the tokens up to the last image, 0 if they cannot be shared."""
        ids, config = row.inputs["input_ids"][0], self.predictor.model.config
        if not self._takes_several or "image_index" not in row.inputs:
            return 0
        length = int((ids == config.image_token_id).nonzero().max()) + 1
        has_region = bool((ids[:length] == config.region_token_id).any())
        return 0 if has_region or length == len(ids) else length

    def _read_whole(
        self, rows: Mapping[Row, Hashable], starts: dict[Hashable, Start | None]
    ) -> list[Row]:
        """Reads rows from their first token, and adds how they start to `starts`."""
        inputs = _side_by_side(self.predictor.processor, list(rows))
        options = {name: inputs[name] for name in VisionInputs._fields if name in inputs}
        cache = DynamicCache(config=self._text_config)
        mask = inputs["attention_mask"]
        logits, hidden = self._forward(inputs["input_ids"], mask, cache, **options)
        for place, (row, key) in enumerate(rows.items()):
            if key is not None:
                first = mask.shape[1] - row.num_prompt_tokens
                columns = slice(first, first + self._start_length(row))
                starts[key] = start = Start.of_row(cache, place, columns, row.images)
                self._known.add(key, start)
        return self._add(list(rows), logits, hidden, cache, mask)

    def _read_rest(self, rows: Sequence[Row], starts: Sequence[Start | None]) -> list[Row]:
        """Reads rows behind their starts.

        In a row, padding stands before the start and between the start and the rest.
        """
        known = [start for start in starts if start is not None]
        longest = max(start.num_tokens for start in known)
        cache = DynamicCache(config=self._text_config)
        for index, layers in enumerate(zip(*(start.layers for start in known), strict=True)):
            keys, values = (
                torch.cat([_padded(part, longest, -2) for part in parts])
                for parts in zip(*layers, strict=True)
            )
            cache.update(keys, values, index)
        rests = [
            row.inputs["input_ids"][0, start.num_tokens :]
            for row, start in zip(rows, known, strict=True)
        ]
        padded = self.predictor.processor.pad([rest.tolist() for rest in rests], side="left")
        padded = {name: value.to(rests[0].device) for name, value in padded.items()}
        ones = padded["attention_mask"].new_ones
        read = torch.cat([_padded(ones(1, start.num_tokens), longest, -1) for start in known])
        mask = torch.cat([read, padded["attention_mask"]], 1)
        options = self._regions(rows)
        logits, hidden = self._forward(padded["input_ids"], mask, cache, **options)
        return self._add(rows, logits, hidden, cache, mask)

    def _regions(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Encodes the regions of rows whose images are in the cache."""
        counts = torch.tensor([len(row.inputs["region_boxes"]) for row in rows])
        asking = [row for row in rows if len(row.inputs["region_boxes"])]
        if not asking:
            return {}
        inputs = _side_by_side(self.predictor.processor, asking)
        given = {name: inputs[name] for name in VisionInputs._fields if name in inputs}
        features = self.predictor.model.encode_regions(VisionInputs(**given))
        places = torch.arange(len(rows)).repeat_interleave(counts)
        return {"region_features": features, "region_image_index": places.to(features.device)}

    def _add(
        self,
        rows: Sequence[Row],
        logits: Tensor,
        hidden: Tensor | None,
        cache: DynamicCache,
        mask: Tensor,
    ) -> list[Row]:
        """Writes the first tokens of rows that have been read; returns the rows that end."""
        ended = self._write(rows, logits, hidden)
        if self.rows:
            self._append(cache, mask)
        else:
            self._cache, self._attention_mask = cache, mask
        self.rows += rows
        return self._leave(ended)

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Writes one token of each row; returns the rows that end."""
        tokens = torch.tensor([[row.ids[-1]] for row in self.rows])
        mask = self._attention_mask
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        self._attention_mask = mask
        logits, hidden = self._forward(tokens.to(mask.device), mask, self._cache)
        return self._leave(self._write(self.rows, logits, hidden))

    def clear(self) -> None:
        """Drops all rows."""
        self.rows = []

    def _forward(
        self, input_ids: Tensor, mask: Tensor, cache: DynamicCache, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Reads what the cache does not hold; gives logits float[B, V] and, for a box head, the
        hidden states float[B, H] of the last tokens."""
        model = self.predictor.model
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        num_new = mask.shape[1] - cache.get_seq_length()
        if model._supports_logits_to_keep():
            options["logits_to_keep"] = 1
        with model.hidden_states_of_answers() as states:
            output = model(
                input_ids=input_ids[:, -num_new:],
                attention_mask=mask,
                position_ids=positions[:, -num_new:],
                past_key_values=cache,
                use_cache=True,
                **options,
            )
        return output.logits[:, -1].float(), states[0] if states else None

    def _write(self, rows: Sequence[Row], logits: Tensor, hidden: Tensor | None) -> list[Row]:
        log_probs = logits.log_softmax(-1)
        grammar = self.predictor.grammar
        for place, row in enumerate(rows):
            scores = logits[place]
            if grammar.location_start is not None:
                scores = scores.clone()
                for banned in grammar.banned_in_text(row.ids):
                    scores[banned] = -torch.inf
                if row.sampling.is_greedy:
                    (scores,) = grammar.weigh_next_box([row.ids], scores[None])
            if hidden is not None:
                row.hidden.append(hidden[place])
                if not self._may_write_box(row, scores):
                    scores = scores.clone()
                    scores[grammar.box_token] = -torch.inf
            token = row.choose(scores)
            row.add(token, float(log_probs[place, token]), token in self._ends)
        return [row for row in rows if row.is_done]

    def _may_write_box(self, row: Row, scores: Tensor) -> bool:
        token = self.predictor.grammar.box_token
        if row.ids[-1:] != [token] or (row.sampling.is_greedy and int(scores.argmax()) != token):
            return True
        return self.predictor.may_write_box(row.ids, torch.stack(row.hidden), row.images)

    def _append(self, cache: DynamicCache, mask: Tensor) -> None:
        """Puts the rows of a cache below those here, all aligned at their last tokens."""
        length = max(mask.shape[1], self._attention_mask.shape[1])
        self._attention_mask = torch.cat(
            [_padded(each, length, -1) for each in (self._attention_mask, mask)]
        )
        for old, new in zip(_layers(self._cache), _layers(cache), strict=True):
            old.keys = torch.cat([_padded(each, length, -2) for each in (old.keys, new.keys)])
            old.values = torch.cat([_padded(each, length, -2) for each in (old.values, new.values)])

    def _leave(self, ended: list[Row]) -> list[Row]:
        """Takes ended rows out, and the columns that only they needed."""
        if not ended:
            return ended
        kept = [place for place, row in enumerate(self.rows) if not row.is_done]
        self.rows = [self.rows[place] for place in kept]
        if self.rows:
            index = torch.tensor(kept, device=self._attention_mask.device)
            mask = self._attention_mask[index]
            first = int(mask.any(0).long().argmax())
            self._attention_mask = mask[:, first:]
            for layer in _layers(self._cache):
                layer.keys = layer.keys[index, :, first:]
                layer.values = layer.values[index, :, first:]
        return ended


def _layers(cache: DynamicCache) -> list[Any]:
    """The layers of attention, each with `keys` and `values`."""
    return list(cache.layers)


def _padded(values: Tensor, length: int, dim: int) -> Tensor:
    """Pads a dimension in front with zeros."""
    missing = length - values.shape[dim]
    if not missing:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values.new_zeros(shape), values], dim)


def _side_by_side(processor: ClocMllmProcessor, rows: Sequence[Row]) -> Mapping[str, Any]:
    """Makes one batch of rows, in which an image that several share is there once."""
    if len(rows) == 1:
        return rows[0].inputs
    device = rows[0].inputs["input_ids"].device
    padded = processor.pad([row.inputs["input_ids"][0].tolist() for row in rows], side="left")
    inputs = {name: value.to(device) for name, value in padded.items()}
    seen: dict[tuple[int, int], int] = {}  # image and view -> its place among the distinct ones
    pixels, frames, image_index, boxes, region_index = [], [], [], [], []
    num_blocks = 0
    for row in rows:
        if "pixel_values" not in row.inputs:
            continue
        places = []
        names = [(id(image), view) for image in row.images for view in range(_num_views(image))]
        for name, values, frame in zip(
            names, row.inputs["pixel_values"], row.inputs["image_frame"], strict=True
        ):
            if name not in seen:
                seen[name] = len(seen)
                pixels.append(values)
                frames.append(frame)
            places.append(seen[name])
        its_index = row.inputs["image_index"]
        image_index.append(torch.tensor(places, device=device)[its_index])
        boxes.append(row.inputs["region_boxes"])
        region_index.append(row.inputs["region_image_index"] + num_blocks)
        num_blocks += len(its_index)
    if pixels:
        inputs |= {"pixel_values": torch.stack(pixels), "image_frame": torch.stack(frames)}
        inputs |= {"image_index": torch.cat(image_index), "region_boxes": torch.cat(boxes)}
        inputs["region_image_index"] = torch.cat(region_index)
    return inputs


def _num_views(image: EncodedImage) -> int:
    return len(image.features.tokens)


def _overlap(text: str, word: str) -> int:
    """The length of the longest end of `text` with which `word` begins."""
    lengths = range(min(len(text), len(word) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(word[:length])), 0)
