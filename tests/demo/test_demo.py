"""The page through its handlers, through gradio_client, and under abuse (CPU, tiny real models)."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError
from PIL import Image

from cloc_mllm.demo import build_app, load_predictors, main
from cloc_mllm.demo.engine import DemoEngine
from cloc_mllm.demo.page import serve
from cloc_mllm.demo.pictures import example_pictures
from cloc_mllm.demo.tabs.ground import ground
from cloc_mllm.demo.tabs.refer import name
from cloc_mllm.inference.cloc_predictor import ClocPredictor

_PATIENCE_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_lost_session_asks_for_a_picture(cloc_engine: DemoEngine) -> None:
    for ask in (ground(cloc_engine, None, "crab"), name(cloc_engine, None, None, "")):
        with pytest.raises(gr.Error, match="Choose a picture first"):
            next(ask)


def test_naming_needs_a_drawing(cloc_engine: DemoEngine) -> None:
    with pytest.raises(gr.Error, match="Draw on the picture first"):
        next(name(cloc_engine, example_pictures()[0], None, ""))


def test_models_default_to_what_ships(cloc_dir: Path, mllm_dir: Path) -> None:
    _, grounding = load_predictors(str(cloc_dir), "")
    assert grounding is None
    _, grounding = load_predictors(str(cloc_dir), str(mllm_dir))
    assert grounding is not None


def test_a_shipped_model_is_not_named_beside_others() -> None:
    with pytest.raises(ValueError, match="--model names a shipped model; leave it out"):
        main(["--model", "scenes", "--cloc", "somewhere"])


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for option in ("--cloc DIR", "--mllm DIR", "--host", "--port", "--share"):
        assert option in out


@pytest.fixture(scope="module")
def contacted() -> list[str]:
    """Hosts that this process looks up or connects to, from now on."""
    hosts: list[str] = []

    def note(event: str, arguments: tuple) -> None:
        if event == "socket.getaddrinfo":
            hosts.append(str(arguments[0]))
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            hosts.append(str(arguments[1][0]))

    sys.addaudithook(note)
    return hosts


@pytest.fixture(scope="module")
def address(
    cloc_predictor: ClocPredictor, gradio_home: Path, contacted: list[str]
) -> Iterator[str]:
    """The page over a tiny CLOC, served in this process. Serving it asks nobody anything."""
    page = build_app(cloc_predictor)
    yield serve(page, host="127.0.0.1", port=free_port(), block=False)
    page.close(verbose=False)
    assert set(contacted) <= {"127.0.0.1", "localhost"}


@pytest.fixture
def client(address: str) -> Client:
    return Client(address, verbose=False)


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    """The server without Gradio's own client; patient with a busy machine."""
    with httpx.Client(base_url=address, timeout=_PATIENCE_S) as http:
        yield http


@pytest.fixture
def picture_file(tmp_path: Path) -> Path:
    Image.new("RGB", (90, 60), "teal").save(tmp_path / "teal.png")
    return tmp_path / "teal.png"


def size_of(shown: dict[str, Any]) -> tuple[int, int]:
    """The size of the picture on the surface."""
    encoded = base64.b64decode(shown["image"].split(",")[1])
    with Image.open(io.BytesIO(encoded)) as image:
        return image.size


def test_round_trip(client: Client, picture_file: Path) -> None:
    shown = client.predict(handle_file(picture_file), api_name="/set_picture")[0]
    assert size_of(shown) == (90, 60) and shown["marks"] == []
    shown, html = client.predict("the crab, a boat", api_name="/ground")
    assert size_of(shown) == (90, 60)
    assert [mark["tag"] for mark in shown["marks"]] == ["the crab", "a boat"]
    assert "similarity" in html


def test_visitors_have_their_own_pictures(address: str, picture_file: Path) -> None:
    first, second = Client(address, verbose=False), Client(address, verbose=False)
    first.predict(handle_file(picture_file), api_name="/set_picture")
    shown, _ = second.predict("the crab", api_name="/ground")
    assert max(size_of(shown)) == 512  # the first example, not the other visitor's upload


