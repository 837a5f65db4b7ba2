"""Records and chats to what the MLLM trains on: about pictures, or about scenes in words.

Letters: B sequences, S canvas side, N image tokens, T text tokens, R regions.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from cloc_mllm.data.conversations import Turn, build_turns
from cloc_mllm.data.records import Box, Record, Region
from cloc_mllm.mllm.feature_cache import FeatureCache, Picture, picture_inputs
from cloc_mllm.mllm.packing import PackedRow, balanced_sequences, pack_questions, pad_sequences
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.mllm.scene_tokens import SceneTargets, scene_targets

Items = Sequence[tuple[int, Record | Chat]]


@dataclass
class MllmBatch:
    """One rank's batch.

    Attributes:
        inputs: the model's keyword arguments: input_ids, labels, position_ids int64[B, T],
            attention_mask float[B, 1, T, T]; for pictures also `vision_inputs` of the processor;
            with a box head answer_boxes float[K, 4] of the labels' `<box>` tokens.
        scene: for scenes in words, what stands in the place of the pictures.
        num_dropped: questions that did not fit into `max_length`.
        ids: of the records and chats, in the order of the sequences.
    """

    inputs: dict[str, Tensor]
    scene: SceneTargets | None
    num_dropped: int
    ids: list[str]

    def to(self, device: torch.device | str) -> MllmBatch:
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, scene=self.scene and self.scene.to(device))


@dataclass(frozen=True)
class Asked:
    """A record or chat as one row.

    Attributes:
        pictures: in the order in which the row shows them.
        mentioned: what its `<region>` tokens stand for, in their order.
        answer_boxes: of its answers, in their order.
        num_dropped: questions, with their answers, that did not fit.
        regions: those of a record that the row asks about.
    """

    id: str
    row: PackedRow
    pictures: Sequence[Picture]
    mentioned: Sequence[MentionedBox]
    answer_boxes: Sequence[Box]
    num_dropped: int
    regions: Sequence[Region] = ()


class ConversationCollator:
    """`(sample_seed, Record or Chat)` items -> MllmBatch; the seed alone decides which questions of
    a record. A chat is learnt as it is: its answers, from the first on while they fit.

    Args:
        pictures: False leaves the pictures out and gives `scene` instead.
        phrases: of the whole data set, for questions about what an image does not show.
        features: of all pictures, in place of the pictures.
    """

    def __init__(
        self,
        processor: ClocMllmProcessor,
        config: ConversationConfig,
        *,
        pictures: bool = True,
        phrases: Sequence[str] = (),
        features: FeatureCache | None = None,
    ) -> None:
        self.processor = processor
        self.config = config
        self.pictures = pictures
        self.phrases = phrases
        self.features = features

    def __call__(self, items: Items) -> MllmBatch:
        asked = [self.ask(record, seed) for seed, record in items]
        sequences = [[index] for index in range(len(asked))]
        if self.config.pack:
            lengths = [len(one.row.input_ids) for one in asked]
            sequences = balanced_sequences(lengths, self.config.max_length)
        inputs = pad_sequences(
            [[asked[index].row for index in sequence] for sequence in sequences],
            self.processor.tokenizer.pad_token_id,
        )
        asked = [asked[index] for sequence in sequences for index in sequence]
        scene = None
        if self.processor.box_head:
            answers = [box for one in asked for box in one.answer_boxes]
            inputs["answer_boxes"] = torch.tensor(answers).reshape(-1, 4)
        if self.pictures:
            inputs |= picture_inputs(
                self.processor,
                [one.pictures for one in asked],
                [one.mentioned for one in asked],
                self.features,
            )
        else:
            records = [of for one in asked for of in one.pictures if isinstance(of, Record)]
            scene = scene_targets(self.processor, records, [one.regions for one in asked])
        num_dropped = sum(one.num_dropped for one in asked)
        return MllmBatch(inputs, scene, num_dropped, [one.id for one in asked])

    def ask(self, item: Record | Chat, seed: int) -> Asked:
        """The row of one item; its pictures are not looked at."""
        return self._of_record(item, seed) if isinstance(item, Record) else self._of_chat(item)

    def _of_record(self, record: Record, seed: int) -> Asked:
        turns = self._turns(record, np.random.default_rng(seed))
        sizes = [(record.width, record.height)]
        try:
            row = pack_questions(
                [self.processor.encode_conversation(as_messages(turn), sizes) for turn in turns],
                self.processor.image_token_id,
                self.config.max_length,
            )
        except ValueError as error:
            raise ValueError(f"record {record.id}: {error}") from error
        kept = [turns[index] for index in row.kept]
        regions = [turn.region for turn in kept if turn.region is not None]
        return Asked(
            record.id,
            row,
            [record],
            [MentionedBox(0, region.box) for region in regions],
            [turn.answer_box for turn in kept if turn.answer_box is not None],
            len(turns) - len(kept),
            regions,
        )

    def _of_chat(self, chat: Chat) -> Asked:
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
            raise ValueError(
                f"chat {chat.id}: conversations.max_length {self.config.max_length} does not hold "
                f"its first question and answer, {len(of_exchange)} tokens; raise it"
            )
        turns = [turn for exchange in exchanges[:num_kept] for turn in exchange]
        num_shown = sum(piece.kind == "image" for turn in turns for piece in turn.pieces)
        asking = [turn for turn in turns if with_tokens and turn.role != "assistant"]
        answering = [turn for turn in turns if turn.role == "assistant"]
        return Asked(
            chat.id,
            PackedRow(ids, labels, list(range(len(ids))), [0] * len(ids), list(range(num_kept))),
            chat.images[:num_shown],
            [box for turn in asking for box in mentioned_boxes(turn)],
            [of.box for turn in answering for of in mentioned_boxes(turn)],
            len(exchanges) - num_kept,
        )

    def _turns(self, record: Record, rng: np.random.Generator) -> list[Turn]:
        coordinates = self.processor.coordinates
        turns = build_turns(record, self.config, coordinates, rng, self.phrases)
        if not turns:
            raise ValueError(
                f"record {record.id} gives nothing to learn: none of its {len(record.regions)} "
                f"regions and {len(record.captions)} captions serves a task whose weight in "
                "`conversations` is above 0; leave such records out of data.train"
            )
        return turns


def chat_messages(
    chat: Chat, box_format: PlaceText, *, region_tokens: bool
) -> list[dict[str, Any]]:
    """A chat in the box format, as chat templates take it."""
    return [
        {"role": turn.role, "content": write_turn(turn, box_format, region_tokens=region_tokens)}
        for turn in chat.turns
    ]


def as_messages(turn: Turn) -> list[dict[str, Any]]:
    """The chat of one question about an image, with its answer."""
    question = [{"type": "image"}, {"type": "text", "text": turn.question}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": turn.answer}]
