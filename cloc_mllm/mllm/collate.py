"""Makes training batches of the MLLM from records and chats, about pictures or scenes in words.

Letters: B sequences, S canvas side, N image tokens, T text tokens, R regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cloc_mllm.config import ConversationConfig
from cloc_mllm.data.chats import (
    Chat,
    MentionedBox,
    PlaceText,
    exchanges_of,
    mentioned_boxes,
    write_turn,
)
from cloc_mllm.data.conversations import Negative, QuestionAnswer, build_questions
from cloc_mllm.data.feature_cache import FeatureCache, Picture
from cloc_mllm.data.records import Record, Region
from cloc_mllm.mllm.feature_cache import picture_inputs
from cloc_mllm.mllm.packing import PackedRow, balanced_sequences, pack_questions, pad_sequences
from cloc_mllm.mllm.places import Places, places_of
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.mllm.scene_tokens import SceneTargets, scene_targets

Items = Sequence[tuple[int, Record | Chat]]


class TooLongError(ValueError):
    """A chat of which not even the first question and answer fit into `max_length`."""


@dataclass
class MllmBatch:
    """One rank's batch.

    Attributes:
        inputs: the model's keyword arguments: input_ids, labels, position_ids int64[B, T],
            attention_mask bool[B, 1, T, T]; for pictures also `vision_inputs` of the processor, and
            places; with a box head answer_boxes float[K, 4] of the labels' `<box>` tokens, and
            answer_image_index int64[K].
        scene: the targets that stand in the place of the pictures, for scenes in words.
        num_dropped: number of questions that did not fit into `max_length`.
        ids: of the records and chats, sequence by sequence.
    """

    inputs: dict[str, Any]
    scene: SceneTargets | None
    num_dropped: int
    ids: list[str]

    def to(self, device: torch.device | str) -> MllmBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MllmBatch:
        """Pins the tensors, for `DataLoader(pin_memory=True)`, which looks for this method."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> MllmBatch:
        inputs = {
            name: value.each(change) if isinstance(value, Places) else change(value)
            for name, value in self.inputs.items()
        }
        return replace(self, inputs=inputs, scene=self.scene and self.scene.each(change))


@dataclass(frozen=True)
class PackedItem:
    """A record or chat as one row, with the questions that fit into it.

    Attributes:
        pictures: in the order in which the row shows them.
        mentioned: what its `<region>` tokens stand for, in their order.
        answered: the boxes of its answers, in their order.
        num_dropped: questions, with their answers, that did not fit.
        regions: those of a record that the row asks about.
    """

    id: str
    row: PackedRow
    pictures: Sequence[Picture]
    mentioned: Sequence[MentionedBox]
    answered: Sequence[MentionedBox]
    num_dropped: int
    regions: Sequence[Region] = ()


