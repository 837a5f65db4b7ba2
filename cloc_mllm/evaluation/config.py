"""Settings of `cloc-mllm eval`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloc_mllm.config import Precision, RegionPrompt, Templates


@dataclass
class EvalConfig:
    """Evaluation: `python eval/run.py --config eval/configs/quick.yaml`.

    Args:
        cloc: stage-1 model directory; "" takes the shipped one.
        mllm: stage-2 model directory; "" takes the shipped one; "none" skips the MLLM tasks.
        mllm_hf: any Transformers image-text model, a directory or a name on the hub, instead of
            `mllm`; it is asked the task `rec` with `prompt`, its answers are read in `format`.
        prompt: for `mllm_hf`, with `{phrase}` where the expression goes.
        format: how `mllm_hf` writes a box; `cloc-mllm eval score --format help` lists the formats.
        baseline_cloc: another stage-1 model to stand beside in the table; "" is none.
        data: records to score on; "" generates 500 built-in test scenes, "compositional" 300
            built-in scenes in which the noun alone does not tell which thing is meant.
        output_dir: gets `predictions.jsonl`, `references.jsonl`, `metrics.json`, `table.md`,
            `report.html`. A run that was stopped goes on after the predictions it finds there.
        overwrite: make all predictions anew, whatever is in `output_dir`.
        tasks: any of the names `cloc-mllm eval --help` lists.
        limit: at most this many records; 0 is all.
        batch_size: images, or questions to the MLLM, at a time.
        precision: of the CLOC model; `bf16` is several times faster where `auto` chooses it.
        region_prompt: how CLOC is told of a true region: its `box`, or a `point`, `scribble` or
            rough `mask` drawn in it.
        annotations: COCO or LVIS instances JSON that the true_box tasks ask, or the folder or zip
            of Flickr30k Entities that phrase_grounding asks; its images are the records of `data`.
        templates: that class names are put into: `none` (the bare name), `photo`, our `small` set
            of 7, or `clip80` (OpenAI's for ImageNet).
        class_names: file of class names for zero_shot_classification to choose from, JSON or lines
            `folder name`; "" takes those that occur.
        benchmark: declares that the data is all of `coco_5k`, `flickr30k_1k`,
            `coco_val2017_boxes`, `lvis_v1_val_boxes`, `flickr30k_entities`, `grit_2k` or
            `imagenet_val`; other counts are an error.
        keep_crowd: true_box tasks also ask boxes around a crowd.
        min_box_side_px: true_box tasks leave out boxes with a shorter side.
        device: `auto` takes a GPU if there is one.
        bootstrap_samples: resamples of the images behind each interval.
        num_examples: best, worst and other examples of each task in the report; 0 leaves them out.
        seed: of the bootstrap and of the choice of examples.
    """

    cloc: str = ""
    mllm: str = ""
    mllm_hf: str = ""
    prompt: str = ""
    format: str = ""
    baseline_cloc: str = ""
    data: str = ""
    output_dir: str = "runs/eval"
    overwrite: bool = False
    tasks: list[str] = field(
        default_factory=lambda: [
            "region_classification",
            "region_text_retrieval",
            "image_text_retrieval",
            "text_to_box",
            "rec",
            "referring",
        ]
    )
    limit: int = 0
    batch_size: int = 64
    precision: Precision = "fp32"
    region_prompt: RegionPrompt = "box"
    annotations: str = ""
    templates: Templates = "none"
    class_names: str = ""
    benchmark: str = ""
    keep_crowd: bool = False
    min_box_side_px: float = 1.0
    device: str = "auto"
    bootstrap_samples: int = 1000
    num_examples: int = 6
    seed: int = 0
