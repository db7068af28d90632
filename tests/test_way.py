"""The way through the book: what a chapter needs lies behind it, what a reader sees is short, and times are counted."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "docs" / "_ext")]
import way  # noqa: E402

CHAPTERS = {name: way.about(name) for names in way.parts().values() for name in names}
MAIN = [name for name, one in CHAPTERS.items() if one.standing != "appendix" and one.number > 0]  # zero links to proofs


def notebook(*cells):
    """A notebook of ("markdown" or "code", source)."""
    made = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    return nbformat.v4.new_notebook(cells=[made[kind](source) for kind, source in cells])


def needed(name):
    """The chapters that the first cell of a chapter links to."""
    first = nbformat.read(way.NOTEBOOKS / f"{name}.ipynb", 4).cells[0].source
    return [one for one in re.findall(r"\((\d\d_\w+)\.ipynb", first) if CHAPTERS[one].standing != "appendix"]


@pytest.mark.parametrize("name", MAIN)
def test_a_chapter_needs_nothing_that_comes_later(name):
    assert all(CHAPTERS[one].number < CHAPTERS[name].number for one in needed(name))


def test_the_essential_chapters_need_no_others():
    essential = [name for name in MAIN if CHAPTERS[name].standing == "essential"]
    assert {one for name in essential for one in needed(name) if CHAPTERS[one].standing != "essential"} == set()
    assert len(essential) > 10 and CHAPTERS["16_mohawk"].standing == "essential"
    assert {CHAPTERS[name].standing for name in way.FURTHER} == {"further"}


def test_reading_times_are_words_and_lines_in_view():
    short, long = "\n".join(["x = 1"] * 12), "\n\n".join(["x = 1"] * 30)
    made = notebook(("markdown", "# Title\n\n> About\n> it.\n\n" + "word " * 795), ("code", "#| default_exp x"),
                    ("code", short), ("code", "#| exports\n" + long), ("code", "#| hide\n" + long),
                    ("code", "#| check: ex-a\n" + long))
    assert way.chapter("50_made", made) == way.Chapter("50_made", "Title", "About it.", 5, 2)


@pytest.mark.parametrize(("source", "title"), [
    ("x = 1", None), ("\n".join(["x = 1"] * 12), None), ("\n\n".join(["x = 1"] * 12), None),
    ("\n".join(["x = 1"] * 13), "code, 13 lines"),
    ("#| exports\n" + "\n".join(["def f():"] + ["    pass"] * 20 + ["class G:"]), "f, G, 22 lines"),
    ("#| exports\n" + "\n".join(f"def f{i}():\n    pass" for i in range(8)), "f0, f1, f2, ..., 16 lines"),
    ("#| fig-cap: A\n" + "\n".join(["x = 1"] * 13), "the figure's code, 13 lines"),
    ("#| export\nimport torch", "Imports"), ("#| check: ex-a\ndef check(f):\n    assert f() == 1", "The check"),
])  # fmt: skip
def test_what_stands_for_code_that_is_folded(source, title):
    assert way.fold(*way.directives(source), solving=False) == title


def test_code_of_solutions_is_folded():
    assert way.fold(*way.directives("x = 1"), solving=True) == "Solution in code"


def test_parts_go_on_without_a_caption():
    assert list(way.parts())[0] == "Start" and way.parts()["Start"][:2] == ["00_in_100_lines", "01_conventions"]


def test_contents_and_routes_have_every_chapter_and_their_times():
    contents, routes = way.contents(CHAPTERS), way.routes(CHAPTERS)
    assert all(f"(nbs/{name}.ipynb)" in contents and f"| {one.minutes} min |" in contents
               for name, one in CHAPTERS.items())
    essential = [one for one in CHAPTERS.values() if one.standing == "essential"]
    assert way.long(essential) in routes and f"{CHAPTERS['00_in_100_lines'].minutes} minutes to read" in routes
