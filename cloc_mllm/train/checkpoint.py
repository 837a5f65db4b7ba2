"""Checkpoints that survive a kill at any instant (contract C7).

A checkpoint is a directory `step_00000100/` of three files and a manifest:

    weights.safetensors     parameters and buffers by name
    optimizer.safetensors   moments by parameter name: `exp_avg.NAME`, `exp_avg_sq.NAME` (AdamW) or
                            `momentum.NAME` (Muon)
    state.json              step, optimizer step, seed, data size, resolved config, fingerprint
    manifest.json           sha256 and size of the others, written last

It is built under a temporary name, flushed to disk and renamed. Everything is stored whole and by
name, so a run may resume on another number of ranks or another ZeRO stage. The random state is
the pair (seed, step): the loop reseeds every generator from it at each step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cloc_mllm.earlier import by_current_name, current_run_settings

FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"

# What may change between a run and its continuation: it moves files or paces the run, but takes
# no part in the arithmetic (`steps` stretches the learning rate schedule, which is its purpose).
FREE_KEYS = frozenset(
    {
        "conversations.pack",
        "data.cache_dir",
        "data.feature_cache",
        "data.num_workers",
        "data.train",
        "data.validation",
        "run.compile",
        "run.eval_every",
        "run.gradient_checkpointing",
        "run.keep_checkpoints",
        "run.log_every",
        "run.max_seconds",
        "run.micro_batch_size",
        "run.output_dir",
        "run.resume",
        "run.save_every",
        "run.steps",
        "run.zero_stage",
    }
)


@dataclass(frozen=True)
class Checkpoint:
    """Tensors are float32 on the CPU, whole, by parameter name."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `root/step_XXXXXXXX`, then removes all but the newest `keep`. One process calls it.

    Raises:
        OSError: the disk is full or gone; older checkpoints are untouched.
    """
    assert keep >= 1
    final = root / f"step_{checkpoint.state['step']:08d}"
    partial = root / f".partial_{final.name}"
    remove_leftovers(root)
    partial.mkdir(parents=True)
    save_file(checkpoint.weights, partial / "weights.safetensors")
    save_file(checkpoint.optimizer, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(checkpoint.state, indent=1), encoding="utf-8")
    for name in FILES:
        _flush(partial / name)
    manifest = {name: _digest(partial / name) for name in FILES}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _flush(partial / MANIFEST)
    _flush(partial)
    if final.exists():  # a broken one of the same step, refused by the last resume
        _discard(final)
    os.replace(partial, final)
    _flush(root)
    for old in list_checkpoints(root)[:-keep]:
        _discard(old)
    return final


def load_checkpoint(directory: Path) -> Checkpoint:
    """Reads a checkpoint that `find_problem` called whole."""
    state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    state["config"] = current_run_settings(state["config"])
    return Checkpoint(
        by_current_name(load_file(directory / "weights.safetensors")),
        by_current_name(load_file(directory / "optimizer.safetensors")),
        state,
    )


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first; they may still be damaged."""
    return sorted(path for path in root.glob("step_*") if path.is_dir())


def newest_whole_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as it was written, and what is wrong with newer
    ones. Nothing is deserialised before its hash was compared.

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
    """What is wrong with a checkpoint, naming the file, or None."""
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
    return None


def check_same_run(
    state: dict[str, Any], config: dict[str, Any], fingerprint: dict[str, Any], num_samples: int
) -> None:
    """
    Raises:
        ValueError: the checkpoint comes from another preprocessing, configuration or data set;
            the message names each differing key with both values.
    """
    differences = [
        *_differences("fingerprint", state["fingerprint"], fingerprint, frozenset()),
        *_differences("config", state["config"], config, FREE_KEYS),
    ]
    if state["num_samples"] != num_samples:
        differences.append(f"number of training samples: {state['num_samples']} != {num_samples}")
    if differences:
        raise ValueError(
            "the checkpoint belongs to another run (checkpoint != now): "
            f"{'; '.join(differences)}. Restore these settings, or choose another run.output_dir"
        )


def remove_leftovers(root: Path) -> None:
    """Removes what a kill in the middle of a save or of a removal left behind."""
    for leftover in (*root.glob(".partial_*"), *root.glob(".removed_*")):
        shutil.rmtree(leftover)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"run": {"seed": 1}}` becomes `{"run.seed": 1}`; values as JSON would give them back. An
    empty dictionary is as good as none: so a new one spoils no older checkpoint."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def _differences(
    kind: str, saved: dict[str, Any], current: dict[str, Any], free: frozenset[str]
) -> list[str]:
    before, now = flatten(saved), flatten(current)
    return [
        f"{kind} {key}: {before.get(key, '(absent)')!r} != {now.get(key, '(absent)')!r}"
        for key in sorted(before.keys() | now.keys())
        if key not in free and before.get(key, "(absent)") != now.get(key, "(absent)")
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
    """Renames before removing, so that a half-removed checkpoint is never taken for one."""
    removed = directory.with_name(f".removed_{directory.name}")
    os.replace(directory, removed)
    shutil.rmtree(removed)
