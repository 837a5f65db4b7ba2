"""Stage 1 through its real entry points, on the smallest scenes and towers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cloc_mllm.cli import main as cli_main
from cloc_mllm.data.parquet import load_records, write_records
from cloc_mllm.losses.cloc_loss import cloc_loss
from cloc_mllm.models.build import load_cloc
from cloc_mllm.train import stage1
from cloc_mllm.train.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from cloc_mllm.train.logging import read_log
from tests.train.tiny_stage1 import tiny_config, write_tiny_inputs

pytest.importorskip("deepspeed")

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 250  # a launch takes about 20 on a quiet machine


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_tiny_inputs(directory)
    config = dataclasses.asdict(tiny_config(directory, directory / "never"))
    config["optim"]["betas"] = list(config["optim"]["betas"])
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def arguments(inputs: Path, output_dir: Path, *extra: str) -> list[str]:
    return [f"--config={inputs / 'config.yaml'}", f"--run.output_dir={output_dir}", *extra]


def clean_environment() -> dict[str, str]:
    """Ours, but outside any process group."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in launcher}


def weights_of(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "model" / "model.safetensors")


def test_dry_run_says_what_would_happen(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ("--dry_run", "--optim.lr=5e-4", '--optim.layer_lr={"text": 0}', "--run.steps=12")
    assert stage1.main(arguments(inputs, tmp_path / "run", *extra)) == 0
    said = capsys.readouterr().out
    resolved = yaml.safe_load(said.split("\n\n")[0].split("\nparameters")[0])
    assert resolved["optim"]["lr"] == 5e-4
    assert resolved["model"]["image_size"] == 64
    assert "images per step:  8 = 1 rank(s) x 8" in said
    assert "96 = 12 steps x 8" in said
    assert "3.00 of 32 images" in said
    assert "regions seen:     at most 192 = 2 per image" in said
    text_row = next(line.split() for line in said.splitlines() if line.startswith("text"))
    assert text_row[1] == "0"
    assert int(text_row[2].replace(",", "")) > 0
    assert not (tmp_path / "run").exists()


def test_training_lowers_every_loss_and_the_model_loads(inputs: Path, tmp_path: Path) -> None:
    extra = ("--run.steps=40", "--optim.lr=3e-3", f"--data.validation={inputs / 'records'}")
    assert stage1.main(arguments(inputs, tmp_path, *extra)) == 0
    rows = read_log(tmp_path / "log.jsonl")
    for term in ("loss", "clip", "cloc", "grounding"):
        first, last = (sum(row[term] for row in part) for part in (rows[:8], rows[-8:]))
        assert last < first, term
    (evaluated,) = read_log(tmp_path / "log.jsonl", "eval")
    assert 0 <= evaluated["text_to_box/acc_at_0_5"] <= 1
    card = (tmp_path / "model" / "README.md").read_text()
    assert "ClocPredictor" in card and f"{evaluated['text_to_box/acc_at_0_5']:.4g} |" in card
    model, _, config = load_cloc(tmp_path / "model")
    assert config.image_size == 64
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights_of(tmp_path)[name])


def test_losses_are_computed_in_float32_also_under_bf16(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []

    def watching(*args: Any) -> dict[str, torch.Tensor]:
        inside.append(torch.is_autocast_enabled("cpu"))
        return cloc_loss(*args)

    monkeypatch.setattr(stage1, "cloc_loss", watching)
    extra = ("--run.steps=2", "--run.precision=bf16")
    assert stage1.main(arguments(inputs, tmp_path, *extra)) == 0
    assert inside == [False, False]
    precise = tiny_config(inputs, tmp_path / "fp32", steps=2)
    stage1.run_stage1(precise)
    actual, expected = (
        [row["loss"] for row in read_log(path / "log.jsonl")]
        for path in (tmp_path, tmp_path / "fp32")
    )
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_sigmoid_loss_in_micro_batches_trains_alike(
    inputs: Path, tmp_path: Path, zero_stage: int
) -> None:
    """Sums of parts come in another order (measured: losses of 6 steps differ by at most 2e-6)."""
    curves = []
    for micro_batch_size in (0, 3):
        run = tmp_path / str(micro_batch_size)
        config = tiny_config(inputs, run, zero_stage=zero_stage, micro_batch_size=micro_batch_size)
        config.model.contrastive_loss = "sigmoid"
        stage1.run_stage1(config)
        curves.append([row["loss"] for row in read_log(run / "log.jsonl")])
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], atol=5e-5, rtol=0)
    bias = weights_of(tmp_path / "3")["region_logit_bias"]
    assert bias.shape == (1,) and bias.item() != -10.0


def test_negative_micro_batch_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.micro_batch_size is -1"):
        stage1.run_stage1(tiny_config(inputs, tmp_path, micro_batch_size=-1))


def test_frozen_towers_do_not_move(inputs: Path, tmp_path: Path) -> None:
    extra = ("--run.steps=2", '--optim.layer_lr={"vision.encoder": 0, "text": 0}')
    assert stage1.main(arguments(inputs, tmp_path / "run", *extra)) == 0
    assert stage1.main(arguments(inputs, tmp_path / "none", *extra, "--run.steps=0")) == 0
    trained, initial = weights_of(tmp_path / "run"), weights_of(tmp_path / "none")
    moved = {name for name in trained if not torch.equal(trained[name], initial[name])}
    assert moved
    assert not [name for name in moved if name.startswith(("vision.encoder.", "text."))]


