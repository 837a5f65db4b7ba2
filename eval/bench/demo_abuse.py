"""What `cloc-mllm demo` does under huge bodies and uploads, bombs, addresses and paths of files,
markup, boxes of NaN, and more questions than it has room for, and what a normal visitor sees
meanwhile; a part of `make faults`."""

from __future__ import annotations

import io
import json
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import httpx
from PIL import Image

from abuse import PATIENCE_S, Attack, Borne, Process, under_attack

_BOX_OF_NAN = {"kind": "box", "points": [[float("nan"), 0], [1, float("inf")]]}
_FULL = "503"
_MARKUP = "<img src=x onerror=alert(1)>"
_PATHS = (
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=../../../../../../etc/passwd",
    "/gradio_api/file=%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/gradio_api/file=/proc/self/environ",
    "/gradio_api/file=file:///etc/passwd",
    "/static/../../../../../../etc/passwd",
    "/assets/..%2f..%2f..%2f..%2f..%2fetc/passwd",
)


class Demo(Process):
    """A running `cloc-mllm demo` of the drawings."""

    def __init__(self, package: Path, port: int) -> None:
        command = ["demo", "--model", "scenes", "--port", str(port)]
        super().__init__(package, command, "/gradio_api/app_id")
        with urlopen(f"{self.address}/config", timeout=PATIENCE_S) as response:
            self.dependencies = json.load(response)["dependencies"]

    def join(
        self, api_name: str, data: Sequence[object], session: str, event: object = None
    ) -> str:
        """Puts a call into the queue, as the page does; returns the status."""
        index = next(one["id"] for one in self.dependencies if one["api_name"] == api_name)
        call = {"data": data, "fn_index": index, "session_hash": session, "event_data": event}
        return self.post("/gradio_api/queue/join", json.dumps(call).encode(), "application/json")

    def post(self, path: str, body: bytes, kind: str) -> str:
        try:
            request = Request(f"{self.address}{path}", body, {"content-type": kind})
            with urlopen(request, timeout=PATIENCE_S) as response:
                return f"{response.status}"
        except HTTPError as error:
            return f"{error.code}"
        except OSError as error:  # refused before the whole body was sent
            return str(error)

    def get(self, path: str) -> str:
        """Asks for a path as it is written; returns the status."""
        line = HTTPConnection(urlsplit(self.address).netloc, timeout=PATIENCE_S)
        line.request("GET", path)
        return f"{line.getresponse().status}"

    def upload(self, data: bytes, name: str = "a.png") -> str:
        """Uploads a file; returns its path there, or why it was refused."""
        try:
            files = {"files": (name, data)}
            url = f"{self.address}/gradio_api/upload"
            answer = httpx.post(url, files=files, timeout=PATIENCE_S)
        except httpx.TransportError as error:
            return str(error)
        return str(answer.json()[0]) if answer.status_code == 200 else f"{answer.status_code}"

    def messages(self, session: str) -> Iterator[dict[str, Any]]:
        """Yields what the page of a session hears, to the end of its call."""
        url = f"{self.address}/gradio_api/queue/data?session_hash={session}"
        with httpx.stream("GET", url, timeout=PATIENCE_S) as stream:
            for line in stream.iter_lines():
                said = json.loads(line.removeprefix("data:")) if line else {}
                yield said
                if said.get("msg") == "process_completed":
                    return

    def told(
        self, api_name: str, data: Sequence[object], session: str, event: object = None
    ) -> str:
        """Asks and reads the answer: `answered`, or the message that the visitor gets."""
        status = self.join(api_name, data, session, event)
        if status != "200":
            return status
        for said in self.messages(session):
            if said.get("msg") == "process_completed":
                error = said["output"].get("error")
                return "answered" if said["success"] else f"refused: {str(error)[:60]}"
        return "no answer"


def _picture(path: str) -> dict[str, object]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def _bodies(demo: Demo) -> Attack:
    body = b" " * 20_000_000
    send = partial(demo.post, "/gradio_api/queue/join", body, "application/json")
    return Attack([send] * 4, "413|.*(reset|pipe)")


def _uploads(demo: Demo) -> Attack:
    file = bytes(50_000_000)
    return Attack([lambda: demo.upload(file)] * 4, "413|.*(reset|pipe)")


