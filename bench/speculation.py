"""Speculative decoding: how often a student is right about its teacher, and what that saves (chapter 18).

    python -m bench.speculation        needs `make demo` first; about three minutes on one core

The embedded teacher writes after prompts of held-out text, alone and with a student ahead. Students: the demo's, two
models that were trained on the same text without a teacher, and the teacher itself. All in turns, in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import tyro

from bench.common import save
from llamba_ref.data import load_documents, pack, split_documents
from llamba_ref.decoder import Decoder
from llamba_ref.decoding import expected_speedup, speculate
from llamba_ref.models import load_model
from llamba_ref.operators import unchecked

STUDENTS = {"its student": "runs/demo", "Mamba-2": "tiny-mamba2", "GateLoop": "tiny-gateloop", "itself": "tiny"}
CONTEXTS, AHEAD, NEW, PROMPTS = (32, 256, 1024), (1, 2, 4, 8), 64, 8


def timed(call: Callable[[], object]) -> tuple[float, object]:
    """How long a call takes, and what it returns."""
    begun = time.perf_counter()
    result = call()
    return time.perf_counter() - begun, result


@torch.no_grad()
def costs(teacher: Decoder, student: Decoder, prompt: torch.Tensor, ahead: int) -> dict[str, float]:
    """A step of the student, and the teacher's reading of a round, over a step of the teacher."""
    (_, cache), (_, state), turns = teacher.read(prompt), student.read(prompt), []
    token, several, length = prompt[:, -1], prompt[:, -ahead - 1 :], prompt.shape[1]
    for _ in range(25):
        with unchecked():
            alone, (_, cache) = timed(lambda: teacher.step(token, cache))
            cache = [layer.crop(length) for layer in cache]
            check, (_, cache) = timed(lambda: teacher.prefill(several, state=cache))
            cache = [layer.crop(length) for layer in cache]
            step, (_, state) = timed(lambda: student.step(token, state))
        turns.append((alone, check, step))
    alone, check, step = (median(times) for times in zip(*turns))
    return {"cost": step / alone, "check": check / alone}


@torch.no_grad()
def measured(teacher: Decoder, student: Decoder, prompts: torch.Tensor, ahead: int) -> dict:
    """A row: all prompts, one after the other."""
    found, ratios, same = [], [], 0
    for prompt in prompts.split(1):  # in turns, so that both see the same noise
        reading, begun = (timed(lambda: model.read(prompt))[0] for model in (teacher, student))
        alone, text = timed(lambda: teacher.generate(prompt, NEW))
        both, one = timed(lambda: speculate(teacher, student, prompt, NEW, ahead))
        found.append(one)
        ratios.append((alone - reading) / (both - reading - begun))
        same += torch.equal(text, one.tokens)
    accepted, rounds = sum(sum(one.accepted) for one in found), sum(len(one.accepted) for one in found)
    wrong = sum(a < p for one in found for a, p in zip(one.accepted, one.proposed))
    rate = accepted / (accepted + wrong)  # of the proposals before which all of their round were right
    row = {"context": prompts.shape[1], "ahead": ahead, "rate": rate, "yield": (NEW - 1) * len(prompts) / rounds,
           "faster": median(ratios), "same_text": same, **costs(teacher, student, prompts[:1], ahead)}
    return row | {"predicted": expected_speedup(rate, ahead, row["cost"], row["check"])}


def main() -> None:
    torch.set_num_threads(1)
    teacher, tokenizer = load_model("tiny")
    _, held_out = split_documents(load_documents("austen"))
    rows = []
    for context in CONTEXTS:
        prompts = pack(held_out, tokenizer, context, max_blocks=PROMPTS)[:PROMPTS]
        for name, where in STUDENTS.items():
            student = load_model(where)[0]
            for ahead in AHEAD:
                rows.append({"student": name, **measured(teacher, student, prompts, ahead)})
                print("{student:>12}, prompt {context}, {ahead} ahead: {rate:.0%} right, {yield:.2f} tokens a round, "
                      "{faster:.2f} times as fast, by the formula {predicted:.2f}".format(**rows[-1]), flush=True)
    save("speculation", "python -m bench.speculation", new=NEW, prompts=PROMPTS, rows=rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
