from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
from tqdm import tqdm

from cloc_mllm import __version__, cli
from cloc_mllm.cli import run
from cloc_mllm.extras import install_command


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch):
    """Registers `cloc-mllm fake` around a function."""

    def register(function) -> None:
        module = ModuleType("fake_command")
        module.main = function
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(
            cli.SUBCOMMANDS, "fake", cli.Subcommand("fake_command", "main", "for a test")
        )

    monkeypatch.delenv("CLOC_DEBUG", raising=False)
    return register


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]], ids=str)
def test_help_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name, subcommand in cli.SUBCOMMANDS.items():
        assert f"  {name} " in out
        assert subcommand.help in out
    assert max(map(len, out.splitlines())) <= 80


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cloc-mllm {__version__}\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("grond", "did you mean 'ground'?"), ("stage", "did you mean 'stage"), ("xyzzy", None)],
)
def test_unknown_command(name: str, hint: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"cloc-mllm: error: unknown command {name!r}")
    assert (hint in err) if hint else ("did you mean" not in err)
    assert all(command in err for command in cli.SUBCOMMANDS)


def test_the_rest_of_the_line_and_the_status_pass_through(fake_command) -> None:
    seen = []
    fake_command(lambda argv: seen.append(argv) or 7)
    assert cli.main(["fake", "--help", "a b", "--x=1"]) == 7
    assert seen == [["--help", "a b", "--x=1"]]


def test_no_status_is_success(fake_command) -> None:
    fake_command(lambda argv: None)
    assert cli.main(["fake"]) == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("expected 4 numbers, got 3"), "expected 4 numbers, got 3"),
        (
            FileNotFoundError(2, "No such file or directory", "a.png"),
            "No such file or directory: a.png",
        ),
        (FileNotFoundError("no shards in runs/x"), "no shards in runs/x"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied: /x"),
        (  # as Transformers says it
            OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection."),
            "We couldn't connect to 'https://huggingface.co'. Check your connection.",
        ),
        (
            ModuleNotFoundError("No module named 'gradio.themes'", name="gradio.themes"),
            f"gradio is not installed; run: {install_command('demo')}",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_user_error_is_one_line(
    error: Exception, message: str, fake_command, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    fake_command(fail)
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr() == ("", f"cloc-mllm: error: {message}\n")


@pytest.mark.parametrize("error", [TypeError("ours"), ModuleNotFoundError("ours", name="ours")])
def test_our_own_error_keeps_its_traceback(error: Exception, fake_command) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    fake_command(fail)
    with pytest.raises(type(error), match="ours"):
        cli.main(["fake"])


def test_debug_shows_the_traceback(fake_command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str]) -> int:
        raise ValueError("wrong box")

    fake_command(fail)
    monkeypatch.setenv("CLOC_DEBUG", "1")
    with pytest.raises(ValueError, match="wrong box"):
        cli.main(["fake"])


def test_libraries_tell_users_nothing_about_code(
    fake_command, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    def command(argv: list[str]) -> None:
        old = "`gradient_checkpointing_enable` is deprecated and will be removed in v6."
        warnings.warn(old, FutureWarning, stacklevel=1)
        warnings.warn("our own", FutureWarning, stacklevel=1)
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("install kernels")

    fake_command(command)
    assert cli.main(["fake"]) == 0
    assert [str(warning.message) for warning in recwarn] == ["our own"]
    assert not caplog.records


def test_ctrl_c(fake_command, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(argv: list[str]) -> int:
        raise KeyboardInterrupt

    fake_command(stop)
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err == "cloc-mllm: interrupted\n"


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_table_points_at_a_function(name: str, project_root: Path) -> None:
    subcommand = cli.SUBCOMMANDS[name]
    path = project_root / subcommand.module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert subcommand.function in {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_every_command_describes_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.startswith("usage: ") and name in usage


def test_installed_command_runs() -> None:
    command = Path(sys.executable).with_name("cloc-mllm")
    result = subprocess.run([command, "grund"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "did you mean 'ground'?" in result.stderr


@pytest.mark.parametrize(("argument", "expected"), [("--help", 141), ("nothing", 2)])
def test_a_closed_pipe_is_no_error(argument: str, expected: int) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "cloc_mllm.cli", argument]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert "BrokenPipe" not in done.stderr
    assert done.returncode == expected


def test_an_error_has_a_line_of_its_own_below_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    def command(arguments: list[str]) -> int:
        for _ in tqdm(range(3)):
            raise ValueError("no such thing")
        return 0

    assert run(command, []) == 2
    assert capsys.readouterr().err.endswith("\ncloc-mllm: error: no such thing\n")
