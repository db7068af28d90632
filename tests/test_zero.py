"""Chapter zero stands alone: it imports nothing of the package, in few lines and small cells, as it says itself."""

import ast
import json
import re
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELLS = json.loads((ROOT / "nbs" / "00_in_100_lines.ipynb").read_text())["cells"]
LONGEST = 12
PROSE = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def code(cells):
    """The code cells but the one for Colab and those that draw."""
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [source for source in sources if "eval: false" not in source and "plt.show" not in source]


def defining(source):
    """Whether a cell defines something, and neither prints nor checks."""
    return not re.search(r"^ *(print\(|assert )", source, re.MULTILINE) and "import" not in source


def test_it_imports_nothing_of_the_package():
    tree = ast.parse("\n".join(code(CELLS)))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {name.split(".")[0] for name in modules} == {
        "json", "re", "importlib", "matplotlib", "torch", "einops", "safetensors", "tokenizers"}


def test_it_has_as_many_lines_as_it_says():
    """In the cells that define something, from the first section to the summary; blank lines are none."""
    end = next(i for i, cell in enumerate(CELLS) if "## Summary" in "".join(cell["source"]))
    counted = sum(bool(line.strip()) for source in filter(defining, code(CELLS[:end])) for line in source.splitlines())
    assert counted == int(re.search(r"is defined here, in (\d+) lines", PROSE)[1]) <= 115


def test_its_cells_are_small():
    """But for the imports, which define nothing."""
    small = [source for source in code(CELLS) if not source.startswith("import")]
    assert max(sum(bool(line.strip()) for line in source.splitlines()) for source in small) <= LONGEST


def test_every_section_says_where_it_is_proved():
    """The sections of the text end with a line in italics that links to later chapters, which exist."""
    sections = PROSE.split("\n## ")[1:-2]  # without summary and exercises
    for section in sections:
        proof = [line for line in section.splitlines() if line.startswith("*") and ".ipynb)" in line]
        assert proof, section.splitlines()[0]
        assert all((ROOT / "nbs" / name).exists() for name in re.findall(r"\((\w+\.ipynb)\)", proof[-1]))


def test_the_demo_that_it_compares_with_is_the_demo():
    """The saved row has the tokens of `make demo`; the yardstick, silence, is in the same file."""
    saved = json.loads((files("llamba_ref") / "assets/results/students.json").read_text())
    rows = {row["name"]: row for row in saved["rows"]}
    tokens = sum(saved["budgets"]["full"]) * saved["batch_size"] * saved["length"]
    assert rows["turning keys 1+2+3, full"]["tokens"] == tokens and "silence" in rows
