"""`cloc-mllm serve` with the shipped model, started, asked and stopped as a user does it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from cloc_mllm.data.records import Record
from cloc_mllm.geometry import elementwise_iou

pytest.importorskip("uvicorn", reason="uvicorn is not installed")
_PATIENCE_S = 120


def start(project_root: Path, *options: str) -> tuple[subprocess.Popen, str]:
    """The process and its address, which it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cloc_mllm.cli", "serve", "--port", "0", *options],
        cwd=project_root,
        env={**os.environ, "PYTHONPATH": str(project_root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://\S+(?=/v1)", line):
            return process, found.group()
    raise AssertionError(f"it ended with {process.wait()} and printed no address")


@pytest.fixture(scope="module")
def address(project_root: Path) -> Iterator[str]:
    process, address = start(project_root)
    yield address
    process.kill()
    process.wait()


def question(record: Record, text: str, **more: object) -> bytes:
    file = io.BytesIO()
    record.load_image().save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return json.dumps({"messages": [{"role": "user", "content": content}], **more}).encode()


def post(address: str, body: bytes):
    headers = {"content-type": "application/json"}
    url = f"{address}/v1/chat/completions"
    return urlopen(Request(url, body, headers), timeout=_PATIENCE_S)


def num_requests(address: str) -> int:
    return json.load(urlopen(f"{address}/health", timeout=_PATIENCE_S))["requests"]


def test_boxes_lie_on_what_was_asked_for(address: str, tiny_scenes: list[Record]) -> None:
    import torch

    ious = []
    for record in tiny_scenes[:8]:
        region = record.regions[0]
        words = question(record, f"Where is {region.expressions[0]}?")
        (box,) = json.load(post(address, words))["choices"][0]["message"]["boxes"]
        sides = torch.tensor(record.load_image().size * 2)
        answered = torch.tensor([box["xyxy"]]) / sides
        ious.append(float(elementwise_iou(answered, torch.tensor([region.box]))))
    assert sum(iou > 0.5 for iou in ious) >= 6, ious


def test_a_stream_comes_in_pieces(address: str, tiny_scenes: list[Record]) -> None:
    body = question(tiny_scenes[0], "Describe the image.", stream=True)
    lines = [line for line in post(address, body).read().decode().split("\n\n") if line]
    assert len(lines) > 5
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_the_model(
    address: str, tiny_scenes: list[Record], stream: bool
) -> None:
    body = question(tiny_scenes[0], "Describe the image.", stream=stream)
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
    left_at = time.monotonic()
    while num_requests(address):
        assert time.monotonic() - left_at < _PATIENCE_S
    assert post(address, body).status == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_ends_it_with_its_number(project_root: Path, number: signal.Signals) -> None:
    process, address = start(project_root)
    assert num_requests(address) == 0
    process.send_signal(number)
    assert process.wait(timeout=_PATIENCE_S) == 128 + number
    assert process.stdout is not None and process.stdout.read() == ""


def test_a_port_that_is_taken_is_one_line(project_root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = subprocess.run(
            [sys.executable, "-m", "cloc_mllm.cli", "serve", "--port", port],
            cwd=project_root,
            capture_output=True,
            text=True,
        )
    assert result.returncode == 2
    assert result.stderr.startswith(f"cloc-mllm: error: cannot listen on 127.0.0.1 port {port}")
    assert len(result.stderr.splitlines()) == 1
