"""Checkpoints that survive a kill at any instant (contract C7).

A checkpoint is a directory such as `step_00000100/` with three files and a manifest:

    weights.safetensors     parameters and buffers by name
    optimizer.safetensors   moments by parameter name: `exp_avg.NAME`, `exp_avg_sq.NAME` (AdamW) or
                            `momentum.NAME` (Muon)
    state.json              steps, last losses, data size, resolved config, fingerprint
    manifest.json           sha256 and size of the others, written last

It is built under a temporary name, flushed to disk and renamed. Tensors are stored whole and by
name, so a run may resume on another number of ranks or at another ZeRO stage. The random state is
the pair (seed, step), from which the loop seeds every generator at each step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cloc_mllm.data.storage import remove, whole_directory
from cloc_mllm.disk import disk_problem
from cloc_mllm.earlier import by_current_name, current_run_settings

FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
_STATE_KEYS = ("step", "optimizer_steps", "config", "fingerprint", "num_samples")

_SETTLE_SECONDS = 10.0

# Settings that may change between a run and its continuation. They move files or pace the run, but
# do not enter the arithmetic (`steps` stretches the learning rate schedule, as it should).
FREE_KEYS = frozenset(
    {
        "data.allow_no_captions",
        "data.allow_no_regions",
        "conversations.pack",
        "data.cache_dir",
        "data.feature_cache",
        "data.num_workers",
        "data.train",
        "data.validation",
        "optim.spike_bound",
        "run.compile",
        "run.eval_every",
        "run.eval_questions",
        "run.gradient_checkpointing",
        "run.keep_checkpoints",
        "run.log_every",
        "run.max_seconds",
        "run.micro_batch_size",
        "run.output_dir",
        "run.resume",
        "run.save_every",
        "run.step_timeout",
        "run.steps",
        "run.zero_stage",
    }
)


# Settings that jobs once had without using them, with their defaults. A checkpoint with such a
# default still belongs to the same run.
REMOVED_SETTINGS = {
    "data.flip": False,
    "data.free_form_share": 0.0,
    "data.label_noise": 0.0,
    "data.regions_per_image": 4,
    "optim.layer_decay": 1.0,
    "optim.new_lr": 0.0,
}


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: whole tensors on the CPU, by parameter name, in the dtype that
    they are trained or held in."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `root/step_XXXXXXXX`, then removes all but the newest `keep` checkpoints.

    Only one process may call this.

    Raises:
        ValueError: the disk is full, read-only or gone; older checkpoints are untouched.
    """
    assert keep >= 1
    final = root / f"step_{checkpoint.state['step']:08d}"
    try:
        root.mkdir(exist_ok=True)  # not its parents: a disk that is gone must not be replaced
        remove_leftovers(root)
        with whole_directory(final) as partial:
            _write(partial, checkpoint)
        _flush(root)
        for old in list_checkpoints(root)[:-keep]:
            _discard(old)
    except (OSError, SafetensorError) as error:
        gone = f"{root.parent} is gone: mount or restore it"
        problem = disk_problem(error) or (str(error) if root.parent.is_dir() else gone)
        raise ValueError(
            f"{final} could not be written: {problem}; then the same command goes on. Older "
            "checkpoints are as they were"
        ) from error
    return final


def _write(directory: Path, checkpoint: Checkpoint) -> None:
    save_file(checkpoint.weights, directory / "weights.safetensors")
    save_file(checkpoint.optimizer, directory / "optimizer.safetensors")
    (directory / "state.json").write_text(json.dumps(checkpoint.state, indent=1), encoding="utf-8")
    for name in FILES:
        _flush(directory / name)
    manifest = {name: _digest(directory / name) for name in FILES}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _flush(directory / MANIFEST)
    _flush(directory)


class CheckpointWriter:
    """Writes checkpoints in a thread while training goes on, one after the other.

    As a context it waits for the last one at its end. What a write raises is raised there, at the
    next write, or by `check`.
    """

    def __init__(self) -> None:
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: futures.Future[Path] | None = None

    def write(self, root: Path, checkpoint: Checkpoint, keep: int) -> None:
        """Starts `save_checkpoint`, once the one before is written. The tensors of the checkpoint
        must not change any more."""
        self.wait()
        self._pending = self._pool.submit(save_checkpoint, root, checkpoint, keep)

    def check(self) -> None:
        """Raises what a write that has ended raised."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def settle(self) -> None:
        """Waits for a write for some seconds, before the process ends."""
        if self._pending is not None:
            futures.wait([self._pending], timeout=_SETTLE_SECONDS)

    def wait(self) -> None:
        """Waits until everything is written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True)
        if error[0] is None:
            self.wait()


