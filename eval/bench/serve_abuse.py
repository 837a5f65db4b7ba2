"""What `cloc-mllm serve` does while clients send huge bodies, open connections and say nothing, or
drip their bodies byte by byte: its memory, how long a health check waits, what each client is told,
and what a normal client sees meanwhile.

    python eval/bench/serve_abuse.py --output runs/bench/serve_abuse.json

With `--package DIR` the server comes from another checkout, for a comparison.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from PIL import Image

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.serve.request_log import CHAT_ROUTE

_ROOT = Path(__file__).resolve().parents[2]
_SIZE = 19_500_000  # bytes of a body, below the limit
_PATIENCE_S = 300
_PICTURE = '{"type":"image_url","image_url":{"url":"%s"}%s}'


def _filled(before: str, piece: str, after: str) -> bytes:
    count = (_SIZE - len(before) - len(after)) // len(piece.encode())
    return (before + piece * count + after).encode()


def _content(piece: str, last: str) -> bytes:
    return _filled('{"messages":[{"role":"user","content":[', piece, last + "]}]}")


def _url(piece: str) -> bytes:
    head, _, tail = (_PICTURE % ("data:image/png;base64,|", "")).partition("|")
    before = '{"messages":[{"role":"user","content":['
    return _filled(before + head, piece, tail + "]}]}")


BODIES: dict[str, Callable[[], bytes]] = {
    "boxes": lambda: _filled(
        '{"messages":[{"role":"user","content":['
        '{"type":"image_url","regions":{"unit":"pixels","boxes":[',
        "[0,0,1,1],",
        '[0,0,1,1]]},"image_url":{"url":"data:image/png;base64,"}}]}]}',
    ),
    "messages": lambda: _filled(
        '{"messages":[', '{"role":"user","content":"a"},', '{"role":"user","content":"a"}]}'
    ),
    "parts": lambda: _content('{"type":"text","text":"a"},', '{"type":"text","text":"a"}'),
    "wrong parts": lambda: _content("0,", "0"),
    "unknown fields": lambda: _filled('{"messages":[],"x":[', "{},", "{}]}"),
    "text": lambda: _filled('{"messages":[{"role":"user","content":"😀', "a", '"}]}'),
    "escapes": lambda: _filled('{"messages":[{"role":"user","content":"', "\\u20ac", '"}]}'),
    "base64": lambda: _url("A"),
    "quoted base64": lambda: _url("%41"),
    "base64 in blanks": lambda: _url("A "),
    "escaped base64": lambda: _url("\\u0041"),
    "depth": lambda: b"[" * _SIZE,
}


class Process:
    """A running server.

    Args:
        command: of `cloc-mllm`; it prints its address.
        health: path that tells whether it lives.
    """

    def __init__(self, package: Path, command: Sequence[str], health: str) -> None:
        self.health = health
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cloc_mllm.cli", *command],
            cwd=package,
            env={**os.environ, "PYTHONPATH": str(package), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        lines = map(re.compile(r"http://[\w.:]+").search, self.process.stdout)
        found = next((line for line in lines if line), None)
        assert found, f"the server ended with {self.process.wait()}"
        self.address = found.group()

    def health_seconds(self) -> float:
        started = time.perf_counter()
        urlopen(f"{self.address}{self.health}", timeout=_PATIENCE_S).read()
        return time.perf_counter() - started

    def megabytes(self, name: str) -> int:
        """`VmRSS` is the memory now, `VmHWM` its peak."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) // 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


class Server(Process):
    """A running `cloc-mllm serve`."""

    def __init__(self, package: Path, *options: str) -> None:
        super().__init__(package, ["serve", "--port", "0", *options], "/health")

    def post(self, body: bytes, source: str = "127.0.0.1") -> str:
        """Sends a chat from an address; returns the status and the start of what it is told."""
        url, headers = urlsplit(self.address).netloc, {"content-type": "application/json"}
        line = HTTPConnection(url, timeout=_PATIENCE_S, source_address=(source, 0))
        try:
            with contextlib.closing(line):
                line.request("POST", CHAT_ROUTE, body, headers)
                response = line.getresponse()
                said = json.load(response)
        except OSError as error:  # refused before the whole body was sent
            return str(error)
        told = said["error"]["message"][:70] if "error" in said else ""
        return f"{response.status} {told}".rstrip()

    def begin(self, num_bytes: int) -> socket.socket:
        """Opens a connection and sends the head of a chat whose body has so many bytes."""
        url = urlsplit(self.address)
        line = socket.create_connection((url.hostname, url.port), timeout=_PATIENCE_S)
        head = f"POST {CHAT_ROUTE} HTTP/1.1\r\nhost: {url.netloc}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {num_bytes}\r\n\r\n"
        line.sendall(head.encode() if num_bytes else head[:40].encode())
        return line


def question(**more: object) -> bytes:
    """A normal chat with a picture."""
    file = io.BytesIO()
    Image.new("RGB", (128, 96), "teal").save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}
    content = [picture, {"type": "text", "text": "Where is the crab?"}]
    return json.dumps({"messages": [{"role": "user", "content": content}], **more}).encode()


