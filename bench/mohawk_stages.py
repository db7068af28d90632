"""What MOHAWK's stages are worth: the same student trained with and without them, on the demo's teacher and text.

    python -m bench.mohawk_stages

Every row is a training run with seed 0. The ablation has equal tokens; the two baselines have at least the time of the three
stages: end to end only, and the same architecture trained on the text from scratch, without a teacher.
"""

from __future__ import annotations

import time

import torch

from bench.common import save
from llamba_ref.cli import Distill, load_model
from llamba_ref.data import Batches, load_documents, pack, split_documents
from llamba_ref.evaluate import evaluate
from llamba_ref.llamba import Llamba
from llamba_ref.mohawk import distill
from llamba_ref.training import Stage

DEMO = Distill()
FIRST, SECOND, THIRD = DEMO.steps
TOTAL = sum(DEMO.steps)
EVERY = 20  # steps between two points of a curve
RUNS = [  # name, steps of orientation, alignment, distillation, language
    ("stages 1+2+3", (FIRST, SECOND, THIRD, 0)),
    ("stages 2+3", (0, FIRST + SECOND, THIRD, 0)),
    ("stage 3 only", (0, 0, TOTAL, 0)),
    ("stage 3 only, more time", (0, 0, TOTAL * 5 // 4, 0)),
    ("from scratch, more time", (0, 0, 0, TOTAL * 3 // 2)),
]


def stages(steps: tuple[int, int, int, int]) -> list[Stage]:
    """The demo's stages with other lengths; where the student trains end to end from the start, at the rate that suits it best."""
    names = ("orientation", "alignment", "distillation", "language")
    rates = (DEMO.lr[0], DEMO.lr[1], DEMO.lr[2] if steps[1] else END_TO_END_LR, SCRATCH_LR)
    return [Stage(name, n, lr, weight_decay=0.0 if name == "orientation" else 0.1) for name, n, lr in zip(names, steps, rates) if n]


END_TO_END_LR = 2e-3  # the best of 2e-3, 4e-3 and 8e-3 after 300 steps
SCRATCH_LR = 2e-3  # with which the teacher was trained


def main() -> None:
    torch.set_num_threads(1)  # so that processor time, which other programs do not disturb, is time
    teacher, tokenizer = load_model(DEMO.teacher)
    training, held_out = split_documents(load_documents(DEMO.corpus.text), DEMO.corpus.held_out)
    blocks, validation = (pack(documents, tokenizer, DEMO.corpus.length) for documents in (training, held_out))
    target, rows = evaluate(teacher, validation).perplexity, []
    print(f"teacher: held-out perplexity {target:.2f}")
    for name, steps in RUNS:
        torch.manual_seed(DEMO.seed)
        student = DEMO.student(teacher)
        if steps[3]:  # nothing of the teacher's: the same architecture, initialised anew
            student = Llamba(student.config)
        curve, spent = [], 0.0

        def point(step: int, stage: Stage) -> None:
            nonlocal began, spent
            if step % EVERY == 0 or step == sum(steps):
                spent += time.process_time() - began
                tokens = step * DEMO.batch_size * DEMO.corpus.length
                curve.append({"tokens": tokens, "cpu_seconds": spent, "stage": stage.objective, "perplexity": evaluate(student, validation).perplexity})
                began = time.process_time()

        began = time.process_time()
        distill(teacher, student, Batches(blocks, DEMO.batch_size, DEMO.seed), stages(steps), after_step=point, progress=False)
        rows.append({"name": name, "steps": steps, **curve[-1], "ratio": curve[-1]["perplexity"] / target, "curve": curve})
        print(f"{name:>24}: {curve[-1]['tokens']:9,} tokens {curve[-1]['cpu_seconds']:6.1f} s  perplexity {curve[-1]['perplexity']:7.2f}"
              f"  {rows[-1]['ratio']:6.3f} x the teacher's", flush=True)
    save("mohawk_stages", "python -m bench.mohawk_stages", teacher_perplexity=target, batch_size=DEMO.batch_size,
         length=DEMO.corpus.length, d_state=DEMO.d_state, lr=DEMO.lr, end_to_end_lr=END_TO_END_LR, scratch_lr=SCRATCH_LR, rows=rows)


if __name__ == "__main__":
    main()
