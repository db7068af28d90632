"""A browser on the built site: what the tests and the screenshots share."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

SITE = Path(__file__).parent / "_build" / "html"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}  # a laptop, a phone
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # a browser that asks nobody for anything


def pages() -> list[str]:
    """Every page of the built site, as paths below its root."""
    return sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files, without a line of log for each."""

    def log_message(self, *_):
        pass


@contextmanager
def served() -> Iterator[str]:
    """The site's address, on a free port of this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium, or the browser that the variable CHROMIUM names."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        raise RuntimeError(
            "no Chromium found: install it (Debian: apt install chromium), or set CHROMIUM to the program's path"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(QUIET))
        yield browser
        browser.close()


def settle(page: Page) -> None:
    """Wait until scripts have loaded, formulas are typeset and fonts are there."""
    page.wait_for_load_state("networkidle")
    page.evaluate("async () => { await window.MathJax?.startup?.promise; await document.fonts.ready; }")


def barriers(page: Page, mode: str, **options) -> list[str]:
    """Serious and critical findings of axe, with one element each."""
    found = Axe().run(page, options={"preload": False, "resultTypes": ["violations"], **options}).response["violations"]
    return [f"{mode}: {one['id']} at {one['nodes'][0]['target']} and {len(one['nodes']) - 1} more"
            for one in found if one["impact"] in ("serious", "critical")]
