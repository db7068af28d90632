"""The kernels on a GPU: time, memory and how near they come to what the card can do, beside other implementations
where installed.

    make bench BENCH=kernels                     at the shapes of Llamba-1B and of the demo's student
    python -m bench.kernels --models 1B demo 8B  at those of Llamba-8B too
    python -m bench.kernels --predict            no GPU: the times that the makers' data sheets allow

Every operation is called as a user would, with backend="triton". The limits are measured too: the bandwidth of a copy
and the speed of matrix products. `count` beside each operation says how many bytes have to move and how many
operations of matrix products are needed, whatever the algorithm; the fraction of the limit is the time that these
would take over the time it took. float32 rows run in tf32, as all peers do. A peer's numbers are compared with ours
before its time counts; it gets its inputs in its own layout, made beforehand. Each operation runs in a process of its
own: a program that breaks the device there breaks nothing else. The result is written after each.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import inf
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

from bench.common import save
from bench.device import BUDGET, UNFINISHED, attempt, attempt_to_tidy, card_name, half_type, peak, require_card, seconds
from bench.traffic import Work, kernel_calls, plain_calls
from llamba_ref import conv, mohawk
from llamba_ref.conventions import relative_error
from llamba_ref.gateloop import gateloop
from llamba_ref.kernels.launch import GPU, GPUS
from llamba_ref.scan import linear_scan
from llamba_ref.ssd import ssd, ssd_step

PACKAGES = ("triton", "fla-core", "mamba-ssm", "causal-conv1d")
TOKENS = 65536  # batch x length
LENGTHS = (2048, 8192, 32768, 65536)
MODELS = {
    "demo": {"heads": 4, "headdim": 32, "state": 32, "groups": 4},
    "1B": {"heads": 32, "headdim": 64, "state": 64, "groups": 32},
    "8B": {"heads": 32, "headdim": 128, "state": 64, "groups": 32},
}
AGREE = {torch.float32: 0.02, torch.complex64: 1e-4}  # largest relative error of a peer; tf32 and half precision round
AGREE_IN_HALF = 0.1  # rounding in half precision is far below, another formula far above
LARGE = 2**26  # bytes: to move fewer takes no longer than to launch a kernel


# What is measured


class Peer(NamedTuple):
    """Another implementation."""

    run: Callable[..., tuple[Tensor, ...]]  # from what `prepare` gives to outputs like ours
    prepare: Callable[..., tuple[Tensor, ...]]  # from our inputs, by name, to its own; is not timed, has a gradient


class Operation(NamedTuple):
    """One public function."""

    make: Callable[..., dict[str, Tensor]]  # inputs, from sizes, dtype and device
    run: Callable[..., tuple[Tensor, ...]]  # from inputs by name to outputs
    naive: Callable[..., tuple[Tensor, ...]]  # the same in plain PyTorch
    count: Callable[..., Work]  # the least: inputs read once, outputs written once; from sizes, bytes of a number,
    # and whether gradients are computed as well
    cases: Callable[[], Iterator[tuple[str, dict, bool]]]  # name of the model, sizes, whether in half precision
    wanted: tuple[str, ...] = ()  # inputs that get gradients; none: there is no backward pass
    peers: dict[str, Peer] = {}


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def decays(*shape: int, device: str = "cpu") -> Tensor:
    """Logs of gates that forget in 5 to 20 tokens: none is 0, because a peer divides by them."""
    return -0.05 - 0.15 * torch.rand(*shape, device=device)


def imported(module: str, name: str) -> Callable:
    """A peer's function. Raises ModuleNotFoundError where it is not installed."""
    return getattr(importlib.import_module(module), name)


