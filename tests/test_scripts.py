"""The scripts beside the package answer users' errors like the `cloc-mllm` command."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path
    for folder in ("training", "eval", "eval/bench", "demo")
    for path in (ROOT / folder).glob("*.py")
    # what the scripts of eval/bench/ share
    if path.stem not in ("abuse", "demo_abuse", "job", "memory", "ratio")
)


def run_script(path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs it as `python PATH ARGUMENTS` would, in this process; returns the exit status."""
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.delenv("CLOC_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("training/stage1.py", "--config {wrong}", "there is no setting bogus"),
        ("training/stage1.py", "--config nowhere.yaml", "nowhere.yaml"),
        ("training/stage1.py", "--model.architecture ViT-B-16 --data.train nowhere", "nowhere"),
        ("training/stage2.py", "--config {wrong}", "there is no setting bogus"),
        ("training/stage2.py", "--model.cloc x --model.language_model y", "data.train is empty"),
        ("training/tiny_llm.py", "--config {wrong}", "there is no setting bogus"),
        ("training/tiny_llm.py", "--config nowhere.yaml", "nowhere.yaml"),
        ("training/tiny_llm.py", "--width many", "width"),
        ("training/smollm2.py", "--output_dir {file}/below", "Not a directory: {file}/below"),
        ("training/pip_towers.py", "--output_dir {file}/below", "Not a directory: {file}/below"),
        ("training/ship.py", "--name photos --cloc no --output_dir {file}x", "no is no CLOC model"),
        ("eval/run.py", "--config {wrong}", "there is no setting bogus"),
        ("eval/run.py", "--config nowhere.yaml", "nowhere.yaml"),
        ("eval/run.py", "--bogus 1", "there is no setting bogus"),
        ("eval/run.py", "--limt 1", "there is no setting limt; did you mean limit?"),
        ("eval/run.py", "rec --bogus 1", "there is no setting bogus"),
        ("eval/run.py", "no_task", "unknown task 'no_task'"),
        (
            "eval/run.py",
            "--cloc nowhere --mllm none --output_dir {file}x",
            "nowhere is no CLOC model",
        ),
        ("eval/run.py", "score --task rec --predictions no --references no", "directory: no"),
        ("demo/app.py", "--bogus 1", "there is no setting bogus"),
        ("eval/bench/step.py", "--data nowhere", "nowhere"),
        ("demo/app.py", "--cloc nowhere", "nowhere is no CLOC model"),
    ],
)
def test_a_users_error_is_one_line(
    script: str,
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "wrong.yaml").write_text("bogus: 1\n")
    (tmp_path / "file").write_text("")
    paths = {"wrong": tmp_path / "wrong.yaml", "file": tmp_path / "file"}
    argv = [argument.format(**paths) for argument in arguments.split()]
    assert run_script(ROOT / script, argv, monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("cloc-mllm: error: ") and said.count("\n") == 1
    assert message.format(**paths) in said


REQUIRED = {
    "average.py": ("x", "x", "--output_dir", "x"),
    "ship.py": ("--name", "scenes", "--cloc", "x"),
    "feature_cache.py": ("--cloc", "x", "--language_model", "x", "--data", "x"),
    "leak_check.py": ("--data", "x"),
    "loader.py": ("--data", "x"),
    "feed.py": ("--data", "x"),
    "flickr8k_chats.py": ("--annotations", "x", "--records", "x", "--output_dir", "x"),
    "grounded_captions.py": ("--data", "x", "--mllm", "x"),
    "own_words.py": ("--language_model", "x", "--output_dir", "x"),
    "serve_abuse.py": ("--output", "x"),
    "serve_throughput.py": ("--output", "x"),
    "faults.py": ("--output", "x"),
    "names.py": ("--data", "x"),
    "single_boxes.py": ("--data", "x", "--output_dir", "x"),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_wrong_option_exits_with_2_and_help_with_0(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_script(script, [*REQUIRED.get(script.name, ()), "--no_such_option", "1"], monkeypatch)
        == 2
    )
    said = capsys.readouterr().err
    assert "no_such_option" in said and "Traceback" not in said
    assert run_script(script, ["--help"], monkeypatch) == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_do_not_run_on_import(script: Path) -> None:
    runpy.run_path(str(script), run_name="not_main")


def test_a_missing_model_leaves_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "scenes" / "cloc" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"weights")
    arguments = ["--name", "scenes", "--cloc", "nowhere", "--output_dir", str(tmp_path)]
    assert run_script(ROOT / "training/ship.py", arguments, monkeypatch) == 2
    assert kept.read_bytes() == b"weights"
