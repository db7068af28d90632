"""Turns the notebooks of nbs/ into pages of the site, just before Sphinx reads them.

The notebooks speak nbdev's language (`#| exports`, `#| fig-cap: ...`), MyST-NB reads cell metadata. Outputs are the
saved ones."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
from course import minutes, plans
from drawings import llama_to_llamba, special_cases
from exercises import chapters, exercises_in
from sphinx.errors import ExtensionError

from llamba_ref.conventions import load_result

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS, PAGES, REFERENCE = ROOT / "nbs", ROOT / "docs" / "nbs", ROOT / "docs" / "api"

DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?\s*(.*?)\s*$")
BLOCK = re.compile(r"^:::\{(exercise|solution)\}(.*?)\n(.*?)^:::$", re.DOTALL | re.MULTILINE)


def directives(source: str) -> tuple[dict[str, str], str]:
    """The `#|` lines at the head of a cell, by name, and the rest of the cell."""
    lines, found = source.splitlines(), {}
    while lines and lines[0].startswith("#|"):
        name, value = DIRECTIVE.match(lines.pop(0)).groups()
        found[name] = value
    return found, "\n".join(lines).strip("\n")


def metadata(found: dict[str, str]) -> dict:
    """What MyST-NB wants to know of a cell with these directives."""
    tags = ["exported"] if "exports" in found else ["hide-input"] if "export" in found else []
    result = {"tags": tags} if tags else {}
    if "export" in found:
        result["mystnb"] = {"code_prompt_show": "Imports", "code_prompt_hide": "Imports"}
    if "fig-cap" in found:
        result["mystnb"] = {
            "figure": {"caption": found["fig-cap"], "name": found["label"]},
            "image": {"alt": found["fig-alt"]},
        }
    return result


def run_times() -> dict[str, str]:
    """How long each chapter ran, in words, as last measured by `make notebooks RECORD=--record`."""
    record = load_result("chapters")
    return {
        one["chapter"]: f"runs in {one['seconds']:.0f} s on {record['cores']} CPU cores" for one in record["chapters"]
    }


def facts(name: str, minutes: int, run_time: str) -> str:
    """The line under a chapter's title: where to run it, how long it takes to read and to run."""
    colab = f"https://colab.research.google.com/github/llamba-ref/llamba_ref/blob/main/nbs/{name}.ipynb"
    parts = [
        f"[Open in Colab]({colab})",
        f"{{download}}`Download notebook <../../nbs/{name}.ipynb>`",
        f"{minutes} min to read",
        run_time,
    ]
    return "{.chapter-facts}\n" + " · ".join(parts)


def with_facts(title_cell: str, line: str) -> str:
    """The first cell of a chapter with the line of facts under its title."""
    title, rest = title_cell.split("\n", 1)
    return f"{title}\n\n{line}\n{rest}"


def with_commands(source: str, numbers: dict[str, str]) -> str:
    """Exercises with the command that checks an answer, where there is one."""

    def told(block: re.Match) -> str:
        label = re.search(r"^:label: (\S+)$", block[0], re.MULTILINE)
        if block[1] != "exercise" or label[1] not in numbers:
            return block[0]
        return f"{block[0][:-3].rstrip()}\n\n`python -m llamba_ref.check {numbers[label[1]]} mine.py`\n:::"

    return BLOCK.sub(told, source)


