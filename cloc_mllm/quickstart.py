"""`cloc-mllm quickstart`: the whole road on built-in data, on a laptop's CPU.

Shows the shipped model first, then makes data, trains CLOC and plain CLIP at equal budget and a
small language model beside them, tunes the MLLM, evaluates, and writes one report.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cloc_mllm.cli import main as cloc_mllm
from cloc_mllm.data.expressions import expression_kind
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes

_CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs"
_TRAIN_SCENES, _VALIDATION_SCENES, _TEST_SCENES = 10_000, 200, 500
_STATUS_EVERY_SECONDS = 20.0


@dataclass(frozen=True)
class Command:
    """One `cloc-mllm` command (or a script, when `script` is set) with its arguments."""

    title: str
    arguments: tuple[str, ...]
    module: str = "cloc_mllm.cli"

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.arguments]

    @property
    def log_name(self) -> str:
        return self.title.replace(" ", "_") + ".log"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cloc-mllm quickstart", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="directory to write"
    )
    out = parser.parse_args(argv).out
    if not (_CONFIGS / "stage1_openmoji.yaml").is_file():
        raise FileNotFoundError(
            f"the quickstart's configs are not in {_CONFIGS}; run it from a clone of the repository"
        )
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    _show_shipped_model(out)
    _train(out)
    exit_code = cloc_mllm(_evaluation_arguments(out))
    minutes = (time.monotonic() - started) / 60
    print(
        f"\nquickstart took {minutes:.1f} minutes; try: cloc-mllm demo --cloc {out}/cloc/model "
        f"--mllm {out}/mllm/model"
    )
    return exit_code


def _show_shipped_model(out: Path) -> None:
    """The checkpoint that ships answers before anything is trained."""
    record, expression = _telling_example()
    picture = out / "example.jpg"
    picture.write_bytes(record.image)
    print(f'The model that ships, before any training: cloc-mllm ground {picture} "{expression}"')
    cloc_mllm(["ground", str(picture), expression, "--out", str(out / "example_answer.png")])


def _telling_example() -> tuple[Record, str]:
    """A test scene with an expression that the name alone does not settle."""
    for record in generate_scenes(200, split="test", long_side=512):
        for region in record.regions:
            for expression in region.expressions:
                if expression_kind(expression) == "size":
                    return record, expression
    raise AssertionError("200 scenes without two things of one kind")


def _train(out: Path) -> None:
    data = str(out / "data")
    _run_together(out, [[*_data_commands(data)]])
    stage1: tuple[str, ...] = (
        "--config",
        str(_CONFIGS / "stage1_openmoji.yaml"),
        "--data.train",
        f"{data}/train",
    )
    stage1 += ("--data.validation", f"{data}/validation")
    cloc = Command("CLOC", ("stage1", *stage1, "--run.output_dir", str(out / "cloc")))
    clip = Command(
        "plain CLIP",
        ("stage1", *stage1, "--run.output_dir", str(out / "clip"), "--model.prompter.kind", "none"),
    )
    llm = Command(
        "small language model",
        (
            "--config",
            str(_CONFIGS / "tiny_llm_openmoji.yaml"),
            "--run.output_dir",
            str(out / "llm"),
        ),
        module="cloc_mllm.train.tiny_llm",
    )
    mllm = Command(
        "MLLM",
        (
            "stage2", "--config", str(_CONFIGS / "stage2_openmoji.yaml"),
            "--data.train", f"{data}/train", "--run.output_dir", str(out / "mllm"),
            "--model.cloc", str(out / "cloc/model"),
            "--model.language_model", str(out / "llm/model"),
        ),
    )  # fmt: skip
    _run_together(out, [[cloc], [clip, llm]])
    _run_together(out, [[mllm]])


def _data_commands(data: str) -> list[Command]:
    sizes = {"train": _TRAIN_SCENES, "validation": _VALIDATION_SCENES, "test": _TEST_SCENES}
    return [
        Command(
            f"{split} scenes",
            (
                "data", "build", "scenes", "--split", split, "--num", str(number),
                "--workers", str(os.cpu_count() or 1), "--out", f"{data}/{split}",
            ),
        )
        for split, number in sizes.items()
        if not Path(data, split).exists()
    ]  # fmt: skip


def _evaluation_arguments(out: Path) -> list[str]:
    return [
        "eval", "--cloc", str(out / "cloc/model"), "--baseline_cloc", str(out / "clip/model"),
        "--mllm", str(out / "mllm/model"), "--data", str(out / "data/test"),
        "--output_dir", str(out),
    ]  # fmt: skip


def _run_together(out: Path, lanes: list[list[Command]]) -> None:
    """Run the commands of each lane one after the other and the lanes side by side, each with its
    share of the cores; output goes to `out/logs`, its last line is shown now and then.

    Raises:
        ValueError: a command failed; names its log.
    """
    threads = str(max(1, (os.cpu_count() or 1) // len(lanes)))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    waiting = [list(lane) for lane in lanes]
    running: dict[int, tuple[Command, subprocess.Popen[bytes], float]] = {}
    (out / "logs").mkdir(exist_ok=True)
    shown = time.monotonic()
    try:
        while running or any(waiting):
            for lane, commands in enumerate(waiting):
                if lane not in running and commands:
                    command = commands.pop(0)
                    print(f"> {command.title}: {' '.join(command.argv[2:])}", flush=True)
                    with _log(out, command).open("wb") as log:
                        running[lane] = (
                            command,
                            _start(command, log, environment),
                            time.monotonic(),
                        )
            time.sleep(0.2)
            for lane in [
                lane for lane, (_, process, _) in running.items() if process.poll() is not None
            ]:
                _finish(out, *running.pop(lane))
            if time.monotonic() - shown > _STATUS_EVERY_SECONDS:
                shown = time.monotonic()
                for command, _, _ in running.values():
                    print(f"  {command.title}: {_last_line(_log(out, command))}", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()


def _start(
    command: Command, log: IO[bytes], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command.argv, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _finish(out: Path, command: Command, process: subprocess.Popen[bytes], started: float) -> None:
    if process.returncode:
        log = _log(out, command)
        raise ValueError(
            f"{command.title} failed with status {process.returncode}; last line of {log}: "
            f"{_last_line(log)}"
        )
    print(f"  {command.title}: done in {time.monotonic() - started:.0f} s", flush=True)


def _log(out: Path, command: Command) -> Path:
    return out / "logs" / command.log_name


def _last_line(log: Path) -> str:
    lines = log.read_bytes().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "starting")


if __name__ == "__main__":
    sys.exit(main())
