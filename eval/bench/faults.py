"""What the commands do when processes, ranks, disks and people fail: the real entry points, on the
smallest scenes and towers.

    make faults    # python eval/bench/faults.py --output runs/bench/faults.json

Each row says what was done, how often, what came of it, the seconds until the last process had
ended (the worst), and how many processes were left. A row that is not as it should be begins with
FAILED, and the script ends with 1. `--only NAME...` runs some of the groups.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import yaml
from torch import Tensor, nn

import demo_abuse
import serve_abuse
from abuse import HEALTH_BAR_S, Borne
from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import ModelConfig, Stage1Config
from cloc_mllm.data.collate import ClocBatch
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.data.tokenizer import train_byte_level_bpe
from cloc_mllm.train import stage1
from cloc_mllm.train.checkpoint import FILES, list_checkpoints, newest_whole_checkpoint
from cloc_mllm.train.engine import StepFn
from cloc_mllm.train.health import DivergedError
from cloc_mllm.train.logging import read_log
from job import PATIENCE_S, Job
from ratio import cpu_seconds, machine_state, save_samples

_ROOT = Path(__file__).resolve().parents[2]
_LAUNCHERS = ("python", "torchrun", "deepspeed")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Row:
    """One line of the table; see the module.

    Args:
        memory_mb: at most, and kept afterwards, above that before.
        normal: what a normal client saw meanwhile.
    """

    fault: str
    times: int
    outcome: str
    worst_s: float | None = None
    left: int = 0
    memory_mb: tuple[int, int] | None = None
    worst_health_s: float | None = None
    normal: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome.startswith("FAILED") or self.left > 0


class Bench:
    """The inputs of all groups, in one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: list[Job] = []
        records = list(generate_scenes(32, split="train", long_side=64))
        write_records(records, root / "records")
        texts = [text for record in records for text in record.captions]
        train_byte_level_bpe(texts, 400).save_pretrained(root / "tokenizer")
        config = Stage1Config(model=_tiny_model(root / "tokenizer"))
        config.data.train, config.data.regions_per_image = str(root / "records"), 2
        config.data.num_workers = 1
        config.run.global_batch_size, config.run.precision = 8, "fp32"
        config.run.log_every = 1
        settings = dataclasses.asdict(config)
        settings["optim"]["betas"] = list(config.optim.betas)
        (root / "config.yaml").write_text(yaml.safe_dump(settings))

    def arguments(self, out: Path, **settings: object) -> list[str]:
        given = {"run.output_dir": out, **settings}
        return [f"--config={self.root}/config.yaml", *(f"--{k}={v}" for k, v in given.items())]

    def train(self, out: Path, launcher: str = "python", /, **settings: object) -> Job:
        script = ["training/stage1.py", *self.arguments(out, **settings)]
        starts = {
            "python": [],
            "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2"],
            "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2"],
        }
        port = [] if launcher == "python" else [f"--master_port={_free_port()}"]
        argv = [sys.executable, *starts[launcher], *port, *script]
        self.jobs.append(Job(argv, self.root / f"{out.name}.log"))
        return self.jobs[-1]

    def end(self) -> None:
        """Ends what a failed check has left running."""
        for job in self.jobs:
            job.seconds_to_end(0)

    def trained(self, out: Path, **settings: object) -> Path:
        """A run from start to end."""
        job = self.train(out, **settings)
        assert job.wait() == 0, job.last_line()
        return out

    def command(self, name: str, *arguments: object) -> Job:
        argv = [sys.executable, "-m", "cloc_mllm.cli", *map(str, arguments)]
        return Job(argv, self.root / f"{name}.log")


