"""How many CPU threads? A step of stage 3 of the demo with one and two threads, on free cores and beside another
program.

    python -m bench.threads

OpenMP threads wait for each other by spinning (policy active, the default) or by sleeping (passive). The policy is read
when torch is imported, so that every measurement is a process of its own. Times are ratios to one thread on free cores.
For the busy case, a second process keeps one core at work. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import torch
import tyro

from bench.common import in_a_process, save
from llamba_ref.cli import Distill
from llamba_ref.llama import Llama
from llamba_ref.mohawk import OBJECTIVES

STEPS = 8


def measure(threads: int) -> float:
    """Median seconds of a step in this process."""
    torch.set_num_threads(threads)
    demo, teacher = Distill(), Llama.from_pretrained("tiny").requires_grad_(False)
    objective = OBJECTIVES["distillation"](teacher, demo.student(teacher))
    input_ids = torch.randint(teacher.vocab_size, (demo.batch_size, demo.corpus.length))
    times = []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        objective(input_ids, lambda loss: loss.backward())
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    rows = []
    for busy in (False, True):
        for threads, policy in ((1, "passive"), (2, "passive"), (2, "active")):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            environment = {**os.environ, "OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(threads)}
            try:
                seconds = in_a_process(f"bench.threads.measure({threads})", environment)
            finally:
                if other is not None:
                    other.kill()
            rows.append({"threads": threads, "policy": policy, "busy": busy, "seconds": seconds})
            rows[-1]["ratio"] = rows[-1]["seconds"] / rows[0]["seconds"]
            print(
                f"{threads} thread{'s' * (threads > 1)}, {policy:>7}, {'one core busy' if busy else 'cores free':>13}: "
                f"{rows[-1]['ratio']:6.2f} x the time",
                flush=True,
            )
    save("threads", "python -m bench.threads", cores=os.cpu_count(), rows=rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
