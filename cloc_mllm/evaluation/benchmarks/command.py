"""`cloc-mllm eval benchmark NAME`: one subcommand a family, each with its own files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloc_mllm.evaluation.benchmarks.job import Job, run
from cloc_mllm.evaluation.benchmarks.pope import pope_questions
from cloc_mllm.evaluation.benchmarks.refcoco import NUM_EXPRESSIONS, refcoco_questions

_EPILOG = """\
A benchmark is asked whole. If photos or rows are missing the command stops and says how many;
--allow_partial or --limit score what is there, and the numbers carry their denominator.
A stopped run goes on where it was when it is started again with the same --output_dir.
Protocols and how to get the data: docs/evaluation.md, "Benchmarks of the MLLM".
"""


def main_benchmark(argv: Sequence[str]) -> int:
    """Run one benchmark; wrong input raises ValueError or OSError for the caller to print."""
    args = build_parser().parse_args(list(argv))
    job = Job(
        output_dir=args.output_dir or f"runs/eval-{args.benchmark}",
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
    return parser


def _add_family(families: Any, name: str, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = families.add_parser(
        name, help=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--mllm", default="", help="stage-2 model directory ('': the shipped one)")
    parser.add_argument("--output_dir", default="", help="'' is runs/eval-NAME")
    parser.add_argument("--limit", type=int, default=0, help="ask only the first so many; 0: all")
    parser.add_argument("--allow_partial", action="store_true", help="score what is there")
    parser.add_argument("--batch_size", type=int, default=64, help="questions at a time")
    parser.add_argument("--device", help="by default a GPU if there is one")
    parser.add_argument("--bootstrap_samples", type=int, default=1000)
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, help="folder, tar or zip of photos")


def _add_refcoco(families: Any) -> None:
    parser = _add_family(families, "refcoco", "RefCOCO, RefCOCO+, RefCOCOg: a box an expression")
    parser.add_argument("--split", required=True, choices=NUM_EXPRESSIONS)
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
    parser.add_argument("--suffix", default="", help="appended to each question")
    _add_images(parser)
    parser.set_defaults(run=_run_pope)


def _run_pope(args: argparse.Namespace, job: Job) -> int:
    run(pope_questions(args.questions, args.images, suffix=args.suffix), job)
    return 0
