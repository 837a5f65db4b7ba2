"""`cloc-mllm quickstart`: the whole road on built-in data, on a laptop's CPU.

Shows the shipped model first. Then, two at a time: a small language model, which needs no data;
data and CLOC; plain CLIP at CLOC's budget; the MLLM. Evaluates, and writes one report. Ends with a
photo.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import STDOUT

import yaml

from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.data.example_photos import EXAMPLE_PHOTOS
from cloc_mllm.data.expressions import expression_kind
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.commands import main as evaluate
from cloc_mllm.inference.commands import main_ground
from cloc_mllm.shipped import CONFIGS
from cloc_mllm.stopping import StopRequest, wait_for
from cloc_mllm.train.claim import claimed

_TRAIN_SCENES, _VALIDATION_SCENES, _TEST_SCENES = 10_000, 200, 500
_STATUS_EVERY_SECONDS = 20.0
_EVALUATION_SECONDS = 35.0
_KNOWN_SECONDS = 60.0  # of the work, before which the time left is a guess
_STEP = re.compile(r"step +(\d+) ")


@dataclass(frozen=True)
class Phase:
    """A part of a command.

    Attributes:
        seconds: that it took on two quiet cores, by which the time left is told.
        steps: of training, 0 if it has none.
        word: that its lines of the log hold, and those of earlier phases do not.
    """

    seconds: float
    steps: int = 0
    word: str = ""


@dataclass(frozen=True)
class Command:
    """One `cloc-mllm` command with its arguments."""

    title: str
    arguments: tuple[str, ...]
    phases: tuple[Phase, ...]

    @property
    def log_name(self) -> str:
        return self.title.replace(" ", "_") + ".log"

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def progress(self, line: str) -> tuple[float, str]:
        """Reads a line of the log: how many of the seconds are done, and the step."""
        found = _STEP.match(line)
        before = 0.0
        for phase in self.phases:
            if found and phase.steps and phase.word in line:
                step = min(int(found[1]), phase.steps)
                return before + phase.seconds * step / phase.steps, f"{step}/{phase.steps}"
            before += phase.seconds
        return 0.0, "..."


class Display:
    """One line for all that runs: the steps, the time passed and about how much is left."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self._total = sum(command.seconds for command in commands) + _EVALUATION_SECONDS
        self._done: dict[str, float] = {}
        self._at_first: dict[str, float] = {}
        self._running: dict[str, str] = {}
        self._started = self._shown = time.monotonic()
        self._lock = threading.Lock()

    def note(self, command: Command, line: str) -> None:
        """Notes the newest line of a command's log, and shows the display now and then."""
        done, step = command.progress(line)
        with self._lock:
            self._at_first.setdefault(command.title, done)  # what an earlier start had done
            self._done[command.title] = done
            self._running[command.title] = f"{command.title} {step}"
            if time.monotonic() - self._shown > _STATUS_EVERY_SECONDS:
                self._shown = time.monotonic()
                print(f"  {', '.join(self._running.values())} | {self._clock()}", flush=True)

    def end(self, command: Command) -> None:
        """Notes that a command is done."""
        with self._lock:
            self._running.pop(command.title, None)
            self._done[command.title] = command.seconds

    def _clock(self) -> str:
        passed = time.monotonic() - self._started
        done = sum(self._done.values())
        learnt = done - sum(self._at_first.values())
        told = f"{passed / 60:.0f} min passed"
        if learnt < _KNOWN_SECONDS:
            return told
        return f"{told}, about {passed * (self._total - done) / learnt / 60:.0f} min left"


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
        _show_photo(out)
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
    arguments = [str(picture), expression, "--model", "scenes"]
    print(f"The model that ships, before any training: cloc-mllm ground {shlex.join(arguments)}")
    main_ground([*arguments, "--output", str(out / "example_answer.png")])


def _show_photo(out: Path) -> None:
    """The model that ships for everyday photos answers, too."""
    arguments = [str(EXAMPLE_PHOTOS / "horses.jpg"), "the horse", "a man riding a horse"]
    print(f"\nEveryday photos, by the model that ships: cloc-mllm ground {shlex.join(arguments)}")
    main_ground([*arguments, "--output", str(out / "example_photo.png")])


def _telling_example() -> tuple[Record, str]:
    """A test scene with an expression that the name alone does not settle."""
    for record in generate_scenes(200, split="test", long_side=512):
        texts = [text for region in record.regions for text in region.expressions]
        size_texts = [text for text in texts if expression_kind(text) == "size"]
        if size_texts:
            return record, size_texts[0]
    raise AssertionError("200 scenes without two things of one kind")


def _train(out: Path, budget: float, stop: StopRequest) -> None:
    data = str(out / "data")
    scenes = ("--data.train", f"{data}/train")
    validation = ("--data.validation", f"{data}/validation")
    stage1 = (*_config("stage1_openmoji", budget), *scenes, *validation)
    cloc = Command(
        "CLOC",
        ("stage1", *stage1, "--run.output_dir", str(out / "cloc")),
        _phases("stage1_openmoji", budget, 170),
    )
    clip = Command(
        "plain CLIP",
        ("stage1", *stage1, "--run.output_dir", str(out / "clip"), "--model.prompter.kind", "none"),
        _phases("stage1_openmoji", budget, 135),
    )
    llm = Command(
        "small language model",
        ("tiny-llm", *_config("tiny_llm_openmoji", budget), "--run.output_dir", str(out / "llm")),
        _phases("tiny_llm_openmoji", budget, 340),
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
        _phases("stage2_openmoji", budget, 116, alignment=150),
    )  # fmt: skip
    scenes_data = _data_commands(data, budget)
    display = Display([*scenes_data, cloc, clip, llm, mllm])
    run = partial(_run, out, stop, display)
    with ThreadPoolExecutor(2) as pool:
        language_model = pool.submit(run, llm)
        for command in scenes_data:
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


def _phases(name: str, budget: float, seconds: float, alignment: float = 0.0) -> tuple[Phase, ...]:
    """The phases of a training by a config, with the seconds of the full budget."""
    config = yaml.safe_load((CONFIGS / "training" / f"{name}.yaml").read_text(encoding="utf-8"))
    training = Phase(seconds * budget, math.ceil(config["run"]["steps"] * budget))
    if not alignment:
        return (training,)
    steps = math.ceil(config["alignment"]["steps"] * budget)
    return Phase(alignment * budget, steps, "cells"), training


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
            (Phase(number * budget / 350),),
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


def _run(out: Path, stop: StopRequest, display: Display, command: Command) -> None:
    """Run a command on half the cores (on OMP_NUM_THREADS of them, where that is set).
    Output goes to `out/logs`, its last line to the display. A request to stop is handed on,
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
        wait_for(process, stop, lambda: display.note(command, _last_line(log)))
    if stop.requested:
        return
    if process.returncode:
        raise ValueError(
            f"{command.title} failed with status {process.returncode}; last line of {log}: "
            f"{_last_line(log)}"
        )
    display.end(command)
    print(f"  {command.title}: done in {time.monotonic() - started:.0f} s", flush=True)


def _last_line(log: Path) -> str:
    lines = log.read_bytes().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "starting")
