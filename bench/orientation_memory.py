"""Peak memory of the distance of stage 1 and its gradients: with both matrices formed, and tile by tile.

    python -m bench.orientation_memory        about two minutes on a CPU

One text, one head. `peak_bytes` counts the bytes of all tensors that are alive, on any device: without a GPU the
kernels run in Triton's interpreter, slowly, but with the same tensors. Inputs are not counted, gradients are. Errors
of the distance and of all gradients together are those of float32 against both matrices in float64.
"""

from __future__ import annotations

import os
import time

import torch

from bench.common import save

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from llamba_ref.conventions import relative_error
from llamba_ref.mohawk import matrix_distance
from llamba_ref.operators import peak_bytes

LENGTHS = (512, 1024, 2048, 4096, 8192)
WIDTH = STATE = 32
MIB = 2**20


def inputs(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, log_a, B, C and D of one head; the student's require gradients."""
    generator = torch.Generator().manual_seed(length)
    q, k, B, C = (torch.randn(1, length, 1, width, generator=generator) for width in (WIDTH, WIDTH, STATE, STATE))
    log_a, D = -torch.rand(1, length, 1, generator=generator), torch.ones(1)
    q, k, *student = (
        z.to("cuda" if torch.cuda.is_available() else "cpu", dtype) for z in (q, k, log_a, B / STATE, C, D)
    )
    return [q, k, *(z.requires_grad_() for z in student)]


def measure(length: int, backend: str, dtype: torch.dtype = torch.float32) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Peak memory and time of forward and backward together; the distance; all gradients in one vector."""
    tensors, kept = inputs(length, dtype), []

    def step() -> None:
        distance = matrix_distance(*tensors, backend=backend)
        distance.sum().backward()
        kept.append(distance.detach())

    began = time.perf_counter()
    peak = peak_bytes(step)
    row = {"length": length, "backend": backend, "mib": peak / MIB, "seconds": time.perf_counter() - began}
    return row, kept[0], torch.cat([z.grad.flatten() for z in tensors[2:]])


def main() -> None:
    torch.set_num_threads(1)
    measure(64, "triton")  # so that nothing is imported or compiled later
    rows = []
    for length in LENGTHS:
        _, *expected = measure(length, "naive", torch.float64)
        for backend in ("naive", "triton"):
            row, *found = measure(length, backend)
            errors = {
                name: relative_error(*pair)
                for name, *pair in zip(("distance_error", "gradient_error"), found, expected)
            }
            rows.append(row | errors)
            print(
                f"L = {length:5d} {backend:>6}: {row['mib']:8.2f} MiB {row['seconds']:5.1f} s, "
                f"errors of distance and gradients {errors['distance_error']:.1e} {errors['gradient_error']:.1e}",
                flush=True,
            )
        print(f"tiles take {rows[-1]['mib'] / rows[-2]['mib']:.3%} of the memory", flush=True)
    save("orientation_memory", "python -m bench.orientation_memory", width=WIDTH, state=STATE, rows=rows)


if __name__ == "__main__":
    main()
