"""The way through the book: which chapters are essential, how long each takes, what a reader sees of its code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "nbs"
WORDS, LINES = 200, 15  # read in a minute: words of prose, lines of code
IN_VIEW = 12  # lines of code that a cell shows; what is longer is folded
APPENDICES = 80  # from this number on
FURTHER = {"05_gateloop_lm", "06_memory_horizon", "10_recall", "18_going_back", "19_throughput", "20_edge"}
FIRST_FURTHER = 21  # all chapters from this number on; the others are essential, and need no chapter that is not

DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?\s*(.*?)\s*$")


def directives(source: str) -> tuple[dict[str, str], str]:
    """The `#|` lines at the head of a cell, by name, and the rest of the cell."""
    lines, found = source.splitlines(), {}
    while lines and lines[0].startswith("#|"):
        name, value = DIRECTIVE.match(lines.pop(0)).groups()
        found[name] = value
    return found, "\n".join(lines).strip("\n")


def lines_of(code: str) -> int:
    """How many lines of code a reader reads: those that are not empty."""
    return sum(bool(line.strip()) for line in code.splitlines())


def fold(found: dict[str, str], body: str, solving: bool) -> str | None:
    """What stands for a folded cell of code; None: it is in view."""
    if "check" in found:
        return "The check"
    if solving:
        return "Solution in code"
    if "export" in found:
        return "Imports"
    if lines_of(body) <= IN_VIEW:
        return None
    names = [name for name in re.findall(r"^(?:class|def) (\w+)", body, re.MULTILINE) if not name.startswith("_")]
    what = ", ".join(names[:3]) + ", ..." * (len(names) > 3) if "exports" in found else ""
    kind = "the figure's code" if "fig-cap" in found else "code"
    return f"{what or kind}, {lines_of(body)} lines"


@dataclass(frozen=True)
class Chapter:
    """What a reader wants to know before a chapter."""

    name: str  # of its notebook
    title: str
    about: str  # in a line
    minutes: int  # to read with the code that is in view
    folded: int  # more, for the rest of the code

    @property
    def number(self) -> int:
        return int(self.name[:2])

    @property
    def standing(self) -> str:
        if self.number >= APPENDICES:
            return "appendix"
        return "further" if self.name in FURTHER or self.number >= FIRST_FURTHER else "essential"


def summary(notebook: nbformat.NotebookNode) -> str:
    """The quoted lines under a chapter's title, which are also its module's docstring."""
    return " ".join(line.removeprefix("> ") for line in notebook.cells[0].source.splitlines() if line.startswith("> "))


def chapter(name: str, notebook: nbformat.NotebookNode) -> Chapter:
    """Words and lines are counted."""
    words, seen, folded, solving = 0, 0, 0, False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            words, solving = words + len(cell.source.split()), ":::{solution}" in cell.source
            continue
        found, body = directives(cell.source)
        if not ("hide" in found or "check" in found or found.get("eval") == "false" or "default_exp" in found):
            hidden = fold(found, body, solving) is not None
            seen, folded = seen + lines_of(body) * (not hidden), folded + lines_of(body) * hidden
    title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
    return Chapter(name, title, summary(notebook), round(words / WORDS + seen / LINES), round(folded / LINES))


def about(name: str) -> Chapter:
    """The chapter of a notebook's name."""
    return chapter(name, nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4))


def parts() -> dict[str, list[str]]:
    """The chapters of each part, in the order of the contents in index.md. A list without a caption goes on with the
    part before it."""
    page, found = (ROOT / "docs" / "index.md").read_text(), {}
    for options, body in re.findall(r"^```\{toctree\}\n((?::.*\n)+)([^`]*)^```$", page, re.MULTILINE):
        caption = re.search(r"^:caption: (.+)$", options, re.MULTILINE)
        part = caption[1] if caption else part
        found[part] = found.get(part, []) + re.findall(r"^nbs/(\w+)$", body, re.MULTILINE)
    return {part: names for part, names in found.items() if names}


def long(chapters: list[Chapter]) -> str:
    """How long chapters take together, as a reader says it."""
    minutes = sum(one.minutes for one in chapters)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes / 60:.0f} hours"


def contents(chapters: dict[str, Chapter]) -> str:
    """All chapters, part by part: what they are about, how they stand and how long they take."""
    lines = ["| | chapter | what it is about | to read |", "| --- | --- | --- | --- |"]
    for caption, names in parts().items():
        lines.append(f"| | **{caption}** | | {long([chapters[name] for name in names])} |")
        for one in (chapters[name] for name in names):
            number = {"essential": f"**{one.number}**", "further": one.number, "appendix": ""}[one.standing]
            title = f"[{one.title}](nbs/{one.name}.ipynb)"
            title = f"**{title}**" if one.standing == "essential" else title
            lines.append(f"| {number} | {title} | {one.about} | {one.minutes} min |")
    return "\n".join(lines)


def routes(chapters: dict[str, Chapter]) -> str:
    """Three ways through the book, with their times."""
    essential = [one for one in chapters.values() if one.standing == "essential"]
    numbered = [one for one in chapters.values() if one.standing != "appendix"]
    zero = chapters["00_in_100_lines"]
    cards = [
        ("An evening", long([zero]), f"[{zero.title}](nbs/{zero.name}.ipynb): everything once, in small. Then "
         "step through [moving pictures](moving.md), [watch a student write](write.md), and distil your own with "
         "`make demo`."),
        ("A weekend", long(essential), "The essential chapters, in bold type in the [contents](#contents): from a "
         "recurrence to a distilled Llama, each step proved and run."),
        ("A term", long(numbered), "All parts, with exercises that are checked for you: "
         "[lectures for 6 and for 12 weeks](course.md)."),
    ]
    body = "\n".join(f":::{{grid-item-card}} {name}\n*{time} to read.* {text}\n:::\n" for name, time, text in cards)
    return f"::::{{grid}} 1 1 3 3\n:gutter: 3\n\n{body}::::\n"
