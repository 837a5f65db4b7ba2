"""`cloc-mllm eval benchmark NAME`: one subcommand a family, each with its own files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cloc_mllm.evaluation import captioning
from cloc_mllm.evaluation.benchmarks.captioning import TASK as CAPTIONING
from cloc_mllm.evaluation.benchmarks.captioning import captioning_questions
from cloc_mllm.evaluation.benchmarks.ferret_bench import JudgeItem, ferret_bench_questions
from cloc_mllm.evaluation.benchmarks.job import Job, complete, predict, run, score, write_results
from cloc_mllm.evaluation.benchmarks.judge import Judge, judge_answers, judged_rows, read_rules
from cloc_mllm.evaluation.benchmarks.pope import pope_questions
from cloc_mllm.evaluation.benchmarks.ref_lvis import KINDS, ref_lvis_questions
from cloc_mllm.evaluation.benchmarks.refcoco import NUM_EXPRESSIONS, refcoco_questions
from cloc_mllm.evaluation.benchmarks.rejection import (
    cloc_rejects,
    cloc_threshold,
    rejection_phrases,
    rejection_questions,
)
from cloc_mllm.evaluation.predictions import PredictionRow
from cloc_mllm.evaluation.resume import model_identity
from cloc_mllm.evaluation.run import records_to_score
from cloc_mllm.evaluation.scoring import pairs_by_task
from cloc_mllm.evaluation.statistics import bootstrap_interval
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.shipped import shipped_directory

_EPILOG = """\
A benchmark is asked whole. If photos or rows are missing the command stops and says how many;
--allow_partial or --limit score what is there, and the numbers carry their denominator.
A stopped run goes on where it was when it is started again with the same --output_dir.
Protocols and how to get the data: docs/evaluation.md, "Benchmarks of the MLLM".
"""


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; wrong input raises ValueError or OSError for the caller to print."""
    args = build_parser().parse_args(list(argv))
    job = Job(
        output_dir=args.output_dir or f"runs/eval-{args.benchmark}",
        overwrite=args.overwrite == "true",
        mllm=args.mllm,
        limit=args.limit,
        allow_partial=args.allow_partial,
        batch_size=args.batch_size,
        device=args.device,
        bootstrap_samples=args.bootstrap_samples,
    )
    status: int = args.run(args, job)
    return status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cloc-mllm eval benchmark",
        description="Score the MLLM on a published benchmark.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    families = parser.add_subparsers(metavar="NAME", required=True, dest="benchmark")
    _add_refcoco(families)
    _add_pope(families)
    _add_ref_lvis(families)
    _add_ferret_bench(families)
    _add_rejection(families)
    _add_captioning(families)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults that say something; "", None and False do not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def _add_family(families: Any, name: str, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = families.add_parser(
        name, help=help_text, description=help_text, formatter_class=_Help
    )
    parser.add_argument("--mllm", default="", help="stage-2 model directory; else the shipped one")
    parser.add_argument("--output_dir", default="", help=f"else runs/eval-{name}")
    parser.add_argument(
        "--overwrite", choices=["true", "false"], default="false", help="make all answers anew"
    )
    parser.add_argument("--limit", type=int, default=0, help="ask only the first so many")
    parser.add_argument("--allow_partial", action="store_true", help="score what is there")
    parser.add_argument("--batch_size", type=int, default=64, help="questions at a time")
    parser.add_argument("--device", help="by default a GPU if there is one")
    parser.add_argument(
        "--bootstrap_samples", type=int, default=1000, help="resamples behind each interval"
    )
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, help="folder, tar or zip of photos")


def _add_refcoco(families: Any) -> None:
    parser = _add_family(families, "refcoco", "RefCOCO, RefCOCO+, RefCOCOg: a box an expression")
    parser.add_argument(
        "--split",
        required=True,
        choices=NUM_EXPRESSIONS,
        metavar="SPLIT",
        help=", ".join(NUM_EXPRESSIONS),
    )
    parser.add_argument("--questions", type=Path, required=True, help="the split's JSON rows")
    _add_images(parser)
    parser.set_defaults(run=_run_refcoco)


def _run_refcoco(args: argparse.Namespace, job: Job) -> int:
    run(refcoco_questions(args.split, args.questions, args.images), job)
    return 0


def _add_pope(families: Any) -> None:
    parser = _add_family(families, "pope", "POPE: is there a THING in the image, yes or no")
    parser.add_argument(
        "--questions", type=Path, required=True, nargs="+", help="files of one to three splits"
    )
    parser.add_argument(
        "--suffix", default="", help="appended to each question, such as ' Answer yes or no.'"
    )
    _add_images(parser)
    parser.set_defaults(run=_run_pope)


def _run_pope(args: argparse.Namespace, job: Job) -> int:
    run(pope_questions(args.questions, args.images, suffix=args.suffix), job)
    return 0


def _add_ref_lvis(families: Any) -> None:
    parser = _add_family(families, "ref-lvis", "RefLVIS: is the object in this region a A or a B")
    parser.add_argument("--annotations", type=Path, required=True, help="LVIS v1 JSON (or COCO)")
    _add_images(parser)
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="how a region is shown"
    )
    parser.add_argument("--things", type=int, default=1000, help="drawn by --seed; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of things, distractors and shapes")
    parser.set_defaults(run=_run_ref_lvis)


