"""Makes training batches of the MLLM from records: questions about pictures or scenes in words.

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
from cloc_mllm.data.conversations import QuestionAnswer, build_questions
from cloc_mllm.data.records import Record, Region
from cloc_mllm.mllm.feature_cache import FeatureCache, record_inputs
from cloc_mllm.mllm.packing import PackedRow, balanced_sequences, pack_questions, pad_sequences
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.mllm.scene_tokens import SceneTargets, scene_targets

Items = Sequence[tuple[int, Record]]


@dataclass
class MllmBatch:
    """One rank's batch.

    Attributes:
        inputs: the model's keyword arguments: input_ids, labels, position_ids int64[B, T],
            attention_mask float[B, 1, T, T]; for pictures also `vision_inputs` of the processor;
            with a box head answer_boxes float[K, 4] of the labels' `<box>` tokens.
        scene: the targets that stand in the place of the pictures, for scenes in words.
        num_dropped: number of questions that did not fit into `max_length`.
        ids: the records' ids in the order of the pictures, sequence by sequence.
    """

    inputs: dict[str, Tensor]
    scene: SceneTargets | None
    num_dropped: int
    ids: list[str]

    def to(self, device: torch.device | str) -> MllmBatch:
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, scene=self.scene and self.scene.to(device))


@dataclass(frozen=True)
class PackedRecord:
    """A record as one row, with the questions that fit into it."""

    record: Record
    row: PackedRow
    questions: list[QuestionAnswer]
    num_dropped: int

    @property
    def regions(self) -> list[Region]:
        return [pair.region for pair in self.questions if pair.region is not None]


class ConversationCollator:
    """Makes an `MllmBatch` of `(sample_seed, Record)` items; the seed alone decides the questions.

    Args:
        pictures: False leaves the pictures out and gives `scene` instead.
        phrases: phrases of the whole data set, for questions about what an image does not show.
        features: cached features of all pictures, which are used instead of the pictures.
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
        packed = [self.pack(record, seed) for seed, record in items]
        sequences = [[index] for index in range(len(packed))]
        if self.config.pack:
            lengths = [len(one.row.input_ids) for one in packed]
            sequences = balanced_sequences(lengths, self.config.max_length)
        inputs = pad_sequences(
            [[packed[index].row for index in sequence] for sequence in sequences],
            self.processor.tokenizer.pad_token_id,
        )
        packed = [packed[index] for sequence in sequences for index in sequence]
        records = [one.record for one in packed]
        regions = [one.regions for one in packed]
        scene = None
        if self.processor.box_head:
            pairs = (pair for one in packed for pair in one.questions)
            answers = [pair.answer_box for pair in pairs if pair.answer_box is not None]
            inputs["answer_boxes"] = torch.tensor(answers).reshape(-1, 4)
        if self.pictures:
            boxes = [[region.box for region in row_regions] for row_regions in regions]
            inputs |= record_inputs(self.processor, records, boxes, self.features)
        else:
            scene = scene_targets(self.processor, records, regions)
        num_dropped = sum(one.num_dropped for one in packed)
        return MllmBatch(inputs, scene, num_dropped, [record.id for record in records])

    def pack(self, record: Record, seed: int) -> PackedRecord:
        """Packs the questions of one record into a row; its picture is not read."""
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
        return PackedRecord(record, row, kept, len(questions) - len(kept))

    def _questions(self, record: Record, rng: np.random.Generator) -> list[QuestionAnswer]:
        coordinates = self.processor.coordinates
        questions = build_questions(record, self.config, coordinates, rng, self.phrases)
        if not questions:
            raise ValueError(
                f"record {record.id} gives nothing to learn: none of its {len(record.regions)} "
                f"regions and {len(record.captions)} captions serves a task whose weight in "
                "`conversations` is above 0; leave such records out of data.train"
            )
        return questions


def as_messages(pair: QuestionAnswer) -> list[dict[str, Any]]:
    """Writes one question about an image and its answer as a chat."""
    question = [{"type": "image"}, {"type": "text", "text": pair.question}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": pair.answer}]
