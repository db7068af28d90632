"""All 30 layers of SmolLM2-135M-Instruct on a CPU: how near its teacher an hour brings the student.

    python -m bench.smollm2_all        needs `make teacher` first; about an hour on two cores

MOHAWK's last two stages on the text of bench.smollm2_hybrid. On the way the student is compared with the teacher on
held-out blocks as long as those of the training; at the end on blocks four times as long too, beside the teacher with
the window of bench.smollm2_hybrid in all layers: as many numbers as the student's state, without any training.
"""

from __future__ import annotations

import torch
import tyro

from bench.common import Curve, distill_options, save
from bench.smollm2_hybrid import Window, evaluation_blocks, measured, minutes
from bench.students import with_attention
from llamba_ref.data import Batches, pack
from llamba_ref.evaluate import compare
from llamba_ref.models import load_model, save_model
from llamba_ref.mohawk import distill

OUT, EVERY = "runs/smollm2-cpu", 25  # steps between two points of the curve
COMMAND = (
    "distill --teacher smollm2 --text sotu --d-state 64 --chunk-size 64 --batch-size 4 --steps 0 60 230 "
    f"--lr 5e-4 5e-4 1e-4 --validation-blocks 16 --threads 2 --out {OUT}"
)
OPTIONS = distill_options(COMMAND)


def main() -> None:
    torch.set_num_threads(OPTIONS.machine.threads)
    teacher, tokenizer = load_model(OPTIONS.teacher)
    (training, held_out), = OPTIONS.corpus.documents()
    blocks = evaluation_blocks(OPTIONS.corpus, held_out, tokenizer)
    student, length = OPTIONS.student(teacher), OPTIONS.corpus.length
    data = Batches(pack(training, tokenizer, length), OPTIONS.batch_size, OPTIONS.seed)
    curve = Curve(EVERY, lambda step: {"tokens": step * OPTIONS.batch_size * length,
                                       "ratio": compare(teacher, student, blocks[length], 4).ratio})
    rows = [measured("student, no training", teacher, student, blocks)]
    records = distill(teacher, student, data, OPTIONS.stages(), after_step=curve)
    save_model(OUT, student, tokenizer)
    rows += [measured("student", teacher, student, blocks),
             measured("window, no training", teacher, with_attention(teacher, Window), blocks)]
    save("smollm2_all", "python -m bench.smollm2_all", arguments=COMMAND, minutes=minutes(records), rows=rows,
         curve=curve.points)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
