"""The demo on this machine: `llamba distill` as anybody would type it, how long it takes, how good its student is.

    python -m bench.demo        a minute on a GPU

The rows of the CPU that README.md shows are those of the same command; on another device sums are rounded otherwise.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from bench.common import save
from bench.device import card_name
from llamba_ref.cli import main as llamba


def main() -> None:
    with TemporaryDirectory() as directory:
        out, began = Path(directory, "demo"), time.perf_counter()
        llamba(["distill", "--out", str(out)])
        spent = time.perf_counter() - began
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = {}
    for record in records:
        if "stage" in record:
            steps.setdefault(record["stage"], []).append(record["tokens_per_second"])
    evaluations = [record for record in records if "evaluation" in record]
    save(f"demo_{card_name()}", "python -m bench.demo", packages=("triton",), arguments="llamba distill",
         seconds=spent, tokens_per_second={stage: sorted(found)[len(found) // 2] for stage, found in steps.items()},
         evaluations=evaluations)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
