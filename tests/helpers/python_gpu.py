"""A GPU written in Python: its tensors say that they are on `pygpu:0`, and compute on the CPU.

- What CUDA refuses is refused: an operation on tensors of two devices, a GPU tensor as a numpy
  array.
- A copy to it that nobody waits for is refused: the device has no pinned memory, as Apple's GPUs
  have none, and would read the source when it may be freed.
- What makes a program wait for a GPU is counted by the line that asked for it: reading a value,
  counting the true elements of a mask, copying to the host.
- `Watch.has_fp64 = False` refuses fp64 on the device, as Apple's GPUs do.

A process has at most one such device, and importing this module makes it. PyTorch's own thread for
the device aborts the process when the interpreter ends: leave by `os._exit`.
"""

import os
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

PACKAGE_PREFIX = os.path.join(Path(__file__).parents[2], "dreambooth_moslora", "")
NAME = "pygpu"
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
COPYING = {"aten::_to_copy", "aten::copy_"}
INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}
"""A tensor of the device takes indices from the CPU, as CUDA's do."""


class DeviceModule:
    """What PyTorch asks of `torch.pygpu`."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.zeros(1, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=None: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])

    device = staticmethod(lambda *_: nullcontext())


_setup_privateuseone_for_python_backend(NAME, backend_module=DeviceModule())
torch.__future__.set_overwrite_module_params_on_conversion(True)
DEVICE = torch.device(NAME, 0)


class Watch:
    """`with Watch() as seen:` counts by line the copies to the device and the waits for it."""

    current: "Watch | None" = None
    has_fp64 = True

    def __init__(self):
        self.copies, self.waits = Counter(), Counter()

    def __enter__(self):
        Watch.current = self
        return self

    def __exit__(self, *_):
        Watch.current = None


def note(kind: str) -> None:
    if Watch.current is not None:
        getattr(Watch.current, kind)[asking_line()] += 1


def asking_line() -> str:
    """The innermost line of the package on the stack; autograd's thread has none."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(PACKAGE_PREFIX):
            return f"{os.path.basename(frame.filename)}: {frame.line}"
    return "backward"


class GpuTensor(Tensor):
    """A tensor on the device. `raw` is the CPU tensor that holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor):
        layout = {
            "strides": raw.stride(),
            "storage_offset": raw.storage_offset(),
            "layout": raw.layout,
        }
        self = Tensor._make_wrapper_subclass(
            cls, raw.size(), dtype=raw.dtype, device=DEVICE, **layout
        )
        self.raw = raw
        return self

    def __repr__(self, **_):
        return f"GpuTensor{tuple(self.shape)}"

    def __reduce_ex__(self, protocol):
        """Saved as the CPU tensor that it is, and read as one: `torch.save` knows no such
        device."""
        return self.raw.__reduce_ex__(protocol)

    def data_ptr(self):
        return self.raw.data_ptr()

    def untyped_storage(self):
        return self.raw.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert a {NAME} tensor to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args: tuple, kwargs: dict):
    """One operation of the device, on the CPU."""
    name = function._schema.name
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    refuse_mixed_devices(name, args, tensors)
    if name in COPYING:
        refuse_unpinned(
            args[-1] if name == "aten::copy_" and len(args) > 2 else kwargs.get("non_blocking"),
            tensors,
        )
    target = kwargs.get("device")
    leaves = target is not None and torch.device(target).type != NAME
    count(name, args, tensors, leaves)
    if target is not None:
        kwargs = kwargs | {"device": "cpu"}
    result = function(*tree_map(raw_of, args), **tree_map(raw_of, kwargs))
    if leaves:
        return result
    if not Watch.has_fp64:
        refuse_fp64(name, result)
    gpu_tensors = {id(tensor.raw): tensor for tensor in tensors if isinstance(tensor, GpuTensor)}
    # An operation in place returns the tensor that it got.
    return tree_map(lambda value: gpu_tensors.get(id(value), wrapped(value)), result)


def refuse_mixed_devices(name: str, args: tuple, tensors: list[Tensor]) -> None:
    """A CPU tensor without dimensions is a number, and CUDA takes it. CUDA also takes indices from
    the CPU, but the CPU takes none from CUDA."""
    if name in INDEXING and not isinstance(args[0], GpuTensor):
        raise RuntimeError(
            f"{name}: indices on {NAME} into a tensor of the CPU: {tuple(args[0].shape)}"
        )
    foreign = [tensor for tensor in tensors if tensor.ndim and not isinstance(tensor, GpuTensor)]
    has_own = any(isinstance(tensor, GpuTensor) for tensor in tensors)
    if foreign and has_own and name not in COPYING | INDEXING:
        raise RuntimeError(
            f"{name} mixes {NAME} with the CPU: {[tuple(tensor.shape) for tensor in foreign]}"
        )


def refuse_unpinned(is_asynchronous: bool | None, tensors: list[Tensor]) -> None:
    if is_asynchronous and not isinstance(tensors[-1], GpuTensor):
        raise RuntimeError(
            f"{NAME} would read {tuple(tensors[-1].shape)} of the CPU at any later time"
        )


def refuse_fp64(name: str, result) -> None:
    """As on Apple's GPUs."""
    if any(
        isinstance(value, Tensor) and value.dtype == torch.float64
        for value in tree_flatten(result)[0]
    ):
        raise TypeError(f"{name}: {NAME} has no float64")


def count(name: str, args: tuple, tensors: list[Tensor], leaves: bool) -> None:
    """The wait or the copy that it means on a GPU."""
    if Watch.current is None:
        return
    has_mask = "index" in name and any(tensor.dtype == torch.bool for tensor in tensors[1:])
    is_copy = name == "aten::copy_"
    leaves = leaves if name == "aten::_to_copy" else is_copy and not isinstance(args[0], GpuTensor)
    if name in WAITING or has_mask or leaves:
        note("waits")
    elif is_copy and not isinstance(args[1], GpuTensor):
        note("copies")


def raw_of(value):
    return value.raw if isinstance(value, GpuTensor) else value


def wrapped(value):
    return GpuTensor(value) if isinstance(value, Tensor) else value


library = torch.library.Library("aten", "IMPL")


def implement_factory(name: str) -> None:
    """Functions that make a tensor from none are not dispatched to `GpuTensor`, but to the
    device."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args, device=None, pin_memory=None, **kwargs):
        return GpuTensor(operation(*args, device="cpu", **kwargs))

    library.impl(name, make, "PrivateUse1")


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    refuse_unpinned(non_blocking, [source])
    note("waits" if isinstance(source, GpuTensor) else "copies")
    raw_of(target).copy_(raw_of(source))
    return target


FACTORIES = "empty.memory_format empty_strided arange arange.start arange.start_step eye eye.m"
for factory in FACTORIES.split():
    implement_factory(factory)
library.impl("_copy_from", copy_from, "PrivateUse1")
