"""`cloc-mllm eval` and what stands under it; only the part that is asked for is loaded."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

# `cloc-mllm eval NAME ...`; without a name, `eval` predicts and scores
SUBCOMMANDS = {
    "benchmark": "cloc_mllm.evaluation.benchmarks.command",
    "compare": "cloc_mllm.evaluation.compare",
    "score": "cloc_mllm.evaluation.eval_score",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the arguments to the part they name."""
    args = list(sys.argv[1:] if argv is None else argv)
    module = "cloc_mllm.evaluation.run"
    if args and args[0] in SUBCOMMANDS:
        module = SUBCOMMANDS[args.pop(0)]
    command: Callable[[list[str]], int] = importlib.import_module(module).main
    return command(args)
