"""What every kernel takes on five GPUs: registers, stack, spills and shared memory of a program. Needs no GPU.

    python -m bench.resources            about five minutes, writes bench/results/resources.json
                                         and resources_blackwell.json
    python -m bench.resources --check    saves nothing, fails where a program does not fit: for another Triton

The kernels are compiled for sm_75 (T4), sm_80 (A100), sm_90 (H100), sm_100 (B200) and sm_120 (RTX 5090) with the types,
sizes and constants with which the package would launch them there at the shapes of Llamba and Mamba-2.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

from bench.common import save, short
from llamba_ref.kernels.ahead import Launch, compile_for, recording
from llamba_ref.kernels.conv import conv_backward, conv_forward, conv_step
from llamba_ref.kernels.gateloop import gateloop_backward, gateloop_forward
from llamba_ref.kernels.launch import GPU, GPUS, INTERPRETED
from llamba_ref.kernels.matrix_distance import matrix_distance_backward, matrix_distance_forward
from llamba_ref.kernels.scan import scan_backward, scan_forward
from llamba_ref.kernels.ssd import ssd_backward, ssd_forward, step_forward

BLACKWELL = (  # as `gpu_of` would find them: no speeds, since no data sheet is in GPUS
    INTERPRETED._replace(name="B200", capability=100, multiprocessors=148, shared=227 * 1024),
    INTERPRETED._replace(name="RTX 5090", capability=120, multiprocessors=170, shared=99 * 1024),
)
FLOATS = (
    "float32",
    "tf32",
    "float16",
    "bfloat16",
)  # tf32: float32 whose matrix products may be rounded on tensor cores


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that stores nothing."""
    return torch.empty(shape, dtype=dtype, device="meta")


