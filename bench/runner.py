"""The C++ program of examples/, run on a student's file (chapter 25).

    .venv-edge/bin/python -m bench.runner        needs `make test-edge` first and a C++ compiler; three minutes

Tokens a second and the largest memory of its process, after a few and after many tokens; and whether it writes what
the same file writes in Python.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro

from bench.common import save
from llamba_ref.edge import EdgeModel
from llamba_ref.export import export_model
from llamba_ref.models import load_model

PROMPT, LENGTHS = (5, 17, 300), (100, 1000, 10_000, 100_000)


def written(program: Path, file: Path, tokens: int) -> tuple[dict, list[int]]:
    """What a run says of its speed and memory, and the ids that it writes."""
    done = subprocess.run([program, file, str(tokens), *map(str, PROMPT)], check=True, capture_output=True, text=True)
    speed, _, _, _, peak, *_ = done.stderr.strip().splitlines()[-1].split()
    return {"tokens": tokens, "tokens_per_second": float(speed), "peak_mib": float(peak)}, done.stdout.split()


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model("tiny-llamba")
    with TemporaryDirectory() as directory:
        file, program = Path(directory, "student.pte"), Path(directory, "runner")
        export_model(model, tokenizer, file, "executorch", 8)
        subprocess.run(["sh", "examples/build.sh", program], check=True)
        rows, texts = zip(*(written(program, file, tokens) for tokens in LENGTHS))
        ours = EdgeModel(file, 1).generate(torch.tensor([PROMPT]), 1000)[0, len(PROMPT):].tolist()
    equal = sum(int(theirs) == token for theirs, token in zip(texts[1], ours))
    for row in rows:
        print(row)
    save("runner", "python -m bench.runner", packages=("executorch", "torchao"), rows=rows, equal=equal, of=len(ours))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
