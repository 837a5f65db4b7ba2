"""A DeepSpeed that lacks what training uses of it is refused when a run starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloc_mllm.train.deepspeed_internals import check_internals
from tests.train.toy import run_config, train_toy

deepspeed = pytest.importorskip("deepspeed")

MAPPING = SimpleNamespace(param_group_index=0, lp_fragment_address=0, hp_fragment_address=0)
OPTIMIZERS: dict[int, dict[str, Any]] = {
    0: {},
    2: {"optimizer": None, "scaled_global_norm": None},
    3: {
        "optimizer": None,
        "_get_norm_groups": None,
        "grad_position": {},
        "get_param_id": id,
        "fp32_partitioned_groups_flat": [],
    },
}
PARAMETERS: dict[int, dict[str, Any]] = {
    0: {},
    2: {"_hp_mapping": MAPPING},
    3: {"ds_id": 0, "ds_numel": 1, "ds_shape": (1,)},
}


def engine_of(stage: int, optimizer: dict[str, Any]) -> SimpleNamespace:
    """Stands for a DeepSpeed engine whose optimizer has these attributes alone."""
    return SimpleNamespace(
        zero_optimization_stage=lambda: stage, optimizer=SimpleNamespace(**optimizer)
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_deepspeed_that_has_everything_passes(stage: int) -> None:
    parameter: Any = SimpleNamespace(**PARAMETERS[stage])
    check_internals(engine_of(stage, OPTIMIZERS[stage]), [parameter])


@pytest.mark.parametrize(
    ("stage", "missing"),
    [(stage, name) for stage, parts in OPTIMIZERS.items() for name in parts],
)
def test_what_the_optimizer_lacks_is_named(stage: int, missing: str) -> None:
    optimizer = {name: value for name, value in OPTIMIZERS[stage].items() if name != missing}
    message = (
        rf"deepspeed {deepspeed.__version__} is not supported: the optimizer of ZeRO stage {stage} "
        rf"has no {missing}\..* written for deepspeed 0\.19\.8; run: pip install deepspeed==0.19.8"
    )
    with pytest.raises(ValueError, match=message):
        check_internals(engine_of(stage, optimizer), [])


@pytest.mark.parametrize(
    ("stage", "missing"),
    [(stage, name) for stage, parts in PARAMETERS.items() for name in parts],
)
def test_what_a_parameter_lacks_is_named(stage: int, missing: str) -> None:
    kept = {name: value for name, value in PARAMETERS[stage].items() if name != missing}
    parameter: Any = SimpleNamespace(**kept)
    message = f"parameters at ZeRO stage {stage} has no {missing}"
    with pytest.raises(ValueError, match=message):
        check_internals(engine_of(stage, OPTIMIZERS[stage]), [parameter])


def test_what_a_mapping_lacks_is_named() -> None:
    mapping = SimpleNamespace(param_group_index=0, lp_fragment_address=0)
    parameter: Any = SimpleNamespace(_hp_mapping=mapping)
    with pytest.raises(ValueError, match="_hp_mapping has no hp_fragment_address"):
        check_internals(engine_of(2, OPTIMIZERS[2]), [parameter])


def test_a_run_is_refused_before_it_writes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("__compatible_ops__", "__getattr__"):
        monkeypatch.delattr(deepspeed.ops, name, raising=False)
    with pytest.raises(ValueError, match=r"deepspeed\.ops has no __compatible_ops__"):
        train_toy(run_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_parts_are_looked_for_when_the_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialize = deepspeed.initialize

    def lacking(**arguments: Any) -> Any:
        engine, *others = initialize(**arguments)
        del engine.optimizer.grad_position
        return engine, *others

    monkeypatch.setattr(deepspeed, "initialize", lacking)
    with pytest.raises(ValueError, match="ZeRO stage 3 has no grad_position"):
        train_toy(run_config(tmp_path / "run", zero_stage=3))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
