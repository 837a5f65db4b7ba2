"""Answers per second of `cloc-mllm serve` with 1, 4 and 16 clients, beside a server that takes one
question at a time and starts each from its first byte, and what that does to each client's wait.

    python eval/bench/serve_throughput.py --output runs/bench/serve_throughput.json

All are real server processes on the same model. They are asked in turn, in rounds, so that the
ratios are of the same minutes. Each client has an address of its own and asks its questions one
after another, `--questions` of them about a picture before it takes its next one. Where others
share the cores, answers per second of the server's own CPU time are the ones to trust.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.config import LoraConfig, MllmConfig
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.data.wordings import SINGLE, asked
from cloc_mllm.serve.request_log import CHAT_ROUTE
from ratio import machine_state, save_samples
from serve_abuse import Server

_ROOT = Path(__file__).resolve().parents[2]
_SMOLLM2 = Path("runs/bench/smollm2_mllm")
_PATIENCE_S = 1200  # of clients and servers: sixteen wait for one another
_NUM_SCENES = 64
_COMMON = ["--limits.waiting", "32", "--limits.seconds", str(_PATIENCE_S)]
_ALONE = ["--limits.together", "1"]
SIDES = {
    "one at a time": [*_ALONE, "--limits.known_bytes", "0"],
    "one at a time, pictures known": _ALONE,
    "together": [],
}


@dataclass
class Asked:
    """What some clients saw: the seconds of each answer by client, how long all of it took, and the
    server's CPU time."""

    seconds: list[list[float]]
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def add(self, other: Asked) -> None:
        """Adds what the same clients saw in another round."""
        self.wall_s += other.wall_s
        self.cpu_s += other.cpu_s
        for mine, theirs in zip(self.seconds, other.seconds, strict=True):
            mine += theirs

    def row(self) -> dict[str, float]:
        """Answers per second, median and 95th percentile of the wait, and the answers of the client
        that got the fewest, as a share of the mean."""
        waits = sorted(itertools.chain(*self.seconds))
        counts = [len(one) for one in self.seconds]
        return {
            "answers_per_s": len(waits) / self.wall_s,
            "answers_per_cpu_s": len(waits) / self.cpu_s,
            "p50_s": statistics.median(waits),
            "p95_s": waits[math.ceil(0.95 * len(waits)) - 1],
            "least_share": min(counts) * len(counts) / sum(counts),
        }


def main(argv: list[str]) -> None:
    """Measures both servers for each model and writes a table."""
    parser = ArgumentParser(prog="serve_throughput", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=["scenes", "smollm2"])
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=4, help="about each picture")
    parser.add_argument("--tokens", type=int, default=16, help="the longest answer")
    arguments = parser.parse_args(argv)
    machine, results = machine_state(), {}
    pictures = NewPictures()
    print(machine, flush=True)
    for name in arguments.models:
        directory = smollm2_mllm() if name == "smollm2" else name
        sides = {
            side: Server(_ROOT, "--mllm", str(directory), *_COMMON, *options)
            for side, options in SIDES.items()
        }
        try:
            for count in arguments.clients:
                results[f"{name}, {count} clients"] = compared(sides, count, pictures, arguments)
        finally:
            for server in sides.values():
                server.close()
    save_samples(arguments.output, machine, results)


def compared(
    sides: dict[str, Server], num_clients: int, pictures: NewPictures, arguments: Any
) -> dict[str, Any]:
    """Asks the servers in rounds, the order turned each time; returns a row for each.

    The first round is not counted.
    """
    totals = {side: Asked([[] for _ in range(num_clients)]) for side in sides}
    for turn in range(arguments.rounds + 1):
        for side in sides if turn % 2 else reversed(sides):
            chats = [questions(pictures, arguments) for _ in range(num_clients)]
            came = ask(sides[side], chats, 2.0 if turn == 0 else arguments.seconds)
            if turn:
                totals[side].add(came)
    rows: dict[str, Any] = {side: total.row() for side, total in totals.items()}
    first, *_, last = rows.values()
    rows["ratio"] = {name: last[name] / first[name] for name in first}
    for side, row in rows.items():
        shown = ", ".join(f"{key} {value:.3f}" for key, value in row.items())
        print(f"{num_clients:2} clients, {side:29}: {shown}", flush=True)
    return rows


def ask(server: Server, chats: list[Iterator[bytes]], seconds: float) -> Asked:
    """Lets one client per element ask its chats for so long."""
    asked = Asked([[] for _ in chats])
    until = time.perf_counter() + seconds
    place = urlsplit(server.address).netloc

    def client(number: int) -> None:
        source = (f"127.0.0.{2 + number}", 0)
        line = http.client.HTTPConnection(place, timeout=_PATIENCE_S, source_address=source)
        with contextlib.closing(line):
            while time.perf_counter() < until:
                body = next(chats[number])
                started = time.perf_counter()
                line.request("POST", CHAT_ROUTE, body, {"content-type": "application/json"})
                response = line.getresponse()
                text = response.read()
                assert response.status == 200, text
                asked.seconds[number].append(time.perf_counter() - started)

    started, cpu = time.perf_counter(), _cpu_seconds(server.process.pid)
    with ThreadPoolExecutor(len(chats)) as pool:
        list(pool.map(client, range(len(chats))))
    asked.wall_s = time.perf_counter() - started
    asked.cpu_s = _cpu_seconds(server.process.pid) - cpu
    return asked


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and its threads."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def questions(pictures: NewPictures, arguments: Any) -> Iterator[bytes]:
    """Makes the requests of a client without end."""
    wording = SINGLE.first("ground")
    for record in pictures:
        url = f"data:image/png;base64,{base64.b64encode(record.image).decode()}"
        phrases = [region.phrase for region in record.regions]
        for phrase in itertools.islice(itertools.cycle(phrases), arguments.questions):
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": asked(wording, phrase=phrase)},
            ]
            chat = {"messages": [{"role": "user", "content": content}]}
            yield json.dumps(chat | {"max_tokens": arguments.tokens}).encode()


class NewPictures:
    """Scenes without end, of which no server knows any, for several threads: bytes behind the end
    of a PNG, which nobody reads, make another file of it."""

    def __init__(self) -> None:
        self._scenes = list(generate_scenes(_NUM_SCENES, split="test"))
        self._numbers = itertools.count()  # in CPython, `next` of it is one operation

    def __iter__(self) -> Iterator[Record]:
        for number in self._numbers:
            scene = self._scenes[number % _NUM_SCENES]
            yield replace(scene, image=scene.image + number.to_bytes(8, "big"))


def smollm2_mllm() -> Path:
    """Builds the shipped drawings' CLOC beside SmolLM2-135M of the pip package, untrained as an
    MLLM: it writes any text up to the limit of the answer."""
    from cloc_mllm.mllm import build_mllm, merge_and_save
    from cloc_mllm.mllm.smollm2 import export_smollm2

    if not _SMOLLM2.exists():
        language_model = _SMOLLM2.with_name("smollm2")
        if not language_model.exists():
            export_smollm2(language_model)
        config = MllmConfig(
            cloc="scenes", language_model=str(language_model), lora=LoraConfig(rank=0)
        )
        merge_and_save(*build_mllm(config), _SMOLLM2)
    return _SMOLLM2


if __name__ == "__main__":
    sys.exit(run(main))