def load_checkpoint(directory: Path) -> Checkpoint:
    """Reads a checkpoint, in which `find_problem` found no problem."""
    state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    state["config"] = current_run_settings(state["config"])
    return Checkpoint(
        by_current_name(load_file(directory / "weights.safetensors")),
        by_current_name(load_file(directory / "optimizer.safetensors")),
        state,
    )


def list_checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints, oldest first; they may still be damaged."""
    numbered = (path for path in root.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))
    return sorted((path for path in numbered if path.is_dir()), key=lambda path: int(path.name[5:]))


def newest_whole_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """Finds the newest checkpoint whose every byte is as it was written.

    Nothing is deserialised before its hash was compared.

    Returns:
        its directory (None if there are no checkpoints), and the faults of newer ones.

    Raises:
        ValueError: there are checkpoints and all of them are damaged.
    """
    problems: list[str] = []
    for directory in reversed(list_checkpoints(root)):
        problem = find_problem(directory)
        if problem is None:
            return directory, problems
        problems.append(problem)
    if problems:
        raise ValueError(
            f"no whole checkpoint is left in {root}: {'; '.join(problems)}. Remove the directory "
            "(or pass another run.output_dir) to start again"
        )
    return None, problems


def find_problem(directory: Path) -> str | None:
    """Finds the fault of a checkpoint, naming the file; None if it is whole."""
    manifest_path = directory / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        expected = {name: (manifest[name]["sha256"], manifest[name]["bytes"]) for name in FILES}
    except FileNotFoundError:
        return f"{manifest_path} is missing"
    except (ValueError, KeyError, TypeError):  # ValueError: not JSON, or not UTF-8
        return f"{manifest_path} is not a manifest"
    for name in FILES:
        if not (directory / name).is_file():
            return f"{directory / name} is missing"
        actual = _digest(directory / name)
        if (actual["sha256"], actual["bytes"]) != expected[name]:
            return f"{directory / name} differs from its sha256 in {MANIFEST}"
    state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    missing = [key for key in _STATE_KEYS if key not in state]
    return f"{directory / 'state.json'} has no {', '.join(missing)}" if missing else None


def check_same_run(
    state: dict[str, Any],
    config: dict[str, Any],
    fingerprint: dict[str, Any],
    num_samples: int,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Checks that a checkpoint belongs to this run.

    Args:
        defaults: the settings of the job at their defaults, which keep what was before there was a
            setting: a checkpoint that lacks one is no different from a run with its default.

    Raises:
        ValueError: its preprocessing, configuration or data set differ; names each key that does,
            with both values.
    """
    differences = [
        *_differences("fingerprint", flatten(state["fingerprint"]), flatten(fingerprint)),
        *_differences(
            "config",
            *_what_matters(flatten(state["config"]), flatten(config), flatten(defaults or {})),
        ),
    ]
    if state["num_samples"] != num_samples:
        differences.append(f"number of training samples: {state['num_samples']} != {num_samples}")
    if differences:
        raise ValueError(
            "the checkpoint belongs to another run (checkpoint != now): "
            f"{'; '.join(differences)}. Restore these settings, or choose another run.output_dir"
        )


def remove_leftovers(root: Path) -> None:
    """Removes what a kill in the middle of a save or a removal left behind."""
    for leftover in (*root.glob(".partial_*"), *root.glob(".removed_*")):
        remove(leftover)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns `{"run": {"seed": 1}}` into `{"run.seed": 1}`, with the values that JSON gives back.

    An empty dictionary leaves no trace, so a checkpoint from before it existed is no different.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def _what_matters(
    before: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of two runs, flattened, without those that do not tell them apart."""
    unused = {
        key
        for key, default in REMOVED_SETTINGS.items()
        if key not in now and before.get(key) == default
    }
    added = {
        key
        for key, default in defaults.items()
        if key not in before and now.get(key, default) == default
    }
    left_out = FREE_KEYS | unused | added
    if before.get("run.precision") == "auto":  # earlier versions stored it unresolved
        left_out |= {"run.precision"}
    return (
        {key: value for key, value in before.items() if key not in left_out},
        {key: value for key, value in now.items() if key not in left_out},
    )


def _differences(kind: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{kind} {key}: {before.get(key, '(absent)')!r} != {now.get(key, '(absent)')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "(absent)") != now.get(key, "(absent)")
    ]


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def _flush(path: Path) -> None:
    """Forces a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(directory: Path) -> None:
    """Renames, then removes, so that a half-removed checkpoint is never taken for a whole one."""
    removed = directory.with_name(f".removed_{directory.name}")
    os.replace(directory, removed)
    shutil.rmtree(removed)
