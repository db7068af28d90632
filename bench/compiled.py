"""What torch.compile of the blocks is worth in training: time of a step of stages 2 and 3 (chapter 19).

    python -m bench.compiled        about five minutes on one core; needs a C++ compiler

The demo's teacher and student, batches of 4 x 256 tokens. Steps of the two pairs of models, one with compiled blocks,
are taken in turns; what compiling costs is the time of the first step of each stage.
"""

from __future__ import annotations

import copy
import time
from statistics import median

import torch
import tyro

from bench.common import distill_options, save
from llamba_ref.models import load_model
from llamba_ref.mohawk import OBJECTIVES
from llamba_ref.training import optimizer_for

STEPS = 30


def main() -> None:
    torch.set_num_threads(1)
    command = distill_options("llamba distill")
    teacher, _ = load_model(command.teacher)
    pairs = {"eager": (teacher, command.student(teacher))}
    pairs["compiled"] = copy.deepcopy(pairs["eager"])
    for model in pairs["compiled"]:
        for block in model.backbone.layers:
            block.compile()
    rows = []
    for stage in command.stages()[1:]:
        ids = torch.randint(teacher.vocab_size, (command.batch_size, command.corpus.length))
        objectives = {name: OBJECTIVES[stage.objective](*pair) for name, pair in pairs.items()}
        optimizers = {name: optimizer_for(student, stage) for name, (_, student) in pairs.items()}
        times, losses = {name: [] for name in pairs}, {}
        for _ in range(STEPS):
            for name in pairs:
                begun = time.perf_counter()
                losses[name] = objectives[name](ids, lambda loss: loss.backward()).mean().item()
                optimizers[name].step()
                optimizers[name].zero_grad()
                times[name].append(time.perf_counter() - begun)
        eager, compiled = (median(times[name][3:]) for name in pairs)
        rows.append({"stage": stage.objective, "faster": eager / compiled, "first_step": times["compiled"][0],
                     "step": {"eager": eager, "compiled": compiled}, "losses": losses})
        print(f"{stage.objective}: {eager / compiled:.2f} times as fast after {times['compiled'][0]:.0f} s; "
              f"losses {losses}", flush=True)
    save("compiled", "python -m bench.compiled", steps=STEPS, rows=rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
