"""`cloc-mllm ablate`: the paper's ablation table in miniature, one cell (arm, seed) at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cloc_mllm.ablation.cells import Cell, build_cells, prepare_training_data, run_cell
from cloc_mllm.ablation.config import AblationConfig
from cloc_mllm.ablation.figure import draw_figure
from cloc_mllm.ablation.summary import summarize, write_summary
from cloc_mllm.command_line import parse_job
from cloc_mllm.data.records import Record
from cloc_mllm.evaluation.record_index import records_to_score
from cloc_mllm.stopping import StopRequest


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and scores every cell that is not done yet, then writes the table and the plot."""
    config, list_only = parse_job(
        AblationConfig,
        argv,
        prog="cloc-mllm ablate",
        description="Train and evaluate arms of stage 1 at equal budget, over several seeds. Cells "
        "that are done are kept: the same command goes on after an interruption.",
        flag=("list", "print the cells and their state"),
    )
    return run_ablation(config, list_only=list_only)


def run_ablation(config: AblationConfig, *, list_only: bool = False) -> int:
    """Runs the cells and writes into `config.output_dir`, see `AblationConfig`.

    Raises:
        ValueError: an arm is named twice or compared with one that does not exist, the base
            configuration lacks a setting, or the training of a cell failed.

    Returns:
        the exit code: 0, or 128 + the number of the signal that stopped it.
    """
    train = config.train or str(Path(config.output_dir) / "train")
    cells = build_cells(config, train)
    if list_only:
        for cell in cells:
            print(f"{cell.name}: {'done' if cell.is_done() else 'to do'}")
        return 0
    chosen = [cell for cell in cells if not config.only or cell.arm in config.only]
    with StopRequest() as stop:
        if not config.train:
            prepare_training_data(Path(train), stop)
        _run_cells(chosen, config, stop)
    if stop.requested:
        print("stopped; the same command goes on from here")
        return 128 + stop.signal_number
    rows = summarize(config, cells)
    directory = Path(config.output_dir)
    write_summary(rows, config, directory)
    draw_figure(rows, directory / "ablation.png")
    print((directory / "ablation.md").read_text())
    return 0


def _run_cells(cells: Sequence[Cell], config: AblationConfig, stop: StopRequest) -> None:
    """Runs cells, `jobs` at a time. After one that fails, or a request to stop, none begins."""
    test = records_to_score(config.test)
    failed = threading.Event()

    def work(cell: Cell) -> None:
        if not (failed.is_set() or stop.requested):
            try:
                _run_and_tell(cell, test, stop, config.jobs)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(config.jobs) as pool:
        for job in [pool.submit(work, cell) for cell in cells]:
            job.result()


def _run_and_tell(cell: Cell, test: Sequence[Record], stop: StopRequest, jobs: int) -> None:
    if cell.is_done():
        print(f"{cell.name}: done before", flush=True)
        return
    result = run_cell(cell, test, stop, share=1 / jobs)
    if result is None:
        return
    numbers = "  ".join(f"{task} {100 * value:.1f}" for task, value in result["means"].items())
    print(f"{cell.name}: {result['seconds']:.0f} s  {numbers}", flush=True)
