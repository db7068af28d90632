"""What MOHAWK's stages are worth: the same student trained with and without them, on the demo's teacher and text.

    python -m bench.mohawk_stages

The ablation (first three rows) has equal tokens. The two baselines have more time than the three stages: end to end
only, and the same architecture trained on the text from scratch, without a teacher. Every row is run with three seeds,
two runs at a time with one thread each; time is processor time, which other programs disturb little. About 25 minutes
on two cores.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import torch
import tyro

from bench.common import Curve, save
from llamba_ref.cli import Distill
from llamba_ref.data import Batches, load_documents, pack, split_documents
from llamba_ref.evaluate import evaluate
from llamba_ref.llamba import Llamba
from llamba_ref.models import load_model
from llamba_ref.mohawk import distill
from llamba_ref.training import Stage

FIRST, SECOND, THIRD = Distill().steps
TOTAL = FIRST + SECOND + THIRD
SEEDS = (0, 1, 2)
EVERY = 50  # steps between two points of a curve
END_TO_END_LR = 2e-3  # the best of 2e-3, 4e-3 and 8e-3 after 300 steps
SCRATCH_LR = 2e-3  # with which the teacher was trained
ROWS = {  # steps of orientation, alignment, distillation, language
    "stages 1+2+3": (FIRST, SECOND, THIRD, 0),
    "stages 2+3": (0, FIRST + SECOND, THIRD, 0),
    "stage 3 only": (0, 0, TOTAL, 0),
    "stage 3 only, more time": (0, 0, TOTAL * 5 // 4, 0),
    "from scratch, more time": (0, 0, 0, TOTAL * 3 // 2),
}


def stages(steps: tuple[int, int, int, int]) -> list[Stage]:
    """The demo's stages with other lengths; where the student trains end to end from the start, at the rate that suits
    it best."""
    *mohawk, language = steps
    orientation, alignment, distillation = Distill().lr
    lr = (orientation, alignment, distillation if steps[1] else END_TO_END_LR)
    first = Distill(steps=tuple(mohawk), lr=lr).stages() if any(mohawk) else []
    return first + ([Stage("language", language, SCRATCH_LR)] if language else [])


def run(name: str, seed: int) -> dict:
    """Train one student: its curve of held-out perplexity against tokens and processor time."""
    torch.set_num_threads(1)
    demo, steps = Distill(seed=seed), ROWS[name]
    teacher, tokenizer = load_model(demo.teacher)
    training, held_out = split_documents(load_documents(demo.corpus.text), demo.corpus.held_out)
    blocks, validation = (pack(documents, tokenizer, demo.corpus.length) for documents in (training, held_out))
    student = demo.student(teacher)
    if steps[3]:  # nothing of the teacher's: the same architecture, initialised anew
        torch.manual_seed(seed)
        student = Llamba(student.config)
    tokens = demo.batch_size * demo.corpus.length

    def point(step: int) -> dict:
        return {"tokens": step * tokens, "perplexity": evaluate(student, validation).perplexity}

    curve = Curve(EVERY, point, last=sum(steps))
    distill(teacher, student, Batches(blocks, demo.batch_size, seed), stages(steps), after_step=curve, progress=False)
    expected = evaluate(teacher, validation).perplexity
    return {"name": name, "seed": seed, "teacher_perplexity": expected, "curve": curve.points}


def summary(name: str, runs: list[dict]) -> dict:
    """One row of the table: means over the seeds, and the range of the perplexity."""
    ends = [one["curve"][-1] for one in runs]
    found = [end["perplexity"] for end in ends]
    mean = {key: statistics.mean(end[key] for end in ends) for key in ("tokens", "cpu_seconds", "perplexity")}
    return {"name": name, "steps": ROWS[name], **mean, "lowest": min(found), "highest": max(found),
            "ratio": mean["perplexity"] / runs[0]["teacher_perplexity"], "curve": runs[0]["curve"]}


def main() -> None:
    torch.set_num_threads(1)  # as in every run, and for the record
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(run, *zip(*product(ROWS, SEEDS))))
    teacher, rows = runs[0]["teacher_perplexity"], []
    print(f"teacher: held-out perplexity {teacher:.2f}; students, mean of {len(SEEDS)} seeds (lowest to highest):")
    for name in ROWS:
        rows.append(row := summary(name, [one for one in runs if one["name"] == name]))
        print(
            f"{name:>24}: {row['tokens'] / 1e6:.2f} M tokens {row['cpu_seconds']:6.1f} s  "
            f"perplexity {row['perplexity']:6.2f} "
            f"({row['lowest']:.2f} to {row['highest']:.2f})  {row['ratio']:.3f} x the teacher's"
        )
    demo = Distill()
    save(
        "mohawk_stages",
        "make compare",
        teacher_perplexity=teacher,
        seeds=SEEDS,
        batch_size=demo.batch_size,
        length=demo.corpus.length,
        d_state=demo.d_state,
        lr=demo.lr,
        end_to_end_lr=END_TO_END_LR,
        scratch_lr=SCRATCH_LR,
        rows=rows,
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