def _tiny_model(tokenizer: Path) -> ModelConfig:
    towers = {
        "embed_dim": 24,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"layers": 1, "width": 32, "heads": 2},
    }
    return ModelConfig(
        clip_config=towers, image_size=64, tokenizer=str(tokenizer), context_length=24
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _steps(out: Path) -> int:
    """The last step of the log."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def _wait_until_step(job: Job, out: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while _steps(out) < step:
        if job.process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"step {step} was not reached: {job.last_line()}")
        time.sleep(0.02)


def _digest(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def _verdict(good: bool, outcome: str) -> str:
    return outcome if good else f"FAILED: {outcome}"


def kills(bench: Bench, times: int) -> Iterator[Row]:
    """`kill -9` at random moments of a run that saves at every second step."""
    settings = {"run.steps": 20 * (times + 2), "run.save_every": 2}
    unbroken = bench.trained(bench.root / "unbroken", **settings)
    out, chance, left = bench.root / "killed", random.Random(0), 0
    for _ in range(times):
        job = bench.train(out, **settings)
        _wait_until_step(job, out, _steps(out) + chance.randint(3, 12))
        time.sleep(chance.uniform(0, 0.1))
        job.process.kill()
        left += job.seconds_to_end(5)[1]
    bench.trained(out, **settings)
    same = _digest(out) == _digest(unbroken)
    outcome = f"resumed {times} of {times}, weights {'equal' if same else 'differ'} bit for bit"
    yield Row("kill -9 around saves", times, _verdict(same, outcome), left=left)


def flips(bench: Bench, times: int) -> Iterator[Row]:
    """Damage to each file of the newest checkpoint."""
    out = bench.trained(bench.root / "flipped", **{"run.steps": 6, "run.save_every": 3})
    root, chance, caught = out / "checkpoints", random.Random(0), 0
    older, newest = list_checkpoints(root)
    names = [*FILES, "manifest.json"]
    for number in range(times):
        path = newest / names[number % len(names)]
        whole = path.read_bytes()
        place = chance.randrange(len(whole))
        flipped = (
            whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]
        )
        path.write_bytes(flipped if number // len(names) % 2 else whole[:place])
        caught += newest_whole_checkpoint(root)[0] == older
        path.write_bytes(whole)
    newest.joinpath(FILES[0]).write_bytes(b"")
    expected = _digest(out)
    bench.trained(out, **{"run.steps": 6, "run.save_every": 3})
    same = _digest(out) == expected
    outcome = f"caught {caught}; resumed from the older, weights {'equal' if same else 'differ'}"
    yield Row("bits flipped, files cut", times, _verdict(caught == times and same, outcome))


def signals(
    bench: Bench,
    launchers: Sequence[str] = _LAUNCHERS,
    numbers: Sequence[signal.Signals] = _SIGNALS,
) -> Iterator[Row]:
    """A signal to the process that the user started, and to nobody else."""
    for launcher in launchers:
        for number in numbers:
            out = bench.root / f"{launcher}-{number.name}"
            job = bench.train(out, launcher, **{"run.steps": 100_000, "run.save_every": 0})
            _wait_until_step(job, out, 3)
            job.process.send_signal(number)
            seconds, left = job.seconds_to_end(60)
            saved = [int(path.name[5:]) for path in list_checkpoints(out / "checkpoints")]
            good = saved == [_steps(out)] and newest_whole_checkpoint(out / "checkpoints")[0]
            outcome = _verdict(bool(good), f"saved at step {saved}, log ends at {_steps(out)}")
            yield Row(f"{number.name} to {launcher}", 1, outcome, seconds, left)


def lost_ranks(
    bench: Bench, launchers: Sequence[str] = _LAUNCHERS[1:], kinds: Sequence[str] = ("dead", "hung")
) -> Iterator[Row]:
    """A rank of two is killed, or stopped."""
    for launcher in launchers:
        for what in kinds:
            number = signal.SIGKILL if what == "dead" else signal.SIGSTOP
            out = bench.root / f"{launcher}-{what}"
            settings = {"run.steps": 100_000, "run.save_every": 5, "run.step_timeout": 8}
            job = bench.train(out, launcher, **settings)
            _wait_until_step(job, out, 12)
            started = time.monotonic()
            os.kill(job.rank(1), number)
            while "was lost in step" not in job.said() and time.monotonic() - started < 60:
                time.sleep(0.05)
            noticed = time.monotonic() - started
            _, left = job.seconds_to_end(60)
            line = job.last_line("was lost in step")
            named = re.search(r"rank 1 on host \S+ was lost in step (\d+)\b", line)
            step = int(named[1]) if named else -1
            is_true = step - _steps(out) in (0, 1)  # done, or under way
            kept = [str(path) for path in list_checkpoints(out / "checkpoints")]
            good = is_true and any(path in line for path in kept) and noticed <= 20
            outcome = f"said after {noticed:.1f} s: {line}"
            seconds = time.monotonic() - started
            yield Row(f"{what} rank, {launcher}", 1, _verdict(good, outcome), seconds, left)


Poison = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def _loss_times_a_million(losses: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return losses | {"loss": losses["loss"] * 1e6}


def _gradient_of_1e19(losses: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    weight = next(model.parameters()).sum()
    return losses | {"loss": losses["loss"] + (weight - weight.detach()) * 1e19}


def _nan(losses: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return losses | {"loss": losses["loss"] * float("nan")}


def _scale_of_1e4(losses: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    model.get_parameter("logit_scale").data.fill_(1e4)
    return losses


def spikes(bench: Bench) -> Iterator[Row]:
    """One step of 65 is spoiled, the 60th; then every second one."""
    for what, poison in (
        ("loss x 1e6", _loss_times_a_million),
        ("gradient of 1e19", _gradient_of_1e19),
        ("loss is NaN", _nan),
    ):
        out = bench.root / what.replace(" ", "-")
        _poisoned(bench, out, poison, {60})
        skipped = read_log(out / "log.jsonl", "skipped")
        good = [row["step"] for row in skipped] == [60] and len(skipped[0]["sample_ids"]) == 8
        told = skipped[0]["fault"] if skipped else "nothing was skipped"
        yield Row(what, 1, _verdict(good, f"step 60 alone skipped, with its ids: {told}"))
    said = _poisoned(bench, bench.root / "scale", _scale_of_1e4, {60})
    told = next((line for line in said.splitlines() if "logit_scale is 1e+04" in line), "nothing")
    yield Row("logit scale of 1e4", 1, _verdict(told != "nothing", told))
    try:
        _poisoned(bench, bench.root / "half", _nan, set(range(2, 65, 2)))
        told = "FAILED: the run ended as if nothing were"
    except DivergedError as error:
        told = str(error)
    yield Row("every second step NaN", 1, told)


def _poisoned(bench: Bench, out: Path, poison: Poison, steps: set[int]) -> str:
    """Runs stage 1 in this process with some steps (from 1) spoiled; returns what it said."""
    sound, num_calls = stage1.stage1_step, 0

    def make_step(config: Stage1Config) -> StepFn:
        step = sound(config)

        def acting(model: nn.Module, batch: ClocBatch) -> dict[str, Tensor]:
            nonlocal num_calls
            num_calls += 1
            losses = step(model, batch)
            return poison(losses, model) if num_calls in steps else losses

        return acting

    said = io.StringIO()
    with mock.patch.object(stage1, "stage1_step", make_step), contextlib.redirect_stderr(said):
        stage1.main(bench.arguments(out, **{"run.steps": 65, "data.num_workers": 0}))
    return said.getvalue()


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Callable[[str], None]]:
    """A disk in memory at a place; gives a function that mounts it anew with options."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "faults", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError("mounting needs root")

    def mount_anew(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)

    try:
        yield mount_anew
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def disks(bench: Bench, names: Sequence[str] = ()) -> Iterator[Row]:
    """Each command on a disk that is full, then on one that may only be read, then with room."""
    run = bench.root / "model_run"
    if {*names} - {"stage1", "data"} or not names:
        bench.trained(run, **{"run.steps": 2})
    model, records, llm = run / "model", bench.root / "records", bench.root / "llm" / "model"
    if "stage2" in names or not names:
        job = bench.command("llm", "tiny-llm", *_small_llm(llm.parent, **{"run.steps": 1}))
        assert job.wait() == 0, job.last_line()
    commands: dict[str, tuple[int, Callable[[Path], list[object]]]] = {
        "stage1": (  # the second checkpoint does not fit
            1800,
            lambda to: ["stage1", *bench.arguments(to, **{"run.steps": 12, "run.save_every": 3})],
        ),
        "data": (
            100,
            lambda to: ["data", "build", "scenes", "--num", 60, "--output_dir", to],
        ),
        "tiny-llm": (  # the third checkpoint does not fit
            1000,
            lambda to: ["tiny-llm", *_small_llm(to, **{"run.steps": 12, "run.save_every": 3})],
        ),
        "stage2": (
            1000,
            lambda to: [
                *("stage2", "--model.cloc", model, "--model.language_model", llm),
                *("--model.num_bins", 20, "--model.lora.rank", 2, "--data.train", records),
                *("--run.global_batch_size", 4, "--run.output_dir", to),
                *("--run.steps", 12, "--run.save_every", 3),
            ],
        ),
        "export": (
            60,
            lambda to: ["export", "--to", "safetensors", "--cloc", model, "--output_dir", to],
        ),
        "eval": (
            16,
            lambda to: ["eval", "--cloc", model, "--data", records, "--output_dir", to],
        ),
        "label": (
            60,
            lambda to: ["label", "--executor=inline", "--images", records, "--output_dir", to],
        ),
    }
    for name in names or commands:
        kilobytes, arguments = commands[name]
        yield from _on_full_disk(bench, name, kilobytes, arguments)


def _small_llm(out: Path, **settings: object) -> list[object]:
    """Arguments of the smallest `tiny-llm`."""
    given: dict[str, object] = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 32}
    given |= {"num_scenes": 40, "num_image_tokens": 16, "num_bins": 20, "run.output_dir": out}
    given |= {"run.global_batch_size": 4, "run.precision": "fp32", **settings}
    return [f"--{name}={value}" for name, value in given.items()]