def _bombs(demo: Demo) -> Attack:
    def bomb(number: int) -> str:
        there = _picture(demo.upload(_bomb()))
        return demo.told("set_picture", [there], f"bomb-{number}")

    return Attack([partial(bomb, number) for number in range(4)], "refused: .*image_too_large")


def _addresses(demo: Demo) -> Attack:
    """Addresses of a server that nobody should ask."""

    def address(number: int, before: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(1)
            url = f"{before}http://127.0.0.1:{listening.getsockname()[1]}/a.png"
            if before:
                status = demo.get(url)
            else:
                status = demo.told("set_picture", [_picture(url)], f"address-{number}")
            try:
                listening.accept()
            except TimeoutError:
                return status
            return f"fetched {url}"

    ways = ("", "/gradio_api/file=", "/gradio_api/proxy=", "/proxy=")
    return Attack([partial(address, *way) for way in enumerate(ways)], "40[034]$")


def _files(demo: Demo) -> Attack:
    """Files of the machine by their paths, and a file that wants to be elsewhere."""

    def upload() -> str:
        there = demo.upload(_small(), "../../../../../../tmp/evil.png")
        is_inside = ".." not in there and "cloc-mllm-demo-" in there
        return "kept in its folder" if is_inside else f"written to {there}"

    def set_picture() -> str:
        return demo.told("set_picture", [_picture("/etc/passwd")], "path")

    gets = [partial(demo.get, path) for path in _PATHS]
    return Attack([*gets, upload, set_picture], "40[0345]$|kept in its folder|refused")


def _markup(demo: Demo) -> Attack:
    """A phrase that is markup, which no answer may hold as it is."""

    def ask(number: int) -> str:
        session = f"markup-{number}"
        status = demo.join("ground", [None, _MARKUP], session)
        if status != "200":
            return status
        *_, last = demo.messages(session)
        html = last["output"]["data"][2]  # the others are data, which `surface.js` shows as text
        return "escaped" if "&lt;img" in html and "<img" not in html else f"not escaped: {html}"

    return Attack([partial(ask, number) for number in range(4)], "escaped")


def _long(demo: Demo) -> Attack:
    asked = [None, "crab " * 20_000]
    asks = [partial(demo.told, "ground", asked, f"long-{number}") for number in range(4)]
    return Attack(asks, "refused: .*(long|character)")


def _boxes_of_nan(demo: Demo) -> Attack:
    draws = [partial(demo.told, "draw", [None], f"nan-{n}", _BOX_OF_NAN) for n in range(4)]
    return Attack(draws, "refused: The drawing cannot be read")


def _gone(demo: Demo) -> Attack:
    """Visitors who leave as soon as they are told that they wait."""

    def ask(number: int) -> str:
        session = f"gone-{number}"
        status = demo.join("ground", [None, "crab"], session)
        if status == "200":
            next(demo.messages(session))
        return status

    return Attack([partial(ask, number) for number in range(20)], "200|503")


def _crowd(demo: Demo) -> Attack:
    asks = [partial(demo.join, "ground", [None, "crab"], f"crowd-{n}") for n in range(200)]
    return Attack(asks, "200|503")


ATTACKS: dict[str, Callable[[Demo], Attack]] = {
    "4 bodies of 20 MB": _bodies,
    "4 uploads of 50 MB": _uploads,
    "4 pictures of 400 megapixels": _bombs,
    "addresses": _addresses,
    "files of the machine": _files,
    "markup in a phrase": _markup,
    "100,000 characters": _long,
    "boxes of NaN": _boxes_of_nan,
    "20 visitors who leave": _gone,
    "200 questions at once": _crowd,
}
_visit_numbers = count()


def attacked(demo: Demo, name: str) -> Borne:
    """Attacks once, by the name of the attack, as a normal visitor visits."""
    return under_attack(demo, ATTACKS[name](demo), lambda: visit(demo))


def visit(demo: Demo) -> str:
    """Uploads a picture and asks where something is, again where the line is full."""
    session = f"normal-{next(_visit_numbers)}"
    there = [_picture(demo.upload(_small()))]
    for api_name, data in (("set_picture", there), ("ground", [None, "crab"])):
        while (told := demo.told(api_name, data, session)) == _FULL:
            time.sleep(0.5)
        if told != "answered":
            break
    return told


def _small() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (128, 96), "teal").save(file, "png")
    return file.getvalue()


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
