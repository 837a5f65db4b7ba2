from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cloc_mllm.train import checkpoint as module
from cloc_mllm.train.checkpoint import (
    FILES,
    MANIFEST,
    Checkpoint,
    check_same_run,
    find_problem,
    list_checkpoints,
    load_checkpoint,
    newest_whole_checkpoint,
    remove_leftovers,
    save_checkpoint,
)


def checkpoint_of(step: int) -> Checkpoint:
    value = torch.full((3,), float(step))
    state = {"step": step, "optimizer_steps": step, "config": {}, "fingerprint": {}}
    state["num_samples"] = 20
    return Checkpoint({"w": value}, {"exp_avg.w": -value, "exp_avg_sq.w": value**2}, state)


def save_steps(root: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(root, checkpoint_of(step), keep=2)


def flip_a_bit(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(bytes(contents))


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = checkpoint_of(7)
    directory = save_checkpoint(tmp_path, saved, keep=2)
    loaded = load_checkpoint(directory)
    assert loaded.state == saved.state
    for actual, expected in ((loaded.weights, saved.weights), (loaded.optimizer, saved.optimizer)):
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, 10, 15, 20)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000015", "step_00000020"]


def test_nothing_saved_is_no_error(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, os.remove], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_damage_is_named_and_the_previous_checkpoint_taken(
    tmp_path: Path, name: str, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 5, 10)
    damage(tmp_path / "step_00000010" / name)

    def refuse(*_: Any) -> None:
        raise AssertionError("deserialised before it was verified")

    monkeypatch.setattr(module, "load_file", refuse)
    directory, problems = newest_whole_checkpoint(tmp_path)
    assert directory == tmp_path / "step_00000005"
    assert len(problems) == 1
    assert "step_00000010" in problems[0]
    assert name in problems[0] or name == MANIFEST


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, 10)
    for directory in list_checkpoints(tmp_path):
        flip_a_bit(directory / "weights.safetensors")
    with pytest.raises(ValueError, match=r"no whole checkpoint is left.*step_00000010.*00000005"):
        newest_whole_checkpoint(tmp_path)


class Killed(BaseException):
    """Stands for kill -9: nothing of the program runs after it."""


def kill_at_call(monkeypatch: pytest.MonkeyPatch, fatal_call: int) -> Callable[[], int]:
    """Lets the process die before the `fatal_call`-th call that touches the disk."""
    num_calls = 0

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls > fatal_call:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (module, "save_file"),
        (Path, "write_text"),
        (Path, "mkdir"),
        (os, "fsync"),
        (os, "replace"),
        (os, "unlink"),  # inside rmtree
        (os, "rmdir"),
    ):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    return lambda: num_calls


def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    fatal_call, survived = 0, False
    while not survived:
        root = tmp_path / str(fatal_call)
        save_steps(root, 5, 10)
        with pytest.MonkeyPatch.context() as monkeypatch:
            kill_at_call(monkeypatch, fatal_call)
            try:
                save_checkpoint(root, checkpoint_of(15), keep=2)
                survived = True
            except Killed:
                pass
        directory, problems = newest_whole_checkpoint(root)
        assert directory is not None
        assert directory.name in ("step_00000010", "step_00000015")
        assert problems == []
        assert all(find_problem(path) is None for path in list_checkpoints(root))
        save_checkpoint(root, checkpoint_of(20), keep=2)  # and the next save cleans up
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
        fatal_call += 1
    assert fatal_call > 15  # the kill was tried at that many points


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 5)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        ValueError, match=r"step_00000010 could not be written: No space left.*room"
    ):
        save_checkpoint(tmp_path, checkpoint_of(10), keep=2)
    assert newest_whole_checkpoint(tmp_path) == (tmp_path / "step_00000005", [])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


def test_an_output_directory_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    """A disk that was unmounted must not be replaced by a folder on the one below."""
    with pytest.raises(ValueError, match=r"run is gone: mount or restore it"):
        save_checkpoint(tmp_path / "run" / "checkpoints", checkpoint_of(10), keep=2)
    assert list(tmp_path.iterdir()) == []


def test_a_state_without_a_key_is_passed_over(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    lacking = checkpoint_of(10)
    del lacking.state["fingerprint"]
    save_checkpoint(tmp_path, lacking, keep=2)
    directory, [problem] = newest_whole_checkpoint(tmp_path)
    assert directory == tmp_path / "step_00000005"
    assert problem.endswith("step_00000010/state.json has no fingerprint")


def test_stray_files_with_names_like_parts_do_no_harm(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, 10)
    for name in ("step_00000012", ".partial_step_00000011", ".removed_step_00000001"):
        (tmp_path / name).write_text("stray")
    (tmp_path / "step_newest").mkdir()
    save_steps(tmp_path, 12, 15)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000012", "step_00000015"]


def test_a_broken_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, 10)
    (tmp_path / "step_00000010" / MANIFEST).unlink()
    save_steps(tmp_path, 10)
    assert find_problem(tmp_path / "step_00000010") is None