def _on_full_disk(
    bench: Bench, name: str, kilobytes: int, arguments: Callable[[Path], list[object]]
) -> Iterator[Row]:
    place = bench.root / f"disk-{name}"
    out = place / "out"
    try:
        with small_disk(place, kilobytes) as remount:
            for fault, change in (("full", ""), ("read-only", "ro")):
                if change:
                    shutil.rmtree(out, ignore_errors=True)
                    remount(change)
                job = bench.command(f"{name}-{fault}", *arguments(out))
                status = job.wait()
                seconds, left = job.seconds_to_end(5)
                line = job.last_line("cloc-mllm: error")
                said = job.said()
                good = status == 2 and "Traceback" not in said and f"\n{line}" in f"\n{said}"
                yield Row(f"{fault} disk, {name}", 1, _verdict(good, line), seconds, left)
            remount(f"rw,size={100_000}k")
            job = bench.command(f"{name}-room", *arguments(out))
            status = job.wait()
            partial = [path.name for path in place.rglob("*") if "partial" in path.name]
            outcome = f"ends with {status}, partial files left: {len(partial)}"
            yield Row(f"room again, {name}", 1, _verdict(status == 0 and not partial, outcome))
    except PermissionError as error:
        yield Row(f"full disk, {name}", 0, f"not tried: {error}")


