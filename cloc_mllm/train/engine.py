"""The DeepSpeed engine: starting it, taking one step, reading and setting its optimizer state.

It runs the same under plain `python`, `torchrun` and `deepspeed`, on CPUs (gloo) and GPUs (nccl),
and needs neither MPI nor a compiler.
"""

from __future__ import annotations

import copy
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cloc_mllm.config import OptimConfig, RunConfig
from cloc_mllm.distributed import (
    all_reduce_sum,
    is_distributed,
    is_main,
    local_rank,
    num_cores,
    num_local_ranks,
    world_size,
)
from cloc_mllm.models.text_encoder import TextEncoder
from cloc_mllm.models.vision_encoder import VisionEncoder
from cloc_mllm.train.checkpoint import Checkpoint
from cloc_mllm.train.deepspeed_config import deepspeed_config
from cloc_mllm.train.deepspeed_internals import (
    MomentPlace,
    NormGate,
    check_internals,
    gathered,
    moment_place,
    skip_compiled_operators,
    whole_shape,
)
from cloc_mllm.train.optim import build_optimizer

_ADAMW_MOMENTS, _MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum",)
_CLIP_EPSILON = 1e-6  # as torch and DeepSpeed have it
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # the main rank evaluates while the others wait

StepFn = Callable[[nn.Module, Any], dict[str, Tensor]]


class TrainStep(nn.Module):
    """The module that DeepSpeed sees: it takes a batch and returns named losses.

    The loss is computed inside the engine's forward, because ZeRO hooks its gradients to the output
    of that. So is autocast, because the engine switches off one that is around it.
    """

    def __init__(self, model: nn.Module, step_fn: StepFn, *, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.step_fn = step_fn
        self.bf16 = bf16

    def forward(self, batch: Any) -> dict[str, Tensor]:
        device_type = next(self.model.parameters()).device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.bf16):
            return self.step_fn(self.model, batch)


def start_processes() -> torch.device:
    """Joins the process group and returns this rank's device.

    Without a launcher, which would set RANK, the group is this process alone.
    """
    if torch.cuda.is_available():
        index = _gpu_of_rank(local_rank(), torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes the GPU of this number
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it had to guess
        _share_cores()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    skip_compiled_operators()
    if is_distributed():
        return device
    import deepspeed

    alone: dict[str, Any] = {}
    if "RANK" not in os.environ:  # plain `python`; DeepSpeed would look for MPI
        address = "tcp://127.0.0.1:0"  # any free port: nobody else has to find it
        alone = {"init_method": address, "rank": 0, "world_size": 1, "auto_mpi_discovery": False}
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        verbose=False,
        timeout=_COLLECTIVE_TIMEOUT,
        **alone,
    )
    return device


def _gpu_of_rank(local_rank: int, num_gpus: int) -> int:
    """Chooses the GPU of a rank. Where each rank sees a single one, as `srun --gpus-per-task 1`
    makes it, that is the one.

    Raises:
        ValueError: the machine shows fewer GPUs than it has ranks.
    """
    if num_gpus == 1:
        return 0
    if local_rank >= num_gpus:
        raise ValueError(
            f"this rank is LOCAL_RANK {local_rank} of its machine, but {num_gpus} GPUs are "
            "visible; start as many ranks as there are GPUs, or show one GPU to each rank"
        )
    return local_rank


def compile_towers(model: nn.Module, zero_stage: int) -> None:
    """Compiles the image and the text tower in place; the names of weights stay as they are.

    The number and length of texts differ from step to step, so the text tower's shapes are dynamic.

    Raises:
        ValueError: ZeRO stage 3 would gather weights inside a compiled tower, or there is no C++
            compiler, which torch.compile needs also on a GPU.
    """
    if zero_stage == 3:
        raise ValueError(
            "run.compile does not go with run.zero_stage 3, which gathers weights inside the "
            "towers; use zero_stage 2, or set run.compile to false"
        )
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    if not any(shutil.which(name) for name in compilers if name):
        raise ValueError(
            "run.compile needs a C++ compiler, and there is no g++ or clang++ on the PATH; install "
            "one, name it in CXX, or set run.compile to false"
        )
    for module in model.modules():
        if isinstance(module, VisionEncoder):
            module.compile()
        elif isinstance(module, TextEncoder):
            module.text.compile(dynamic=True)


