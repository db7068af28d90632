"""Everything that this book wants from a GPU, in the order of worth: one command, half an hour.

    make gpu                                  all of it
    make gpu ONLY="kernels decode"            some stages
    python -m bench.gpu --budget 10m          as many stages as there is time for

Each stage is a program of its own with at most eight minutes; it writes bench/results/STAGE_CARD.json while it
measures, so that a lost machine loses little. A stage that was done with the same code is left out when the command is
repeated: a second half hour goes on where the first one ended. --again measures everything anew.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import tyro

from bench.common import RESULTS, save, short
from bench.device import UNFINISHED, card_name, require_card

ROOT = Path(__file__).parent.parent
LIMIT = 480.0  # seconds of a stage
ENDING = 45.0  # seconds that a stage gets to end by itself, before it is ended
SOURCES = ("llamba_ref/**/*.py", "bench/*.py", "tests/test_kernels_*.py")


class Stage(NamedTuple):
    """A program that measures, and what its result is called."""

    name: str
    program: tuple[str, ...]  # arguments of Python
    about: str
    timed: bool = True  # it takes --stop-after


STAGES = (
    Stage("gpu_tests", ("-m", "bench.gpu_tests"), "every kernel against the loop in float64, all types, gradients"),
    Stage("kernels", ("-m", "bench.kernels"), "time, share of the measured bandwidth, beside fla and mamba_ssm"),
    Stage("decode", ("-m", "bench.decode"), "tokens a second and the largest batch, beside transformers' Llama"),
    Stage("demo", ("-m", "bench.demo"), "the demo's distillation: time and perplexity there", False),
    Stage("smollm2", ("-m", "bench.smollm2_gpu"), "SmolLM2-135M, all 30 layers, quality against tokens"),
    Stage("profiles", ("-m", "bench.profiles"), "a training step and a decoding step, event by event", False),
    Stage("chapters", ("-m", "bench.chapters", "2[1-5]*", "16*", "19*", "--record"), "chapters as on Colab", False),
)


def seconds_of(budget: str) -> float:
    """A time such as 30m, 90s or 1h, in seconds. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if not found:
        raise ValueError(f"budget is {budget!r}: it must be a number with s, m or h, such as 30m")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def code() -> str:
    """What the sources are, in a few letters."""
    files = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    return short("".join(path.read_text() for path in files))


def results_of(card: str) -> dict[str, dict]:
    """The row of each stage that was run on this card before, by its name."""
    file = RESULTS / f"gpu_{card}.json"
    return {row["stage"]: row for row in json.loads(file.read_text())["stages"]} if file.is_file() else {}


def run(stage: Stage, limit: float) -> tuple[str, float]:
    """Run a stage: "done", "failed", or "no time" where it had to be ended; and the seconds it took."""
    words = (*stage.program, *(("--stop-after", f"{max(1.0, limit - ENDING):.0f}") if stage.timed else ()))
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, start_new_session=True)
    try:
        status = {0: "done", UNFINISHED: "no time"}.get(process.wait(limit), "failed")
    except subprocess.TimeoutExpired:
        status = "no time"
    finally:  # however it ended, nothing that it has started is left behind
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status, time.perf_counter() - began


def run_all(
    stages: Sequence[Stage],  # in the order in which they run
    card: str,  # its short name
    budget: float,  # seconds for all of them
    again: bool = False,  # also those that are there
) -> list[dict]:  # a row for each of them
    """Run what there is time for. After each stage all rows are written, with those of other stages from before."""
    until, now, rows = time.monotonic() + budget, code(), results_of(card)
    for stage in stages:
        left, before = until - time.monotonic(), rows.get(stage.name, {})
        if not again and (before.get("status"), before.get("code")) == ("done", now):
            print(f"{stage.name}: is there already, of the same code", flush=True)
            continue
        if left < ENDING:
            status, spent = "no time", 0.0
        else:
            print(f"\n{stage.name}: {stage.about} (at most {min(LIMIT, left) / 60:.0f} minutes)", flush=True)
            status, spent = run(stage, min(LIMIT, left))
        print(f"{stage.name}: {status} after {spent:.0f} s", flush=True)
        rows[stage.name] = {"stage": stage.name, "status": status, "seconds": spent, "code": now}
        save(f"gpu_{card}", "make gpu", packages=("triton",), stages=[*rows.values()])
    return [rows[stage.name] for stage in stages]


def main(
    only: tuple[str, ...] = (),  # these stages; none given: all
    budget: str = "30m",  # for all of them
    again: bool = False,  # measure also what is there
) -> None:
    """Run the stages; exit with 1 unless all of them were done."""
    known = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in only if name not in known]:
        sys.exit(f"only has {unknown[0]!r}: known are {', '.join(known)}")
    try:
        limit = seconds_of(budget)
    except ValueError as error:
        sys.exit(str(error))
    require_card("bench.gpu")
    card = card_name()
    rows = run_all([known[name] for name in only or known], card, limit, again)
    bad = [f"{row['stage']} ({row['status']})" for row in rows if row["status"] != "done"]
    if bad:
        sys.exit(f"not done: {', '.join(bad)}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
