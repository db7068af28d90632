"""The C++ program of examples/, run on a student's file (chapter 20).

    .venv-edge/bin/python -m bench.runner        needs `make test-edge` first, g++, and Debian's qemu-user and
                                               g++-aarch64-linux-gnu; five minutes

Tokens a second and the largest memory of its process, after a few and after many tokens; whether it writes what the
same file writes in Python; and whether it does so on emulated 64-bit ARM processors, whose speed says nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro

from bench.common import save
from llamba_ref.edge import EdgeModel
from llamba_ref.export import export_model
from llamba_ref.models import load_model

PROMPT, LENGTHS = (5, 17, 300), (100, 1000, 10_000, 100_000)
PROCESSORS, EMULATED = ("cortex-a53", "cortex-a72", "cortex-a76", "max"), 200  # of the emulator; tokens to write there


def written(program: list[str | Path], file: Path, tokens: int) -> tuple[dict, list[int]]:
    """What a run says of its speed and memory, and the ids that it writes."""
    done = subprocess.run([*program, file, str(tokens), *map(str, PROMPT)], check=True, capture_output=True, text=True)
    speed, _, _, _, peak, *_ = done.stderr.strip().splitlines()[-1].split()
    ids = [int(word) for word in done.stdout.split()]
    return {"tokens": tokens, "tokens_per_second": float(speed), "peak_mib": float(peak)}, ids


def alike(one: list[int], other: list[int]) -> int:
    """How many tokens are the same until the first that is not."""
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model("tiny-llamba")
    with TemporaryDirectory() as directory:
        file, program = Path(directory, "student.pte"), Path(directory, "runner")
        export_model(model, tokenizer, file, "executorch", 8)
        subprocess.run(["sh", "examples/build.sh", program], check=True)
        rows, texts = zip(*(written([program], file, tokens) for tokens in LENGTHS))
        ours = EdgeModel(file, 1).generate(torch.tensor([PROMPT]), 1000)[0, len(PROMPT):].tolist()
        subprocess.run(["sh", "examples/arm64.sh", directory], check=True, env=dict(os.environ, PYTHON=sys.executable))
        arm = {}
        for name in PROCESSORS:
            emulator = ["qemu-aarch64", "-cpu", name, "-L", "/usr/aarch64-linux-gnu"]
            arm[name] = alike(written([*emulator, program], file, EMULATED)[1], ours)
    for row in rows:
        print(row)
    print(f"as in Python: {alike(texts[1], ours)} of {len(ours)} tokens; emulated, of {EMULATED}: {arm}")
    save("runner", "python -m bench.runner", packages=("executorch", "torchao"), rows=rows, equal=alike(texts[1], ours),
         of=len(ours), emulated=arm, emulated_of=EMULATED)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