def test_messages_are_ours_or_none(
    client: Client, picture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for blank in (" ", None):
        with pytest.raises(AppError, match="Type what to look for"):
            client.predict(blank, api_name="/ground")
    with pytest.raises(AppError, match="characters"):
        client.predict("x" * 100_000, api_name="/ground")
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(AppError, match="not_an_image"):
        client.predict(handle_file(tmp_path / "page.png"), api_name="/set_picture")

    def fail(self: DemoEngine, *_: object) -> None:
        raise RuntimeError("secret path")

    monkeypatch.setattr(DemoEngine, "ground", fail)
    with pytest.raises(AppError) as error:
        client.predict("crab", api_name="/ground")
    assert "secret" not in str(error.value)
    monkeypatch.undo()
    client.predict("crab", api_name="/ground")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../etc/passwd", "/proc/self/environ", "http://127.0.0.1:1/"]
)
def test_no_file_of_this_machine_is_served(http: httpx.Client, path: str) -> None:
    assert http.get(f"/gradio_api/file={path}").status_code in (403, 404)


def join(http: httpx.Client, api_name: str, data: list, session: str = "abuse") -> httpx.Response:
    """Put one call in the queue, as the page does."""
    dependencies = http.get("/config").json()["dependencies"]
    index = next(d["id"] for d in dependencies if d["api_name"] == api_name)
    body = {"data": data, "fn_index": index, "session_hash": session}
    return http.post("/gradio_api/queue/join", json=body)


@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.169.254"])
def test_addresses_are_not_fetched(http: httpx.Client, host: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.2)
        url = f"http://{host}:{listener.getsockname()[1]}/a.png"
        file = {"path": url, "meta": {"_type": "gradio.FileData"}}
        assert join(http, "set_picture", [file]).status_code == 400
        with pytest.raises(TimeoutError):
            listener.accept()


def test_files_that_were_not_uploaded_are_refused(client: Client) -> None:
    with pytest.raises(AppError):
        client.predict(
            {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}, api_name="/set_picture"
        )


def test_large_uploads_and_bodies_are_refused(http: httpx.Client) -> None:
    upload = http.post("/gradio_api/upload", files={"files": bytes(21_000_000)})
    assert upload.status_code == 413
    assert join(http, "ground", ["x" * 2_000_000]).status_code == 413


def test_two_hundred_calls_at_once(http: httpx.Client, client: Client) -> None:
    with ThreadPoolExecutor(20) as pool:
        calls = pool.map(lambda i: join(http, "ground", [None, "crab"], f"visitor-{i}"), range(200))
        codes = {response.status_code for response in calls}
    assert codes == {200, 503}  # taken, or "the queue is full"
    deadline = time.monotonic() + _PATIENCE_S
    while True:  # the calls that were taken are answered first
        try:
            answer = client.predict("crab", api_name="/ground")[1]
            break
        except QueueError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert "similarity" in answer


def test_a_taken_port_is_said(address: str, cloc_engine: DemoEngine) -> None:
    port = httpx.URL(address).port
    assert port is not None
    with pytest.raises(ValueError, match="try another --port"):
        serve(build_app(cloc_engine.cloc), host="127.0.0.1", port=port, block=False)


def test_served_to_this_machine_only(http: httpx.Client) -> None:
    assert http.base_url.host == "127.0.0.1"
    assert http.get("/config").json()["analytics_enabled"] is False


def test_command_cleans_up_after_ctrl_c(cloc_dir: Path, project_root: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "demo/app.py", "--cloc", str(cloc_dir), "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        cwd=project_root,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        # jobs that a script puts into the background inherit a SIGINT that is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "127.0.0.1" in line)
        assert str(port) in line
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=_PATIENCE_S).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=_PATIENCE_S) == 0
    finally:
        process.kill()
    assert list(tmp_path.glob("cloc-mllm-demo-*")) == []
