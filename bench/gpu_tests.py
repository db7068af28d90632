"""The tests marked `gpu`: every kernel on this card, forward and gradients, against the loop in float64.

    python -m bench.gpu_tests        needs a CUDA device; some minutes, most of which Triton compiles

What pytest said of each test is in the result, also when there was no time for all of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from math import inf
from pathlib import Path
from tempfile import TemporaryFile

import tyro

from bench.common import save
from bench.device import UNFINISHED, card_name, require_card

ROOT = Path(__file__).parent.parent
COMMAND = ("-m", "pytest", "-m", "gpu", "-v", "--tb=line", "-rN", "-p", "no:cacheprovider", "--color=no")
OUTCOME = re.compile(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b|"
                     r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (tests/\S+::.+?)$", re.MULTILINE)
REASON = re.compile(r"^(?:E +|\S+:\d+: )(.+)$", re.MULTILINE)


def outcomes(text: str) -> dict[str, str]:
    """What pytest said of each test, alone or with several processes."""
    return {first or last: (said or word).lower() for first, said, word, last in OUTCOME.findall(text)}


def run(arguments: tuple[str, ...], stop_after: float) -> tuple[str, bool]:
    """What a test run printed, and whether it came to its end."""
    with TemporaryFile("w+") as output:
        try:  # in the process group of who called, who ends all of it if this hangs
            subprocess.run([sys.executable, *COMMAND, *arguments], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                           timeout=None if stop_after == inf else stop_after)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        output.seek(0)
        return output.read(), ended


def main(
    stop_after: float = inf,  # end the tests after so many seconds
    processes: int = min(8, os.cpu_count() or 1),  # tests at a time: compiling takes longest
) -> None:
    require_card("bench.gpu_tests")
    began = time.perf_counter()
    text, ended = run(("-n", str(processes)), stop_after)
    found = outcomes(text)
    counts = dict(Counter(found.values()))
    print(text[-6000:])
    save(f"gpu_tests_{card_name()}", "python -m bench.gpu_tests",
         packages=("triton", "pytest"), ended=ended, counts=counts, seconds=time.perf_counter() - began,
         failed=sorted(name for name, said in found.items() if said in ("failed", "error")),
         reasons=REASON.findall(text)[:50])
    print(", ".join(f"{count} {said}" for said, count in counts.items()) or "no test ran")
    bad = not found or counts.get("failed") or counts.get("error")
    sys.exit(1 if bad else 0 if ended else UNFINISHED)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
