"""Does CLOC learn from its own labels? Built-in scenes, where the true boxes are known.

    python eval/bench/self_training.py --output_dir runs/bench/self_training

A few scenes have true regions, many have captions alone. Each round labels the many with the model
of the round before and trains on both, from that model on. The control trains as many steps more
on the few alone. Printed is the quality of the labels and of the models.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.ops import box_iou

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser, parse_job
from cloc_mllm.config import Stage1Config
from cloc_mllm.data.parquet import load_records, write_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.quick import quick_region_metrics
from cloc_mllm.models.build import load_cloc
from cloc_mllm.train.stage1 import run_stage1
from cloc_mllm.vesl.config import LabelConfig
from cloc_mllm.vesl.job import label_images

TRUE_IOU = 0.5


@dataclass(frozen=True)
class LabelQuality:
    """Labels against true regions: a label is right if a true region of the same phrase, not yet
    taken by a better label, overlaps it with IoU >= 0.5."""

    num_labels: int
    num_right: int
    num_true: int

    @property
    def precision(self) -> float:
        return self.num_right / max(1, self.num_labels)

    @property
    def recall(self) -> float:
        return self.num_right / max(1, self.num_true)


def label_quality(labelled: Iterable[Record], true: Iterable[Record]) -> LabelQuality:
    """Of records of the same images, matched by id; one that was not labelled has no label."""
    labels = {record.id: record for record in labelled}
    num_labels = num_right = num_true = 0
    for record in true:
        found = labels[record.id].regions if record.id in labels else []
        best_first = sorted(found, key=lambda region: -region.score)
        free = list(record.regions)
        num_labels += len(found)
        num_true += len(free)
        for label in best_first:
            same = [region for region in free if region.phrase == label.phrase]
            boxes = torch.tensor([region.box for region in same]).reshape(-1, 4)
            iou = box_iou(torch.tensor([label.box]), boxes)[0]
            if len(same) and iou.max() >= TRUE_IOU:
                free.remove(same[int(iou.argmax())])
                num_right += 1
    return LabelQuality(num_labels, num_right, num_true)


@dataclass(frozen=True)
class Experiment:
    """Sizes of the experiment; `seed` is of the scenes and of training.

    Args:
        num_true, num_captioned: scenes with true regions, and with captions alone.
        first_steps, round_steps: of training on the true ones, and of each round after it.
        threshold: cosine under which a label is not used.
    """

    config: Stage1Config
    out: Path
    num_true: int = 1000
    num_captioned: int = 4000
    num_validation: int = 300
    first_steps: int = 200
    round_steps: int = 100
    num_rounds: int = 2
    threshold: float = 0.6

    def run(self) -> Iterable[dict[str, float | str]]:
        """One row a model: round 0, 1, ..., then the control. A round whose model is there already
        is not trained again."""
        self._make_data()
        validation = load_records(self.out / "validation")
        previous = self._train("round0", [self.out / "true"], self.first_steps, None)
        yield {"model": "round 0", **_scores(previous, validation)}
        for number in range(1, self.num_rounds + 1):
            labels = self._label(f"labels{number}", previous)
            truth = load_records(self.out / "captioned_truth")
            quality = label_quality(load_records(labels), truth)
            data = [self.out / "true", labels]
            previous = self._train(f"round{number}", data, self.round_steps, previous)
            yield {
                "model": f"round {number}",
                "labels": quality.num_labels,
                "precision": quality.precision,
                "recall": quality.recall,
                **_scores(previous, validation),
            }
        steps = self.round_steps * self.num_rounds
        control = self._train("control", [self.out / "true"], steps, self.out / "round0/model")
        yield {"model": "control", **_scores(control, validation)}

    def _make_data(self) -> None:
        seed = self.config.run.seed
        self._write("true", generate_scenes(self.num_true, split="train", seed=seed))
        many = generate_scenes(self.num_captioned, split="train", seed=seed, start=self.num_true)
        self._write("captioned_truth", many)
        truth = load_records(self.out / "captioned_truth")
        self._write("captioned", (dataclasses.replace(record, regions=[]) for record in truth))
        scenes = generate_scenes(self.num_validation, split="validation", seed=seed)
        self._write("validation", scenes)

    def _write(self, name: str, records: Iterable[Record]) -> None:
        if not (self.out / name).exists():
            write_records(records, self.out / name)

    def _label(self, name: str, model: Path) -> Path:
        if not (self.out / name).exists():
            label_images(
                LabelConfig(
                    images=str(self.out / "captioned"),
                    output_dir=str(self.out / name),
                    detector_model=str(model),
                    threshold=self.threshold,
                    phrase_form="name",
                    executor="inline",
                    batch_size=32,
                )
            )
        return self.out / name

    def _train(self, name: str, data: Sequence[Path], steps: int, init: Path | None) -> Path:
        model = self.out / name / "model"
        if model.exists():
            return model
        mixed = self.out / f"{name}_data"
        if not mixed.exists():
            write_records(itertools.chain(*map(load_records, data)), mixed)
        config = dataclasses.replace(
            self.config,
            data=dataclasses.replace(self.config.data, train=str(mixed), validation=""),
            run=dataclasses.replace(self.config.run, output_dir=str(self.out / name), steps=steps),
        )
        if init is not None:
            config = dataclasses.replace(
                config, model=dataclasses.replace(self.config.model, init=str(init), clip_config={})
            )
        if code := run_stage1(config).exit_code:
            raise ValueError(f"training of {name} was stopped (status {code}); run it again")
        return model


def _scores(model: Path, validation: Sequence[Record]) -> dict[str, float]:
    cloc, tokenizer, _ = load_cloc(model)
    metrics = quick_region_metrics(cloc, tokenizer, validation)
    return {
        "region accuracy": metrics["region_classification/macro_acc"],
        "text->box Acc@0.5": metrics["text_to_box/acc_at_0_5"],
    }


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="self_training", description=__doc__)
    parser.add_argument("--config", default="stage1_openmoji")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/bench/self_training"))
    parser.add_argument("--true", type=int, default=1000, help="scenes with true regions")
    parser.add_argument("--captioned", type=int, default=4000, help="scenes with captions alone")
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--first_steps", type=int, default=200)
    parser.add_argument("--round_steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threshold", type=float, default=0.6)
    args = parser.parse_args(argv)
    config, _ = parse_job(Stage1Config, ["--config", args.config], prog="stage1", description="")
    experiment = Experiment(
        config,
        args.output_dir,
        num_true=args.true,
        num_captioned=args.captioned,
        num_validation=args.validation,
        first_steps=args.first_steps,
        round_steps=args.round_steps,
        num_rounds=args.rounds,
        threshold=args.threshold,
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with open(args.output_dir / "rounds.jsonl", "w", encoding="utf-8") as file:
        for row in experiment.run():
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
