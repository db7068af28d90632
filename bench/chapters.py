"""Every chapter, run as on Colab: in an empty directory, with the installed package. Prints what differs from the saved
outputs.

    make notebooks              # all chapters, in an environment that has the package and no development tools
    make notebooks NB=07_ssd    # one

A chapter has to run without an error, in under two minutes, and to print what is saved in it. Figures are not compared.
What a cell that begins with `#| measured` prints comes from times on this machine: only the number of its lines is
compared. What a cell with `#| needs: MODULE` prints is compared where that optional module is installed. Numbers under
1e-5 count as rounding errors, which differ between processors: they may differ by a factor of ten."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import nbformat
import torch
import tyro
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

from bench.common import RESULTS, save
from bench.device import card_name
from llamba_ref.conventions import load_result

NOTEBOOKS = Path(__file__).parent.parent / "nbs"
LIMIT = 120  # seconds for a chapter
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
ROUNDING = 1e-5


def printed(cell: nbformat.NotebookNode) -> str:
    """The text of a code cell's outputs: what it prints, and the repr of its last value unless that is a picture."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            texts.append(output.text)
        elif "image/png" not in output.data:
            texts.append(output.data.get("text/plain", "") + "\n")
    return "".join(texts)


def same_number(saved: str, now: str) -> bool:
    """Whether two numbers, as printed, are the same, or are both rounding errors of one size."""
    if saved == now:
        return True
    small, large = sorted(map(abs, (float(saved), float(now))))
    return large < ROUNDING and "e" in saved + now and (large < 1e-15 or large <= 10 * small)


def same_text(saved: str, now: str, measured: bool) -> bool:
    """Whether two outputs agree: in their words and numbers, or, if `measured`, in how many lines they have."""
    if measured:
        return saved.count("\n") == now.count("\n")
    words = [NUMBER.split(text) for text in (saved, now)]
    numbers = [NUMBER.findall(text) for text in (saved, now)]
    return words[0] == words[1] and all(map(same_number, *numbers))


def missing_module(source: str) -> str | None:
    """The optional module that a cell needs, if it is not installed."""
    needed = re.search(r"^#\| needs: (\w+)$", source, re.MULTILINE)
    return needed[1] if needed and importlib.util.find_spec(needed[1]) is None else None


def compare(saved: nbformat.NotebookNode, now: nbformat.NotebookNode) -> tuple[list[str], set[str]]:
    """What differs, cell by cell; and the modules for want of which cells were not compared."""
    differ, missing = [], set()
    for before, after in zip(saved.cells, now.cells):
        if before.cell_type != "code":
            continue
        if module := missing_module(before.source):
            missing.add(module)
        elif not same_text(printed(before), printed(after), "#| measured" in before.source.splitlines()):
            differ.append(f"cell {before.id}\n  saved: {printed(before)!r}\n  now:   {printed(after)!r}")
    return differ, missing


def run(path: Path) -> tuple[float, list[str], set[str]]:
    """Run a chapter in an empty directory: the seconds it took, what is wrong with it, and what was missing to compare
    all cells."""
    saved = nbformat.read(path, 4)
    now = copy.deepcopy(saved)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as empty:
        try:
            NotebookClient(now, timeout=LIMIT, kernel_name="python3", extra_arguments=["--log-level=ERROR"],
                           resources={"metadata": {"path": empty}}).execute()
        except (CellExecutionError, CellTimeoutError) as error:
            return time.perf_counter() - began, [str(error)], set()
    seconds = time.perf_counter() - began
    slow = [f"took {seconds:.0f} s, more than {LIMIT}"] * (seconds > LIMIT)
    differ, missing = compare(saved, now)
    return seconds, slow + differ, missing


def main(
    chapters: Annotated[tuple[str, ...], tyro.conf.Positional] = ("*",),  # names of notebooks, with wildcards
    record: bool = False,  # write their times into bench/results/chapters.json, which the site shows; a GPU has its own
):
    """Run chapters and compare their outputs with the saved ones; exit with 1 when something is wrong."""
    paths = sorted({path for pattern in chapters for path in NOTEBOOKS.glob(f"{pattern}.ipynb")})
    if not paths:
        sys.exit(f"no chapter is called {' or '.join(chapters)}")
    times, bad = [], []
    for path in paths:
        seconds, wrong, missing = run(path)
        times.append({"chapter": path.stem, "seconds": round(seconds, 1)})
        note = f", not compared for want of {', '.join(sorted(missing))}: some cells" if missing else ""
        print(f"{path.stem:24}{seconds:6.1f} s  {'WRONG' if wrong else 'ok'}{note}", *wrong, sep="\n", flush=True)
        bad += [path.stem] * bool(wrong)
    if bad:
        sys.exit(f"{len(bad)} of {len(paths)} chapters are wrong: {', '.join(bad)}")
    if record:
        name = f"chapters_{card_name()}" if torch.cuda.is_available() else "chapters"
        before = load_result(name)["chapters"] if (RESULTS / f"{name}.json").is_file() else []
        known = {one["chapter"]: one for one in [*before, *times]}
        there = [known[path.stem] for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.stem in known]
        save(name, "make notebooks RECORD=--record", cores=os.cpu_count(), chapters=there)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
