"""SSD on a CPU: `ssd` against other chunked implementations in PyTorch, forward and with the backward pass.

    make peers        installs fla-core, then runs this: about four minutes

Everybody computes the same outputs and gradients (checked first) with every chunk size of CHUNKS, in turns, and is
judged by its best time with its best chunk size. Noise only adds, so the best is the fairest. "groups 1" is Mamba-2's
own choice: all heads share B and C; "groups 8" is Llamba's: each head has its own.

Why `ssd` wins: it computes C B^T, and reads and writes states, once for a group instead of once a head; it fills the
decay masks with one product, one running sum and one exponential, without infinities; and it takes only as many chunks
together as fit into the cache, so that temporaries neither wait for memory nor are fetched anew from the system.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import torch
import tyro
from einops import rearrange
from torch import Tensor

from bench.common import device_name, save
from llamba_ref.conventions import relative_error
from llamba_ref.ssd import ssd

BATCH, LENGTH, HEADS, HEADDIM, STATE = 2, 2048, 8, 64, 64
CHUNKS = (32, 64, 128, 256)
ROUNDS = 12


def listing(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """The four steps of the SSD paper's minimal listing as einsums: b batch, c and z chunks, l and s tokens, h
    heads."""

    def mask(logs):
        size = logs.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool).tril(-1)
        sums = logs[..., None].expand(*logs.shape, size).masked_fill(~later, 0).cumsum(-2)
        return sums.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), -torch.inf).exp()

    B, C = (z.repeat_interleave(x.shape[2] // z.shape[2], 2) for z in (B, C))
    x, B, C = (rearrange(z, "b (c l) h k -> b c l h k", l=chunk_size) for z in (x, B, C))
    logs = rearrange(log_a, "b (c l) h -> b h c l", l=chunk_size)
    total = logs.cumsum(-1)
    inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, mask(logs), x)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (total[..., -1:] - total).exp(), x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    entering = torch.einsum("bhzc,bchpn->bzhpn", mask(torch.nn.functional.pad(total[..., -1], (1, 0))), states)[:, :-1]
    outside = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, entering, total.exp())
    return rearrange(inside + outside, "b c l h p -> b (c l) h p")


def transformers_scan(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """The scan of Mamba2ForCausalLM's PyTorch path; it multiplies x by dt = -log_a itself."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(x / -log_a[..., None], -log_a, -torch.ones(x.shape[2]), B, C, chunk_size)


def fla_naive(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """flash-linear-attention's naive chunk with one gate a head; it has no groups."""
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    B, C = (z.repeat_interleave(x.shape[2] // z.shape[2], 2) for z in (B, C))
    return naive_chunk_simple_gla(C, B, x, log_a, chunk_size=chunk_size, scale=1.0)[0]


def ours(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """llamba_ref.ssd.ssd"""
    return ssd(x, log_a, B, C, chunk_size=chunk_size, backend="naive")


PEERS = {"transformers": transformers_scan, "paper's listing": listing, "fla naive": fla_naive}


def passes(function: Callable, inputs: list[Tensor], weight: Tensor) -> dict[str, Callable]:
    """What is timed: a forward pass without a graph, and a forward and backward pass."""

    def forward():
        with torch.no_grad():
            return (function(*inputs),)

    return {"forward": forward, "forward + backward": lambda: torch.autograd.grad(function(*inputs), inputs, weight)}


def check(inputs: list[Tensor], weight: Tensor) -> float:
    """The largest relative error of anyone's outputs and gradients against the recurrence in float64."""
    doubles = [z.detach().double().requires_grad_() for z in inputs]
    y = ssd(*doubles, mode="recurrent")
    exact = {"forward": (y,), "forward + backward": torch.autograd.grad(y, doubles, weight.double())}
    errors = []
    for function in (ours, *PEERS.values()):
        for what, call in passes(partial(function, chunk_size=64), inputs, weight).items():
            errors += [relative_error(out, ref) for out, ref in zip(call(), exact[what])]
    return max(errors)


def compare(groups: int, threads: int) -> dict:
    """Best times of everybody with every chunk size, taken in turns."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x, weight = torch.randn(BATCH, LENGTH, HEADS, HEADDIM), torch.randn(BATCH, LENGTH, HEADS, HEADDIM)
    B, C = torch.randn(BATCH, LENGTH, groups, STATE), torch.randn(BATCH, LENGTH, groups, STATE)
    inputs = [z.requires_grad_() for z in (x, -0.2 * torch.rand(BATCH, LENGTH, HEADS) - 1e-3, B, C)]
    error = check(inputs, weight)
    if error > 1e-5:
        raise RuntimeError(f"the implementations do not agree: largest relative error {error:.1e}")
    runs = {(name, size, what): call for name, function in {"ours": ours, **PEERS}.items() for size in CHUNKS
            for what, call in passes(partial(function, chunk_size=size), inputs, weight).items()}
    times = {key: [] for key in runs}
    for _ in range(ROUNDS):
        for key, call in runs.items():
            began = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - began)
    rows = [
        {"name": name, "chunk_size": size, "pass": what, "seconds": min(found)}
        for (name, size, what), found in times.items()
    ]
    return {"groups": groups, "threads": threads, "largest_error": error, "rows": rows, "ratios": ratios(rows)}


def ratios(rows: list[dict]) -> dict:
    """For each pass: the quickest peer, and how many times the time of `ours` it takes."""
    found = {}
    for what in ("forward", "forward + backward"):
        best = {}
        for row in (row for row in rows if row["pass"] == what):
            if row["name"] not in best or row["seconds"] < best[row["name"]]["seconds"]:
                best[row["name"]] = row
        mine = best.pop("ours")
        over = {name: row["seconds"] / mine["seconds"] for name, row in best.items()}
        quickest = min(over, key=over.get)
        found[what] = {
            "quickest_peer": quickest,
            "ratio": over[quickest],
            "ratios": over,
            "chunk_size": {"ours": mine["chunk_size"], **{name: row["chunk_size"] for name, row in best.items()}},
        }
    return found


def main() -> None:
    results = []
    for threads in dict.fromkeys((1, min(2, os.cpu_count() or 1))):
        for groups in (1, HEADS):
            results.append(compare(groups, threads))
            for what, found in results[-1]["ratios"].items():
                others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["ratios"].items())
                print(
                    f"{threads} thread{'s' * (threads > 1)}, groups {groups}, {what}: times over ours: {others}",
                    flush=True,
                )
    torch.set_num_threads(1)
    save(
        "ssd_cpu",
        "make peers",
        processor=device_name().split(",")[0],
        shape={
            "batch": BATCH,
            "length": LENGTH,
            "heads": HEADS,
            "headdim": HEADDIM,
            "state": STATE,
            "dtype": "float32",
        },
        peers=("transformers", "fla-core"),
        results=results,
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
