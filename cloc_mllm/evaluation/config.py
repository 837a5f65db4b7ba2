"""Settings of `cloc-mllm eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cloc_mllm.config import ModelDtype, Precision, RegionPrompt, Templates
from cloc_mllm.evaluation.queries import AskedIn


@dataclass
class EvalConfig:
    """An evaluation: models, tasks, records and scoring.

    Args:
        tasks: names that `cloc-mllm eval --list` shows, or paths of Python files with a task of
            one's own; a task with options is written `{NAME: {OPTION: VALUE}}`.
        cloc: stage-1 model directory, or a shipped model, `photos` or `scenes`; "" takes `scenes`
            for built-in scenes and `photos` for everything else.
        mllm: stage-2 model directory, or `scenes`, the shipped one, which "" takes, too; "none"
            skips the MLLM tasks.
        wordings: the words that `mllm` is asked in: the `first` that it was taught, all `trained`
            ones, or the `held_out` ones, which no training uses; one per question by its id.
        mllm_hf: any Transformers image-text model, a directory or a name on the hub, instead of
            `mllm`; it is asked where things are with `prompt`, and questions without regions as
            they stand.
        prompt: for `mllm_hf`, with `{phrase}` where the expression goes.
        format: how `mllm_hf` writes a box; `cloc-mllm eval score --format help` lists the formats;
            or a definition of one's own, as JSON or a file.
        baseline_cloc: another stage-1 model to stand beside in the table; "" is none.
        data: records to score on; "" generates 500 built-in test scenes, "compositional" 300
            built-in scenes in which the noun alone does not tell which thing is meant.
        benchmark: declares that the records are all of `coco_5k`, `flickr30k_1k`,
            `coco_val2017_boxes`, `lvis_v1_val_boxes`, `flickr30k_entities`, `grit_2k` or
            `imagenet_val`, which is checked.
        output_dir: gets `predictions.jsonl`, `references.jsonl`, `metrics.json`, `table.md`,
            `report.html`. A run that was stopped goes on after the predictions it finds there.
        overwrite: makes all predictions anew, whatever is in `output_dir`.
        limit: at most so many records, or questions of a benchmark with files of its own; 0 is all.
        allow_partial: scores a published benchmark also if photos or rows of it are missing.
        batch_size: images, or questions to the MLLM, at a time.
        precision: of the CLOC model; `bf16` is several times faster where `auto` chooses it.
        dtype: what `mllm` is held in; `auto` is what its files hold.
        region_prompt: how CLOC is told of a true region: its `box`, or a `point`, `scribble` or
            rough `mask` drawn in it.
        templates: what class names are put into: `none` (the bare name), `photo`, our `small` set
            of 7, or `clip80` (OpenAI's for ImageNet).
        device: `auto` takes a GPU if there is one.
        bootstrap_samples: resamples of the images behind each interval.
        num_examples: best, worst and other examples of each task in the report; 0 leaves them out.
        seed: of the bootstrap and of the choice of examples.
    """

    tasks: list[str | dict[str, dict[str, Any]]] = field(
        default_factory=lambda: [
            "region_classification",
            "region_text_retrieval",
            "image_text_retrieval",
            "text_to_box",
            "rec",
            "referring",
        ]
    )
    cloc: str = ""
    mllm: str = ""
    wordings: AskedIn = "first"
    mllm_hf: str = ""
    prompt: str = ""
    format: str = ""
    baseline_cloc: str = ""
    data: str = ""
    benchmark: str = ""
    output_dir: str = "runs/eval"
    overwrite: bool = False
    limit: int = 0
    allow_partial: bool = False
    batch_size: int = 64
    precision: Precision = "fp32"
    dtype: ModelDtype = "float32"
    region_prompt: RegionPrompt = "box"
    templates: Templates = "none"
    device: str = "auto"
    bootstrap_samples: int = 1000
    num_examples: int = 6
    seed: int = 0
