"""`cloc-mllm quickstart`: the whole road on built-in data, on a laptop's CPU.

Shows the shipped model first. Then, two at a time: a small language model, which needs no data;
data and CLOC; plain CLIP at CLOC's budget; the MLLM. Evaluates, and writes one report.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import STDOUT

import yaml

from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.expressions import expression_kind
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.commands import main as evaluate
from cloc_mllm.inference.commands import main_ground
from cloc_mllm.shipped import CONFIGS
from cloc_mllm.stopping import StopRequest
from cloc_mllm.train.claim import claimed

_TRAIN_SCENES, _VALIDATION_SCENES, _TEST_SCENES = 10_000, 200, 500
_STATUS_EVERY_SECONDS, _LOOK_EVERY_SECONDS = 20.0, 0.2


@dataclass(frozen=True)
class Command:
    """One `cloc-mllm` command with its arguments."""

    title: str
    arguments: tuple[str, ...]

    @property
    def log_name(self) -> str:
        return self.title.replace(" ", "_") + ".log"


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="cloc-mllm quickstart", description=__doc__)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/quickstart"), help="directory to write"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the scenes and training steps; 0.02 is a rehearsal (default: 1.0)",
    )
    arguments = parser.parse_args(argv)
    out, budget = arguments.output_dir, arguments.budget
    if not 0 < budget <= 1:
        raise ValueError(f"--budget must lie in 0..1, got {budget}")
    _check_installed()
    started = time.monotonic()
    with claimed(out):
        _refuse_other_budget(out, budget)
        _show_shipped_model(out)
        with StopRequest() as stop:
            _train(out, budget, stop)
        if stop.requested:
            print("stopped; the same command goes on from there")
            return 128 + stop.signal_number
        exit_code = evaluate(_evaluation_arguments(out))
    minutes = (time.monotonic() - started) / 60
    print(
        f"\nquickstart took {minutes:.1f} minutes; try: cloc-mllm demo --cloc {out}/cloc/model "
        f"--mllm {out}/mllm/model"
    )
    return exit_code


def _refuse_other_budget(out: Path, budget: float) -> None:
    """What is in the directory was made for one budget.

    Raises:
        ValueError: for another one.
    """
    note = out / "budget.json"
    begun = json.loads(note.read_text()) if note.exists() else budget
    if begun != budget:
        raise ValueError(
            f"{out} was begun with --budget {begun:g}, not {budget:g}; go on with that, or name "
            "another --output_dir"
        )
    note.write_text(json.dumps(budget))


def _check_installed() -> None:
    """Refuses to start without what the last step needs, too.

    Raises:
        ModuleNotFoundError: names the package.
    """
    for package in ("deepspeed", "peft", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def _show_shipped_model(out: Path) -> None:
    """The checkpoint that ships answers before anything is trained."""
    record, expression = _telling_example()
    picture = out / "example.jpg"
    picture.write_bytes(record.image)
    print(f'The model that ships, before any training: cloc-mllm ground {picture} "{expression}"')
    main_ground([str(picture), expression, "--output", str(out / "example_answer.png")])


def _telling_example() -> tuple[Record, str]:
    """A test scene with an expression that the name alone does not settle."""
    for record in generate_scenes(200, split="test", long_side=512):
        texts = [text for region in record.regions for text in region.expressions]
        size_texts = [text for text in texts if expression_kind(text) == "size"]
        if size_texts:
            return record, size_texts[0]
    raise AssertionError("200 scenes without two things of one kind")


def _train(out: Path, budget: float, stop: StopRequest) -> None:
    run = partial(_run, out, stop)
    data = str(out / "data")
    scenes = ("--data.train", f"{data}/train")
    validation = ("--data.validation", f"{data}/validation")
    stage1 = (*_config("stage1_openmoji", budget), *scenes, *validation)
    cloc = Command("CLOC", ("stage1", *stage1, "--run.output_dir", str(out / "cloc")))
    clip = Command(
        "plain CLIP",
        ("stage1", *stage1, "--run.output_dir", str(out / "clip"), "--model.prompter.kind", "none"),
    )
    llm = Command(
        "small language model",
        ("tiny-llm", *_config("tiny_llm_openmoji", budget), "--run.output_dir", str(out / "llm")),
    )
    mllm = Command(
        "MLLM",
        (
            "stage2", *_config("stage2_openmoji", budget), *scenes, *validation,
            "--run.eval_every", "40",
            "--run.output_dir", str(out / "mllm"),
            "--model.cloc", str(out / "cloc/model"),
            "--model.language_model", str(out / "llm/model"),
        ),
    )  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        language_model = pool.submit(run, llm)
        for command in _data_commands(data, budget):
            run(command)
        encoder, baseline = (pool.submit(run, command) for command in (cloc, clip))
        for needed in (language_model, encoder):
            needed.result()
        for job in (pool.submit(run, mllm), baseline):
            job.result()


def _config(name: str, budget: float) -> tuple[str, ...]:
    """`--config` and, below the full budget, fewer steps."""
    config = yaml.safe_load((CONFIGS / "training" / f"{name}.yaml").read_text(encoding="utf-8"))
    arguments = ["--config", name]
    for part in ("run", "alignment"):
        if part in config:
            arguments += [f"--{part}.steps", str(math.ceil(config[part]["steps"] * budget))]
    return tuple(arguments)


def _data_commands(data: str, budget: float) -> list[Command]:
    sizes = {"train": _TRAIN_SCENES, "validation": _VALIDATION_SCENES, "test": _TEST_SCENES}
    return [
        Command(
            f"{split} scenes",
            (
                "data", "build", "scenes", "--split", split, "--num",
                str(math.ceil(number * budget)), "--workers", str(_half_the_cores()),
                "--output_dir", f"{data}/{split}",
            ),
        )
        for split, number in sizes.items()
        if not Path(data, split).exists()
    ]  # fmt: skip


def _evaluation_arguments(out: Path) -> list[str]:
    return [
        "--cloc", str(out / "cloc/model"), "--baseline_cloc", str(out / "clip/model"),
        "--mllm", str(out / "mllm/model"), "--data", str(out / "data/test"),
        "--output_dir", str(out), "--overwrite", "true",
    ]  # fmt: skip


def _half_the_cores() -> int:
    return max(1, (os.cpu_count() or 1) // 2)


def _run(out: Path, stop: StopRequest, command: Command) -> None:
    """Run a command on half the cores (on OMP_NUM_THREADS of them, where that is set).
    Output goes to `out/logs`; the last line is shown now and then. A request to stop is handed on,
    and nothing is started after it.

    Raises:
        ValueError: the command failed; names its log.
    """
    if stop.requested:
        return
    threads = {"OMP_NUM_THREADS": str(_half_the_cores()), "OMP_WAIT_POLICY": "passive"}
    environment = {**threads, **os.environ}
    log = out / "logs" / command.log_name
    log.parent.mkdir(exist_ok=True)
    started = time.monotonic()
    print(f"> {command.title}: cloc-mllm {' '.join(command.arguments)}", flush=True)
    argv = [sys.executable, "-m", "cloc_mllm.cli", *command.arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=STDOUT, env=environment)
        _wait_and_show(process, command, log, stop)
    if stop.requested:
        return
    if process.returncode:
        raise ValueError(
            f"{command.title} failed with status {process.returncode}; last line of {log}: "
            f"{_last_line(log)}"
        )
    print(f"  {command.title}: done in {time.monotonic() - started:.0f} s", flush=True)


def _wait_and_show(
    process: subprocess.Popen[bytes], command: Command, log: Path, stop: StopRequest
) -> None:
    shown, told = time.monotonic(), False
    while process.poll() is None:
        time.sleep(_LOOK_EVERY_SECONDS)
        if stop.requested and not told:
            process.terminate()
            told = True
        if time.monotonic() - shown > _STATUS_EVERY_SECONDS:
            shown = time.monotonic()
            print(f"  {command.title}: {_last_line(log)}", flush=True)


def _last_line(log: Path) -> str:
    lines = log.read_bytes().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "starting")