@pytest.mark.parametrize(
    ("zero_stage", "number"), [(0, signal.SIGKILL), (2, signal.SIGTERM)], ids=["kill", "term"]
)
def test_a_run_ended_from_outside_resumes_bit_equal(
    inputs: Path, tmp_path: Path, zero_stage: int, number: signal.Signals
) -> None:
    extra = ("--run.steps=60", "--run.save_every=3", f"--run.zero_stage={zero_stage}")
    broken = arguments(inputs, tmp_path / "broken", *extra, "--data.num_workers=1")
    process = subprocess.Popen(
        [sys.executable, "training/stage1.py", *broken],
        cwd=PROJECT_ROOT,
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until_step(process, tmp_path / "broken" / "log.jsonl", 5)
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_SECONDS)
    stopped_at = read_log(tmp_path / "broken" / "log.jsonl")[-1]["step"]
    assert stopped_at < 60, "the run was over before the signal came"
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
        assert last_checkpoint(tmp_path / "broken").state["step"] == stopped_at

    assert stage1.main(broken) == 0
    assert stage1.main(arguments(inputs, tmp_path / "unbroken", *extra)) == 0
    actual, expected = (last_checkpoint(tmp_path / name) for name in ("broken", "unbroken"))
    assert actual.state["step"] == expected.state["step"] == 60
    for ours, theirs in (
        (actual.weights, expected.weights),
        (actual.optimizer, expected.optimizer),
    ):
        different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        assert not different, [(n, (ours[n] - theirs[n]).abs().max()) for n in different]


def wait_until_step(process: subprocess.Popen[str], log: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        if process.poll() is not None:
            pytest.fail(f"training ended early: {process.communicate()[1]}")
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"training did not get going in {PATIENCE_SECONDS} s")


def last_checkpoint(output_dir: Path) -> Checkpoint:
    return load_checkpoint(list_checkpoints(output_dir / "checkpoints")[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks on the CPU are meant here")
def test_the_deepspeed_launcher_with_two_ranks_gives_the_curve_of_one(
    inputs: Path, tmp_path: Path
) -> None:
    """Measured over 6 steps of 8 images: losses differ by at most 3e-6."""
    launcher = Path(sys.executable).with_name("deepspeed")
    script = ["training/stage1.py", *arguments(inputs, tmp_path / "two", "--run.zero_stage=2")]
    process = subprocess.Popen(
        [sys.executable, launcher, "--num_gpus=2", f"--master_port={free_port()}", *script],
        cwd=PROJECT_ROOT,
        env=clean_environment() | {"PYTHONPATH": str(PROJECT_ROOT)},
        start_new_session=True,
    )
    try:
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        if process.poll() is None:  # the launcher leaves its ranks behind when it is killed
            os.killpg(process.pid, signal.SIGKILL)
    assert stage1.main(arguments(inputs, tmp_path / "one")) == 0
    actual, expected = (
        [row["loss"] for row in read_log(tmp_path / name / "log.jsonl")] for name in ("two", "one")
    )
    assert len(actual) == 6
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def free_port() -> int:
    """Below those that clients are given, or it may be taken until the launcher's ranks are up."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port below 32,000")


@pytest.mark.parametrize(
    ("keeps", "extra", "message"),
    [
        ("captions", [], r"none of the 8 training records has a region \(\d+ captions"),
        ("captions", ["--data.allow_no_regions=true"], ""),
        ("captions", ["--model.prompter.kind=none"], ""),
        ("nothing", ["--data.allow_no_regions=true"], r"has a region or caption \(0 captions"),
        ("regions", [], r"none of the 8 training records has a caption \(0 captions"),
        ("regions", ["--data.allow_no_captions=true"], ""),
        ("regions", ["--model.prompter.kind=none"], r"has a caption \(0 captions"),
    ],
)
def test_a_set_with_nothing_to_learn_is_refused_before_the_first_step(
    keeps: str, extra: list[str], message: str, inputs: Path, tmp_path: Path
) -> None:
    records = [
        dataclasses.replace(
            record,
            regions=record.regions if keeps == "regions" else [],
            captions=record.captions if keeps == "captions" else [],
        )
        for record in load_records(inputs / "records")[:8]
    ]
    write_records(records, tmp_path / "records")
    train = f"--data.train={tmp_path / 'records'}"
    settings = arguments(inputs, tmp_path / "out", "--run.steps=1", train, *extra)
    if not message:
        assert stage1.main(settings) == 0
        return
    with pytest.raises(ValueError, match=message):
        stage1.main(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data.train=nowhere"], "cloc-mllm data build"),
        (["--data.train="], "data.train is empty"),
        (["--model.tokenizer=nowhere"], "unknown tokenizer 'nowhere'"),
        (['--optim.layer_lr={"tower": 0}'], "optim.layer_lr names 'tower'"),
        (["--run.keep_checkpoints=1"], "keep at least 2"),
        (["--run.zero_stage=4"], "run.zero_stage"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_settings_are_one_clear_line(
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    try:
        code = cli_main(["stage1", *arguments(inputs, tmp_path, "--run.steps=1", *extra)])
    except SystemExit as exit_request:  # jsonargparse's own
        code = int(exit_request.code or 0)
    assert code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
