"""Settings on the command line and in files: what works, what is refused and how it is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloc_mllm.cli import main
from cloc_mllm.command_line import ArgumentParser, parse_job, with_underscores


@dataclass
class Part:
    """A part.

    Args:
        rate: how fast.
    """

    rate: float = 1.0
    names: dict[str, float] = field(default_factory=dict)


@dataclass
class Job:
    """A job."""

    steps: int = 1
    part: Part = field(default_factory=Part)


def parse(*argv: str) -> tuple[Job, bool]:
    return parse_job(Job, argv, prog="job", description="A job.")


def test_arguments_override_the_file(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("steps: 3\npart: {rate: 2.0, names: {a: 1}}\n")
    job, dry_run = parse("--config", str(tmp_path / "job.yaml"), "--part.rate", "0.5", "--dry_run")
    assert job == Job(3, Part(0.5, {"a": 1}))
    assert dry_run
    assert parse() == (Job(), False)


def test_the_launchers_argument_is_accepted() -> None:
    assert parse("--local_rank=1", "--steps=2") == (Job(steps=2), False)


def test_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    assert "how fast. (type: float, default: 1.0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part.rat", "1"], r"job: there is no setting part\.rat; did you mean part\.rate\? \("),
        (["--stebs=1"], r"job: there is no setting stebs; did you mean steps\? "),
        (["--part", "{rates: 1}"], r"no setting part\.rates; did you mean part\.rate\? "),
        (["--config", "part: {rates: 1}"], r"no setting part\.rates; did you mean part\.rate\? "),
        (["--config", "stepps: 1"], r"no setting stepps; did you mean steps\? "),
        (["--config", "parts: {rate: 1}"], r"no setting parts\.rate; did you mean part\.rate\? "),
        (["--zebra", "1"], r"job: there is no setting zebra \(--help lists all\)$"),
        (["--steps", "many"], r'job: Parser key "steps": Expected a .*int.*Got value: many$'),
        (["--steps"], r"job: argument --steps: expected one argument$"),
        (["--config", "steps: {"], r"job: Problems parsing config: while parsing"),
        (["--config=nowhere.yaml"], r"job: .*nowhere\.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    if arguments[0] == "--config":
        (tmp_path / "job.yaml").write_text(arguments[1])
        arguments = ["--config", str(tmp_path / "job.yaml")]
    with pytest.raises(ValueError, match=message) as refused:
        parse(*arguments)
    assert "\n" not in str(refused.value)


# what a stage does not use is not among its settings
FOREIGN = [
    ("stage1", "model.max_tiles"),
    ("stage2", "data.flip"),
    ("stage2", "data.regions_per_image"),
    ("stage2", "data.free_form_share"),
    ("stage2", "data.label_noise"),
    ("stage2", "optim.new_lr"),
    ("stage2", "run.micro_batch_size"),
    ("tiny-llm", "optim.new_lr"),
    ("tiny-llm", "optim.layer_decay"),
    ("tiny-llm", "run.compile"),
    ("tiny-llm", "run.eval_every"),
    ("tiny-llm", "run.gradient_checkpointing"),
    ("tiny-llm", "run.micro_batch_size"),
]


@pytest.mark.parametrize("in_file", [False, True], ids=["argument", "file"])
@pytest.mark.parametrize(("command", "setting"), FOREIGN)
def test_a_setting_of_another_stage_is_refused(
    command: str,
    setting: str,
    in_file: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    group, name = setting.split(".")
    arguments = [f"--{setting}=1"]
    if in_file:
        (tmp_path / "job.yaml").write_text(f"{group}: {{{name}: 1}}\n")
        arguments = [f"--config={tmp_path / 'job.yaml'}"]
    assert main([command, *arguments, "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert f"cloc-mllm: error: {command}: there is no setting {setting}" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--max-drop-share 0.1", "--max_drop_share 0.1"),
        ("--max-drop-share=a-b", "--max_drop_share=a-b"),
        ("--max_drop_share 0.1", "--max_drop_share 0.1"),
        ("-n a-b --x-y", "-n a-b --x_y"),
        ("a-b.json", "a-b.json"),
        ("--a-b -- --c-d", "--a_b -- --c-d"),
        ("--", "--"),
    ],
)
def test_hyphens_are_underscores_in_names_of_options(typed: str, expected: str) -> None:
    assert with_underscores(typed.split()) == expected.split()


@pytest.mark.parametrize("option", ["--output_dir", "--output-dir", "--out", "--output-d"])
@pytest.mark.parametrize("is_one_word", [True, False])
def test_options_may_be_typed_with_hyphens_and_cut_short(option: str, is_one_word: bool) -> None:
    parser = ArgumentParser()
    commands = parser.add_subparsers()
    commands.add_parser("build").add_argument("--output_dir")  # its parser is of the same class
    value = "my-folder/a--b"
    typed = [f"{option}={value}"] if is_one_word else [option, value]
    assert parser.parse_args(["build", *typed]).output_dir == value