def start_engine(model: nn.Module, step_fn: StepFn, run: RunConfig, optim: OptimConfig) -> Any:
    """Starts a DeepSpeed engine around `model` and our optimizer.

    The weights must be loaded before. `run.precision` must be resolved (`resolve_precision`).
    """
    import deepspeed

    assert run.precision != "auto"
    bf16 = run.precision == "bf16"
    shell = _without_weights(model) if run.zero_stage == 3 and is_main() else None
    engine, *_ = deepspeed.initialize(
        model=TrainStep(model, step_fn, bf16=bf16),
        optimizer=build_optimizer(
            model, optim, muon_dtype=torch.bfloat16 if bf16 else torch.float32
        ),
        config=deepspeed_config(run, optim, world_size()),
        dist_init_required=False,
    )
    check_internals(engine, [p for p in model.parameters() if p.requires_grad])
    engine.shell = shell
    if run.zero_stage:
        engine.norm_gate = NormGate(engine)
    return engine


def whole_model(engine: Any, model: nn.Module, device: torch.device | str) -> nn.Module:
    """Makes a plain model: on the main rank it has all weights and makes no collective calls.

    Every rank must call this. At ZeRO stage 3 a rank holds a part of each weight and gathers the
    other parts during the forward pass, which would hang on one rank alone. So the main rank
    gathers all of them into a second model on `device`, which lives as long as the caller keeps it.
    At other stages this is `model` itself, wherever it lies.
    """
    if engine.zero_optimization_stage() < 3:
        return model
    empty = dict(engine.shell.named_parameters()) if is_main() else {}
    filled: dict[int, Any] = {}  # by the id of the empty parameter, as `deepcopy` looks them up
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with gathered(parameter):
                if is_main():
                    filled[id(empty[name])] = _filled(empty[name], parameter, device)
        if not is_main():
            return model
        whole = copy.deepcopy(engine.shell, filled)
        for name, buffer in model.named_buffers():
            whole.get_buffer(name).copy_(buffer)
    return whole.to(device)


def _without_weights(model: nn.Module) -> nn.Module:
    """Copies a model but for its weights, which have a shape and a dtype and no memory.

    Weights of bitsandbytes carry more than numbers and are copied.
    """
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
        if type(p) is nn.Parameter
    }
    return copy.deepcopy(model, empty)  # it takes what the dictionary has for what it finds there


def _filled(empty: nn.Parameter, parameter: nn.Parameter, device: torch.device | str) -> Any:
    if empty.is_meta:
        whole = parameter.detach().to(device, copy=True)
        return nn.Parameter(whole, requires_grad=empty.requires_grad)
    quantized = copy.deepcopy(empty)
    quantized.copy_(parameter)
    return quantized


class StepOutcome(NamedTuple):
    """The outcome of a step.

    Attributes:
        loss: mean over ranks.
        grad_norm: norm of the whole gradient, before clipping; `inf` or `nan` if it is not finite.
        fault: why the step was skipped, "" if it was taken.
        flagged: whether any rank raised the flag.
    """

    loss: float
    grad_norm: float
    fault: str
    flagged: bool


def not_finite(loss: float, grad_norm: float) -> str:
    """Says so if a step is not finite, "" if it is."""
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    return "" if finite else "loss or gradient is not finite"


def step_if_sound(
    engine: Any,
    loss: Tensor,
    grad_clip: float,
    find_fault: Callable[[float, float], str] = not_finite,
    *,
    flag: bool = False,
) -> StepOutcome:
    """Takes the optimizer step, unless it has a fault.

    The gradients are already summed over ranks, so their norm is the same on all ranks, and it is
    not finite if any rank's loss or gradient was not. A skipped step leaves weights and optimizer
    state as they are on every rank.

    Args:
        loss: float[], this rank's.
        grad_clip: longer gradients are scaled to this norm; 0 leaves them.
        find_fault: says from the mean loss and the norm what is wrong; must say the same on all
            ranks.
        flag: anything that all ranks are to know. It comes with the norm, so that a GPU is waited
            for once.
    """
    own = loss.detach().float().reshape(1)
    sums = all_reduce_sum(torch.cat([own, torch.full_like(own, float(flag))]))
    if engine.zero_optimization():
        total, flags = sums.tolist()
        mean = total / world_size()
        engine.norm_gate.find_fault = partial(find_fault, mean)
        engine.step()  # computes the norm of the partitioned gradient, has it judged, and clips it
        norm, fault = engine.norm_gate.norm, engine.norm_gate.fault
        assert bool(fault) != engine.was_step_applied()
        return StepOutcome(mean, norm, fault, flags > 0)
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    whole = nn.utils.get_total_norm(gradients)
    norm, total, flags = torch.cat([whole.reshape(1).float(), sums]).tolist()
    mean = total / world_size()
    fault = find_fault(mean, norm)
    if fault:
        engine.zero_grad()
    else:
        if grad_clip and norm > grad_clip:
            torch._foreach_mul_(gradients, grad_clip / (norm + _CLIP_EPSILON))
        engine.step()
    return StepOutcome(mean, norm, fault, flags > 0)


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Makes all randomness inside a step (dropout) depend on these three numbers alone.

    So a resumed run draws what the unbroken run drew.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]
    random.seed(int(state))
    np.random.seed(state)
    torch.manual_seed(int(state))


