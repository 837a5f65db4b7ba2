"""Records to what the MLLM trains on: questions about pictures, or about scenes in words.

Letters: B images (one row each), S canvas side, N image tokens, T text tokens, R regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cloc_mllm.config import ConversationConfig
from cloc_mllm.data.conversations import Turn, build_turns
from cloc_mllm.data.records import Box, Record, Region
from cloc_mllm.mllm.packing import PackedRow, pack_questions, pad_rows
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
        scene: for scenes in words, what stands in the place of the pictures.
        num_dropped: questions that did not fit into `max_length`.
        ids: the records' ids, in order.
    """

    inputs: dict[str, Tensor]
    scene: SceneTargets | None
    num_dropped: int
    ids: list[str]

    def to(self, device: torch.device | str) -> MllmBatch:
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, scene=self.scene and self.scene.to(device))


class ConversationCollator:
    """`(sample_seed, Record)` items -> MllmBatch; the seed alone decides which questions.

    Args:
        pictures: False leaves the pictures out and gives `scene` instead.
        phrases: of the whole data set, for questions about what an image does not show.
    """

    def __init__(
        self,
        processor: ClocMllmProcessor,
        config: ConversationConfig,
        *,
        pictures: bool = True,
        phrases: Sequence[str] = (),
    ) -> None:
        self.processor = processor
        self.config = config
        self.pictures = pictures
        self.phrases = phrases

    def __call__(self, items: Items) -> MllmBatch:
        rows: list[PackedRow] = []
        regions: list[list[Region]] = []
        answer_boxes: list[Box] = []
        num_dropped = 0
        for seed, record in items:
            turns = self._turns(record, np.random.default_rng(seed))
            row = pack_questions(
                [self.processor.encode_conversation(as_messages(turn)) for turn in turns],
                self.processor.image_token_id,
                self.config.max_length,
            )
            rows.append(row)
            num_dropped += len(turns) - len(row.kept)
            kept = [turns[index] for index in row.kept]
            regions.append([turn.region for turn in kept if turn.region is not None])
            answer_boxes += [turn.answer_box for turn in kept if turn.answer_box is not None]
        records = [record for _, record in items]
        inputs = pad_rows(rows, self.processor.tokenizer.pad_token_id)
        scene = None
        if self.processor.box_head:
            inputs["answer_boxes"] = torch.tensor(answer_boxes).reshape(-1, 4)
        if self.pictures:
            inputs |= self.processor.vision_inputs(
                [record.load_image() for record in records],
                [[region.box for region in of_record] for of_record in regions],
            )
        else:
            scene = scene_targets(self.processor, records, regions)
        return MllmBatch(inputs, scene, num_dropped, [record.id for record in records])

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


def as_messages(turn: Turn) -> list[dict[str, Any]]:
    """The chat of one question about an image, with its answer."""
    question = [{"type": "image"}, {"type": "text", "text": turn.question}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": turn.answer}]