def same_directory(bench: Bench) -> Iterator[Row]:
    """A second run in the directory of a first, and a third after the first was killed."""
    out = bench.root / "shared"
    first = bench.train(out, **{"run.steps": 100_000, "run.save_every": 5})
    _wait_until_step(first, out, 3)
    second = bench.command("second", "stage1", *bench.arguments(out))
    status = second.wait()
    refused = status == 2 and "another run is at work" in second.last_line()
    first.process.kill()
    _, left = first.seconds_to_end(5)
    bench.trained(out, **{"run.steps": _steps(out) + 2, "run.save_every": 5})
    yield Row("second run in a directory", 1, _verdict(refused, second.last_line()), left=left)


def quickstart(bench: Bench) -> Iterator[Row]:
    """SIGTERM while its children train; then another budget."""
    out = bench.root / "quickstart"
    start = ["quickstart", "--output_dir", out, "--budget"]
    job = bench.command("quickstart", *start, "0.001")
    deadline = time.monotonic() + PATIENCE_S
    while len(job.members()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    job.process.terminate()
    seconds, left = job.seconds_to_end(60)
    line = job.last_line()
    good = job.process.returncode == 128 + signal.SIGTERM
    yield Row("SIGTERM to quickstart", 1, _verdict(good, line), seconds, left)
    other = bench.command("quickstart-other", *start, "0.5")
    good = other.wait() == 2 and "--budget" in other.last_line()
    yield Row("quickstart, other --budget", 1, _verdict(good, other.last_line()))


def serve(
    bench: Bench,
    names: Sequence[str] = tuple(serve_abuse.ATTACKS),
    health_bar_s: float = HEALTH_BAR_S,
) -> Iterator[Row]:
    """What `serve_abuse` lists."""
    with closing(serve_abuse.Server(_ROOT)) as server:
        for name in names:
            came = serve_abuse.attacked(server, name)
            yield _attacked(f"serve: {name}", came, came.is_good(health_bar_s))
        ended = serve_abuse.stopped(server)
        good = ended["told"] == ["whole"] and ended["status"] == 128 + signal.SIGTERM
        outcome = _verdict(good, f"the answer is {ended['told'][0]}, exit {ended['status']}")
        yield Row("serve: SIGTERM in an answer", 1, outcome, ended["seconds"])


def hostile_template(bench: Bench) -> Iterator[Row]:
    """A chat template with a part that never ends."""
    came = serve_abuse.hostile_template(_ROOT)
    yield _attacked("serve: a chat template that never ends", came, came.is_good())


def demo(
    bench: Bench,
    names: Sequence[str] = tuple(demo_abuse.ATTACKS),
    health_bar_s: float = HEALTH_BAR_S,
) -> Iterator[Row]:
    """What `demo_abuse` lists."""
    with closing(demo_abuse.Demo(_ROOT, _free_port())) as page:
        demo_abuse.visit(page)  # Gradio imports matplotlib for the first visitor
        for name in names:
            came = demo_abuse.attacked(page, name)
            yield _attacked(f"demo: {name}", came, came.is_good(health_bar_s))


def _attacked(what: str, came: Borne, good: bool) -> Row:
    normal = f"{', '.join(came.normal)}, within {came.normal_worst_s:.1f} s"
    told = _verdict(good, "; ".join(came.told))
    memory = (came.peak_mb, came.kept_mb)
    return Row(what, 1, told, came.seconds, 0, memory, came.worst_health_s, normal)


GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "kills": lambda bench: kills(bench, 8),
    "flips": lambda bench: flips(bench, 24),
    "signals": signals,
    "lost_ranks": lost_ranks,
    "spikes": spikes,
    "disks": disks,
    "same_directory": same_directory,
    "quickstart": quickstart,
    "serve": serve,
    "hostile_template": hostile_template,
    "demo": demo,
}


