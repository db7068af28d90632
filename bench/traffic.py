"""What has to be moved for an operation of this book: by PyTorch's own operations, call by call, and by the kernels,
launch by launch. Counted on tensors without numbers, so no card is needed. The card's cache is thought to hold what a
call or a launch fetches more than once, and nothing from one to the next.

`bench.kernels --predict` puts both beside the least that any program needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from llamba_ref.kernels.ahead import recording
from llamba_ref.kernels.launch import FUNCTIONS, GPU
from llamba_ref.operators import unchecked, without_numbers

FREE = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")  # no bytes
FILL = ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange",
        "scalar_tensor", "zero_", "fill_")  # write, and read nothing


class Work(NamedTuple):
    """What an operation, a call of PyTorch or a launch of a kernel has to do."""

    bytes: int  # that are read and written
    flops: int = 0  # operations of matrix products; of a launch they are not known


def size(tensor: Tensor) -> int:
    """Bytes of a tensor; an expanded one is as large as what is stored of it."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class Calls(TorchDispatchMode):
    """Keeps every call: each tensor that goes in is read once, each that comes out is written once. An operation of
    this book's kernels is run, so that what it launches can be recorded."""

    def __init__(self):
        super().__init__()
        self.calls: list[Work] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation.namespace == "llamba_ref":
            changed = [z for z, one in zip(args, operation._schema.arguments) if one.is_write]  # read, and written too
            self.calls += [Work(size(z)) for z in changed]
            with self:
                return FUNCTIONS[operation.name()](*args, **kwargs)
        out, name = operation(*args, **kwargs), operation.overloadpacket.__name__
        if operation.namespace == "aten" and not operation.is_view and name not in FREE:
            given = () if name in FILL else args[1:] if name == "copy_" else (args, kwargs | {"out": None})
            read = {id(z): z for z in tree_leaves(given) if isinstance(z, Tensor)}.values()
            written = [z for z in tree_leaves(out) if isinstance(z, Tensor)]
            count = flop_registry.get(operation.overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            self.calls.append(Work(sum(map(size, (*read, *written))), flops))
        return out


def run(function: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor], wanted: tuple[str, ...]) -> list[Work]:
    """What PyTorch is called for by a function, and, if gradients of some inputs are wanted, in its backward pass."""
    inputs = {name: z.requires_grad_() if name in wanted else z for name, z in inputs.items()}
    with unchecked(), Calls() as seen:
        out = [z for z in function(**inputs) if z.requires_grad]
        if wanted:
            torch.autograd.grad(out, [inputs[name] for name in wanted], [torch.empty_like(z) for z in out])
    return seen.calls


def plain_calls(function: Callable, make: Callable[[str], dict[str, Tensor]], wanted: tuple[str, ...]) -> list[Work]:
    """What a function does with plain PyTorch on a GPU; `make` gives its inputs on a device."""
    return run(function, make("meta"), wanted)


def kernel_calls(
    function: Callable, make: Callable[[str], dict[str, Tensor]], wanted: tuple[str, ...], gpu: GPU
) -> list[Work]:
    """What a function does with the kernels as they are launched on a GPU, and with PyTorch between them."""
    with without_numbers("cuda"), recording(gpu) as launches:
        calls = run(function, make("cpu"), wanted)
    tensors = [{id(z): z for z in launch.arguments.values() if isinstance(z, Tensor)}.values() for launch in launches]
    return calls + [Work(sum(map(size, given))) for given in tensors]