def test_leftovers_are_removed(tmp_path: Path) -> None:
    for name in (".partial_step_00000005", ".removed_step_00000001"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def state_of(**changes: Any) -> dict[str, Any]:
    state = {
        "config": {"run": {"seed": 0, "steps": 10}, "optim": {"betas": (0.9, 0.98)}},
        "fingerprint": {"image_size": 64, "tokenizer": "abc"},
        "num_samples": 20,
    }
    return json.loads(json.dumps(state | changes))


def test_a_setting_that_came_later_and_is_empty_spoils_no_checkpoint() -> None:
    state = {"config": {"data": {"flip": False}}, "fingerprint": {}, "num_samples": 4}
    check_same_run(state, {"data": {"flip": False, "mixture": {}}}, {}, 4)
    with pytest.raises(ValueError, match=r"data\.mixture\.a: '\(absent\)' != 1"):
        check_same_run(state, {"data": {"flip": False, "mixture": {"a": 1}}}, {}, 4)


def test_the_same_run_may_continue_with_other_steps_and_paths() -> None:
    config = {"run": {"seed": 0, "steps": 99}, "optim": {"betas": (0.9, 0.98)}}
    check_same_run(state_of(), config, {"image_size": 64, "tokenizer": "abc"}, 20)


def test_a_setting_that_is_gone_is_missed_only_if_it_was_used() -> None:
    """A checkpoint of stage 2 from before each stage had settings of its own."""
    gone = {"flip": False, "regions_per_image": 4, "free_form_share": 0.0, "label_noise": 0.0}
    config = {"data": gone, "optim": {"new_lr": 0.0, "layer_decay": 1.0, "lr": 0.1}}
    state = {"config": config, "fingerprint": {}, "num_samples": 4}
    check_same_run(state, {"data": {}, "optim": {"lr": 0.1}}, {}, 4)
    state["config"] = {**config, "data": {**gone, "flip": True}}
    with pytest.raises(ValueError, match=r"config data\.flip: True != '\(absent\)'"):
        check_same_run(state, {"data": {}, "optim": {"lr": 0.1}}, {}, 4)
    with pytest.raises(ValueError, match=r"config data\.flip: False != True"):  # stage 1 has it
        check_same_run(
            {**state, "config": {"data": {"flip": False}}}, {"data": {"flip": True}}, {}, 4
        )


def test_a_setting_that_is_new_is_missed_only_if_it_is_used() -> None:
    defaults = {"model": {"tiles": 0, "rates": {}}}
    state = {"config": {"model": {}}, "fingerprint": {}, "num_samples": 4}
    check_same_run(state, {"model": {"tiles": 0}}, {}, 4, defaults)
    for now, message in (
        ({"tiles": 2}, r"config model\.tiles: '\(absent\)' != 2"),
        ({"tiles": 0, "rates": {"text": 0}}, r"config model\.rates\.text: '\(absent\)' != 0"),
        ({"other": 0}, r"config model\.other: '\(absent\)' != 0"),  # without a default
    ):
        with pytest.raises(ValueError, match=message):
            check_same_run(state, {"model": now}, {}, 4, defaults)
    state["config"] = {"model": {"tiles": 2}}
    with pytest.raises(ValueError, match=r"config model\.tiles: 2 != 0"):
        check_same_run(state, {"model": {"tiles": 0}}, {}, 4, defaults)


@pytest.mark.parametrize("now", ["fp32", "bf16"])
def test_a_precision_that_was_stored_unresolved_is_any(now: str) -> None:
    state = {"config": {"run": {"precision": "auto"}}, "fingerprint": {}, "num_samples": 4}
    check_same_run(state, {"run": {"precision": now}}, {}, 4)
    state["config"] = {"run": {"precision": "fp32"}}
    with pytest.raises(ValueError, match=r"config run\.precision: 'fp32' != 'bf16'"):
        check_same_run(state, {"run": {"precision": "bf16"}}, {}, 4)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"fingerprint": {"image_size": 96, "tokenizer": "abc"}}, "image_size: 64 != 96"),
        ({"fingerprint": {"image_size": 64}}, r"tokenizer: 'abc' != '\(absent\)'"),
        (
            {"config": {"run": {"seed": 1, "steps": 10}, "optim": {"betas": (0.9, 0.98)}}},
            "config run.seed: 0 != 1",
        ),
        ({"num_samples": 21}, "training samples: 20 != 21"),
    ],
    ids=["fingerprint", "missing-key", "config", "data"],
)
def test_another_run_is_refused_with_both_values(now: dict[str, Any], message: str) -> None:
    current = {
        "config": {"run": {"seed": 0, "steps": 10}, "optim": {"betas": (0.9, 0.98)}},
        "fingerprint": {"image_size": 64, "tokenizer": "abc"},
        "num_samples": 20,
    } | now
    with pytest.raises(ValueError, match=message):
        check_same_run(
            state_of(), current["config"], current["fingerprint"], current["num_samples"]
        )


def test_a_half_removed_checkpoint_is_not_taken(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    shutil.copytree(tmp_path / "step_00000005", tmp_path / ".removed_step_00000004")
    assert list_checkpoints(tmp_path) == [tmp_path / "step_00000005"]
