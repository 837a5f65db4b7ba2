"""The command `cloc-mllm label`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser

from cloc_mllm.command_line import parse_settings
from cloc_mllm.data.drop_log import note_line
from cloc_mllm.vesl.config import LabelConfig
from cloc_mllm.vesl.report import time_estimates


def main(argv: Sequence[str] | None = None) -> int:
    """Labels images, then prints the throughput and where the report is.

    Returns:
        0, or 1 where no image got a box.
    """
    parser = ArgumentParser(
        prog="cloc-mllm label",
        description="Find what captions name in their images, with VESL: captions, noun phrases, "
        "open-vocabulary detection, records. Stop it at any time; the same command goes on.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_class_arguments(LabelConfig)
    values = parse_settings(parser, argv)
    config = LabelConfig(**{item.name: values[item.name] for item in fields(LabelConfig)})

    from cloc_mllm.vesl.job import label_images

    result = label_images(config)
    rate = result.images_per_second
    num_labelled = result.num_images - result.num_dropped
    print(
        f"{num_labelled:,} images labelled with {result.num_regions:,} boxes, "
        f"{result.num_dropped:,} dropped (drops.jsonl says why)"
    )
    for what, count in result.notes.items():
        print(note_line(what, count, result.examples.get(what, ())))
    print(
        f"this run: {result.num_now:,} images in {result.seconds:.1f} s after loading the models, "
        f"{rate:.2f} images per second"
    )
    for amount, duration in time_estimates(rate):
        print(f"  {amount:>6} images at this rate: {duration}")
    print(f"records: {config.output_dir}\nreport: {Path(config.output_dir) / 'report.html'}")
    if result.num_regions:
        return 0
    fates = ", ".join(f"{count:,} {reason}" for reason, count in result.phrases.items() if count)
    print(
        f"no image got a box ({fates or 'no phrase was found'}): see the report for the reasons; "
        "try a lower --threshold, another --detector, or captions that name things"
    )
    return 1
