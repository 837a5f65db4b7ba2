"""One shard from its images to its files: what a worker process does, under Ray or without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cloc_mllm.config import LabelConfig
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.records import Record, validate_record
from cloc_mllm.vesl.captioner import Captioner
from cloc_mllm.vesl.detector import load_detector
from cloc_mllm.vesl.phrases import PhraseExtractor
from cloc_mllm.vesl.pipeline import Labelled, Labeller, Selection
from cloc_mllm.vesl.shards import Shard, write_shard_files
from cloc_mllm.vesl.sources import open_source


def read_shard(row: dict[str, Any], images: str, captions: str) -> dict[str, Any]:
    """`{index, start, stop}` -> the same with `records`, as they are in the source."""
    return {**row, "records": open_source(images, captions).read(row["start"], row["stop"])}


def load_labeller(config: LabelConfig, device: str = "") -> Labeller:
    """The models of a configuration.

    Args:
        device: "" takes a GPU if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
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

    def __init__(self, config: LabelConfig, directory: str) -> None:
        torch.set_grad_enabled(False)
        self.labeller = load_labeller(config)
        self.batch_size = config.batch_size
        self.directory = Path(directory)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of `read_shard` -> `{index, num_images}`, once the shard is on disk."""
        shard = Shard(int(row["index"]), int(row["start"]), int(row["stop"]))
        drop_log = DropLog()
        checked = (validate_record(record, drop_log) for record in row["records"])
        records = [record for record in checked if record is not None]
        write_shard_files(self.directory, shard, self._label(records), drop_log)
        return {"index": shard.index, "num_images": shard.stop - shard.start}

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
