"""Labels one shard, from its images to its files: the work of a process, with or without Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.records import Record, validate_record
from cloc_mllm.devices import choose_device
from cloc_mllm.vesl.captioner import Captioner
from cloc_mllm.vesl.config import LabelConfig
from cloc_mllm.vesl.detector import load_detector
from cloc_mllm.vesl.phrases import PhraseExtractor
from cloc_mllm.vesl.pipeline import Labelled, Labeller, Selection
from cloc_mllm.vesl.shards import Shard, write_shard_files
from cloc_mllm.vesl.sources import Source


@dataclass(frozen=True)
class ShardContent:
    """The usable images of a shard, and what `validate_record` says of the others."""

    shard: Shard
    records: list[Record]
    drop_log: DropLog


@dataclass(frozen=True)
class ShardDone:
    """A shard that is on disk; `seconds` is how long a worker took to label and write it."""

    num_images: int
    seconds: float


def read_shard(shard: Shard, source: Source) -> ShardContent:
    """Reads and checks the images of a shard."""
    drop_log = DropLog()
    read = source.read(shard.start, shard.stop)
    checked = [validate_record(record, drop_log) for record in read]
    return ShardContent(shard, [r for r in checked if r is not None], drop_log)


def load_labeller(config: LabelConfig, device: str = "") -> Labeller:
    """Loads the models of a configuration.

    Args:
        device: "" takes a GPU if there is one.
    """
    device = str(choose_device(device))
    captioner = None
    if config.captioner:
        captioner = Captioner.from_pretrained(
            config.captioner, prompt=config.caption_prompt, device=device
        )
    detector = load_detector(
        config.detector, config.detector_model, image_size=config.detector_size, device=device
    )
    return Labeller(
        PhraseExtractor(config.max_queries, config.phrase_form),
        detector,
        Selection(config.threshold, config.nms_iou),
        captioner,
    )


class ShardLabeller:
    """Holds the models; each call labels one shard and writes its files into `directory`."""

    def __init__(self, config: LabelConfig, directory: Path) -> None:
        self.labeller = load_labeller(config)
        self.batch_size = config.batch_size
        self.directory = directory

    def __call__(self, content: ShardContent) -> ShardDone:
        started = time.monotonic()
        labelled = self._label(content.records)
        write_shard_files(self.directory, content.shard, labelled, content.drop_log)
        num_images = content.shard.stop - content.shard.start
        return ShardDone(num_images, time.monotonic() - started)

    def _label(self, records: Sequence[Record]) -> list[Labelled]:
        labelled: list[Labelled] = []
        while len(labelled) < len(records):
            batch = records[len(labelled) : len(labelled) + self.batch_size]
            try:
                labelled += self.labeller.label(batch)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                torch.cuda.empty_cache()
        return labelled
