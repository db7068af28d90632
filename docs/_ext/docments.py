"""Autodoc for nbdev's way of writing: comments beside parameters, backticks and dollars in docstrings."""

from __future__ import annotations

import inspect
import re

from fastcore.docments import docments

SPAN = re.compile(r"\$([^$\n]+)\$|(?<!`)`([^`\n]+)`(?!`)")


def restructured(line: str) -> str:
    """A line in which `code` and $maths$ are as in Markdown, and all else is plain text, as reStructuredText."""
    parts, place = [], 0
    for span in SPAN.finditer(line):
        parts += [escape(line[place : span.start()]), f":math:`{span[1]}`" if span[1] else f"``{span[2]}``"]
        place = span.end()
    return "".join([*parts, escape(line[place:])])


def escape(text: str) -> str:
    """Text whose stars, bars and underscores mark nothing up."""
    return re.sub(r"([\\*|_])", r"\\\1", text)


def comments(obj) -> dict:
    """What stands beside each parameter and, as `return`, beside the result; beside the fields of a NamedTuple."""
    if hasattr(obj, "_fields"):
        found = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(obj), re.MULTILINE))
        return {name: found.get(name) for name in obj._fields}
    return {name: about.get("docment") for name, about in docments(obj, full=True, args_kwargs=True).items()}


def is_place(app, what, name, obj, skip, options) -> bool | None:
    """Skip the fields of a NamedTuple: they are its parameters, and Python's own text only numbers them."""
    return True if (inspect.getdoc(obj) or "").startswith("Alias for field number") else None


def describe(app, what, name, obj, options, lines) -> None:
    """Docstrings from Markdown, and a field for each commented parameter and for the result."""
    lines[:] = [restructured(line) for line in lines]
    bare = inspect.isclass(obj) and obj.__init__ is object.__init__ and not hasattr(obj, "_fields")
    if bare or what not in ("function", "method", "class"):
        return
    lines.append("")
    for parameter, text in comments(obj).items():
        if text and parameter not in ("self", "cls"):
            text = restructured(" ".join(text) if isinstance(text, list) else text)
            lines.append(f":returns: {text}" if parameter == "return" else f":param {parameter}: {text}")
    lines.append("")


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", describe)
    app.connect("autodoc-skip-member", is_place)
    return {"parallel_read_safe": True}
