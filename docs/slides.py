"""Slides of each part of the book, made from its chapters: questions, theorems, figures with captions, summaries.

    make slides
    python docs/slides.py --out decks

A deck is one HTML file that holds its figures; MathJax lies beside it. Arrow keys turn pages, d changes the theme."""

from __future__ import annotations

import html
import re
import shutil
import sys
from pathlib import Path

import nbformat
import tyro
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext")]
from way import parts, summary  # noqa: E402

MATHJAX = DOCS / "_static" / "mathjax"
BLOCK = re.compile(r"^(:{3,})\{prf:(?!proof)(\w+)\}(.*?)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
STYLE, SCRIPT = ((DOCS / f"slides.{kind}").read_text() for kind in ("css", "js"))
BULLETS = 5  # points of a summary on one slide


def numbered_parts() -> dict[str, list[str]]:
    """The chapters of each part that has a number, by its caption."""
    return {caption: names for caption, names in parts().items() if " · " in caption}


def plain(text: str, names: dict[str, str]) -> str:
    """MyST as Markdown: references become words, links their text."""
    text = re.sub(r"^:[\w-]+:.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"(\$\$)\s*\(eq-[\w-]+\)", r"\1", text)
    text = re.sub(r"\s*\{cite:\w+\}`[^`]*`", "", text)
    text = re.sub(r"\{(?:prf:ref|numref)\}`(?:[^<`]*<)?([\w-]+)>?`", lambda m: names.get(m[1], "above"), text)
    text = re.sub(r"\{(?:eq)\}`[^`]*`", "the equation above", text)
    text = re.sub(r"\{\w+\}`([^<`]+?)\s*(?:<[^`]*>)?`", r"\1", text)
    return re.sub(r"\[([^\]]*)\]\((?:[^)]*)\)", r"\1", text).strip()


def markdown() -> MarkdownIt:
    """Markdown with formulas for MathJax."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    delimiters = {False: r"\({}\)", True: r"\[{}\]"}
    return parser.use(
        dollarmath_plugin, double_inline=True,
        renderer=lambda content, about: delimiters[bool(about["display_mode"])].format(html.escape(content.strip())))


def figure(cell: nbformat.NotebookNode) -> tuple[str, str, str] | None:
    """Picture, caption and alternative text of a cell that draws one."""
    found = dict(re.findall(r"^#\| (label|fig-cap|fig-alt): (.*)$", cell.source, re.MULTILINE))
    if "fig-cap" not in found:
        return None
    png = next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
    return "data:image/png;base64," + png.replace("\n", ""), found["fig-cap"], found["fig-alt"]


def slides_of(chapter: str, names: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """Kind, heading, HTML and chapter of each slide of a chapter."""
    notebook, render = nbformat.read(DOCS.parent / "nbs" / f"{chapter}.ipynb", 4), markdown().render
    first = notebook.cells[0].source
    title = first.splitlines()[0].removeprefix("# ")
    texts = [" ".join(p.split()) for p in first.split("\n\n")[1:] if p[:1].isalpha()]
    texts = [p for p in texts if not p.startswith(("You need", "It needs", "At the end"))] or [""]
    question = re.split(r" (?=At the end of this chapter|At the end you)", texts[0])[0]
    lead = markdown().renderInline(plain(summary(notebook), names))
    opening = f'<p class="lead">{lead}</p>' + render(plain(question, names))
    found = [("chapter", title, opening)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if drawn := figure(cell):
                source, caption, alt = drawn
                words = markdown().renderInline(plain(caption, names))
                found.append(("figure", "", f'<figure><img src="{source}" alt="{html.escape(alt)}">'
                                            f"<figcaption>{words}</figcaption></figure>"))
            continue
        for _, kind, name, body in BLOCK.findall(cell.source):
            heading = f"{kind.capitalize()}: {name.strip()}" if name.strip() else kind.capitalize()
            found.append((kind, plain(heading, names), render(plain(body, names))))
        if points := re.search(r"^## Summary\n+(.*?)(?=^## |\Z)", cell.source, re.DOTALL | re.MULTILINE):
            items = re.findall(r"^- (.*?)(?=^- |\Z)", points[1], re.DOTALL | re.MULTILINE)
            for start in range(0, len(items), BULLETS):
                text = "\n".join(f"- {plain(item, names)}" for item in items[start : start + BULLETS])
                found.append(("summary", f"Summary: {title}", render(text)))
    return [(kind, heading or title, body, title) for kind, heading, body in found]


def theorem_names() -> dict[str, str]:
    """What to call a theorem to which a text refers, by its label."""
    names = {}
    for path in (DOCS.parent / "nbs").glob("*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            for _, kind, name, body in BLOCK.findall(cell.source if cell.cell_type == "markdown" else ""):
                if label := re.search(r"^:label: (\S+)", body, re.MULTILINE):
                    names[label[1]] = f"the {kind} “{name.strip()}”" if name.strip() else f"the {kind} above"
    return names



def deck(caption: str, chapters: list[str], names: dict[str, str]) -> str:
    """One part as an HTML page."""
    slides = [slide for chapter in chapters for slide in slides_of(chapter, names)]
    contents = [heading for kind, heading, _, _ in slides if kind == "chapter"]
    opening = "<ol>" + "".join(f"<li>{html.escape(title)}</li>" for title in contents) + "</ol>"
    slides = [("part", caption, opening, ""), *slides]
    body = []
    for number, (kind, heading, text, chapter) in enumerate(slides, 1):
        level = "h1" if kind in ("part", "chapter") else "h2"
        place = html.escape(" · ".join(filter(None, (caption, chapter))))
        body.append(
            f'<section class="{kind}" aria-label="{number} of {len(slides)}">'
            f"<{level}>{markdown().renderInline(heading)}</{level}>"
            f'<div class="body">{text}</div><footer><span>{place}</span>'
            f"<span>{number} / {len(slides)}</span></footer></section>")
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(caption)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
            f'<body><main id="stage">\n' + "\n".join(body) + f"\n</main>\n<script>{SCRIPT}</script>\n"
            '<script src="mathjax/tex-chtml.js" defer></script></body></html>\n')


def main(
    out: Path = DOCS / "_build" / "slides",  # where the decks go
):
    """Write PART.html for each part of the book."""
    out.mkdir(parents=True, exist_ok=True)
    if MATHJAX.is_dir():
        shutil.copytree(MATHJAX, out / "mathjax", dirs_exist_ok=True)
    names = theorem_names()
    for caption, chapters in numbered_parts().items():
        file = out / f"part-{caption.split(' · ')[0].lower()}.html"
        file.write_text(deck(caption, chapters, names))
        print(f"{file}: {len(chapters)} chapters")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