def page(notebook: nbformat.NotebookNode, name: str, run_time: str) -> nbformat.NotebookNode:
    """A notebook as MyST-NB wants it: no cells for machines only, code of solutions folded, facts under the title."""
    cells, solving, numbers = [], False, {one.label: one.number for one in exercises_in(name) if one.check}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            solving = ":::{solution}" in cell.source
            cells.append(nbformat.v4.new_markdown_cell(with_commands(cell.source, numbers), id=cell.id))
            continue
        found, body = directives(cell.source)
        if "hide" in found or found.get("eval") == "false" or not body:
            continue
        about = metadata(found)
        if "check" in found:
            prompt = {"code_prompt_show": "The check", "code_prompt_hide": "The check"}
            about = {"tags": ["hide-cell"], "mystnb": prompt}
        elif solving:
            about.setdefault("tags", []).append("hide-cell")
            about["mystnb"] = {
                **about.get("mystnb", {}),
                "code_prompt_show": "Solution in code",
                "code_prompt_hide": "Solution in code",
            }
        cells.append(nbformat.v4.new_code_cell(body, id=cell.id, metadata=about, outputs=cell.outputs))
    if not cells[0].source.startswith("# "):
        raise ExtensionError(f"nbs/{name}.ipynb has to begin with its title")
    time = minutes([(cell.cell_type, cell.source) for cell in notebook.cells])
    cells[0].source = with_facts(cells[0].source, facts(name, time, run_time))
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def exercises_of(notebook: nbformat.NotebookNode) -> str:
    """A chapter's exercises and their solutions, folded, for the index of all exercises."""
    title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
    parts = [f"## {title}\n"]
    for cell in notebook.cells:
        for kind, argument, body in BLOCK.findall(cell.source if cell.cell_type == "markdown" else ""):
            options = dict(re.findall(r"^:([\w-]+): *(.*)$", body, re.MULTILINE))
            text = re.sub(r"^:[\w-]+:.*\n", "", body, flags=re.MULTILINE)
            text = re.sub(r"(\$\$) *\(eq-[\w-]+\)", r"\1", text).strip()  # an equation has one number, in its chapter
            text = re.sub(r"\]\((\w+\.ipynb)", r"](nbs/\1", text)
            if kind == "exercise":
                link = f"{{ref}}`In the chapter <{options['label']}>`"
                name = argument.strip() or "Exercise"
                parts.append(f"::::{{admonition}} {name}\n:class: exercise-copy\n\n{text}\n\n{link}\n::::\n")
            else:
                parts.append(f"::::{{admonition}} Solution\n:class: dropdown\n\n{text}\n::::\n")
    return "\n".join(parts) if len(parts) > 1 else ""


def problems() -> str:
    """How many exercises there are, and how their answers are checked."""
    every = [one for chapter in chapters() for one in exercises_in(chapter)]
    checked, code = [one for one in every if one.check], [one for one in every if one.code]
    return (f"Of the {len(every)} exercises {len(checked)} are checked by the program. "
            f"The solutions of {len(code)} have code, all of which is run by the tests. "
            "The others ask for a derivation or a reason.\n")


def summary(notebook: nbformat.NotebookNode) -> str:
    """The quoted lines under a chapter's title, which are also its module's docstring."""
    return " ".join(line.removeprefix("> ") for line in notebook.cells[0].source.splitlines() if line.startswith("> "))


def module_page(module: str, chapter: str) -> str:
    """The reference page of a module."""
    return (f"# {module}\n\n`llamba_ref.{module}` is derived and tested in {{doc}}`/nbs/{chapter}`.\n\n"
            f"```{{eval-rst}}\n.. automodule:: llamba_ref.{module}\n   :members:\n```\n")


def stage(app) -> None:
    """Write docs/nbs (chapters) and docs/api (modules) anew, and what other pages include. The contents of index.md
    give the order."""
    for folder in (PAGES, REFERENCE):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    times, exercises, modules = run_times(), [], []
    for name in re.findall(r"^nbs/(\w+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE):
        if name not in times:
            raise ExtensionError(f"nbs/{name}.ipynb was never timed: make notebooks RECORD=--record")
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
        nbformat.write(page(notebook, name, times[name]), PAGES / f"{name}.ipynb")
        exercises.append(exercises_of(notebook))
        module = next(m[1] for cell in notebook.cells if (m := re.match(r"#\| default_exp (\S+)", cell.source)))
        (REFERENCE / f"{module}.md").write_text(module_page(module, name))
        modules.append(f"[`{module}`](api/{module}.md)\n: {summary(notebook)}\n")
    (PAGES / "_exercises.md").write_text("\n".join(filter(None, exercises)))  # docs/exercises.md includes it
    (PAGES / "_modules.md").write_text("\n".join(modules))  # docs/api.md includes it
    for plan, text in plans().items():
        (PAGES / f"_course_{plan}.md").write_text(text)  # docs/course.md includes them
    (PAGES / "_problems.md").write_text(problems())
    (PAGES / "_llama_to_llamba.svg").write_text(llama_to_llamba())  # docs/index.md shows it
    (PAGES / "_special_cases.svg").write_text(special_cases())  # docs/map.md shows it


def setup(app):
    app.connect("builder-inited", stage, priority=1)
    return {"parallel_read_safe": True}