class ConversationCollator:
    """Makes an `MllmBatch` of `(sample_seed, Record or Chat)` items.

    The seed alone decides the questions about a record. A chat is learnt as it is, from its start
    on while its questions and answers fit.

    Args:
        pictures: False leaves the pictures out and gives `scene` instead.
        negatives: things of the whole data set, to ask for what an image does not show.
        features: cached features of all pictures, which are used instead of the pictures.
    """

    def __init__(
        self,
        processor: ClocMllmProcessor,
        config: ConversationConfig,
        *,
        pictures: bool = True,
        negatives: Sequence[Negative] = (),
        features: FeatureCache | None = None,
    ) -> None:
        self.processor = processor
        self.config = config
        self.pictures = pictures
        self.negatives = negatives
        self.features = features

    def __call__(self, items: Items) -> MllmBatch:
        packed = [self.pack(record, seed) for seed, record in items]
        sequences = [[index] for index in range(len(packed))]
        if self.config.pack:
            lengths = [len(one.row.input_ids) for one in packed]
            sequences = balanced_sequences(lengths, self.config.max_length)
        inputs: dict[str, Any] = pad_sequences(
            [[packed[index].row for index in sequence] for sequence in sequences],
            self.processor.tokenizer.pad_token_id,
            additive=False,
        )
        packed = [packed[index] for sequence in sequences for index in sequence]
        scene = None
        if self.processor.box_head:
            answers = [of.box for one in packed for of in one.answered]
            inputs["answer_boxes"] = torch.tensor(answers).reshape(-1, 4)
        if self.pictures:
            inputs |= picture_inputs(
                self.processor,
                [one.pictures for one in packed],
                [one.mentioned for one in packed],
                self.features,
                answered=[one.answered for one in packed] if self.processor.box_head else (),
            )
            inputs["places"] = places_of(inputs, *self.processor.placeholder_ids())
        else:
            records = [of for one in packed for of in one.pictures if isinstance(of, Record)]
            scene = scene_targets(self.processor, records, [one.regions for one in packed])
        num_dropped = sum(one.num_dropped for one in packed)
        return MllmBatch(inputs, scene, num_dropped, [one.id for one in packed])

    def pack(self, item: Record | Chat, seed: int) -> PackedItem:
        """Packs one item into a row; its pictures are not read."""
        return self._of_record(item, seed) if isinstance(item, Record) else self._of_chat(item)

    def _of_record(self, record: Record, seed: int) -> PackedItem:
        questions = self._questions(record, np.random.default_rng(seed))
        sizes = [(record.width, record.height)]
        try:
            chats = [
                self.processor.encode_conversation(as_messages(pair), sizes) for pair in questions
            ]
            row = pack_questions(chats, self.processor.image_token_id, self.config.max_length)
        except ValueError as error:
            raise ValueError(f"record {record.id}: {error}") from error
        kept = [questions[index] for index in row.kept]
        regions = [pair.region for pair in kept if pair.region is not None]
        return PackedItem(
            record.id,
            row,
            [record],
            [MentionedBox(0, region.box) for region in regions],
            [MentionedBox(0, box) for pair in kept for box in pair.answer_boxes],
            len(questions) - len(kept),
            regions,
        )

    def _of_chat(self, chat: Chat) -> PackedItem:
        """A chat is cut before the first question that no longer fits with its answer."""
        processor, with_tokens = self.processor, self.config.region_tokens
        exchanges = exchanges_of(chat)
        messages = chat_messages(chat, processor.coordinates, region_tokens=with_tokens)
        sizes = [(of.width, of.height) for of in chat.images]
        ids: list[int] = []
        labels: list[int] = []
        num_kept = 0
        for of_exchange, its_labels in processor.encode_exchanges(messages, sizes):
            if len(ids) + len(of_exchange) > self.config.max_length:
                break
            ids += of_exchange
            labels += its_labels
            num_kept += 1
        if not num_kept:
            raise TooLongError(
                f"chat {chat.id}: conversations.max_length {self.config.max_length} does not hold "
                f"its first question and answer, {len(of_exchange)} tokens; raise it"
            )
        turns = [turn for exchange in exchanges[:num_kept] for turn in exchange]
        num_shown = sum(piece.kind == "image" for turn in turns for piece in turn.pieces)
        asking = [turn for turn in turns if with_tokens and turn.role != "assistant"]
        answering = [turn for turn in turns if turn.role == "assistant"]
        return PackedItem(
            chat.id,
            PackedRow(ids, labels, list(range(len(ids))), [0] * len(ids), list(range(num_kept))),
            chat.images[:num_shown],
            [box for turn in asking for box in mentioned_boxes(turn)],
            [box for turn in answering for box in mentioned_boxes(turn)],
            len(exchanges) - num_kept,
        )

    def _questions(self, record: Record, rng: np.random.Generator) -> list[QuestionAnswer]:
        coordinates, wordings = self.processor.coordinates, self.processor.asked_in
        questions = build_questions(record, self.config, coordinates, rng, self.negatives, wordings)
        if not questions:
            raise ValueError(
                f"record {record.id} gives nothing to learn: none of its {len(record.regions)} "
                f"regions and {len(record.captions)} captions serves a task whose weight in "
                "`conversations` is above 0; leave such records out of data.train"
            )
        return questions


def chat_messages(
    chat: Chat, box_format: PlaceText, *, region_tokens: bool
) -> list[dict[str, Any]]:
    """A chat in the box format, as chat templates take it."""
    return [
        {"role": turn.role, "content": write_turn(turn, box_format, region_tokens=region_tokens)}
        for turn in chat.turns
    ]


def as_messages(pair: QuestionAnswer) -> list[dict[str, Any]]:
    """Writes one question about an image and its answer as a chat."""
    question = [{"type": "image"}, {"type": "text", "text": pair.question}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": pair.answer}]
