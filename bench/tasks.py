"""The demo's student on tasks of lm-eval that are made of its held-out text (appendix 91).

    python -m bench.tasks        about twenty minutes, most of it for the hybrid

Beside the teacher and the student: a hybrid that keeps two of its sixteen heads of attention, distilled like the
student; and what both must beat: the student before its training, one that starts at random, and one whose mixers are
silent.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

import llamba_ref as lr
from bench.common import save
from llamba_ref.cli import Distill, Machine
from llamba_ref.harness import LOCAL, run_tasks

HYBRID = Path("runs/tasks_hybrid")


@torch.no_grad()
def silent(student: lr.Llamba) -> lr.Llamba:
    """The student with mixers that add nothing."""
    for block in student.backbone.layers:
        for weight in block.mixer.out_proj.parameters():
            weight.zero_()
    return student


def contenders() -> dict:
    """Models and their tokenizer, by what the chapter calls them."""
    teacher, tokenizer = lr.load_model("tiny")
    if not (HYBRID / "student").exists():
        Distill(out=str(HYBRID), keep_heads=2, machine=Machine(threads=1)).run()
    torch.manual_seed(0)
    models = {
        "random start": lr.Llamba.from_teacher(teacher, start="published", rotation="none", d_state=32, chunk_size=32),
        "silent mixers": silent(lr.Llamba.from_teacher(teacher, d_state=32, chunk_size=32)),
        "before training": lr.Llamba.from_teacher(teacher, d_state=32, chunk_size=32),
        "student": lr.load_model("tiny-llamba")[0],
        "hybrid": lr.load_model(HYBRID)[0],
        "teacher": teacher,
    }
    return {name: (model, tokenizer) for name, model in models.items()}


def main() -> None:
    """Measure and save."""
    torch.set_num_threads(1)
    texts = [row["text"] for row in lr.split_documents(lr.load_documents("austen"))[1]]
    scores = run_tasks(contenders(), LOCAL, texts)
    save("tasks", "python -m bench.tasks", packages=("lm_eval",), scores=[asdict(score) for score in scores])


if __name__ == "__main__":
    main()
