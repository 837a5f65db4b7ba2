"""Everything that training uses of DeepSpeed beyond what DeepSpeed promises to keep.

These attributes may change with any version, and there is no upper bound on the version. So they
are read here only, and `check_internals` looks for all of them when a run starts: a run must not
fail hours later, at its first checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from cloc_mllm.distributed import rank

WRITTEN_FOR = "0.19.8"

# Attributes of the ZeRO optimizer, and of each trainable parameter, by ZeRO stage.
_OPTIMIZER_PARTS = {
    0: (),
    1: ("optimizer", "scaled_global_norm"),
    2: ("optimizer", "scaled_global_norm"),
    3: (
        "optimizer",
        "_get_norm_groups",
        "grad_position",
        "get_param_id",
        "fp32_partitioned_groups_flat",
    ),
}
_PARAMETER_PARTS = {
    0: (),
    1: ("_hp_mapping",),
    2: ("_hp_mapping",),
    3: ("ds_id", "ds_numel", "ds_shape"),
}
_MAPPING_PARTS = ("param_group_index", "lp_fragment_address", "hp_fragment_address")


class MomentPlace(NamedTuple):
    """The place of the moments of this rank's part of a parameter in the optimizer.

    Attributes:
        optimizer: torch's optimizer, whose state has the moments.
        owner: the tensor under which the state is stored.
        own: the part of the flattened parameter that belongs to this rank.
        part: the place of that part in the flattened moments.
    """

    optimizer: torch.optim.Optimizer
    owner: Tensor
    own: slice
    part: slice


class NormGate:
    """Stands between the gradient norm that ZeRO computes and the step it takes: of a gradient with
    a fault ZeRO is told an infinite norm, and skips the step.

    Attributes:
        find_fault: to be set before each step: takes the norm, and says what is wrong with it.
        norm, fault: of the last step. ZeRO 1 and 2 find some infinities before the norm.
    """

    def __init__(self, engine: Any) -> None:
        zero = engine.optimizer
        self.find_fault: Callable[[float], str] = lambda norm: ""
        self.norm, self.fault = math.inf, ""
        if engine.zero_optimization_stage() == 3:
            self._judge_result_of(zero, "_get_norm_groups", _combined)
        else:
            self._judge_result_of(zero, "scaled_global_norm", float)
        step = zero.step

        def judged_step(*arguments: Any, **keywords: Any) -> Any:
            self.norm, self.fault = math.inf, self.find_fault(math.inf)
            return step(*arguments, **keywords)

        zero.step = judged_step

    def _judge_result_of(self, zero: Any, name: str, norm_of: Callable[[Any], float]) -> None:
        compute = getattr(zero, name)

        def judged() -> Any:
            result = compute()
            self.norm = norm_of(result)
            self.fault = self.find_fault(self.norm)
            if not self.fault:
                return result
            return [math.inf] if isinstance(result, list) else torch.full_like(result, math.inf)

        setattr(zero, name, judged)


def _combined(norms: list[Any]) -> float:
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return float(combine_grad_norm_groups(norms))


def skip_compiled_operators() -> None:
    """Keeps DeepSpeed from compiling operators, none of which training needs.

    On a CPU its shared-memory backend takes a minute to compile, and crashes where there is no
    compiler. DeepSpeed does not try what its table of operators does not list.
    """
    import deepspeed

    # newer versions fill the table at its first reading, by calling the compiler: do not read it
    if not {"__compatible_ops__", "__getattr__"} & vars(deepspeed.ops).keys():
        _refuse("deepspeed.ops", ["__compatible_ops__"])
    deepspeed.ops.__compatible_ops__ = {}


def check_internals(engine: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Checks that everything below will work for this engine and its trainable parameters.

    Raises:
        ValueError: this version of DeepSpeed lacks an attribute; names it and a version that works.
    """
    stage = engine.zero_optimization_stage()
    _require(engine.optimizer, _OPTIMIZER_PARTS[stage], f"the optimizer of ZeRO stage {stage}")
    for parameter in parameters:
        _require(parameter, _PARAMETER_PARTS[stage], f"parameters at ZeRO stage {stage}")
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            _require(mapping, _MAPPING_PARTS, "_hp_mapping")


def moment_place(engine: Any, parameter: nn.Parameter) -> MomentPlace | None:
    """Finds the moments of a parameter; None if no part of it belongs to this rank.

    At stage 0 the parameter itself owns them. ZeRO 1 and 2 flatten each group of parameters into
    one tensor per rank and note the addresses in `_hp_mapping`. ZeRO 3 cuts every parameter into
    equal parts, the last one padded. (DeepSpeed's own `safe_get_full_optimizer_state` knows only
    the first parameter group in 0.19.8, and no state before the first step.)
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        whole = slice(0, parameter.numel())
        return MomentPlace(engine.optimizer, parameter, whole, whole)
    zero: Any = engine.optimizer
    if stage == 3:
        group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        total = parameter.ds_numel  # type: ignore[attr-defined]
        own = slice(min(total, rank() * length), min(total, (rank() + 1) * length))
        part = slice(offset, offset + own.stop - own.start)
        return MomentPlace(zero.optimizer, zero.fp32_partitioned_groups_flat[group], own, part)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    owner = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
    own, part = (
        slice(address.start, address.start + address.numel)
        for address in (mapping.lp_fragment_address, mapping.hp_fragment_address)
    )
    return MomentPlace(zero.optimizer, owner, own, part)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a whole parameter, even if ZeRO 3 left this rank only a part of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes a parameter whole inside the context, also at ZeRO stage 3. Every rank must enter."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


@contextmanager
def linear_as_it_was() -> Iterator[None]:
    """Puts torch's `functional.linear` back at the end.

    ZeRO 3 replaces it for the rest of the process by one that rounds differently and that
    TorchScript cannot compile.
    """
    linear = nn.functional.linear
    try:
        yield
    finally:
        nn.functional.linear = linear


def _require(owner: Any, names: Iterable[str], what: str) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        _refuse(what, missing)


def _refuse(what: str, missing: list[str]) -> NoReturn:
    import deepspeed

    raise ValueError(
        f"deepspeed {deepspeed.__version__} is not supported: {what} has no {', '.join(missing)}. "
        f"Training was written for deepspeed {WRITTEN_FOR}; run: "
        f"pip install deepspeed=={WRITTEN_FOR}"
    )
