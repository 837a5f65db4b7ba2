"""What `cloc-mllm serve` does while clients send huge bodies and impossible numbers, open
connections and say nothing, drip their bodies byte by byte, or make a hostile chat template run on.

    python eval/bench/serve_abuse.py --output runs/bench/serve_abuse.json

A part of `make faults`. With `--package DIR` the server comes from another checkout, for a
comparison.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from PIL import Image

from abuse import PATIENCE_S, Attack, Borne, Process, under_attack
from cloc_mllm.cli import run
from cloc_mllm.command_line import ArgumentParser
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.serve.request_log import CHAT_ROUTE

_ROOT = Path(__file__).resolve().parents[2]
_SIZE = 19_500_000  # bytes of a body, below the limit
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


class Server(Process):
    """A running `cloc-mllm serve`."""

    def __init__(self, package: Path, *options: str) -> None:
        super().__init__(package, ["serve", "--port", "0", *options], "/health")

    def post(self, body: bytes, source: str = "127.0.0.1") -> str:
        """Sends a chat from an address; returns the status and the start of what it is told."""
        url, headers = urlsplit(self.address).netloc, {"content-type": "application/json"}
        line = HTTPConnection(url, timeout=PATIENCE_S, source_address=(source, 0))
        try:
            with closing(line):
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
        line = socket.create_connection((url.hostname, url.port), timeout=PATIENCE_S)
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


def _huge(name: str, server: Server) -> Attack:
    """Four clients send the same body."""
    body = BODIES[name]()
    return Attack([lambda: server.post(body)] * 4, "400")


def _half_open(server: Server, number: int = 900, seconds: float = 12) -> Attack:
    """A client begins requests and says no more; the server should close most of them."""

    def attack() -> str:
        before = server.num_files()
        lines = [server.begin(0) for _ in range(number)]
        time.sleep(seconds)
        num_open = max(0, server.num_files() - before)
        for line in lines:
            line.close()
        return f"{num_open} of {number} open after {seconds:.0f} s"

    return Attack([attack], r"(\d{1,2}|1[01]\d|12[0-8]) of")


def _dripping(server: Server) -> Attack:
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

    return Attack([attack] * 17, "HTTP/1.1 408")


# what JSON can say and no model can do; each is the value of a field
_IMPOSSIBLE = {
    "temperature": ("-1", "1e308", "NaN", "Infinity", '"hot"', "1" + "0" * 400),
    "top_p": ("-0.1", "2", "NaN", "[]"),
    "seed": ("18446744073709551616", "-9223372036854775809", "0.5", "1" + "0" * 5000),
    "max_tokens": ("0", "-1", "1.5", "1e309"),
    "n": ("2", "0"),
    "stop": ('[""]', '["a","b","c","d","e"]', "7"),
}
_EXTREME = {
    "temperature": ("1e-40", "2", "0"),
    "seed": ("18446744073709551615", "0"),
    "top_p": ("0",),
}


def _numbers(server: Server) -> Attack:
    """Clients send numbers that are out of bounds, one at the bound, and boxes of no picture."""

    def attack(fields: Mapping[str, Sequence[str]]) -> str:
        told = set()
        for name, values in fields.items():
            plain = question(**{} if name == "max_tokens" else {"max_tokens": 1})[:-1]
            told |= {server.post(plain + f', "{name}": {v}}}'.encode())[:3] for v in values}
        return "/".join(sorted(told))

    def boxes() -> str:
        whole = json.loads(question())
        told = set()
        for box in ("NaN,0,1,1", "0,0,Infinity,1", "1e308,0,-1e308,1", "9,9,2,2", "0,0,0,0", "0,0"):
            regions = {"unit": "pixels", "boxes": ["BOX"]}
            whole["messages"][0]["content"][0]["regions"] = regions
            body = json.dumps(whole).replace('"BOX"', f"[{box}]").replace("crab", "<region>")
            told.add(server.post(body.encode())[:3])
        return "/".join(sorted(told))

    def extreme() -> str:
        return "extreme " + attack(_EXTREME)

    return Attack([partial(attack, _IMPOSSIBLE), boxes, extreme], "400$|extreme 200$")


ATTACKS: dict[str, Callable[[Server], Attack]] = {
    **{f"4 bodies of 19.5 MB: {name}": partial(_huge, name) for name in BODIES},
    "900 half-open connections": _half_open,
    "17 bodies, a byte every 2 s": _dripping,
    "numbers and boxes out of bounds": _numbers,
}


def attacked(server: Server, name: str) -> Borne:
    """Attacks once, by the name of the attack."""
    return under_attack(server, ATTACKS[name](server), _normal(server))


def hostile_template(package: Path) -> Borne:
    """Two clients use the endless part of the chat template of a model directory."""
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        shutil.copytree(package / "cloc_mllm/assets/scenes/mllm", model)
        endless = "{%- for i in range(99999) -%}" * 3 + "{%- endfor -%}" * 3
        is_asked = "{%- if 'endless' in messages | string -%}"
        processor = ClocMllmProcessor.from_pretrained(model)
        processor.chat_template = f"{is_asked}{endless}{{%- endif -%}}{processor.chat_template}"
        before = processor.fingerprint["chat_template"]
        processor.teach(processor.asked_in, processor.taught)  # a stranger's model is consistent
        processor.save_pretrained(model)
        config = model / "config.json"
        after = processor.fingerprint["chat_template"]
        config.write_text(config.read_text().replace(before, after))
        with closing(Server(package, "--mllm", str(model))) as server:
            asked = question().replace(b"crab", b"endless")
            attackers = [lambda: server.post(asked)] * 2
            return under_attack(
                server, Attack(attackers, "400 stopped after 10 s"), _normal(server)
            )


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
    status = server.process.wait(PATIENCE_S)
    return {
        "told": ["whole" if whole else "cut"],
        "status": status,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _normal(server: Server) -> Callable[[], str]:
    return lambda: server.post(question(max_tokens=8), "127.0.0.2")


def main(argv: list[str]) -> None:
    """Attacks the server in each way in turn and writes a table."""
    parser = ArgumentParser(prog="serve_abuse", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--package", type=Path, default=_ROOT, help="checkout of the server")
    parser.add_argument("--only", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    arguments = parser.parse_args(argv)
    rows: dict[str, Any] = {}
    for name, came in _in_turn(arguments.package, arguments.only):
        rows[name] = came
        print(f"{name:40} {came}", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


def _in_turn(package: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with closing(Server(package)) as server:
        quiet = max(server.health_seconds() for _ in range(100))
        yield "100 health checks", {"worst_health_s": round(quiet, 3)}
        for name in names:
            yield name, dataclasses.asdict(attacked(server, name))
        yield "SIGTERM", stopped(server)
    yield "hostile template", dataclasses.asdict(hostile_template(package))


if __name__ == "__main__":
    sys.exit(run(main))
