"""Pages of the site that have to agree with the notebooks; what needs a browser is in test_site.py."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
PAPER = re.compile(r"arxiv\.org/abs/(\d{4}\.\d{5})")


def markdown(path):
    """All prose of a notebook."""
    return "\n".join(
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"
    )


def test_the_bibliography_has_every_paper():
    """A paper that a chapter or the README links to has an entry with its arXiv number, and only one."""
    entries = re.findall(r"eprint = \{(\S+)\}", (ROOT / "docs" / "refs.bib").read_text())
    assert len(entries) == len(set(entries)) > 0
    linked = {number for path in NOTEBOOKS for number in PAPER.findall(markdown(path))} | set(
        PAPER.findall((ROOT / "README.md").read_text())
    )
    assert {"2311.01927", "2405.21060", "2408.10189", "2502.14458"} <= linked
    assert not linked - set(entries)


def test_every_chapter_is_in_the_contents():
    """The landing page lists each notebook once, in the README's order."""
    listed = re.findall(r"^nbs/(\w+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [path.stem for path in NOTEBOOKS]
    readme = re.findall(r"\(nbs/(\w+)\.ipynb\)", (ROOT / "README.md").read_text().split("## The book")[1])
    assert listed == readme


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_chapter_installs_the_package_on_colab_only(path):
    """The first code cell installs the package where there is a google.colab, nowhere else; no cell needs nbdev."""
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    guard, install = [line for line in cells[0].splitlines() if line and not line.startswith(("#|", "import sys"))]
    assert guard == 'if "google.colab" in sys.modules:'
    assert install == "    %pip install -q git+https://github.com/llamba-ref/llamba_ref"
    assert not any(re.search(r"^\s*(import|from) nbdev", cell, re.MULTILINE) for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_has_a_caption_and_words_for_who_cannot_see_it(path):
    """A cell with a picture has a label, a caption and an alternative text; a cell without has none of them."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            drawn = any("image/png" in output.get("data", {}) for output in cell["outputs"])
            head = "".join(cell["source"]).splitlines()
            found = {
                name
                for name in ("label", "fig-cap", "fig-alt")
                if any(re.match(rf"#\| {name}: \S", line) for line in head)
            }
            assert len(found) == (3 if drawn else 0), f"cell {cell['id']} has {sorted(found)}"


def test_figure_labels_are_unique():
    labels = [label for path in NOTEBOOKS for label in re.findall(r'"#\| label: (\S+)\\n"', path.read_text())]
    assert len(labels) == len(set(labels)) > 50 and all(re.fullmatch(r"fig-[a-z0-9-]+", label) for label in labels)


def test_drawings_in_chapters_are_those_of_the_site():
    """docs/images holds the drawings that notebooks show outside of the site: `python docs/_ext/drawings.py`."""
    spec = importlib.util.spec_from_file_location("drawings", ROOT / "docs" / "_ext" / "drawings.py")
    drawings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawings)
    images = {path.stem: path.read_text() for path in (ROOT / "docs" / "images").glob("*.svg")}
    assert images == {name: drawings.alone(draw()) for name, draw in drawings.IN_CHAPTERS.items()}
    prose = "\n".join(map(markdown, NOTEBOOKS))
    assert set(re.findall(r"\(\.\./docs/images/(\w+)\.svg\)", prose)) == set(images)
