"""Code for a GPU, run on a machine without one: CPU tensors that claim to lie on `cuda:N`.

    with pretend_cuda() as gpu:
        model.to("cuda")(batch.to("cuda")).sum().backward()
    print(gpu.report())  # where the host waits, by line of the project

A `PretendCuda` is a wrapper subclass whose C++ device is cuda:N around a real CPU tensor, so all
that looks at a device above the kernels is the real thing: autograd's checks, autocast("cuda") with
CUDA's own lists of operators, `.numpy()`'s refusal, `torch.tensor(..., device=)`. Below, a
`TorchDispatchMode` runs each operator on the CPU and raises where CUDA would:
- tensors of two devices in one operator (fine are: a 0-dim CPU tensor in a pointwise one, CPU
  indices of a cuda tensor, copies);
- what CUDA's kernels refuse and the CPU's take: LayerNorm over two dtypes, integer matrix products;
- a collective of a CPU tensor where the backend is nccl (gloo does the work; ranks may be several).
`gpu.syncs` counts what makes the host wait (`.item()`, `nonzero`, boolean masks, copies to the
host), `gpu.pageable` blocking copies to the GPU or from memory that is not pinned, which wait too,
`gpu.launches` operators (views included), `gpu.float64` those in double. `num_devices=2` and
LOCAL_RANK=1 show what lands on the first GPU by mistake. Not seen: kernels, streams, memory, speed,
NCCL, fused attention (plain products stand for it), bitsandbytes (its parameters are tensor classes
of their own), `.data =` of another device.
Needs g++ and torch's headers once (a device guard without a driver). DeepSpeed needs
DS_ACCELERATOR=cuda before it is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import types
from collections import Counter
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WATCHED = os.environ.get("PRETEND_CUDA_WATCH", "cloc_mllm")  # the package whose lines are named
_INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
_COPIES = {"copy_", "_to_copy", "_copy_from"}
_TAKES_SCALARS = {
    "fill",
    "fill_",
    "masked_fill",
    "masked_fill_",
    "where",
    "lerp",
    "lerp_",
    "index_fill",
    "index_fill_",
    "_foreach_mul",
    "_foreach_mul_",
    "_foreach_add_",
}
_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "bincount",
    "is_nonzero",
    "repeat_interleave",
}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "convolution"}
_ONE_DTYPE = _PRODUCTS | {
    "native_layer_norm",
    "native_group_norm",
    "index_copy",
    "index_copy_",
    "index_put",
    "index_put_",
}
_active: list[pretend_cuda] = []


class PretendCuda(torch.Tensor):
    """`held` is the CPU tensor; views share memory as the held ones do."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, index: int = 0) -> PretendCuda:
        assert not isinstance(held, PretendCuda) and held.device.type == "cpu", held.device
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=f"cuda:{index}",
        )
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if not _active:
            raise RuntimeError(f"{func} on a pretended tensor outside of pretend_cuda()")
        return _active[-1].__torch_dispatch__(func, types, args, kwargs)

    def __tensor_flatten__(
        self,
    ):  # makes Module.to swap tensors, so that parameters stay the same objects
        return ["held"], self.device.index

    @staticmethod
    def __tensor_unflatten__(inner, index, size, stride):
        return PretendCuda(inner["held"], index)

    def _set_data(self, value):
        assert isinstance(value, PretendCuda), "`.data` of a cuda tensor is set to a CPU tensor"
        _set_shape(self, value)
        self.held = value.held.detach()

    data = property(lambda self: self.detach(), _set_data)

    tolist = lambda self: self.cpu().tolist()  # noqa: E731
    untyped_storage = lambda self: self.held.untyped_storage()  # noqa: E731
    data_ptr = lambda self: self.held.data_ptr()  # noqa: E731
    __repr__ = lambda self, **_: f"PretendCuda({self.held!r}, device='{self.device}')"  # noqa: E731

    def __deepcopy__(self, memo):
        copy = PretendCuda(self.held.clone(), self.device.index).requires_grad_(self.requires_grad)
        copy._is_param = getattr(self, "_is_param", False)
        return memo.setdefault(id(self), copy)


