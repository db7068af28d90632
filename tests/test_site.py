"""The built site in a real browser (make test-docs): every page is loaded once, and everything that is asked of it is looked at then."""

from __future__ import annotations

import filecmp
import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.browser
pytest.importorskip("playwright", reason="make test-docs installs what the browser tests need")

from docs.browser import NARROW, SITE, WIDE, chromium, pages, served, settle  # noqa: E402

CHAPTERS = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))

# Text that a reader sees and that is still TeX: in no code, no script and no typeset formula.
RAW_TEX = r"""() => {
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode;
    if (node.parentElement.closest("code, pre, script, style, noscript, mjx-container, textarea")) continue;
    if (/\\[()\[\]]|\$[^$]+\$|\\(begin|frac|top|mathrm|log|lvert|sum)\b/.test(node.data)) found.push(node.data.trim().slice(0, 80));
  }
  return found;
}"""
UNTYPESET = """() => [...document.querySelectorAll(".math")].filter(e => !e.querySelector("mjx-container") || e.querySelector("mjx-merror, [data-mjx-error]"))
  .map(e => e.textContent.trim().slice(0, 80))"""
ADDRESSES = """() => [...document.querySelectorAll("a[href], link[href], img, script[src]")].map(e => e.href || e.src)"""
WITHOUT_ALT = """() => [...document.querySelectorAll("main img")].filter(e => !e.alt.trim()).map(e => e.src)"""


@dataclass
class Visit:
    """What was seen on a page."""

    console: list[str] = field(default_factory=list)  # errors, warnings, uncaught exceptions
    outside: list[str] = field(default_factory=list)  # requests to another host
    failed: list[str] = field(default_factory=list)  # requests without an answer, or with an error
    raw_tex: list[str] = field(default_factory=list)
    untypeset: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    without_alt: list[str] = field(default_factory=list)
    barriers: list[str] = field(default_factory=list)  # serious findings of axe
    narrow_width: int = 0  # what there is to scroll through on a phone


def listen(page, visit: Visit, site: str) -> None:
    """Note what the page says and asks for."""
    page.on("console", lambda message: visit.console.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: visit.console.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((site, "data:", "blob:")) else visit.outside.append(request.url))
    page.on("requestfailed", lambda request: visit.failed.append(request.url))
    page.on("response", lambda response: visit.failed.append(f"{response.status} {response.url}") if response.status >= 400 else None)


def barriers(page, mode: str, leave_out: str | None = "div.highlight", **options) -> list[str]:
    """Serious and critical findings of axe, with one element each. Code has a thousand coloured words on a page, in the same
    few colours on each: it is left out, which makes this ten times as fast, but for one page."""
    from axe_playwright_python.sync_playwright import Axe

    context = {"exclude": [[leave_out]]} if leave_out else None
    found = Axe().run(page, context=context, options={"preload": False, **options}).response["violations"]
    return [f"{mode}: {one['id']} at {one['nodes'][0]['target']} and {len(one['nodes']) - 1} more"
            for one in found if one["impact"] in ("serious", "critical")]


@pytest.fixture(scope="module")
def site():
    with served() as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as program:
        yield program


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport=dict(zip(("width", "height"), WIDE)))
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def visited(browser, site):
    """Load a page, look at everything, and remember what was seen."""

    @functools.cache
    def visit(name: str) -> Visit:
        context, seen = browser.new_context(viewport=dict(zip(("width", "height"), WIDE)), color_scheme="light"), Visit()
        page = context.new_page()
        listen(page, seen, site)
        page.goto(site + name)
        settle(page)
        seen.raw_tex, seen.untypeset = page.evaluate(RAW_TEX), page.evaluate(UNTYPESET)
        seen.addresses, seen.without_alt = page.evaluate(ADDRESSES), page.evaluate(WITHOUT_ALT)
        seen.barriers = barriers(page, "light")
        page.emulate_media(color_scheme="dark")
        page.wait_for_timeout(400)  # colours fade
        seen.barriers += barriers(page, "dark", runOnly=["color-contrast"])
        page.set_viewport_size(dict(zip(("width", "height"), NARROW)))
        seen.narrow_width = page.evaluate("document.documentElement.scrollWidth")
        context.close()
        return seen

    return visit


@functools.cache
def anchors(path: Path) -> set[str]:
    """The ids of a built page."""
    return set(re.findall(r"""\b(?:id|name)=["']([^"']+)["']""", path.read_text()))


def dangling(address: str, site: str) -> bool:
    """Whether an address inside the site leads to no file, or to no place in it."""
    if not address.startswith(site):
        return False
    parts = urlsplit(address)
    path = SITE / unquote(parts.path.lstrip("/"))
    path = path / "index.html" if path.is_dir() else path
    return not path.is_file() or bool(parts.fragment) and path.suffix == ".html" and unquote(parts.fragment) not in anchors(path)


def test_the_site_is_built():
    assert {f"nbs/{name}.html" for name in CHAPTERS} | {"index.html", "search.html", "play.html", "map.html"} <= set(pages()), "make docs"


every_page = pytest.mark.parametrize("name", pages())


@every_page
def test_nothing_goes_wrong_and_nothing_leaves_the_host(name, visited):
    seen = visited(name)
    assert not seen.console
    assert not seen.failed
    assert not seen.outside


@every_page
def test_formulas_are_typeset(name, visited):
    assert not visited(name).untypeset
    assert not visited(name).raw_tex