def under_attack(
    server: Process, attackers: Sequence[Callable[[], str]], normal: Callable[[], str]
) -> dict[str, Any]:
    """Lets attackers do what they do at once, and asks for the health meanwhile, as a normal client
    does its own thing."""
    before = server.megabytes("VmRSS")
    server.forget_peak()
    waits, answers = [server.health_seconds()], []
    with ThreadPoolExecutor(len(attackers) + 1) as pool:
        started = time.perf_counter()
        attacks = [pool.submit(attacker) for attacker in attackers]
        last_one = pool.submit(normal)
        asked_at = started
        while not all(attack.done() for attack in attacks):
            time.sleep(0.02)
            waits.append(server.health_seconds())
            if last_one.done():
                answers.append((last_one.result(), time.perf_counter() - asked_at))
                asked_at, last_one = time.perf_counter(), pool.submit(normal)
        seconds = time.perf_counter() - started
        answers.append((last_one.result(), time.perf_counter() - asked_at))
    time.sleep(0.5)  # until freed memory is given back
    return {
        "told": sorted({attack.result() for attack in attacks}),
        "seconds": round(seconds, 2),
        "worst_health_s": round(max(waits), 3),
        "peak_mb": server.megabytes("VmHWM") - before,
        "kept_mb": server.megabytes("VmRSS") - before,
        "normal": sorted({answer for answer, _ in answers}),
        "normal_worst_s": round(max(wait for _, wait in answers), 2),
    }


def judged(came: dict[str, Any], may_be: str = "") -> tuple[bool, str]:
    """Whether a server bore what `under_attack` did, on a quiet machine; and what came of it.

    Args:
        may_be: what a normal client may be told beside its answer.
    """
    normal = set(came["normal"]) - {may_be}
    good = came["worst_health_s"] <= 0.5 and came["peak_mb"] <= 300 and came["kept_mb"] <= 100
    return good and bool(normal) and normal <= {"200", "answered"}, (
        f"told: {'; '.join(came['told'])}; +{came['peak_mb']} MB, {came['kept_mb']} kept; health "
        f"within {came['worst_health_s']:.2f} s; a normal client: {', '.join(came['normal'])}, "
        f"within {came['normal_worst_s']:.1f} s"
    )


def huge_bodies(server: Server, name: str, num_clients: int) -> dict[str, Any]:
    """Several clients send the same body at once."""
    body = BODIES[name]()
    return under_attack(server, [lambda: server.post(body)] * num_clients, _normal(server))


def half_open(server: Server, num_clients: int, seconds: float) -> dict[str, Any]:
    """Clients begin a request and say no more; the server should close most of them."""

    def attack() -> str:
        lines = [server.begin(0) for _ in range(num_clients)]
        time.sleep(seconds)
        num_open = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) - before
        for line in lines:
            line.close()
        return f"{num_open} of {num_clients} open after {seconds:.0f} s"

    before = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
    return under_attack(server, [attack], _normal(server))


def dripping(server: Server, num_clients: int) -> dict[str, Any]:
    """Clients send a body byte by byte, two seconds apart, until they are refused."""

    def attack() -> str:
        with server.begin(1000) as line:
            line.settimeout(2)
            while True:
                try:
                    line.sendall(b" ")
                    told = line.recv(4096)
                except TimeoutError:
                    continue
                except OSError as error:
                    return str(error)
                return told.decode(errors="replace").partition("\r\n")[0]

    return under_attack(server, [attack] * num_clients, _normal(server))


def stopped(server: Server) -> dict[str, Any]:
    """SIGTERM at the first piece of an answer, which is read to its end."""
    headers = {"content-type": "application/json"}
    body = question(stream=True, temperature=1.0, seed=0)
    with urlopen(Request(f"{server.address}{CHAT_ROUTE}", body, headers)) as response:
        first = response.readline()
        server.process.terminate()
        started = time.perf_counter()
        rest = response.read()
    whole = first.startswith(b"data:") and rest.endswith(b"data: [DONE]\n\n")
    status = server.process.wait(_PATIENCE_S)
    return {
        "told": ["whole" if whole else "cut"],
        "status": status,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _normal(server: Server) -> Callable[[], str]:
    return lambda: server.post(question(max_tokens=8), "127.0.0.2")


def main(argv: list[str]) -> None:
    """Attacks the server with each body in turn and writes a table."""
    parser = ArgumentParser(prog="serve_abuse", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--package", type=Path, default=_ROOT, help="checkout of the server")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--bodies", nargs="*", default=list(BODIES), choices=list(BODIES))
    arguments = parser.parse_args(argv)
    server = Server(arguments.package)
    rows: dict[str, Any] = {}
    attacks: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(huge_bodies, server, name, arguments.clients) for name in arguments.bodies
    }
    attacks["half-open connections"] = lambda: half_open(server, 900, 12)
    attacks["dripping bodies"] = lambda: dripping(server, 17)
    attacks["SIGTERM"] = lambda: stopped(server)
    try:
        quiet = max(server.health_seconds() for _ in range(100))
        print(f"worst of 100 quiet health checks: {quiet:.3f} s", flush=True)
        for name, attack in attacks.items():
            rows[name] = attack()
            print(f"{name:22} {rows[name]}", flush=True)
    finally:
        server.stop()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
