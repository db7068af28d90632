"""What the distillation of all of SmolLM2-135M takes on a GPU: memory and time, predicted from parts measured here.

    python -m bench.predict        needs `make teacher` first; about three minutes on one core

Measured, for each token of a training step: floating-point operations (PyTorch's counter), and bytes that the backward
pass keeps. Counted: weights, gradients and AdamW's means. Predicted: memory is their sum; time is the operations over
a card's published rate, at the share of the rate of matrix products that the same step reaches on this CPU, and at half
of it. Nothing here ran on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import tyro
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bench.common import parameters, save
from llamba_ref.llamba import Llamba
from llamba_ref.models import load_model
from llamba_ref.mohawk import OBJECTIVES

BLOCKS, LENGTH = 2, 256
COMMAND = ("llamba distill --teacher smollm2 --text sotu --d-state 64 --chunk-size 64 --length 1024 --batch-size 32 "
           "--steps 0 2000 500 --lr 5e-4 5e-4 1e-5 --precision {precision}")
TOKENS = {"alignment": 2000 * 32 * 1024, "distillation": 500 * 32 * 1024}
BATCH_TOKENS = 32 * 1024
# name -> bytes of memory, operations a second for matrix products in the type of `--precision` (the makers' figures)
CARDS = {"T4": (16e9, 8.1e12, "no"), "A100": (40e9, 312e12, "bf16"), "H100": (80e9, 989e12, "bf16")}


def matmul_rate(size: int = 1024) -> float:
    """Operations a second of a product of matrices on this machine."""
    a, best = torch.randn(size, size), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def step_parts(step: Callable[[], object]) -> dict:
    """Operations, seconds and bytes kept at most at a time, of one training step."""
    step()  # warm
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    with FlopCounterMode(display=False) as counter:
        step()
    now = most = 0
    seen = set()

    class Kept:
        """A tensor that is kept for the backward pass; counted once, as long as it lives."""

        def __init__(self, tensor: torch.Tensor):
            nonlocal now, most
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.key = storage.data_ptr()
            self.size = 0 if isinstance(tensor, torch.nn.Parameter) or self.key in seen else storage.nbytes()
            seen.add(self.key)
            now += self.size
            most = max(most, now)

        def __del__(self):
            nonlocal now
            now -= self.size
            if self.size:
                seen.discard(self.key)

    with saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step()
    return {"operations": counter.get_total_flops(), "seconds": seconds, "kept": most}


def main() -> None:
    torch.set_num_threads(1)
    teacher, _ = load_model("smollm2")
    student = Llamba.from_teacher(teacher, start="published", rotation="fixed", d_state=64, chunk_size=64)
    ids = torch.randint(teacher.vocab_size, (BLOCKS, LENGTH), generator=torch.Generator().manual_seed(0))
    count, rate, parts = BLOCKS * LENGTH, matmul_rate(), {}
    for name in TOKENS:
        objective = OBJECTIVES[name](teacher, student)
        found = step_parts(lambda: objective(ids, lambda loss: loss.backward()))
        parts[name] = {"operations": found["operations"] / count, "kept": found["kept"] / count,
                       "share": found["operations"] / found["seconds"] / rate}
        print(f"{name}: {parts[name]['operations'] / 1e9:.2f} GFLOP and {parts[name]['kept'] / 1e3:.0f} kB a token, "
              f"{parts[name]['share']:.0%} of this CPU's rate of matrix products", flush=True)
    fixed = 16 * parameters(student) + 4 * parameters(teacher)  # weights, gradients, two means; the teacher's weights
    rows = []
    for card, (memory, peak, precision) in CARDS.items():
        left = memory - fixed
        micro = max(1, int(left / max(part["kept"] for part in parts.values()) / 1024))
        hours = [sum(TOKENS[name] * part["operations"] / (peak * part["share"] * scale) for name, part in parts.items())
                 / 3600 for scale in (1, 0.5)]
        rows.append({"card": card, "precision": precision, "memory": memory, "blocks_at_a_time": min(micro, 32),
                     "hours": hours})
        print(f"{card}: {min(micro, 32)} blocks of 1024 tokens at a time, {hours[0]:.1f} to {hours[1]:.1f} hours")
    save("predict", "python -m bench.predict", arguments=COMMAND, parameters=parameters(student), fixed_bytes=fixed,
         tokens=TOKENS, parts=parts, rows=rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