def optimizer_state(engine: Any, model: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Collects the optimizer's moments, whole, on the main rank's CPU, and AdamW's step count.

    Every rank must call this: under ZeRO each owns a part of each moment.

    Returns:
        the moments by `{moment}.{parameter name}`, shaped like the parameter, and the step count;
        nothing on other ranks.
    """
    moments: dict[str, Tensor] = {}
    num_steps = 0
    if not is_main() and not engine.zero_optimization():
        return moments, num_steps  # the main rank has everything
    for name, parameter, names in _trainable(engine, model):
        place = moment_place(engine, parameter)
        # empty before the first step
        state = place.optimizer.state.get(place.owner) if place is not None else None
        num_steps = max(num_steps, int(state.get("step", 0))) if state else num_steps
        shape = whole_shape(parameter)
        for moment in names:
            whole = torch.zeros(shape, device=parameter.device).flatten()
            if place is not None and state:
                whole[place.own] = state[moment].flatten()[place.part]
            if engine.zero_optimization():
                whole = all_reduce_sum(whole)
            if is_main():
                moments[f"{moment}.{name}"] = whole.reshape(shape).cpu()
    return moments, num_steps


def load_optimizer_state(engine: Any, model: nn.Module, checkpoint: Checkpoint) -> None:
    """Sets the moments of a checkpoint, on any number of ranks and at any ZeRO stage.

    Raises:
        ValueError: a moment of a trainable parameter is missing.
    """
    for name, parameter, names in _trainable(engine, model):
        if f"{names[0]}.{name}" not in checkpoint.optimizer:
            raise ValueError(f"the checkpoint has no optimizer state for {name}")
        place = moment_place(engine, parameter)
        if place is None:
            continue
        state = _state_with(place, names)
        if "step" in state:
            state["step"].fill_(checkpoint.state["optimizer_steps"])
        for moment in names:
            # a checkpoint's file is mapped, so only this rank's part of it is read
            saved = checkpoint.optimizer[f"{moment}.{name}"].flatten()[place.own]
            state[moment].view(-1)[place.part] = saved.to(parameter.device)


def _state_with(place: MomentPlace, moments: tuple[str, ...]) -> dict[str, Tensor]:
    """The state with the moments; they are zeros if the optimizer has not stepped yet."""
    state = place.optimizer.state
    if place.owner not in state:
        state[place.owner] = {moment: torch.zeros_like(place.owner) for moment in moments}
        if moments == _ADAMW_MOMENTS:
            state[place.owner]["step"] = torch.tensor(0.0, device=place.owner.device)
    return state[place.owner]


def _trainable(
    engine: Any, model: nn.Module
) -> Iterator[tuple[str, nn.Parameter, tuple[str, ...]]]:
    """Each trainable parameter: its name, the parameter, and the names of its moments."""
    groups = engine.optimizer.param_groups
    by_muon = {id(p) for group in groups if group["muon"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, _MUON_MOMENTS if id(parameter) in by_muon else _ADAMW_MOMENTS


def _share_cores() -> None:
    """Divides the cores among the ranks of this machine, unless OMP_NUM_THREADS does.

    With more threads than cores the ranks spin while they wait for each other, and are 10 to 30
    times slower. torchrun sets OMP_NUM_THREADS; the `deepspeed` launcher does not.
    """
    if num_local_ranks() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // num_local_ranks()))