class pretend_cuda(TorchDispatchMode):
    """The context manager in which `num_devices` GPUs are there."""

    def __init__(self, num_devices: int = 1) -> None:
        super().__init__()
        self.num_devices, self.current, self.nccl = num_devices, 0, False
        self.pinned: dict[int, torch.Tensor] = {}
        self.reset()

    def reset(self) -> None:
        self.launches, self.syncs, self.pageable, self.float64 = 0, Counter(), Counter(), Counter()

    def report(self) -> str:
        lines = [f"{self.launches} operators"]
        for title in ("syncs", "pageable", "float64"):
            lines += [
                f"-- {title}",
                *(f"{n:6}  {where}" for where, n in getattr(self, title).most_common()),
            ]
        return "\n".join(lines)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in leaves if isinstance(x, PretendCuda)]
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not on_gpu and (target is None or target.type != "cuda"):
            if func.namespace == "c10d" and self.nccl and leaves and name != "barrier":
                raise RuntimeError(
                    f"No backend type associated with device type cpu (nccl) {_where()}"
                )
            return func(*args, **kwargs)
        self._check(func, name, leaves, on_gpu, args)
        index = on_gpu[0].device.index if on_gpu else None
        if target is not None and target.type == "cuda":
            index = self.current if target.index is None else target.index
            kwargs["device"] = torch.device("cpu")
        if name == "_to_copy" and target is not None and target.type != "meta":
            to_gpu = target.type == "cuda"
            self._note_copy(args[0], to_gpu, kwargs.get("non_blocking", False))
            how = {key: kwargs[key] for key in ("dtype", "memory_format") if key in kwargs}
            held = torch.Tensor.to(_held(args[0]), **how, copy=True)  # both lie on the CPU
            return PretendCuda(held, index) if to_gpu else held
        self.launches += 1
        wrappers = {id(x.held): x for x in on_gpu}
        out = func(*pytree.tree_map(_held, args), **pytree.tree_map(_held, kwargs))
        if name == "copy_":
            return args[0]
        if target is not None and target.type != "cuda":
            return out
        for x in on_gpu:
            if x.size() != x.held.size():  # resize_ and its like
                _set_shape(x, PretendCuda(x.held, index))

        def wrap(x):
            if not isinstance(x, torch.Tensor) or isinstance(x, PretendCuda):
                return x
            return wrappers[id(x)] if id(x) in wrappers else PretendCuda(x, index)

        return pytree.tree_map(wrap, out)

    def _check(self, func, name, leaves, on_gpu, args) -> None:
        if name in _COPIES:
            if name == "copy_":
                self._note_copy(
                    args[1], isinstance(args[0], PretendCuda), len(args) > 2 and args[2]
                )
            return
        if func.namespace != "aten":
            return
        indices = [i for i in args[1] if isinstance(i, torch.Tensor)] if name in _INDEXING else []
        if len({x.device for x in leaves}) > 1:
            if indices and isinstance(args[0], PretendCuda):
                apart = [x for x in args[2:3] if isinstance(x, torch.Tensor) and x.dim()]
                if any(not isinstance(i, PretendCuda) for i in indices):
                    self.syncs[f"index on the CPU {_where()}"] += 1
            else:
                scalars = torch.Tag.pointwise in func.tags or name in _TAKES_SCALARS
                apart = [x for x in leaves if x.dim() or isinstance(x, PretendCuda) or not scalars]
            if len({x.device for x in apart} | {on_gpu[0].device}) > 1:
                found = ", ".join(sorted(f"{x.device} {tuple(x.shape)}" for x in leaves))
                raise RuntimeError(
                    f"{func}: Expected all tensors to be on the same device, but found {found} "
                    f"{_where()}"
                )
        floats = {x.dtype for x in leaves if x.dtype.is_floating_point}
        if name in _ONE_DTYPE and len(floats) > 1:
            raise RuntimeError(f"{func}: CUDA wants one dtype, got {floats} {_where()}")
        if name in _PRODUCTS and not floats and not any(x.is_complex() for x in leaves):
            raise RuntimeError(f'"{name}_cuda" not implemented for {leaves[0].dtype} {_where()}')
        if torch.float64 in floats:
            self.float64[f"{name} {_where()}"] += 1
        if name in _WAITING or any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.syncs[f"{name} {_where()}"] += 1

    def _note_copy(self, source, to_gpu, non_blocking) -> None:
        if isinstance(source, PretendCuda) and not to_gpu:
            self.syncs[f"copy to the host {_where()}"] += 1
            return
        from_host = to_gpu and not isinstance(source, PretendCuda) and source.numel()
        if from_host and (id(source) not in self.pinned or not non_blocking):
            self.pageable[f"{'tensor' if source.dim() else 'number'} {_where()}"] += 1

    def __enter__(self):
        self._stack, self._guard = contextlib.ExitStack(), _guard_library()
        for patch in _patches(self):
            self._stack.enter_context(patch)
        self._guard.pretend(self.current, self.num_devices)
        self._stack.callback(self._guard.pretend, 0, 0)
        self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        lifted = (
            torch._C._only_lift_cpu_tensors()
        )  # so that torch.tensor(..., device="cuda") is seen
        torch._C._set_only_lift_cpu_tensors(True)
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        _active.append(self)
        self._stack.callback(_active.remove, self)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._stack.close()


