"""The solutions of all exercises, as they stand in the chapters: every piece of their code is run, with what it needs
of its chapter; the book's own answers pass their checks, and wrong ones do not."""

import __future__

import copy
import importlib.util
import inspect
import math
import os
import re
import sys
from numbers import Number
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import exercises  # noqa: E402

LATER = __future__.annotations.compiler_flag  # annotations are not evaluated, as in the chapters
ALL = [one for chapter in exercises.chapters() for one in exercises.exercises_in(chapter)]
os.environ.setdefault("MPLBACKEND", "agg")


# These need files that cells before them have written, or models that a loop has trained.
WHOLE = {"ex-checkpoint-count", "ex-checkpoint-fuzz", "ex-zero-gates"}
RUN = "llamba('distill', '--out', 'run', *small)"
SLOW = {"ex-hybrid-run", "ex-harness-paired", "ex-harness-window", "ex-budget-8b", "ex-budget-recompute",
        "ex-mohawk-values", "ex-edge-uneven", "ex-start-entries", "ex-start-state", "ex-zero-gates"}


def solved(one, folder, monkeypatch):
    """The names after a solution's code has run, in a module that begins with what it needs of its chapter."""
    if module := exercises.module_of(one.chapter):
        importlib.import_module(f"llamba_ref.{module}")  # registers classes, as the chapter does
    before = exercises.needed(one.chapter, one.place, "\n".join(one.code))
    if one.label == "ex-hybrid-run":  # of the chapter's commands it needs the first distillation alone
        before = [text for text in before if not text.startswith("llamba(") or text == RUN]
    if one.label in WHOLE:
        before = [source for kind, source in exercises.cells_of(one.chapter)[: one.place] if kind == "code"]
    text = "\n".join([*before, *one.code]).replace("from __future__ import annotations\n", "")
    (folder / "chapter.py").write_text(exercises.MAGIC.sub(r"\1pass", text))
    spec = importlib.util.spec_from_file_location("chapter", folder / "chapter.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "chapter", module)  # where dataclasses look for it
    torch.manual_seed(0)
    code = compile((folder / "chapter.py").read_text(), folder / "chapter.py", "exec", LATER)
    exec(code, vars(module))
    return vars(module)


def checked(one, **answer):
    """Hold an answer against the check, as `python -m llamba_ref.check` does."""
    names = {}
    exec(compile(exercises.standalone(one), one.label, "exec"), names)
    torch.manual_seed(0)
    next(value for name, value in names.items() if name.startswith("check_"))(**answer)


def off(value):
    """A little more than it should be."""
    if isinstance(value, torch.Tensor):
        return ~value if value.dtype == torch.bool else value + torch.ones_like(value)
    if isinstance(value, Number):
        return 0 if value == math.inf else 2 * value + 1
    return value


def zero(value):
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return 0 * value if isinstance(value, Number) and value != math.inf else value


def spoilt(answer, name):
    """Wrong answers, made from a right one by making one of its values wrong: nothing, zeros, a little off. A change
    that leaves everything as it was is none."""
    value = answer[name]
    yield "nothing", answer | {name: (lambda *_, **__: None) if callable(value) else 1 if value is None else None}
    for kind, change in (("zeros", zero), ("off", off)):
        if inspect.isclass(value):
            def forward(self, *args, change=change, value=value):
                return tree_map(change, value.forward(self, *args))

            yield kind, answer | {name: type("Wrong", (value,), {"forward": forward})}
        elif callable(value):
            seen = []

            def wrong(*args, change=change, value=value, seen=seen, **options):
                right = value(*args, **options)
                seen.append(not same(right, tree_map(change, right)))
                return tree_map(change, right)

            wrong.changes = seen
            yield kind, answer | {name: wrong}
        elif not same(value, tree_map(change, value)):
            yield kind, answer | {name: tree_map(change, value)}


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else repr(a) == repr(b)


@pytest.mark.parametrize("one", [
    pytest.param(one, id=one.label, marks=[pytest.mark.slow] * (one.label in SLOW)) for one in ALL if one.code])
def test_the_code_of_a_solution_runs_and_passes_its_check(one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = solved(one, tmp_path, monkeypatch)
    if not one.check:
        return
    answer = {name: names[name] for name in one.wants}
    checked(one, **copy.copy(answer))
    for name in one.wants:
        for kind, wrong in spoilt(answer, name):
            try:
                checked(one, **wrong)
            except Exception:
                continue
            assert not any(getattr(wrong[name], "changes", [True])), f"{name}: {kind} passes"


def test_no_code_is_left_out():
    """Each fence of Python and each cell below a solution belongs to an exercise; what has a check has code."""
    fences = cells = 0
    for chapter in exercises.chapters():
        solving = False
        for kind, source in exercises.cells_of(chapter):
            if kind == "markdown":
                solving = ":::{solution}" in source
                blocks = [body for what, _, body in exercises.BLOCK.findall(source) if what == "solution"]
                fences += sum(body.count("```python\n") for body in blocks)
            elif solving and not source.startswith(("#| hide", "#| check")):
                cells += 1
    assert sum(len(one.code) for one in ALL) == fences + cells
    assert all(one.solution for one in ALL)
    assert not [one.label for one in ALL if one.check and not one.code]


def test_every_check_is_of_an_exercise_that_says_what_it_wants():
    """The text names each function and number that is checked; exercises of parts I to III are covered."""
    for one in ALL:
        for name in one.wants:
            assert re.search(rf"`{name}\b[^`]*`", one.text), f"{one.label} does not say that it wants {name}"
    assert len([one for one in ALL if one.check and int(one.chapter[:2]) <= 20]) > 40


def test_the_package_has_the_checks_of_the_notebooks():
    assert exercises.CHECKS.read_text() == exercises.packaged(), "run make export"
