"""The course page names what there is; the slides have every figure and need no network."""

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]
import course  # noqa: E402
import yaml  # noqa: E402

WEEKS = yaml.safe_load(course.PLANS.read_text())
TEXT = (ROOT / "docs" / "course.md").read_text()
PARTS = ("I · Linear recurrence", "II · State space duality", "III · From Llama to Llamba", "IV · Kernels",
         "V · Where this stands")


def test_there_are_two_plans_and_their_chapters_and_exercises_exist():
    assert {name: len(weeks) for name, weeks in WEEKS.items()} == {"six": 6, "twelve": 12}
    for name, text in course.plans().items():  # raises for a chapter or an exercise that is not there
        assert text.count("**Week ") == len(WEEKS[name]) and "{ref}" in text
        assert f"_course_{name}.md" in TEXT


def test_chapters_come_in_the_books_order_and_once():
    for weeks in WEEKS.values():
        read = [course.chapter_of(chapter) for week in weeks for chapter in week["read"].split()]
        assert read == sorted(set(read))


def test_the_figures_that_lectures_show_exist():
    labels = set(re.findall(r"#\| label: (fig-[\w-]+)", "".join(p.read_text() for p in (ROOT / "nbs").glob("*.ipynb"))))
    assert set(re.findall(r"\{numref\}`(fig-[\w-]+)`", course.PLANS.read_text())) <= labels


def test_projects_say_with_what_they_begin_and_what_they_need():
    projects = re.findall(r"^\d+\. (.*)$", TEXT.split("## Projects")[1], re.MULTILINE)
    assert 8 <= len(projects) <= 12
    for project in projects:
        assert "*Begin with*" in project and "*Good:*" in project, project
        assert re.search(r"(Laptop|GPU), \d+ h", project), project
    named = set(re.findall(r"`(bench/\w+\.py)`", TEXT))
    assert named and all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("caption", PARTS)
def test_a_deck_has_all_figures_and_no_address(caption):
    pytest.importorskip("mdit_py_plugins.dollarmath")
    from docs import slides

    chapters = slides.parts()[caption]
    page = slides.deck(caption, chapters, slides.theorem_names())
    figures = theorems = 0
    for chapter in chapters:
        cells = json.loads((ROOT / "nbs" / f"{chapter}.ipynb").read_text())["cells"]
        figures += sum("#| fig-cap: " in "".join(cell["source"]) for cell in cells)
        theorems += sum(len(slides.BLOCK.findall("".join(c["source"]))) for c in cells if c["cell_type"] == "markdown")
    assert page.count("<figure>") == page.count("data:image/png;base64,") == figures > 0
    assert len(re.findall(r'<section class="(?!part|chapter|figure|summary)', page)) == theorems > 0
    assert page.count('class="chapter"') == len(chapters)
    outside = re.findall(r'(?:src|href)="(?!data:)([^"]*)"|url\(([^)]*)\)|(https?://[^\s"<]+)', page)
    assert outside == [("mathjax/tex-chtml.js", "", "")]
    assert not re.search(r"\{(prf:ref|eq|cite|numref|doc)", page)