def _run_ref_lvis(args: argparse.Namespace, job: Job) -> int:
    question_set = ref_lvis_questions(
        args.annotations, args.images, kinds=args.kinds, num_things=args.things, seed=args.seed
    )
    run(question_set, job)
    return 0


def _add_ferret_bench(families: Any) -> None:
    parser = _add_family(families, "ferret-bench", "Ferret-Bench: free answers, scored by a judge")
    for name in ("questions", "contexts", "answers"):
        parser.add_argument(
            f"--{name}", type=Path, required=True, nargs="+", help="a file a category"
        )
    _add_images(parser)
    parser.add_argument(
        "--judge_url",
        default="",
        help="OpenAI-compatible, up to /v1; without it the answers are only made",
    )
    parser.add_argument("--judge_model", default="", help="the judge's name")
    parser.add_argument("--judge_key_env", default="OPENAI_API_KEY", help="variable with the key")
    parser.add_argument("--judge_rules", type=Path, help="Ferret's rule.json, for its own prompts")
    parser.set_defaults(run=_run_ferret_bench)


def _run_ferret_bench(args: argparse.Namespace, job: Job) -> int:
    """Exit status 1 if some answers were not judged."""
    if bool(args.judge_url) != bool(args.judge_model):
        raise ValueError("give --judge_url and --judge_model together, or neither")
    question_set, items = ferret_bench_questions(
        args.questions, args.contexts, args.answers, args.images
    )
    chosen = job.chosen(question_set)
    rows = predict(chosen, job)
    if not args.judge_url:
        print(f"{len(rows)} answers in {job.output_dir}; add --judge_url and --judge_model")
        return 0
    asked = {question.id for question in chosen.questions}
    rows = _judge(args, [item for item in items if item.id in asked], rows, job)
    metrics = score(chosen, rows, job)
    failures = [row.failure for row in rows if row.failure]
    metrics["about"]["judged"] = f"{len(rows) - len(failures)} of {len(rows)} by {args.judge_model}"
    write_results(chosen, rows, metrics, job)
    print(f"judged: {metrics['about']['judged']}")
    if failures:
        print(f"not judged: {', '.join(sorted(set(failures)))}; run again to try these again")
    return 1 if failures else 0


def _judge(
    args: argparse.Namespace,
    items: Sequence[JudgeItem],
    rows: Sequence[PredictionRow],
    job: Job,
) -> list[PredictionRow]:
    judge = Judge(args.judge_url, args.judge_model, os.environ.get(args.judge_key_env, ""))
    rules = read_rules(args.judge_rules) if args.judge_rules else {}
    path = Path(job.output_dir) / "judgements.jsonl"
    return judged_rows(rows, judge_answers(judge, items, rows, path, rules))


def _add_rejection(families: Any) -> None:
    parser = _add_family(families, "rejection", "phrases of built-in scenes, half of them absent")
    parser.add_argument("--scenes", type=int, default=200, help="of built-in test data")
    parser.add_argument("--by", choices=["mllm", "cloc"], default="mllm", help="who answers")
    parser.add_argument("--cloc", default="", help="stage-1 model directory; else the shipped one")
    parser.add_argument(
        "--threshold",
        type=float,
        help="CLOC refuses under this cosine; by default the best one on validation scenes",
    )
    parser.set_defaults(run=_run_rejection)


def _run_rejection(args: argparse.Namespace, job: Job) -> int:
    records, phrases = rejection_phrases(args.scenes)
    question_set = job.chosen(rejection_questions(records, phrases))
    if args.by == "mllm":
        run(question_set, job)
        return 0
    asked = {question.id for question in question_set.questions}

    def answers(finished: set[str]) -> Iterable[PredictionRow]:
        predictor = ClocPredictor.from_pretrained(args.cloc or None, device=job.device)
        threshold = args.threshold
        if threshold is None:
            threshold = cloc_threshold(predictor, args.scenes)
        chosen = [phrase for phrase in phrases if phrase.id in asked - finished]
        name = args.cloc or "shipped cloc"
        return cloc_rejects(predictor, question_set.records, chosen, threshold, name)

    cloc = model_identity(args.cloc or shipped_directory("cloc"))
    rows = complete(question_set, job, {"cloc": cloc, "threshold": args.threshold}, answers)
    metrics = score(question_set, rows, job)
    write_results(question_set, rows, metrics, job)
    return 0


def _add_captioning(families: Any) -> None:
    parser = _add_family(families, "captioning", "captions of regions: CIDEr, METEOR")
    parser.add_argument("--data", default="", help="records; else built-in test scenes")
    parser.add_argument("--scenes", type=int, default=200, help="of built-in data")
    parser.add_argument("--meteor", action="store_true", help="METEOR too; needs Java")
    parser.set_defaults(run=_run_captioning)


def _run_captioning(args: argparse.Namespace, job: Job) -> int:
    records = records_to_score(args.data, 0 if args.data else args.scenes)
    name = args.data or f"{len(records)} built-in test scenes"
    chosen = job.chosen(captioning_questions(records, name))
    rows = predict(chosen, job)
    metrics = score(chosen, rows, job)
    if args.meteor:
        pairs = pairs_by_task(rows, chosen.references)[CAPTIONING]
        scores, of_all = captioning.meteor(pairs)
        interval = bootstrap_interval(scores, samples=job.bootstrap_samples)
        metrics["tasks"][CAPTIONING]["meteor"] = asdict(interval)
        metrics["about"]["meteor_of_all_together"] = of_all
    write_results(chosen, rows, metrics, job)
    return 0
