"""What `cloc-mllm demo` does under huge bodies and uploads, bombs, addresses, and more questions
than it has room for, and what a normal visitor sees meanwhile; a part of `make faults`."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import httpx
from PIL import Image

from serve_abuse import Process, under_attack

_PATIENCE_S = 600


class Demo(Process):
    """A running `cloc-mllm demo` of the drawings."""

    def __init__(self, package: Path, port: int) -> None:
        super().__init__(package, ["demo", "--model", "scenes", "--port", str(port)], "/config")
        with urlopen(f"{self.address}/config", timeout=_PATIENCE_S) as response:
            self.dependencies = json.load(response)["dependencies"]

    def join(self, api_name: str, data: Sequence[object], session: str) -> str:
        """Puts a call into the queue, as the page does; returns the status."""
        index = next(one["id"] for one in self.dependencies if one["api_name"] == api_name)
        call = {"data": data, "fn_index": index, "session_hash": session}
        return self.post("/gradio_api/queue/join", json.dumps(call).encode(), "application/json")

    def post(self, path: str, body: bytes, kind: str) -> str:
        try:
            request = Request(f"{self.address}{path}", body, {"content-type": kind})
            with urlopen(request, timeout=_PATIENCE_S) as response:
                return f"{response.status}"
        except HTTPError as error:
            return f"{error.code}"
        except OSError as error:  # refused before the whole body was sent
            return str(error)

    def upload(self, data: bytes, name: str = "a.png") -> str:
        """Uploads a file; returns its path there, or why it was refused."""
        try:
            files = {"files": (name, data)}
            url = f"{self.address}/gradio_api/upload"
            answer = httpx.post(url, files=files, timeout=_PATIENCE_S)
        except httpx.TransportError as error:
            return str(error)
        return str(answer.json()[0]) if answer.status_code == 200 else f"{answer.status_code}"

    def told(self, api_name: str, data: Sequence[object], session: str) -> str:
        """Asks and reads the answer: `answered`, or the message that the visitor gets."""
        status = self.join(api_name, data, session)
        if status != "200":
            return status
        url = f"{self.address}/gradio_api/queue/data?session_hash={session}"
        with httpx.stream("GET", url, timeout=_PATIENCE_S) as stream:
            for line in stream.iter_lines():
                said = json.loads(line.removeprefix("data:")) if line else {}
                if said.get("msg") == "process_completed":
                    error = said["output"].get("error")
                    return "answered" if said["success"] else f"refused: {str(error)[:60]}"
        return "no answer"


def attacks(demo: Demo) -> dict[str, list[Callable[[], str]]]:
    """What the attackers do at once, by name."""
    body, file = b" " * 20_000_000, bytes(50_000_000)
    address = {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}

    def bomb(number: int) -> str:
        there = {"path": demo.upload(_bomb()), "meta": {"_type": "gradio.FileData"}}
        return demo.told("set_picture", [there], f"bomb-{number}")

    def read_file() -> str:
        path = "/gradio_api/file=/etc/passwd"
        return f"{httpx.get(demo.address + path, timeout=_PATIENCE_S).status_code}"

    def ask(number: int) -> str:
        return demo.join("ground", [None, "crab"], f"visitor-{number}")

    kind = "application/json"
    return {
        "bodies of 20 MB": [lambda: demo.post("/gradio_api/queue/join", body, kind)] * 4,
        "uploads of 50 MB": [lambda: demo.upload(file)] * 4,
        "pictures of 400 megapixels": [partial(bomb, number) for number in range(4)],
        "addresses, files of the machine": [
            lambda: demo.join("set_picture", [address], "address"),
            read_file,
        ],
        "100 questions at once": [partial(ask, number) for number in range(100)],
    }


def abused(demo: Demo) -> Iterator[tuple[str, dict[str, Any]]]:
    """Attacks in turn. The normal visitor asks where something is, again if the queue is full."""
    file = io.BytesIO()
    Image.new("RGB", (128, 96), "teal").save(file, "png")
    number = 0

    def visit() -> str:
        nonlocal number
        number += 1
        session = f"normal-{number}"
        there = {"path": demo.upload(file.getvalue()), "meta": {"_type": "gradio.FileData"}}
        demo.told("set_picture", [there], session)
        return demo.told("ground", [None, "crab"], session)

    for name, attackers in attacks(demo).items():
        yield name, under_attack(demo, attackers, visit)


def _bomb() -> bytes:
    """A PNG of 20,000 x 20,000 black pixels, in 50 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        sum_ = zlib.crc32(kind + data)
        return len(data).to_bytes(4, "big") + kind + data + sum_.to_bytes(4, "big")

    side = (20_000).to_bytes(4, "big")
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(2_501)) for _ in range(20_000)) + packer.flush()
    head = chunk(b"IHDR", side + side + bytes([1, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
