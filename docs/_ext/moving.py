"""The moving pictures of docs/_static/moving.js: places for them in chapters, and the script on pages that have one."""

from __future__ import annotations

import re

PLACE = re.compile(r'<div class="moving" data-picture="([\w-]+)">.*?</div>', re.DOTALL)


def with_pictures(source: str) -> str:
    """A chapter's text with the picture itself wherever a notebook only says that there is one."""
    return PLACE.sub(r"```{raw} html\n:file: ../_moving/\1.html\n```", source)


def load(app, _name, _template, context, _doctree) -> None:
    """Script and style for the pages that have a picture."""
    if '<section class="moving"' in context.get("body", ""):
        app.add_css_file("moving.css")
        app.add_js_file("moving.js", loading_method="defer")


def setup(app):
    app.connect("html-page-context", load)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