@every_page
def test_links_lead_somewhere(name, visited, site):
    assert len(visited(name).addresses) > 10
    assert not [address for address in visited(name).addresses if dangling(address, site)]


@every_page
def test_pictures_are_described(name, visited):
    assert not visited(name).without_alt


@every_page
def test_no_sideways_scrolling_on_a_phone(name, visited):
    assert visited(name).narrow_width <= NARROW[0]


@every_page
def test_no_serious_barrier(name, visited):
    assert not visited(name).barriers


@pytest.mark.parametrize("name", ["nbs/05_ssd.html", "_modules/llamba_ref/scan.html"])
def test_no_serious_barrier_in_code(name, page, site):
    page.goto(site + name)
    settle(page)
    for mode in ("light", "dark"):
        page.emulate_media(color_scheme=mode)
        page.wait_for_timeout(400)
        assert not barriers(page, mode, leave_out=None)


def test_the_checks_see_faults(page, site):
    """A page with every fault is found out."""
    seen = Visit()
    listen(page, seen, site)
    page.goto(site + "index.html")
    settle(page)
    page.evaluate("""() => { document.querySelector("main").innerHTML = `<p>Let $x_t$ be</p><div class="math">\\\\[y\\\\]</div><img src="none.png">
        <a href="#nowhere">x</a><p style="color: #ddd; background: #fff">pale</p><div style="width: 2000px">wide</div>`; console.error("oh"); fetch("http://127.0.0.1:9/"); }""")
    page.wait_for_timeout(300)
    assert "oh" in seen.console and any("none.png" in one for one in seen.failed) and seen.outside == ["http://127.0.0.1:9/"]
    assert len(page.evaluate(RAW_TEX)) == 2 and len(page.evaluate(UNTYPESET)) == 1 and len(page.evaluate(WITHOUT_ALT)) == 1
    assert any(dangling(address, site) for address in page.evaluate(ADDRESSES))
    assert {"image-alt", "color-contrast"} <= {one.split()[1] for one in barriers(page, "light")}
    page.set_viewport_size(dict(zip(("width", "height"), NARROW)))
    assert page.evaluate("document.documentElement.scrollWidth") > NARROW[0]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_has_its_facts(chapter, page, site):
    """Colab, the notebook as it is, the times to read and to run, what comes before and after, and figures with captions."""
    page.goto(f"{site}nbs/{chapter}.html")
    facts = page.locator(".chapter-facts")
    assert re.search(r"\d+ min to read · runs in \d+ s", facts.inner_text())
    colab = "https://colab.research.google.com/github/llamba-ref/llamba_ref/blob/main/nbs/"
    assert facts.get_by_role("link", name="Open in Colab").get_attribute("href") == f"{colab}{chapter}.ipynb"
    download = facts.get_by_role("link", name="Download notebook").evaluate("e => e.href").removeprefix(site)
    assert filecmp.cmp(SITE / download, ROOT / "nbs" / f"{chapter}.ipynb", shallow=False)
    cells = json.loads((ROOT / "nbs" / f"{chapter}.ipynb").read_text())["cells"]
    drawn = sum("image/png" in output.get("data", {}) for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"])
    assert page.locator("main figure figcaption").count() == drawn == page.locator("main figure img").count()


def test_chapters_follow_each_other(page, site):
    """From the first chapter to the last appendix by `next`, in the order of the contents; and back by `previous`."""
    order = re.findall(r"^nbs/(\w+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    page.goto(f"{site}nbs/{order[0]}.html")
    for before, after in zip(order, order[1:]):
        page.locator("a.right-next").click()
        assert page.url.endswith(f"/nbs/{after}.html")
        assert page.locator("a.left-prev").evaluate("e => e.href").endswith(f"/nbs/{before}.html")


def test_search_finds_a_word(page, site):
    """By keyboard, from any page: a word that only some chapters have."""
    page.goto(f"{site}nbs/00_core.html")
    settle(page)
    page.keyboard.press("Control+k")
    page.keyboard.type("semiseparable")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?*")
    page.wait_for_selector("#search-results li")
    assert "State space duality by hand" in page.locator("#search-results").inner_text()


def test_light_and_dark(page, site):
    """The switch changes the page, stays on the next one, and figures keep their white ground."""
    page.goto(f"{site}nbs/05_ssd.html")
    settle(page)
    ground = "getComputedStyle(document.body).backgroundColor"
    seen = set()
    for mode in ("Light", "Dark"):
        page.get_by_role("button", name="Color mode").click()
        page.get_by_role("button", name=mode, exact=True).click()
        seen.add(page.evaluate(ground))
    assert len(seen) == 2
    assert page.locator("main figure img").first.evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)"
    dark = page.evaluate(ground)
    page.locator("a.right-next").click()
    settle(page)
    assert page.evaluate(ground) == dark


def test_the_index_has_every_exercise_and_its_solution(page, site):
    cells = [cell for chapter in CHAPTERS for cell in json.loads((ROOT / "nbs" / f"{chapter}.ipynb").read_text())["cells"]]
    prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    page.goto(site + "exercises.html")
    assert page.locator(".exercise-copy").count() == prose.count(":::{exercise}") == page.locator(".admonition.dropdown").count() > 50


def test_solutions_are_folded_and_open(page, site):
    page.goto(site + "exercises.html")
    settle(page)
    solution = page.locator(".admonition.dropdown").first
    assert not solution.locator("p").nth(1).is_visible()
    solution.get_by_role("button").click()
    assert solution.locator("p").nth(1).is_visible()
