"""The layout: chapters in an order that never looks ahead, modules without a circle, lines that fit."""

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
APPENDICES = 80  # from this number on: tools, which any chapter may use
PACKAGE = ROOT / "llamba_ref"
LONGEST_CELL = 60


def number(path):
    return int(path.stem[:2])


def sources(path):
    """The code cells of a notebook."""
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def python_of(cell):
    """A cell without the lines that only a notebook understands."""
    return re.sub(r"^( *)[%!].*$", r"\1pass", cell, flags=re.MULTILINE)


def imported(text, package="llamba_ref"):
    """The modules of this package that some code imports, at any depth; `package` is where relative imports start."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("llamba_ref."))
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("llamba_ref")):
            start = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names = [alias.name for alias in node.names] if module in ("llamba_ref", "llamba_ref.kernels") else [""]
            yield from (f"{module}.{name}".rstrip(".") for name in names)


def chapter_of():
    """The number of the chapter that begins each module."""
    begun = {}
    for path in NOTEBOOKS:
        for cell in sources(path):
            if found := re.match(r"#\| default_exp (\S+)", cell):
                begun[f"llamba_ref.{found[1]}"] = number(path)
    return begun


def test_every_number_is_given_once_and_none_is_left_out():
    numbers = [number(path) for path in NOTEBOOKS]
    chapters = [n for n in numbers if n < APPENDICES]
    assert chapters == list(range(len(chapters)))
    assert numbers[len(chapters) :] == list(range(APPENDICES, APPENDICES + len(numbers) - len(chapters)))


def test_the_contents_are_in_the_order_of_the_numbers():
    listed = re.findall(r"^nbs/(\w+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert listed == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_chapter_imports_from_a_later_one(path):
    """A chapter imports from itself, earlier chapters and appendices; an appendix' module from no later appendix."""
    begun, appendix = chapter_of(), number(path) >= APPENDICES
    for cell in (cell for cell in sources(path) if cell.startswith("#| export") or not appendix):
        for module in imported(python_of(cell)):
            home = begun[module]
            tool = home >= APPENDICES and not appendix
            assert tool or home <= number(path), f"{path.stem} imports {module}, which chapter {home} begins"


def modules():
    """Every module of the package, and the modules that it imports at any depth, by name."""
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        if not path.name.startswith("_"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            graph[name] = set(imported(path.read_text(), name.rpartition(".")[0]))
    return graph


def test_modules_import_in_no_circle():
    order = list(TopologicalSorter(modules()).static_order())  # raises CycleError that names the circle
    assert len(order) > 20


def test_operators_stand_below_models():
    """Operators import what all share and operators alone; kernels nothing but that and what they share."""
    graph = {name.removeprefix("llamba_ref."): {m.removeprefix("llamba_ref.") for m in found}
             for name, found in modules().items()}
    operators = {"scan", "gateloop", "ssd", "conv"}
    for name in operators:
        assert graph[name] <= operators | {"operators"}, name
    for name in (name for name in graph if name.startswith("kernels.")):
        assert all(m.startswith("kernels.") or m == "operators" for m in graph[name]), name


def test_cells_fit_on_a_screen():
    long = {path.stem: n for path in NOTEBOOKS if (n := max(c.count("\n") + 1 for c in sources(path))) > LONGEST_CELL}
    assert not long


def test_linter_finds_nothing():
    """Lines of at most 120 characters, no unused names, sorted imports, in the package, tests, benches and chapters."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format", "concise", ROOT],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
