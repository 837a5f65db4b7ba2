"""The Python of README and docs runs, and prints what its comments say."""

from __future__ import annotations

import base64
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.shipped import ASSETS
from tests.integration.test_serve import start

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": ROOT / "README.md",
    "docs/how-to/encoders.md": ROOT / "docs" / "how-to" / "encoders.md",
    "docs/reference/python.md": ROOT / "docs" / "reference" / "python.md",
    "docs/how-to/serve.md": ROOT / "docs" / "how-to" / "serve.md",
    "docs/learn/first_box.md": ROOT / "docs" / "learn" / "first_box.md",
    "docs/explanation/frames.md": ROOT / "docs" / "explanation" / "frames.md",
}


def blocks(language: str) -> list[tuple[str, str]]:
    """(name, code) of each block of the pages."""
    found = []
    for page, path in PAGES.items():
        codes = re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)
        found += [(f"{page} {index}", code) for index, code in enumerate(codes)]
    return found


def named(cases: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("code", [c for _, c in cases], ids=[n for n, _ in cases])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures of the examples.

    `horses.jpg` ships; `picture.png` is a scene with a doughnut, a tent, hamburgers and a candle.
    """
    directory = tmp_path_factory.mktemp("documentation")
    shutil.copy(ASSETS / "photos" / "examples" / "horses.jpg", directory)
    scene = next(generate_scenes(1, split="test", seed=3))
    scene.load_image().save(directory / "picture.png")
    return directory


def run(code: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def check_comments(code: str, printed: str) -> None:
    """Each line of an example that prints something says in its comment what."""
    promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
    assert code.count("print(") == len(promised)
    # DeepSpeed logs to standard output when it is first imported
    said = [line for line in printed.splitlines() if "[WARNING]" not in line]
    for line, comment in zip(said, promised, strict=True):
        assert comment.startswith(line), f"printed {line!r}, promised {comment!r}"


LOCAL = [case for case in blocks("python") if "OpenAI(" not in case[1]]
REMOTE = [case for case in blocks("python") if "OpenAI(" in case[1]]
COMMANDS = [
    (f"{name} python -c", shlex.split(line)[2])
    for name, code in blocks("sh")
    for line in code.splitlines()
    if line.startswith("python -c ")
]
CURL = [case for case in blocks("sh") if "curl" in case[1]]


def test_every_page_has_examples() -> None:
    assert {name.split()[0] for name, _ in [*LOCAL, *REMOTE]} == set(PAGES)
    assert len(COMMANDS) == len(REMOTE) == len(CURL) == 1


@named(LOCAL)
def test_a_block_prints_what_it_says(code: str, folder: Path) -> None:
    check_comments(code, run(code, folder))


@named(COMMANDS)
def test_a_command_prints_boxes_in_pixels(code: str, folder: Path) -> None:
    assert "kind='pixels', image_wh=(128.0, 128.0)" in run(code, folder)


@pytest.fixture(scope="module")
def port() -> Iterator[str]:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    process, address = start(ROOT)
    yield address.rpartition(":")[2]
    process.kill()
    process.wait()


@named(CURL)
def test_the_server_answers_curl(code: str, folder: Path, port: str) -> None:
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    result = subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, text=True)
    assert '"label":"the doughnut"' in result.stdout, result


@named(REMOTE)
def test_the_server_answers_the_client_of_openai(code: str, folder: Path, port: str) -> None:
    pytest.importorskip("openai", reason="openai is not installed")
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    check_comments(code, run(code, folder))


def test_an_answer_goes_back_as_history(folder: Path, port: str) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    data = base64.b64encode((folder / "picture.png").read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    messages: list[Any] = []

    def ask(*content: dict[str, Any]) -> Any:
        messages.append({"role": "user", "content": list(content)})
        answer = client.chat.completions.create(model="cloc-mllm", messages=messages, seed=1)
        messages.append(answer.choices[0].message.model_dump(exclude_none=True))
        return answer

    picture["regions"] = {"unit": "pixels", "boxes": [[76, 2, 111, 36]]}
    first = ask(picture, {"type": "text", "text": "What is in {box} <region>?"})
    second = ask({"type": "text", "text": "Where is the tent?"})
    third = ask({"type": "text", "text": "Where is the doughnut?"})
    (box,) = third.choices[0].message.boxes
    assert box["label"] == "the doughnut" and len(box["xyxy"]) == 4
    assert messages[3]["content"].startswith("<loc_") and messages[3]["boxes"]
    counts = [answer.usage.prompt_tokens for answer in (first, second, third)]
    assert counts == sorted(set(counts))
