"""The settings of `cloc-mllm label`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class LabelConfig:
    """Labelling with VESL (docs/how-to/label.md).

    `cloc-mllm label --images photos --output_dir out`

    Args:
        images: records (a directory that `cloc-mllm data build` made, one of its files, or a URL),
            whose regions are replaced; or a folder, tar or zip of photos.
        captions: captions of photos, as JSON lines `{"image": NAME, "captions": [TEXT, ...]}`; ""
            looks for NAME.txt beside each photo, one caption per line.
        encoding: encoding of captions without a byte order mark; "" is UTF-8.
        output_dir: records, logs and `report.html`; must be new. An unfinished run goes on.
        captioner: a Transformers image-text-to-text model (directory or name), whose caption is
            put before the given ones; "" uses the given ones alone.
        caption_prompt: what a chat captioner is asked; "" asks for every object.
        detector: which kind of model finds the boxes.
        detector_model: its directory or Hugging Face name; "" takes the CLOC that ships for
            `photos` (`scenes` is the one for built-in scenes), OWLv2 L/14 or Grounding DINO base.
        detector_size: side in pixels of OWLv2's input (the paper: 448); 0 takes the model's own.
        threshold: smallest confidence of a box. CLOC's is a cosine (docs/how-to/label.md).
        nms_iou: IoU from which on only the better of two boxes of one phrase is kept.
        max_queries: most phrases per image that the detector is asked for.
        phrase_form: `paper` as written ("the small dogs"), `name` bare and singular ("small dog").
        limit: most images to label; 0 is all.
        shard_size: images per file; a stop loses less than one file per worker.
        batch_size: images at a time; halved when they do not fit into a GPU's memory.
        max_drop_share: largest share of images that may be unusable.
        executor: `ray` (one machine, or a cluster by `ray_address`) or `inline`, in this process.
        num_workers: processes that hold the models; 0 is one per GPU, or per core without GPUs.
        ray_address: address of a running cluster (`ray start`), whose machines see `images` and
            `output_dir` under the same paths; "" starts Ray on this machine alone.
        num_examples: pictures in the report.
    """

    images: str = ""
    captions: str = ""
    encoding: str = ""
    output_dir: str = "runs/labels"
    captioner: str = ""
    caption_prompt: str = ""
    detector: Literal["cloc", "owlv2", "grounding_dino"] = "cloc"
    detector_model: str = ""
    detector_size: int = 0
    threshold: float = 0.1
    nms_iou: float = 0.5
    max_queries: int = 20
    phrase_form: Literal["paper", "name"] = "paper"
    limit: int = 0
    shard_size: int = 1000
    batch_size: int = 16
    max_drop_share: float = 0.05
    executor: Literal["ray", "inline"] = "ray"
    num_workers: int = 0
    ray_address: str = ""
    num_examples: int = 12