class _InThread(TorchDispatchMode):
    """Modes belong to a thread; threads started inside get one that asks the first."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return (
            _active[-1].__torch_dispatch__(func, types, args, kwargs)
            if _active
            else func(*args, **(kwargs or {}))
        )


class _Anything:
    """Streams and events: nothing waits, all is done."""

    def __init__(self, *args, **kwargs) -> None:
        self.cuda_stream = 0

    def __getattr__(self, name):
        return lambda *args, **kwargs: True


def _patches(gpu: pretend_cuda):
    """What Python asks of CUDA, and what a wrapper cannot do as a tensor does."""
    props = types.SimpleNamespace(
        name="Pretended", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
    )
    gloo, swap, run = (
        torch.distributed.init_process_group,
        torch.utils.swap_tensors,
        threading.Thread.run,
    )
    null, inference = contextlib.nullcontext, torch.autograd.grad_mode.inference_mode

    def set_device(device):
        gpu.current = (device if isinstance(device, int) else torch.device(device).index) or 0
        assert gpu.current < gpu.num_devices, f"invalid device ordinal {device}"
        gpu._guard.pretend(gpu.current, gpu.num_devices)

    def pin(tensor, *_):
        assert not isinstance(tensor, PretendCuda), "only dense CPU tensors can be pinned"
        copy = tensor.clone()
        gpu.pinned = {**dict(list(gpu.pinned.items())[-500:]), id(copy): copy}
        return copy

    def init(backend=None, *args, device_id=None, **kwargs):
        gpu.nccl = "nccl" in str(backend)
        return gloo("gloo", *args, **kwargs)

    def swap_keeping_attributes(old, new):
        """As `.data =` does, by which `Module.to` moves to a real GPU."""
        kept = {name: value for name, value in vars(old).items() if name != "held"}
        swap(old, new)
        vars(old).update({**kept, **vars(old)})

    def run_inside(thread):
        torch._C._set_only_lift_cpu_tensors(True)
        with _InThread(), torch.autograd.set_multithreading_enabled(False):
            run(thread)

    def enter_inference(context):
        """Wrappers cannot be inference tensors; without gradient is near enough."""
        context.inner = torch.no_grad() if context.mode else null()
        context.inner.__enter__()

    constants = [
        (True, ("is_available", "is_initialized", "is_bf16_supported")),
        (False, ("is_current_stream_capturing",)),
        (None, ("_lazy_init", "synchronize", "manual_seed", "manual_seed_all", "empty_cache")),
        (None, ("reset_peak_memory_stats",)),
        (0, ("memory_allocated", "max_memory_allocated", "memory_reserved")),
        (0, ("max_memory_reserved",)),
    ]
    values = {
        name: (lambda *_, value=value, **__: value) for value, names in constants for name in names
    }
    values |= {
        "_initialized": True,
        "device_count": lambda: gpu.num_devices,
        "current_device": lambda: gpu.current,
        "set_device": set_device,
        "get_device_properties": lambda *_: props,
        "get_device_name": lambda *_: props.name,
        "device": null,
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (80 << 30,) * 2,
        "memory_stats": lambda *_: {},
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "stream": lambda _: null(),
        "Stream": _Anything,
        "Event": _Anything,
        "current_stream": _Anything,
        "default_stream": _Anything,
    }
    yield from (mock.patch.object(torch.cuda, name, value) for name, value in values.items())
    here = lambda *_, **__: torch.device("cuda", gpu.current)  # noqa: E731
    for owner, name, value in (
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "current_accelerator", here),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.Tensor, "pin_memory", pin),
        (torch.Tensor, "is_pinned", lambda tensor, *_: id(tensor) in gpu.pinned),
        (torch.utils, "swap_tensors", swap_keeping_attributes),
        (threading.Thread, "run", run_inside),
        (torch.utils, "weakref", types.SimpleNamespace(getweakrefs=lambda tensor: [])),
        (inference, "__enter__", enter_inference),
        (inference, "__exit__", lambda c, *error: c.inner.__exit__(*error)),
        (torch.distributed, "init_process_group", init),
        (torch.distributed.distributed_c10d, "_get_object_coll_device", here),
    ):
        yield mock.patch.object(owner, name, value)
    yield torch.backends.cudnn.flags(enabled=False)


def _held(x):
    return x.held if isinstance(x, PretendCuda) else x


def _set_shape(tensor, like):
    with torch._C._DisableTorchDispatch():
        torch.Tensor.data.__set__(tensor, like)


def _where() -> str:
    """The innermost line of the watched package."""
    frame = sys._getframe(2)
    while frame:
        file = frame.f_code.co_filename
        if f"/{WATCHED}/" in file and "site-packages" not in file:
            return f"{file[file.rindex(f'/{WATCHED}/') + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "(elsewhere)"


_GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
static DeviceIndex current = 0, count = 1;
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return count; }
};
struct Hooks final : at::CUDAHooksInterface {  // autograd finds no context: no stream to wait for
  long versionCuDNN() const override { return 0; }
  long versionRuntimeCuDNN() const override { return 0; }
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};
static Guard guard;
static Hooks hooks;
extern "C" void pretend(int now, int num) {  // num 0 puts the real ones back
  static void* real = *(void**)&at::detail::getCUDAHooks();
  static auto* before = impl::device_guard_impl_registry[1].load();  // 1 is DeviceType::CUDA
  current = now; count = num;
  impl::device_guard_impl_registry[1].store(num ? &guard : before);
  *(void**)&at::detail::getCUDAHooks() = num ? *(void**)&hooks : real;
}
"""


def _guard_library() -> ctypes.CDLL:
    """Autograd and `.to("cuda")` ask C++ for devices and streams; this answers without a driver."""
    root = os.path.dirname(torch.__file__)
    key = hashlib.sha256((_GUARD + root + torch.__version__).encode()).hexdigest()[:12]
    library = os.path.join(tempfile.gettempdir(), f"pretend_cuda_{key}.so")
    if not os.path.exists(library):
        partial = f"{library}.{os.getpid()}"
        command = (
            f"g++ -x c++ - -std=c++20 -w -shared -fPIC -I {root}/include -L {root}/lib "
            f"-lc10 -ltorch_cpu -o {partial}"
        )
        subprocess.run(command.split(), input=_GUARD.encode(), check=True)
        os.replace(partial, library)
    return ctypes.CDLL(library)
