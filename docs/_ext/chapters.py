"""Turns the notebooks of nbs/ into pages of the site, just before Sphinx reads them.

The notebooks speak nbdev's language (`#| exports`, `#| fig-cap: ...`), MyST-NB reads cell metadata. Outputs are the
saved ones."""

from __future__ import annotations

import re
import shutil

import nbformat
from course import plans
from drawings import IN_CHAPTERS, llama_to_llamba, special_cases
from exercises import BLOCK, exercises_in
from exercises import chapters as all_chapters
from moving import with_pictures
from sphinx.errors import ExtensionError
from way import NOTEBOOKS, ROOT, Chapter, chapter, contents, directives, fold, parts, routes

from llamba_ref.conventions import load_result

PAGES, REFERENCE = ROOT / "docs" / "nbs", ROOT / "docs" / "api"

DRAWING = re.compile(r"^!\[[^\]]*\]\(\.\./docs/images/(\w+)\.svg\)$", re.MULTILINE)


def metadata(found: dict[str, str], body: str, solving: bool) -> dict:
    """What MyST-NB wants to know of a cell with these directives."""
    title, result = fold(found, body, solving), {}
    tags = ["exported"] * ("exports" in found)
    if title:
        tags.append("hide-cell" if solving or "check" in found else "hide-input")
        result["mystnb"] = {"code_prompt_show": title, "code_prompt_hide": title}
    if tags:
        result["tags"] = tags
    if "fig-cap" in found:
        result.setdefault("mystnb", {}).update(
            figure={"caption": found["fig-cap"], "name": found["label"]}, image={"alt": found["fig-alt"]})
    return result


def run_times() -> dict[str, str]:
    """How long each chapter ran, in words, as last measured by `make notebooks RECORD=--record`."""
    record = load_result("chapters")
    return {
        one["chapter"]: f"runs in {one['seconds']:.0f} s on {record['cores']} CPU cores" for one in record["chapters"]
    }


def facts(about: Chapter, run_time: str) -> str:
    """The line under a title: whether the chapter is on the way, where to run it, how long reading and running take."""
    colab = f"https://colab.research.google.com/github/llamba-ref/llamba_ref/blob/main/nbs/{about.name}.ipynb"
    parts = [
        {"essential": "**Essential**", "further": "Further reading", "appendix": "Appendix"}[about.standing],
        f"[Open in Colab]({colab})",
        f"{{download}}`Download notebook <../../nbs/{about.name}.ipynb>`",
        f"{about.minutes} min to read" + f" (and {about.folded} for what is folded)" * (about.folded > 0),
        run_time,
    ]
    return "{.chapter-facts}\n" + " · ".join(parts)


def with_facts(title_cell: str, line: str) -> str:
    """The first cell of a chapter with the line of facts under its title."""
    title, rest = title_cell.split("\n", 1)
    return f"{title}\n\n{line}\n{rest}"


def with_drawings(prose: str) -> str:
    """A cell whose drawings are a part of the page and take its colours; in a notebook they are files."""
    return DRAWING.sub(r"```{raw} html\n:file: _\1.svg\n```", prose)


def with_commands(source: str, numbers: dict[str, str]) -> str:
    """Exercises with the command that checks an answer, where there is one."""

    def told(block: re.Match) -> str:
        label = re.search(r"^:label: (\S+)$", block[0], re.MULTILINE)
        if block[1] != "exercise" or label[1] not in numbers:
            return block[0]
        return f"{block[0][:-3].rstrip()}\n\n`python -m llamba_ref.check {numbers[label[1]]} mine.py`\n:::"

    return BLOCK.sub(told, source)


def page(notebook: nbformat.NotebookNode, about: Chapter, run_time: str) -> nbformat.NotebookNode:
    """A notebook as MyST-NB wants it: no cells for machines only, long code folded, facts under the title."""
    numbers = {one.label: one.number for one in exercises_in(about.name) if one.check}
    cells, solving = [], False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            solving = ":::{solution}" in cell.source
            prose = with_pictures(with_drawings(with_commands(cell.source, numbers)))
            cells.append(nbformat.v4.new_markdown_cell(prose, id=cell.id))
            continue
        found, body = directives(cell.source)
        if "hide" in found or found.get("eval") == "false" or not body:
            continue
        seen = metadata(found, body, solving)
        cells.append(nbformat.v4.new_code_cell(body, id=cell.id, metadata=seen, outputs=cell.outputs))
    if not cells[0].source.startswith("# "):
        raise ExtensionError(f"nbs/{about.name}.ipynb has to begin with its title")
    cells[0].source = with_facts(cells[0].source, facts(about, run_time))
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


def modules_of(notebook: nbformat.NotebookNode) -> list[str]:
    """The module that a chapter begins, if it begins one: chapter zero exports nothing."""
    return [m[1] for cell in notebook.cells if (m := re.match(r"#\| default_exp (\S+)", cell.source))]


def problems() -> str:
    """How many exercises there are, and how their answers are checked."""
    every = [one for name in all_chapters() for one in exercises_in(name)]
    checked, code = [one for one in every if one.check], [one for one in every if one.code]
    return (f"Of the {len(every)} exercises {len(checked)} are checked by the program. "
            f"The solutions of {len(code)} have code, all of which is run by the tests. "
            "The others ask for a derivation or a reason.\n")


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
    times, exercises, modules, chapters = run_times(), [], [], {}
    for name, draw in (IN_CHAPTERS | {"llama_to_llamba": llama_to_llamba, "special_cases": special_cases}).items():
        (PAGES / f"_{name}.svg").write_text(draw())  # chapters, docs/index.md and docs/map.md show them
    for name in (name for names in parts().values() for name in names):
        if name not in times:
            raise ExtensionError(f"nbs/{name}.ipynb was never timed: make notebooks RECORD=--record")
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
        about = chapters[name] = chapter(name, notebook)
        nbformat.write(page(notebook, about, times[name]), PAGES / f"{name}.ipynb")
        exercises.append(exercises_of(notebook))
        for module in modules_of(notebook):
            (REFERENCE / f"{module}.md").write_text(module_page(module, name))
            modules.append(f"[`{module}`](api/{module}.md)\n: {about.about}\n")
    (PAGES / "_routes.md").write_text(routes(chapters))  # docs/index.md includes it
    (PAGES / "_contents.md").write_text(contents(chapters))  # and this
    for plan, text in plans().items():
        (PAGES / f"_course_{plan}.md").write_text(text)  # docs/course.md includes them
    (PAGES / "_problems.md").write_text(problems())
    (PAGES / "_exercises.md").write_text("\n".join(filter(None, exercises)))  # docs/exercises.md includes it
    (PAGES / "_modules.md").write_text("\n".join(modules))  # docs/api.md includes it


def setup(app):
    app.connect("builder-inited", stage, priority=1)
    return {"parallel_read_safe": True}
