"""What `cloc-mllm serve` does while clients send huge bodies: its memory, how long a health check
waits, and what each client is told.

    python eval/bench/serve_abuse.py --output runs/bench/serve_abuse.json

With `--package DIR` the server comes from another checkout, for a comparison.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser

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
    "depth": lambda: b"[" * _SIZE,
}


class Server:
    """A running `cloc-mllm serve`."""

    def __init__(self, package: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cloc_mllm.cli", "serve", "--port", "0", *options],
            cwd=package,
            env={**os.environ, "PYTHONPATH": str(package)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+(?=/v1)", line)
        assert found, f"the server ended with {self.process.wait()}"
        self.address = found.group()

    def post(self, body: bytes) -> str:
        """Sends a chat; returns the status and the start of what it is told."""
        url, headers = f"{self.address}/v1/chat/completions", {"content-type": "application/json"}
        try:
            with urlopen(Request(url, body, headers), timeout=_PATIENCE_S) as response:
                return f"{response.status}"
        except HTTPError as error:
            return f"{error.code} {json.load(error)['error']['message'][:70]}"
        except OSError as error:  # refused before the whole body was sent
            return str(error)

    def health_seconds(self) -> float:
        started = time.perf_counter()
        urlopen(f"{self.address}/health", timeout=_PATIENCE_S).read()
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


def attacked(server: Server, body: bytes, num_clients: int) -> dict[str, Any]:
    """Sends a body by several clients at once, and asks for the health meanwhile."""
    before = server.megabytes("VmRSS")
    server.forget_peak()
    told: list[str] = []
    senders = [
        threading.Thread(target=lambda: told.append(server.post(body))) for _ in range(num_clients)
    ]
    started = time.perf_counter()
    for sender in senders:
        sender.start()
    waits = [server.health_seconds()]
    while any(sender.is_alive() for sender in senders):
        time.sleep(0.02)
        waits.append(server.health_seconds())
    return {
        "told": sorted(set(told)),
        "seconds": round(time.perf_counter() - started, 2),
        "worst_health_s": round(max(waits), 3),
        "peak_mb": server.megabytes("VmHWM") - before,
        "kept_mb": server.megabytes("VmRSS") - before,
    }


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
    try:
        quiet = max(server.health_seconds() for _ in range(100))
        print(f"worst of 100 quiet health checks: {quiet:.3f} s", flush=True)
        for name in arguments.bodies:
            rows[name] = attacked(server, BODIES[name](), arguments.clients)
            print(f"{name:18} {rows[name]}", flush=True)
    finally:
        server.stop()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