_COLUMNS = (
    *("fault", "times", "what came of it", "seconds to end", "left"),
    *("MB at most, kept", "worst health check, s", "a normal client"),
)


def line_of(row: Row) -> str:
    """A row of a Markdown table."""
    seconds = "" if row.worst_s is None else f"{row.worst_s:.1f}"
    health = "" if row.worst_health_s is None else f"{row.worst_health_s:.2f}"
    memory = "" if row.memory_mb is None else "{}, {}".format(*row.memory_mb)
    cells = (row.fault, row.times, row.outcome, seconds, row.left, memory, health, row.normal)
    return f"| {' | '.join(map(str, cells))} |"


def _whole(name: str, bench: Bench) -> Iterator[Row]:
    """Runs a group; one that breaks off is a failure, and the next group goes on."""
    try:
        yield from GROUPS[name](bench)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        yield Row(name, 0, f"FAILED: broke off: {error!r}")


def main(argv: list[str]) -> int:
    """Runs the groups and prints the table as it grows."""
    parser = ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    arguments = parser.parse_args(argv)
    for number in (signal.SIGHUP, signal.SIGINT):  # ignored under nohup, and behind `&` in a script
        if signal.getsignal(number) is signal.SIG_IGN:  # what is only caught, the commands do get
            signal.signal(number, lambda *_: None)
    rows: list[Row] = []
    machine, started = machine_state(), time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        print(f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|")
        for name in arguments.only:
            for row in _whole(name, bench):
                rows.append(row)
                print(line_of(row).replace(directory, "DIR"), flush=True)
        bench.end()
    seconds = {"wall": time.monotonic() - started, "cpu": cpu_seconds()}
    loads = f"load {machine['load']} at the start, {os.getloadavg()[0]:.1f} at the end"
    print("\n{wall:.0f} s, {cpu:.0f} s of processor time; ".format(**seconds) + loads)
    save_samples(arguments.output, machine | seconds, {row.fault: vars(row) for row in rows})
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(run(main))
