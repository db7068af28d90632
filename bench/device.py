"""What measuring on a GPU needs, beside what a CPU does for the same call in tests: time, memory, recorded loops."""

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from llamba_ref.operators import peak_bytes

BUDGET = 0.2  # seconds of repetitions for one time
UNFINISHED = 75  # exit status of a program that had no time to measure all; the result holds what it has measured


def seconds(call: Callable[[], object], device: str, budget: float = BUDGET) -> float:
    """Median time of a call, of as many as `budget` seconds allow; on a GPU each finds an empty L2 cache."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=250 * budget, rep=1000 * budget, return_mode="median") / 1000
    times = []
    while not times or sum(times) < budget:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


def peak(call: Callable[[], object], device: str) -> int:
    """The most bytes that a call takes beside what was there before."""
    if device != "cuda":
        return peak_bytes(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def recorded(call: Callable[[], object], device: str) -> Callable[[], object]:
    """A call as a CUDA graph: to be replayed with one launch. What it reads and writes must stay where it is.

    Raises RuntimeError for a call that waits for the device: in a recorded loop there is nobody to wait."""
    if device != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles kernels, and lets libraries take their workspaces
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def attempt(function: Callable[[], object]) -> tuple[object, str | None]:
    """What a function gives, and None; or None, and why there is nothing."""
    try:
        return function(), None
    except ModuleNotFoundError as error:
        reason = f"not installed: {error.name}"
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # whatever another library raises belongs into the table
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
    gc.collect()  # frames of the error hold tensors
    attempt_to_tidy()
    return None, reason


def attempt_to_tidy() -> None:
    """Give unused memory back; a device that an error has broken refuses that, too."""
    try:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    except RuntimeError:
        pass


def require_card(program: str) -> None:
    """End a program that has nothing to measure on this machine."""
    if not torch.cuda.is_available():
        sys.exit(f"{program} needs a CUDA device: there is none here")


def half_type() -> torch.dtype:
    """What 16-bit numbers are on this card: bfloat16 where its tensor cores know it."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def short_name(gpu: str) -> str:
    """What a file is called by: h200, h100, a100, t4, or the device's name in small letters."""
    known = re.search(r"\b(H200|H100|A100|L4|T4)\b", gpu)
    return known[1].lower() if known else re.sub(r"[^a-z0-9]+", "_", gpu.lower().removeprefix("nvidia ")).strip("_")


def card_name() -> str:
    """What the card of this machine is called in the names of files; "cpu" where there is none."""
    return short_name(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"