def documents(length: int, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """What kernels are told of documents: nothing, and in one type a number for each token."""
    return [(), *[(torch.empty(1, length, dtype=torch.int32, device="meta"),)] * (dtype == torch.bfloat16)]


def call_scan(dtype: torch.dtype) -> None:
    """GateLoop with one number a head: 2048 channels, gates of their own."""
    x, gates = empty(1, 8192, 2048, dtype=dtype), empty(1, 8192, 2048)
    phase = gates if dtype.is_complex else None
    start = empty(1, 2048, dtype=dtype if dtype.is_complex else torch.float32)
    scan_forward(x, gates, phase, start)
    scan_backward(x, x, gates, phase, start)


def call_ssd(dtype: torch.dtype) -> None:
    """Llamba-1B, and the widest of all: values of 128 as in Llamba-8B, keys of 128 that all heads share as in
    Mamba-2."""
    for headdim, groups, state in ((64, 32, 64), (128, 1, 128)):
        x, log_a, keys = (
            empty(2, 2048, 32, headdim, dtype=dtype),
            empty(2, 2048, 32),
            empty(2, 2048, groups, state, dtype=dtype),
        )
        start = empty(2, 32, headdim, state)
        ssd_forward(x, log_a, keys, keys, start)
        ssd_backward(x, start, x, log_a, keys, keys, start)


def call_step(dtype: torch.dtype) -> None:
    """One token of the same models."""
    for headdim, groups, state in ((64, 32, 64), (128, 1, 128)):
        keys = empty(32, groups, state, dtype=dtype)
        step_forward(empty(32, 32, headdim, dtype=dtype), empty(32, 32), keys, keys, empty(32, 32, headdim, state))


def call_distance(dtype: torch.dtype) -> None:
    """Stage 1 for a student like Llamba-8B: 32 heads, of which 8 of the teacher's have keys, 128 wide; states of 64."""
    log_a, D, lse = empty(1, 8192, 32), empty(32), empty(1, 32, 8192)
    B = C = empty(1, 8192, 32, 64, dtype=dtype)
    inputs = (empty(1, 8192, 32, 128, dtype=dtype), empty(1, 8192, 8, 128, dtype=dtype), log_a, B, C, D)
    for marks in documents(8192, dtype):
        distance, _ = matrix_distance_forward(*inputs, 128**-0.5, *marks)
        matrix_distance_backward(distance, distance, lse, *inputs, 128**-0.5, *marks)


def call_conv(dtype: torch.dtype) -> None:
    """The convolutions of Llamba-1B and 8B on a slice of the projection; in float32 also 8 taps, the most that the
    kernels take."""
    for d_inner, d_state, heads, width in ((2048, 64, 32, 4), (4096, 64, 32, 4), (4096, 64, 32, 8))[
        : 3 if dtype == torch.float32 else 2
    ]:
        channels = d_inner + 2 * heads * d_state
        x = empty(1, 8192, d_inner + channels + heads, dtype=dtype)[..., d_inner : d_inner + channels]
        weight, bias, window = (
            empty(channels, 1, width, dtype=dtype),
            empty(channels, dtype=dtype),
            empty(1, channels, width, dtype=dtype),
        )
        for silu in (False, True) if width == 4 else (True,):
            for marks in documents(8192, dtype)[: 1 + silu]:
                grad = conv_forward(x, weight, bias, window, silu, *marks)
                conv_backward(grad, x, weight, bias, window, silu, *marks)
        conv_step(x[:, 0], weight, bias, window, True)


def call_gateloop(dtype: torch.dtype) -> None:
    """GateLoop with a gate for each of 64 channels in 32 heads: real, then complex gates, with pairs of queries and
    keys twice as wide."""
    gates, v = empty(1, 8192, 32, 64), empty(1, 8192, 32, 64, dtype=dtype)
    for queries, key, phase in ((1, 64, None), (2, 128, gates)):
        q, k, start = (
            empty(1, 8192, 32, queries, key, dtype=dtype),
            empty(1, 8192, 32, key, dtype=dtype),
            empty(1, 32, key, 64),
        )
        y, last = gateloop_forward(q, k, v, gates, phase, start)
        gateloop_backward(y, last, q, k, v, gates, phase, start)


CALLS: dict[str, tuple[Callable, tuple[str, ...]]] = {  # what launches kernels -> with which types
    "scan": (call_scan, (*FLOATS, "complex64")),
    "ssd": (call_ssd, FLOATS),
    "step": (call_step, FLOATS),
    "matrix_distance": (call_distance, FLOATS),
    "conv": (call_conv, FLOATS),
    "gateloop": (call_gateloop, FLOATS),
}


class Job(NamedTuple):
    """One program to compile."""

    gpu: GPU
    call: str
    dtype: str
    index: int  # which of the launches of that call


def launches_of(gpu: GPU, call: str, dtype: str) -> list[Launch]:
    """What a call launches on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    with recording(gpu) as launches:
        CALLS[call][0](torch.float32 if dtype == "tf32" else getattr(torch, dtype))
    torch.set_float32_matmul_precision(before)
    return launches


def jobs(gpus: Iterable[GPU] = GPUS.values()) -> Iterator[Job]:
    """Every program once for each GPU: many types and shapes launch the same."""
    seen = set()
    for gpu in gpus:
        for call, (_, dtypes) in CALLS.items():
            for dtype in dtypes:
                for index, launch in enumerate(launches_of(gpu, call, dtype)):
                    program = launch.program(gpu)
                    if program not in seen:
                        seen.add(program)
                        yield Job(gpu, call, dtype, index)


def compile_job(job: Job) -> dict:
    """A row of the table: in a process of its own, because Triton and ptxas take seconds."""
    launch = launches_of(job.gpu, job.call, job.dtype)[job.index]
    began = time.perf_counter()
    found = compile_for(job.gpu, launch)
    tensor_cores = any(word in found.ptx for word in ("mma.sync", "wgmma", "tcgen05"))
    constants = {name: str(launch.arguments[name]) for name in sorted(launch.constants)}
    return {
        "gpu": job.gpu.name,
        "call": job.call,
        "dtype": job.dtype,
        "kernel": launch.kernel.__name__,
        "constants": constants,
        "warps": launch.num_warps,
        "program": short(launch.program(job.gpu)),
        "registers": found.registers,
        "stack": found.stack,
        "spills": found.spills,
        "shared": found.shared,
        "tensor_cores": tensor_cores,
        "seconds": time.perf_counter() - began,
    }


KERNELS = ("launch", "scan", "conv", "ssd", "gateloop", "matrix_distance")  # modules of llamba_ref.kernels


def code() -> str:
    """What the kernels' source is, in a few letters: rows of another source say nothing about these."""
    found = (part for name in KERNELS for part in vars(importlib.import_module(f"llamba_ref.kernels.{name}")).values())
    kernels = [part.fn for part in found if hasattr(part, "fn") and hasattr(part, "arg_names")]  # made by triton.jit
    return short("".join(map(inspect.getsource, kernels)))


def compile_all(processes: int = 2, gpus: Iterable[GPU] = GPUS.values()) -> list[dict]:
    """Compile everything. The kernels must not be interpreted: TRITON_INTERPRET must not be set."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(compile_job, jobs(gpus), chunksize=4))


def main(
    check: bool = False,  # save nothing
) -> None:
    cards = {gpu.name: gpu for gpu in (*GPUS.values(), *BLACKWELL)}
    rows = compile_all(gpus=cards.values())
    for row in rows:
        print(
            f"{row['gpu']:8} {row['kernel']:24} {row['dtype']:10} {row['registers']:4} registers "
            f"{row['spills']:5} bytes spilled {row['shared'] / 1024:6.1f} KiB shared  {row['seconds']:5.1f} s"
        )
        del row["seconds"]
    if large := [row for row in rows if row["shared"] > cards[row["gpu"]].shared]:
        sys.exit(f"{len(large)} programs take more shared memory than there is, such as {large[0]}")
    for name, gpus in () if check else (("resources", GPUS.values()), ("resources_blackwell", BLACKWELL)):
        own = [row for row in rows if row["gpu"] in [gpu.name for gpu in gpus]]
        save(name, "python -m bench.resources", packages=("triton",), code=code(), rows=own)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
