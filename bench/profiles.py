"""Where the time of a step goes on a GPU: what ran when, where the processor waited, how long the card had nothing to
do, for a training step and a decoding step.

    python -m bench.profiles        needs a CUDA device; a minute

Steps of the sizes of SmolLM2-135M, in half precision as on that card: the third stage of MOHAWK on 8 blocks of 512
tokens, and a greedy token for each of 32 sequences. The profiler's events of one step are kept: kernels with their
beginning and length, and every call that waits for the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import tyro
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, record_function

from bench.common import save
from bench.decode import recurrent
from bench.device import card_name, half_type, require_card
from bench.predict import SIZES
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.llamba import Llamba, student_config
from llamba_ref.mohawk import OBJECTIVES
from llamba_ref.operators import unchecked
from llamba_ref.training import Stage, optimizer_for, train_step

MODEL, ROWS, LENGTH, SEQUENCES = "smollm2", 8, 512, 32
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")  # of the runtime
STEPS = 5  # the last one is kept


class Event(NamedTuple):
    """Something that the profiler saw, in microseconds from the begin of the step."""

    name: str
    begin: float
    length: float
    where: str  # "card": a kernel or a copy on the GPU; "wait": the processor waits for it; "call": any other call


def training(config: LlamaConfig, device: str, dtype: torch.dtype) -> Callable[[], object]:
    """A step of the last stage, as `distill` takes it."""
    torch.manual_seed(0)
    teacher = Llama(config).to(device)
    student = Llamba(student_config(config, d_state=64, chunk_size=64, rotation="fixed", bias=True)).to(device)
    stage = Stage("distillation", 1000, 1e-4)
    objective, optimizer = OBJECTIVES[stage.objective](teacher, student), optimizer_for(student, stage)
    accelerator = Accelerator(mixed_precision="bf16" if dtype == torch.bfloat16 else "no", cpu=device == "cpu")
    ids = torch.randint(config.vocab_size, (ROWS, LENGTH), device=device)

    def step():
        with unchecked():  # as in `train_stage`
            return train_step(student, stage, objective, ids, optimizer, accelerator, ROWS, "profile")

    return step


def decoding(config: LlamaConfig, device: str, dtype: torch.dtype) -> Callable[[], object]:
    """A greedy token, step by step and not as a graph: what `generate` does."""
    torch.manual_seed(0)
    student = Llamba(student_config(config, d_state=64, chunk_size=64, rotation="fixed", bias=True))
    return recurrent(student.to(device, dtype).eval(), SEQUENCES, 1)


def watch(step: Callable[[], object], device: str) -> list[Event]:
    """The events of the last of some steps."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    for _ in range(STEPS):  # what is compiled or tuned is so by then
        step()
    with profile(activities=kinds) as seen:
        for _ in range(STEPS):
            with record_function("step"):
                step()
        if device == "cuda":
            torch.cuda.synchronize()
    return of_last_step(seen.events())


def of_last_step(events: Iterable) -> list[Event]:
    """What the profiler saw from the begin of the last step on, without the calls that hold others."""
    events = list(events)
    steps = [one for one in events if one.name == "step" and "CPU" in str(one.device_type)]
    begin, end = steps[-1].time_range.start, steps[-1].time_range.end
    found = []
    for one in events:
        on_card, start = "CPU" not in str(one.device_type), one.time_range.start
        if one.name == "step" or start < begin or not on_card and start > end:
            continue
        waits = any(word in one.name for word in WAITS) and "Async" not in one.name
        if on_card or waits or one.name.startswith(("cuda", "cu")) or one.cpu_parent is not None \
                and one.cpu_parent.name == "step":
            where = "card" if on_card else "wait" if waits else "call"
            found.append(Event(one.name, start - begin, one.time_range.end - start, where))
    return sorted(found, key=lambda one: one.begin)


def busy(events: list[Event]) -> dict:
    """How long the step was, how much of it the card worked, and how often and how long it was waited for."""
    card = [one for one in events if one.where == "card"]
    worked, until = 0.0, 0.0
    for one in card:  # some overlap
        worked += max(0.0, one.begin + one.length - max(until, one.begin))
        until = max(until, one.begin + one.length)
    waits = [one for one in events if one.where == "wait"]
    whole = max((one.begin + one.length for one in events), default=0.0)
    return {"microseconds": whole, "busy": worked / whole if whole else 0.0, "kernels": len(card),
            "waits": len(waits), "waited_microseconds": sum(one.length for one in waits)}


def main() -> None:
    require_card("bench.profiles")
    steps = []
    for name, make in (("decoding", decoding), ("training", training)):
        events = watch(make(SIZES[MODEL], "cuda", half_type()), "cuda")
        found = busy(events)
        print(f"{name}: {found['microseconds'] / 1e3:.2f} ms, the card works {found['busy']:.0%} of it with "
              f"{found['kernels']} kernels; the processor waits {found['waits']} times")
        steps.append({"step": name, **found, "events": [[one.name[:60], round(one.begin, 1), round(one.length, 1),
                                                         one.where] for one in events if one.where != "call"]})
        save(f"profiles_{card_name()}", "python -m bench.profiles", packages=("triton",),
             size=MODEL, rows=ROWS, length=LENGTH, sequences=SEQUENCES, steps=steps)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