def lengths_and_types() -> Iterator[tuple[str, dict, bool]]:
    """Both models at every length in half precision, and at the shortest in float32."""
    for model, sizes in MODELS.items():
        for length in LENGTHS:
            yield model, {**sizes, "batch": TOKENS // length, "length": length}, True
        yield model, {**sizes, "batch": TOKENS // LENGTHS[0], "length": LENGTHS[0]}, False


# linear_scan


def make_scan(batch, length, width, dtype, device, **_):
    return {
        "log_a": decays(batch, length, width, device=device),
        "x": normal(batch, length, width, dtype=dtype, device=device),
    }


def make_complex_scan(batch, length, width, dtype, device, **_):
    """Complex gates, complex inputs."""
    real = make_scan(batch, length, width, torch.complex64, device)
    return {**real, "phase": normal(batch, length, width, device=device)}


def count_scan(batch, length, width, size, backward, **_) -> Work:
    """Forward: x and log_a (float32) read, h written. Backward: the gradient, log_a and h read, gradients of x and
    log_a written."""
    return Work(batch * length * width * (2 * size + 4 + backward * (3 * size + 8)))


def count_complex_scan(batch, length, width, size, backward, **_) -> Work:
    """As before, with the phase (float32) beside each log and its gradient beside each log's."""
    return Work(batch * length * width * (2 * size + 8 + backward * (3 * size + 16)))


def scan_cases(half: bool) -> Iterator[tuple[str, dict, bool]]:
    """A number a head: GateLoop as wide as the model."""
    for model, sizes, in_half in lengths_and_types():
        if half or in_half:  # complex64 has one type
            width = sizes["heads"] * sizes["headdim"]
            yield model, {"batch": sizes["batch"], "length": sizes["length"], "width": width}, in_half and half


def hgrn(name: str) -> Peer:
    return Peer(lambda x, g: imported("fla.ops.hgrn", name)(x, g)[:1], lambda x, log_a: (x, log_a))


SCAN = Operation(
    make_scan,
    lambda log_a, x: (linear_scan(log_a, x, backend="triton"),),
    lambda log_a, x: (linear_scan(log_a, x, backend="naive"),),
    count_scan,
    partial(scan_cases, True),
    ("log_a", "x"),
    {f"fla {name}": hgrn(name) for name in ("chunk_hgrn", "fused_recurrent_hgrn")},
)

COMPLEX_SCAN = Operation(
    make_complex_scan,
    lambda log_a, x, phase: (linear_scan(log_a, x, phase, backend="triton"),),
    lambda log_a, x, phase: (linear_scan(log_a, x, phase, backend="naive"),),
    count_complex_scan,
    partial(scan_cases, False),
    ("log_a", "x", "phase"),
)


# gateloop and ssd


def make_gateloop(batch, length, heads, headdim, state, dtype, device, **_):
    q, k = (normal(batch, length, heads, state, dtype=dtype, device=device) for _ in range(2))
    v = normal(batch, length, heads, headdim, dtype=dtype, device=device)
    return {"q": q, "k": k, "v": v, "log_a": decays(batch, length, heads, state, device=device)}


def count_gateloop(batch, length, heads, headdim, state, size, backward, **_) -> Work:
    """Bytes forward: q, k, v and log_a (float32) read, y written; backward: these four and the gradient of y read,
    four gradients written.

    Products of a token and head: k v^T into the state, q out of it. Backward: the state again, its adjoint, the
    gradients of q, k and v."""
    numbers = batch * length * heads
    read = 2 * state * size + headdim * size + 4 * state
    return Work(
        numbers * (read + headdim * size + backward * (2 * read + headdim * size)),
        numbers * 2 * state * headdim * (2 + 5 * backward),
    )


def by_gateloop(backend: str, q, k, v, log_a):
    return (gateloop(q, k, v, log_a, mode="chunked", backend=backend),)


GATELOOP = Operation(
    make_gateloop,
    partial(by_gateloop, "triton"),
    partial(by_gateloop, "naive"),
    count_gateloop,
    lengths_and_types,
    ("q", "k", "v", "log_a"),
    {
        "fla chunk_gla": Peer(
            lambda q, k, v, g: imported("fla.ops.gla", "chunk_gla")(q, k, v, g, scale=1.0)[:1],
            lambda q, k, v, log_a: (q, k, v, log_a),
        )
    },
)


def make_ssd(batch, length, heads, headdim, state, groups, dtype, device):
    B, C = (normal(batch, length, groups, state, dtype=dtype, device=device) for _ in range(2))
    return {
        "x": normal(batch, length, heads, headdim, dtype=dtype, device=device),
        "log_a": decays(batch, length, heads, device=device),
        "B": B,
        "C": C,
    }


def count_ssd(batch, length, heads, headdim, state, groups, size, backward) -> Work:
    """As for gateloop, with one gate a head, and B and C once for a group."""
    tokens = batch * length
    read = heads * headdim * size + 4 * heads + 2 * groups * state * size
    return Work(tokens * (read + heads * headdim * size + backward * (2 * read + heads * headdim * size)),
                tokens * heads * 2 * state * headdim * (2 + 5 * backward))


def for_heads(z: Tensor, heads: int, axis: int) -> Tensor:
    """A group's B or C for each of its heads: a peer without groups wants copies."""
    groups = z.shape[axis]
    return z if groups == heads else z.repeat_interleave(heads // groups, axis)


def simple_gla(name: str) -> Peer:
    return Peer(lambda q, k, v, g: imported("fla.ops.simple_gla", name)(q, k, v, g, scale=1.0)[:1],
                lambda x, log_a, B, C: (for_heads(C, x.shape[2], 2), for_heads(B, x.shape[2], 2), x, log_a))


def mamba_scan(x, dt, A, B, C):
    return (imported("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")(x, dt, A, B, C, chunk_size=128),)


def mamba_inputs(x, log_a, B, C):
    """Decays are exp(dt A), and x is multiplied by dt inside: with A = -1, dt is -log_a, and x comes divided by it."""
    return (x / -log_a.unsqueeze(-1)).to(x.dtype), -log_a, -torch.ones(x.shape[2], device=x.device), B, C


SSD = Operation(
    make_ssd,
    lambda x, log_a, B, C: (ssd(x, log_a, B, C, backend="triton"),),
    lambda x, log_a, B, C: (ssd(x, log_a, B, C, backend="naive"),),
    count_ssd,
    lengths_and_types,
    ("x", "log_a", "B", "C"),
    {
        **{f"fla {name}": simple_gla(name) for name in ("chunk_simple_gla", "fused_recurrent_simple_gla")},
        "mamba_ssm mamba_chunk_scan_combined": Peer(mamba_scan, mamba_inputs),
    },
)


# One token


def make_step(batch, heads, headdim, state, groups, dtype, device):
    one = make_ssd(1, batch, heads, headdim, state, groups, dtype, device)
    return {
        **{f"{name}_t": z[0] for name, z in one.items()},
        "state": normal(batch, heads, headdim, state, device=device),
    }


def count_step(batch, heads, headdim, state, groups, size, backward) -> Work:
    """The state (float32) read and written; the token's x, B, C and log_a (float32) read, y written."""
    return Work(
        batch * (2 * 4 * heads * headdim * state + 2 * heads * headdim * size + 4 * heads + 2 * groups * state * size)
    )


def step_cases() -> Iterator[tuple[str, dict, bool]]:
    for model, sizes in MODELS.items():
        for batch in (1, 32, 256):
            yield model, {**sizes, "batch": batch}, True


def mamba_step(state, x, dt, A, B, C):
    y = imported("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")(state, x, dt, A, B, C)
    return y, state  # changed in place


def mamba_step_inputs(x_t, log_a_t, B_t, C_t, state):
    """As for the whole sequence; dt and A for each channel, as views of one number a head."""
    heads, headdim, size = state.shape[1:]
    A = torch.full((heads, 1, 1), -1.0, device=state.device).expand(heads, headdim, size)
    return (
        state,
        (x_t / -log_a_t.unsqueeze(-1)).to(x_t.dtype),
        (-log_a_t).unsqueeze(-1).expand(-1, -1, headdim),
        A,
        B_t,
        C_t,
    )


def fla_step(q, k, v, g, state):
    run = imported("fla.ops.simple_gla", "fused_recurrent_simple_gla")
    y, state = run(q, k, v, g, scale=1.0, initial_state=state, output_final_state=True)
    return y.squeeze(1), state.mT


def fla_step_inputs(x_t, log_a_t, B_t, C_t, state):
    heads = x_t.shape[1]
    q, k = (for_heads(z, heads, 1).unsqueeze(1) for z in (C_t, B_t))
    return q, k, x_t.unsqueeze(1), log_a_t.unsqueeze(1), state.mT.contiguous()


STEP = Operation(
    make_step,
    lambda **inputs: ssd_step(**inputs, in_place=True, backend="triton"),
    lambda **inputs: ssd_step(**inputs, backend="naive"),
    count_step,
    step_cases,
    (),
    {
        "mamba_ssm selective_state_update": Peer(mamba_step, mamba_step_inputs),
        "fla fused_recurrent_simple_gla": Peer(fla_step, fla_step_inputs),
    },
)


# The convolution


def make_conv(batch, length, channels, dtype, device):
    return {
        "x": normal(batch, length, channels, dtype=dtype, device=device),
        "weight": normal(channels, 1, 4, dtype=dtype, device=device),
        "bias": normal(channels, dtype=dtype, device=device),
    }


def count_conv(batch, length, channels, size, backward) -> Work:
    """Forward: x, four taps and a bias a channel read, y and the window written; backward: x, the taps, the bias and
    the gradient read, the gradients of x, taps and bias written."""
    x, filters, window = batch * length * channels, 5 * channels, 4 * batch * channels
    return Work(size * (2 * x + filters + window + backward * (3 * x + 2 * filters)))


def channels_of(sizes: dict) -> int:
    """What the convolution of a mixer runs over: x, B and C."""
    return sizes["heads"] * sizes["headdim"] + 2 * sizes["groups"] * sizes["state"]


def conv_cases() -> Iterator[tuple[str, dict, bool]]:
    for model, sizes, half in lengths_and_types():
        yield model, {"batch": sizes["batch"], "length": sizes["length"], "channels": channels_of(sizes)}, half


def tri_dao_conv(x, weight, bias):
    return (imported("causal_conv1d", "causal_conv1d_fn")(x, weight, bias, activation="silu").mT,)


def fla_conv(x, weight, bias):
    return (imported("fla.modules.causal_conv1d", "causal_conv1d")(x, weight, bias, activation="silu")[0],)


def by_conv(backend: str, x, weight, bias):
    return conv.causal_conv(x, weight, bias, activation="silu", backend=backend)[:1]


CONV = Operation(
    make_conv, partial(by_conv, "triton"), partial(by_conv, "naive"), count_conv, conv_cases, ("x", "weight", "bias"),
    {"causal_conv1d causal_conv1d_fn": Peer(tri_dao_conv, lambda x, weight, bias: (x.mT, weight.squeeze(1), bias)),
     "fla causal_conv1d": Peer(fla_conv, lambda x, weight, bias: (x, weight.squeeze(1), bias))})


def make_conv_step(batch, channels, dtype, device):
    made = make_conv(1, batch, channels, dtype, device)
    return {
        "x_t": made["x"][0],
        "weight": made["weight"],
        "bias": made["bias"],
        "window": normal(batch, channels, 4, dtype=dtype, device=device),
    }


def count_conv_step(batch, channels, size, backward) -> Work:
    """The window read and written, x read and y written, four taps and a bias a channel read."""
    return Work(size * channels * (batch * (2 * 4 + 2) + 5))


def conv_step_cases() -> Iterator[tuple[str, dict, bool]]:
    for model, sizes, half in step_cases():
        yield model, {"batch": sizes["batch"], "channels": channels_of(sizes)}, half


def by_conv_step(backend: str, x_t, weight, bias, window):
    return conv.causal_conv_step(x_t, weight, bias, window, activation="silu", backend=backend)


def tri_dao_conv_step(x, window, weight, bias):
    y = imported("causal_conv1d", "causal_conv1d_update")(x, window, weight, bias, activation="silu")
    return y, window  # changed in place


CONV_STEP = Operation(
    make_conv_step,
    partial(by_conv_step, "triton"),
    partial(by_conv_step, "naive"),
    count_conv_step,
    conv_step_cases,
    (),
    {
        "causal_conv1d causal_conv1d_update": Peer(
            tri_dao_conv_step, lambda x_t, weight, bias, window: (x_t, window, weight.squeeze(1), bias)
        )
    },
)


# Stage 1


def make_distance(batch, length, heads, keys, headdim, state, groups, dtype, device):
    made = make_ssd(batch, length, heads, 1, state, groups, dtype, device)
    q, k = (normal(batch, length, count, headdim, dtype=dtype, device=device) for count in (heads, keys))
    return {"q": q, "k": k, **{name: made[name] for name in ("log_a", "B", "C")}, "D": torch.ones(heads, device=device)}


def count_distance(batch, length, heads, keys, headdim, state, groups, size, backward) -> Work:
    """Neither matrix has to be in memory: q, k, B, C, log_a are read, and again for the backward pass, which writes
    gradients of the last three.

    Products: half of the entries of q k^T and of C B^T; backward these again, and the gradients of C and of B. D is
    nothing beside them."""
    tokens, triangle = batch * length, batch * heads * length * (length + 1) // 2
    mixer = 2 * groups * state * size + 4 * heads
    attention = (heads + keys) * headdim * size
    return Work(tokens * (mixer + attention + backward * (2 * mixer + attention)),
                triangle * 2 * ((headdim + state) * (1 + backward) + 2 * state * backward))


def distance_cases() -> Iterator[tuple[str, dict, bool]]:
    """At 8192 tokens and 32 heads naive has matrices of 8 GiB: a quarter of the heads as well, where they fit."""
    for model, sizes in MODELS.items():
        whole = sizes["heads"]
        for length, heads, half in ((2048, whole, True), (2048, whole, False), (8192, whole // 4, True),
                                    (8192, whole, True)):
            yield (
                model,
                {**sizes, "batch": 1, "length": length, "heads": heads, "groups": heads, "keys": max(1, heads // 4)},
                half,
            )


def by_distance(backend: str, **inputs):
    return (mohawk.matrix_distance(*(inputs[name] for name in ("q", "k", "log_a", "B", "C", "D")), backend=backend),)


DISTANCE = Operation(
    make_distance,
    partial(by_distance, "triton"),
    partial(by_distance, "naive"),
    count_distance,
    distance_cases,
    ("log_a", "B", "C", "D"),
)

OPERATIONS = {
    "linear_scan": SCAN,
    "linear_scan complex": COMPLEX_SCAN,
    "gateloop": GATELOOP,
    "ssd": SSD,
    "ssd_step": STEP,
    "causal_conv": CONV,
    "causal_conv_step": CONV_STEP,
    "matrix_distance": DISTANCE,
}


# How it is measured


class Limits(NamedTuple):
    """What the card does at its best."""

    bandwidth: float  # bytes a second, read and written
    matmul: dict[str, float]  # operations a second, by type; "tf32" is float32 on tensor cores

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second with factors of a type; float32 may be rounded to tf32 where that is there."""
        if dtype == torch.float32:
            return self.matmul.get("tf32", self.matmul["float32"])
        return self.matmul.get(str(dtype).removeprefix("torch."), inf)

    def seconds(self, work: Work, dtype: torch.dtype) -> float:
        """The least time that some work takes."""
        return max(work.bytes / self.bandwidth, work.flops / self.rate(dtype))


def measure_limits(device: str, size: int = 8192, copied: int = 2**30, budget: float = BUDGET) -> Limits:
    """A copy of `copied` bytes, and products of square matrices of `size` rows."""
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / seconds(lambda: target.copy_(source), device, budget)
    kinds = {"float32": (torch.float32, "highest"), "float16": (torch.float16, "highest")}
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        kinds |= {"tf32": (torch.float32, "high"), "bfloat16": (torch.bfloat16, "highest")}
    found, before = {}, torch.get_float32_matmul_precision()
    for name, (dtype, precision) in kinds.items():
        torch.set_float32_matmul_precision(precision)
        a, b = (normal(size, size, dtype=dtype, device=device) for _ in range(2))
        found[name] = 2 * size**3 / seconds(lambda: a @ b, device, budget)
    torch.set_float32_matmul_precision(before)
    return Limits(bandwidth, found)


def fresh(inputs: dict[str, Tensor], wanted: tuple[str, ...], backward: bool) -> dict[str, Tensor]:
    """Copies, because an operation may change its state in place; leaves that want gradients for a backward pass."""
    return {name: z.detach().clone().requires_grad_(backward and name in wanted) for name, z in inputs.items()}


def finish(outputs: tuple[Tensor, ...], leaves: list[Tensor], backward: bool) -> list[Tensor]:
    """The outputs, and with a backward pass the gradients of a fixed weighting of the first."""
    if not backward:
        return list(outputs)
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    weight = torch.randn(outputs[0].shape, generator=generator, device=outputs[0].device, dtype=outputs[0].dtype)
    return [outputs[0].detach(), *torch.autograd.grad(outputs[0], leaves, weight)]


def results(operation: Operation, peer: Peer, inputs: dict[str, Tensor], backward: bool) -> list[Tensor]:
    """Outputs and gradients of our inputs, through what a peer makes of them."""
    leaves = fresh(inputs, operation.wanted, backward)
    with torch.set_grad_enabled(backward):
        outputs = peer.run(*peer.prepare(**leaves))
        return finish(outputs, [leaves[name] for name in operation.wanted], backward)


def timed(
    operation: Operation, peer: Peer, inputs: dict[str, Tensor], backward: bool, device: str, budget: float
) -> dict:
    """Time and memory with inputs in the peer's own layout."""
    own = [
        z.detach().requires_grad_(backward and z.requires_grad)
        for z in peer.prepare(**fresh(inputs, operation.wanted, backward))
    ]
    leaves = [z for z in own if z.requires_grad]
    weight = None

    def call():
        nonlocal weight
        with torch.set_grad_enabled(backward):
            outputs = peer.run(*own)
        if backward:
            weight = torch.ones_like(outputs[0]) if weight is None else weight
            torch.autograd.grad(outputs[0], leaves, weight)

    call()  # compiles, and tunes
    return {"seconds": seconds(call, device, budget), "peak_bytes": peak(call, device)}


def as_peer(names: list[str], function: Callable) -> Peer:
    """A function of our inputs by name."""
    return Peer(
        lambda *values: function(**dict(zip(names, values))), lambda **inputs: tuple(inputs[name] for name in names)
    )


def compare(
    operation: Operation, peer: Peer, inputs, ours: list[Tensor], limit: float, mine: float, backward, device, budget
) -> dict:
    """A peer's errors against ours; its time, memory and ratio if it computes the same; else the reason."""
    names = [f"output {i}" for i in range(len(ours) - backward * len(operation.wanted))] + list(
        operation.wanted
    ) * backward

    def errors():
        theirs = results(operation, peer, inputs, backward)
        return {name: relative_error(one, other) for name, one, other in zip(names, theirs, ours, strict=True)}

    found, reason = attempt(errors)
    if reason:
        return {"reason": reason}
    worst = max(found, key=lambda name: found[name] if found[name] == found[name] else inf)
    if not found[worst] <= limit:  # nan is not
        return {"errors": found, "reason": f"disagrees: relative error {found[worst]:.1e} of {worst}"}
    times, reason = attempt(partial(timed, operation, peer, inputs, backward, device, budget))
    return (
        {"errors": found, "reason": reason}
        if reason
        else {"errors": found, "reason": None, **times, "ratio": times["seconds"] / mine}
    )


def measure(
    name: str,
    model: str,
    sizes: dict,
    dtype: torch.dtype,
    backward: bool,
    limits: Limits,
    device: str,
    budget: float = BUDGET,
) -> dict:
    """A row of the table: one operation at one size, forward or with the backward pass, beside all peers."""
    operation = OPERATIONS[name]
    row = {"operation": name, "model": model, "sizes": sizes, "dtype": str(dtype).removeprefix("torch."),
           "pass": "forward + backward" if backward else "forward", "reason": None, "peers": {}}
    torch.manual_seed(0)
    inputs, row["reason"] = attempt(lambda: operation.make(**sizes, dtype=dtype, device=device))
    if row["reason"]:
        return row
    us, plain = (as_peer(list(inputs), function) for function in (operation.run, operation.naive))
    ours, row["reason"] = attempt(lambda: results(operation, us, inputs, backward))
    times, row["reason"] = (
        (None, row["reason"])
        if row["reason"]
        else attempt(partial(timed, operation, us, inputs, backward, device, budget))
    )
    peers = {"naive": plain, **operation.peers}
    if row["reason"]:
        return {**row, "peers": {peer: {"reason": "not compared: ours failed"} for peer in peers}}
    work = operation.count(**sizes, size=dtype.itemsize, backward=backward)
    row |= {
        **times,
        **work._asdict(),
        "bytes_per_second": work.bytes / times["seconds"],
        "flops_per_second": work.flops / times["seconds"],
        "fraction": limits.seconds(work, dtype) / times["seconds"],
    }
    agree = AGREE.get(dtype, AGREE_IN_HALF)
    for peer, one in peers.items():
        row["peers"][peer] = compare(operation, one, inputs, ours, agree, times["seconds"], backward, device, budget)
    return row


def dtype_of(name: str, half: bool, half_type: torch.dtype) -> torch.dtype:
    """The type of an operation's inputs."""
    return torch.complex64 if name == "linear_scan complex" else half_type if half else torch.float32


def measure_operation(name: str, models: tuple[str, ...], limits: Limits, kept: Path, until: float) -> None:
    """All rows of one operation, printed as they come, and each written to the file `kept` before the next is
    measured. None begins after the time `until`."""
    torch.set_float32_matmul_precision("high")  # tf32: the peers multiply float32 so, and so do we here
    for model, sizes, half in OPERATIONS[name].cases():
        for backward in (False, True)[: 1 + bool(OPERATIONS[name].wanted)]:
            if model not in models or time.time() > until:
                continue
            row = measure(name, model, sizes, dtype_of(name, half, half_type()), backward, limits, "cuda")
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(line(row), flush=True)
            attempt_to_tidy()


def in_a_process(function: Callable, *arguments) -> object:
    """Run a function in a new process. Raises what it raises, and BrokenProcessPool when the process dies."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_all(limits: Limits, models: tuple[str, ...] = tuple(MODELS), until: float = inf) -> Iterator[list[dict]]:
    """The rows of each operation, in a process of its own; where it fails or dies, the rows before and one that says
    so."""
    for name in OPERATIONS:
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder, "rows")
            _, reason = attempt(partial(in_a_process, measure_operation, name, models, limits, kept, until))
            rows = [json.loads(text) for text in kept.read_text().splitlines()] if kept.exists() else []
        if reason:
            rows.append({"operation": name, "model": "all", "sizes": {}, "dtype": "", "pass": "", "reason": reason,
                         "peers": {}})
            print(line(rows[-1]), flush=True)
        yield rows


# What data sheets allow


def sheet(gpu: GPU) -> Limits:
    """What a kernel of Triton can reach at most, from the maker's figures."""
    if gpu.capability < 80:  # Triton does not use the tensor cores of such a card
        return Limits(gpu.bandwidth, {"float32": gpu.float32, "float16": gpu.float32})
    half = dict.fromkeys(("float16", "bfloat16"), gpu.half)
    return Limits(gpu.bandwidth, {"float32": gpu.float32, "tf32": gpu.half / 2, **half})


def predicted(name: str, model: str, sizes: dict, half: bool, backward: bool) -> dict:
    """A row without a card: the least that has to be moved and multiplied, and the time of that on each card; beside
    it what plain PyTorch takes, call by call, and the kernels, launch by launch. Products are counted in PyTorch, which
    multiplies in float32, or in tf32 where that is there; the kernels make 0.8 to 1.5 times as many."""
    row = {"operation": name, "model": model, "sizes": sizes, "half": half,
           "pass": "forward + backward" if backward else "forward",
           "seconds": {}, "launched_bytes": {}, "launched_seconds": {}, "plain_seconds": {}}
    operation, wanted = OPERATIONS[name], OPERATIONS[name].wanted if backward else ()
    made = partial(operation.make, **sizes, dtype=dtype_of(name, half, torch.float16))
    plain = plain_calls(operation.naive, lambda device: made(device=device), wanted)
    row |= {"plain_bytes": sum(call.bytes for call in plain), "plain_flops": sum(call.flops for call in plain)}
    for gpu in GPUS.values():
        dtype, limits = dtype_of(name, half, torch.bfloat16 if gpu.capability >= 80 else torch.float16), sheet(gpu)
        work = operation.count(**sizes, size=dtype.itemsize, backward=backward)
        launched = kernel_calls(operation.run, lambda device: made(device=device), wanted, gpu)
        row |= work._asdict()
        row["seconds"][gpu.name] = limits.seconds(work, dtype)
        row["launched_bytes"][gpu.name] = sum(call.bytes for call in launched)
        row["launched_seconds"][gpu.name] = (
            row["launched_bytes"][gpu.name] / gpu.bandwidth + row["plain_flops"] / limits.rate(dtype))
        row["plain_seconds"][gpu.name] = sum(limits.seconds(call, torch.float32) for call in plain)
    return row


def predictions(models: tuple[str, ...]) -> list[dict]:
    """All rows that would be measured."""
    return [predicted(name, model, sizes, half, backward) for name, operation in OPERATIONS.items()
            for model, sizes, half in operation.cases() if model in models
            for backward in (False, True)[: 1 + bool(operation.wanted)]]


# What is said about it


def line(row: dict) -> str:
    """A row as text: what it is, what it took, and each peer's ratio or the reason why there is none."""
    sizes = " ".join(
        f"{name} {row['sizes'][name]}"
        for name in ("batch", "length", "heads", "width", "channels")
        if name in row["sizes"]
    )
    head = f"{row['operation']:19} {row['model']:3} {sizes:28} {row['dtype']:9} {row['pass']:18}"
    if row["reason"]:
        return f"{head} {row['reason']}"
    speed = f"{row['bytes_per_second'] / 1e9:6.0f} GB/s {row['flops_per_second'] / 1e12:6.1f} TFLOP/s"
    found = f"{1e3 * row['seconds']:9.3f} ms {speed} {row['fraction']:6.1%} of the limit"
    found += f" {row['peak_bytes'] / 2**20:8.1f} MiB"
    peers = [
        f"{name}: " + (peer["reason"] or f"{peer['ratio']:.2f} x our time (error {max(peer['errors'].values()):.0e})")
        for name, peer in row["peers"].items()
    ]
    return "\n".join([f"{head} {found}", *(f"    {peer}" for peer in peers)])


class Goal(NamedTuple):
    """What the kernels should reach, and where they stand."""

    text: str
    figure: Callable[[dict], float | None]  # of a row; None: the row says nothing about it
    bound: float
    at_least: bool = True  # a figure should be the bound at least; or below it
    operations: tuple[str, ...] = ()


def quickest_ratio(row: dict) -> float | None:
    """The time of the quickest peer, plain PyTorch among them, over ours."""
    return min((peer["ratio"] for peer in row["peers"].values() if "ratio" in peer), default=None)


def large_fraction(row: dict) -> float | None:
    """The fraction of the limit, where there is enough to do for a launch not to matter."""
    return row["fraction"] if row["bytes"] >= LARGE else None


def memory_ratio(row: dict) -> float | None:
    """Our peak memory over naive's at 8192 tokens."""
    naive = row["peers"].get("naive", {})
    return row["peak_bytes"] / naive["peak_bytes"] if row["sizes"]["length"] == 8192 and "peak_bytes" in naive else None


GOALS = (
    Goal("no kernel is slower than the quickest peer", quickest_ratio, 1.0, True, tuple(OPERATIONS)),
    Goal("the scan reaches 80% of the bandwidth", large_fraction, 0.8, True, ("linear_scan", "linear_scan complex")),
    Goal(
        "the convolution reaches 80% of the bandwidth", large_fraction, 0.8, True, ("causal_conv", "causal_conv_step")
    ),
    Goal("the decode step reaches 80% of the bandwidth", large_fraction, 0.8, True, ("ssd_step",)),
    Goal("stage 1 takes under 5% of naive's memory at 8192 tokens", memory_ratio, 0.05, False, ("matrix_distance",)),
)


def verdict(goal: Goal, rows: list[dict]) -> dict:
    """Whether a goal is reached, and the worst row. A row that failed counts as missed, unless the card's memory was
    too small for it."""
    own = [row for row in rows if row["operation"] in goal.operations]
    failed = [row for row in own if row["reason"] and row["reason"] != "out of memory"]
    figures = [(figure, row) for row in own if not row["reason"] and (figure := goal.figure(row)) is not None]
    worst, where = min(figures, key=lambda pair: pair[0] if goal.at_least else -pair[0]) if figures else (None, None)
    if failed:
        said = f"not reached: {len(failed)} rows failed, {failed[0]['reason']}"
    elif worst is None:
        said = "not measured"
    else:
        said = "reached" if (worst >= goal.bound if goal.at_least else worst < goal.bound) else "not reached"
    place = None if where is None else {key: where[key] for key in ("operation", "model", "sizes", "dtype", "pass")}
    return {"goal": goal.text, "verdict": said, "worst": worst, "where": place, "rows": len(figures)}


def summary(verdicts: list[dict]) -> str:
    """The goals, one a line."""
    lines = []
    for one in verdicts:
        worst = "" if one["worst"] is None else f"; worst of {one['rows']}: {one['worst']:.3f}"
        place = "" if one["where"] is None else " ({operation} {model} {sizes} {dtype} {pass})".format(**one["where"])
        lines.append(f"{one['goal']}: {one['verdict']}{worst}{place}")
    return "\n".join(lines)


def main(
    models: tuple[str, ...] = ("1B", "demo"),  # whose shapes: of MODELS
    stop_after: float = inf,  # begin no row after so many seconds
    predict: bool = False,  # measure nothing: write what data sheets of cards allow, and say so
) -> None:
    if unknown := [model for model in models if model not in MODELS]:
        sys.exit(f"models has {unknown[0]!r}: known are {', '.join(MODELS)}")
    if predict:
        save("kernels_predicted", "python -m bench.kernels --predict", predicted=True, rows=predictions(models))
        return
    require_card("bench.kernels")
    began = time.perf_counter()
    limits = in_a_process(measure_limits, "cuda")
    print(f"copy {limits.bandwidth / 1e9:.0f} GB/s; matrix products, TFLOP/s: "
          + ", ".join(f"{name} {speed / 1e12:.1f}" for name, speed in limits.matmul.items()), flush=True)
    rows, done = [], []
    for name, found in zip(OPERATIONS, measure_all(limits, models, time.time() + stop_after)):
        rows, done = rows + found, [*done, name]
        verdicts = [verdict(goal, rows) for goal in GOALS]
        save(f"kernels_{card_name()}", "make bench BENCH=kernels", packages=PACKAGES,
             predicted=False, limits=limits._asdict(), models=models, operations=done, goals=verdicts, rows=rows,
             large=LARGE, total_seconds=time.perf_counter() - began)
    print(summary(verdicts))
    if time.perf_counter() - began > stop_after:
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
