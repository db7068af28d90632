"""The built site in a real browser (make test-docs): every page is loaded once, and looked at in every way then."""

from __future__ import annotations

import filecmp
import functools
import json
import queue
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.browser
pytest.importorskip("playwright", reason="make test-docs installs what the browser tests need")

from docs.browser import NARROW, SITE, WIDE, barriers, chromium, pages, settle  # noqa: E402

READERS = 2  # browsers that look at pages side by side
CHAPTERS = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))

# Text that a reader sees and that is still TeX: in no code, no script and no typeset formula.
RAW_TEX = r"""() => {
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode;
    if (node.parentElement.closest("code, pre, dt.sig, script, style, noscript, mjx-container, textarea")) continue;
    if (/\\[a-zA-Z()\[\]]|\$[^$]+\$|\$\$/.test(node.data)) found.push(node.data.trim().slice(0, 80));
  }
  return found;
}"""
UNTYPESET = """() => [...document.querySelectorAll(".math")]
  .filter(e => !e.querySelector("mjx-container") || e.querySelector("mjx-merror, [data-mjx-error]"))
  .map(e => e.textContent.trim().slice(0, 80))"""
ADDRESSES = (
    """() => [...document.querySelectorAll("a[href], link[href], img, script[src]")].map(e => e.href || e.src)"""
)
STICKING_OUT = """() => [...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect();
  if (!box.width || !box.height || box.right <= innerWidth + 1) return false;
  if (!e.checkVisibility({visibilityProperty: true, opacityProperty: true})) return false;
  if (e.closest("mjx-assistive-mml")) return false;  // for screen readers, one pixel wide
  for (let outer = e.parentElement; outer !== document.body; outer = outer.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(outer).overflowX)) return false;
  return true;
}).map(e => e.outerHTML.slice(0, 120))"""
# Words of code that look as others before them become plain text: a chapter has ten thousand, in twenty colours, and
# axe looks at each.
LESS_CODE = """() => {
  const seen = new Set();
  for (const word of document.querySelectorAll("pre span[class]")) {
    const look = word.className + " in " + word.closest("div").className;
    if (seen.has(look)) word.replaceWith(word.textContent);
    seen.add(look);
  }
}"""
CHAPTER = """() => ({
  facts: document.querySelector(".chapter-facts")?.innerText,
  links: Object.fromEntries([...document.querySelectorAll(".chapter-facts a")].map(e => [e.innerText.trim(), e.href])),
  before: document.querySelector("a.left-prev")?.href, after: document.querySelector("a.right-next")?.href,
  pictures: document.querySelectorAll("main figure img").length,
  captions: document.querySelectorAll("main figure figcaption").length})"""
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
    chapter: dict = field(default_factory=dict)  # what only chapters have
    narrow_width: int = 0  # what there is to scroll through on a phone
    sticking_out: list[str] = field(default_factory=list)  # what a phone cuts off


def listen(page, visit: Visit, site: str) -> None:
    """Note what the page says and asks for."""
    page.on(
        "console", lambda message: visit.console.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: visit.console.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((site, "data:", "blob:")) else visit.outside.append(request.url),
    )
    page.on("requestfailed", lambda request: visit.failed.append(request.url))
    page.on(
        "response",
        lambda response: visit.failed.append(f"{response.status} {response.url}") if response.status >= 400 else None,
    )


@pytest.fixture
def empty_page(browser):
    context = browser.new_context(viewport=WIDE)
    yield context.new_page()
    context.close()


@pytest.fixture
def page(empty_page, site):
    """A page to do something with, in which nothing may go wrong meanwhile."""
    seen = Visit()
    listen(empty_page, seen, site)
    yield empty_page
    assert not (seen.console or seen.failed or seen.outside)


def visit(browser, site: str, name: str) -> Visit:
    """Load a page and look at everything."""
    context, seen = browser.new_context(viewport=WIDE, color_scheme="light"), Visit()
    page = context.new_page()
    listen(page, seen, site)
    page.goto(site + name)
    settle(page)
    seen.raw_tex, seen.untypeset = page.evaluate(RAW_TEX), page.evaluate(UNTYPESET)
    seen.addresses, seen.without_alt = page.evaluate(ADDRESSES), page.evaluate(WITHOUT_ALT)
    seen.chapter = page.evaluate(CHAPTER)
    page.evaluate(LESS_CODE)
    seen.barriers = barriers(page, "light")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size(NARROW)
    page.evaluate(
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )  # scripts look for boxes that scroll
    page.wait_for_timeout(400)  # colours fade
    seen.barriers += barriers(page, "dark and narrow", runOnly=["color-contrast", "scrollable-region-focusable"])
    seen.narrow_width, seen.sticking_out = (
        page.evaluate("document.documentElement.scrollWidth"),
        page.evaluate(STICKING_OUT),
    )
    context.close()
    return seen


@pytest.fixture(scope="module")
def visited(request, browser, site):
    """What was seen on a page. Readers, each a thread with a browser, look ahead at what the chosen tests ask for."""
    wanted = {item.callspec.params["name"] for item in request.session.items if "visited" in item.fixturenames}
    seen, waiting = {name: Future() for name in sorted(wanted)}, queue.SimpleQueue()
    for name in [*seen, *[None] * READERS]:  # None ends a reader
        waiting.put(name)

    def read():
        with chromium() as own:
            for name in iter(waiting.get, None):
                if seen[name].set_running_or_notify_cancel():
                    try:
                        seen[name].set_result(visit(own, site, name))
                    except Exception as error:
                        seen[name].set_exception(error)  # for the tests of this page

    with ThreadPoolExecutor(READERS) as readers:
        for _ in range(READERS):
            readers.submit(read)
        yield lambda name: seen[name].result(timeout=600)
        for future in seen.values():
            future.cancel()  # the tests may have ended early


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
    return (
        not path.is_file()
        or bool(parts.fragment)
        and path.suffix == ".html"
        and unquote(parts.fragment) not in anchors(path)
    )


def test_the_site_is_built():
    assert {f"nbs/{name}.html" for name in CHAPTERS} | {"index.html", "search.html", "play.html", "map.html"} <= set(
        pages()
    ), "make docs"


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
    assert visited(name).narrow_width <= NARROW["width"]
    assert not visited(name).sticking_out


@every_page
def test_no_serious_barrier(name, visited):
    assert not visited(name).barriers


FAULTS = r"""<p>Let $x_t$ be</p><div class="math">\\[y\\]</div><img src="none.png"><a href="#nowhere">x</a>
<p style="color: #ddd; background: #fff">pale</p><div style="width: 2000px">wide</div>
<div style="overflow: hidden"><div style="width: 2000px">cut off</div></div>"""
PALE_CODE = """<div class="highlight"><pre style="background: #fff">good <span class="k" style="color: #ddd">pale</span>
<span class="k">pale</span></pre></div>"""


def test_the_checks_see_faults(empty_page, site):
    """A page with every fault is found out."""
    page, seen = empty_page, Visit()
    listen(page, seen, site)
    page.goto(site + "index.html")
    settle(page)
    fill = "html => { document.querySelector('main').innerHTML = html; }"
    page.evaluate(fill, FAULTS)
    page.evaluate(
        "() => { console.error('oh'); setTimeout(() => { throw new Error('ah'); }); fetch('http://127.0.0.1:9/'); }"
    )
    page.wait_for_timeout(300)
    assert (
        {"oh", "ah"} <= set(seen.console)
        and any("none.png" in one for one in seen.failed)
        and seen.outside == ["http://127.0.0.1:9/"]
    )
    assert (
        len(page.evaluate(RAW_TEX)) == 2 and len(page.evaluate(UNTYPESET)) == 1 and len(page.evaluate(WITHOUT_ALT)) == 1
    )
    assert any(dangling(address, site) for address in page.evaluate(ADDRESSES))
    assert {"image-alt", "color-contrast"} <= {one.split()[1] for one in barriers(page, "light")}
    page.set_viewport_size(NARROW)
    assert page.evaluate("document.documentElement.scrollWidth") > NARROW["width"]
    assert {"wide", "cut off"} <= {re.sub("<[^>]*>", "", one) for one in page.evaluate(STICKING_OUT)}
    page.evaluate(fill, PALE_CODE)
    page.evaluate(LESS_CODE)
    assert page.locator("pre span").count() == 1
    assert "color-contrast" in {one.split()[1] for one in barriers(page, "light")}


def test_files_name_nothing_outside():
    """No style, script, picture or font has an address on another host, also those that no page asks for."""
    outside = re.compile(
        r"""<(?:link|script|img|iframe|source|object|embed|video|audio)\b[^>]*\b(?:src|srcset|href|data)=["']?(?:https?:)?//"""
        r"""|url\(\s*["']?(?:https?:)?//|@import\s+["'](?:https?:)?//"""
    )
    files = [*SITE.rglob("*.html"), *SITE.rglob("*.css")]
    assert len(files) > len(pages())
    assert not [
        f"{path.relative_to(SITE)}: {found[0]}" for path in files for found in outside.finditer(path.read_text())
    ]


every_chapter = pytest.mark.parametrize("name", [f"nbs/{chapter}.html" for chapter in CHAPTERS])


@every_chapter
def test_chapter_has_its_facts(name, visited, site):
    """Colab, the notebook as it is, the times to read and to run, and figures with captions."""
    about, notebook = visited(name).chapter, Path(name).with_suffix(".ipynb")
    assert re.search(r"^(Essential|Further reading|Appendix) ·", about["facts"])
    assert re.search(r"\d+ min to read( \(and \d+ for what is folded\))? · runs in \d+ s", about["facts"])
    assert (
        about["links"]["Open in Colab"]
        == f"https://colab.research.google.com/github/llamba-ref/llamba_ref/blob/main/{notebook}"
    )
    download = about["links"]["Download notebook"].removeprefix(site)
    assert filecmp.cmp(SITE / download, ROOT / notebook, shallow=False)
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    drawn = sum(
        "image/png" in output.get("data", {})
        for cell in cells
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
    )
    assert about["captions"] == drawn == about["pictures"]


@every_chapter
def test_chapters_follow_each_other(name, visited, site):
    """By `previous` and `next`, in the order of the contents."""
    order = [
        f"nbs/{chapter}.html"
        for chapter in re.findall(r"^nbs/(\w+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    ]
    place, about = order.index(name), visited(name).chapter
    assert place == 0 or about["before"] == site + order[place - 1]
    assert place == len(order) - 1 or about["after"] == site + order[place + 1]


def test_search_finds_a_word(page, site):
    """By keyboard, from any page: a word that only some chapters have."""
    page.goto(f"{site}nbs/01_conventions.html")
    settle(page)
    page.keyboard.press("Control+k")
    page.keyboard.type("semiseparable")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?*")
    page.wait_for_selector("#search-results li p.context")
    page.wait_for_load_state("networkidle")  # each result shows a piece of its page, which is fetched
    found = page.locator("#search-results")
    assert "State space duality by hand" in found.inner_text() and found.locator('a[href^="nbs/07_ssd.html"]').count()
    assert found.locator("li p.context").count() == found.locator("li").count() and not page.evaluate(RAW_TEX)


def test_light_and_dark(page, site):
    """The switch changes the page, stays on the next one, and figures keep their white ground."""
    page.goto(f"{site}nbs/07_ssd.html")
    settle(page)
    ground = "getComputedStyle(document.body).backgroundColor"
    seen = set()
    for mode in ("Light", "Dark"):
        page.get_by_role("button", name="Color mode").click()
        page.get_by_role("button", name=mode, exact=True).click()
        seen.add(page.evaluate(ground))
    assert len(seen) == 2
    assert (
        page.locator("main figure img").first.evaluate("e => getComputedStyle(e).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    dark = page.evaluate(ground)
    page.locator("a.right-next").click()
    settle(page)
    assert page.evaluate(ground) == dark


def test_the_index_has_every_exercise_and_its_solution(page, site):
    cells = [
        cell for chapter in CHAPTERS for cell in json.loads((ROOT / "nbs" / f"{chapter}.ipynb").read_text())["cells"]
    ]
    prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    page.goto(site + "exercises.html")
    assert (
        page.locator(".exercise-copy").count()
        == prose.count(":::{exercise}")
        == page.locator(".admonition.dropdown").count()
        > 50
    )


def test_solutions_are_folded_and_open(page, site):
    page.goto(site + "exercises.html")
    settle(page)
    solution = page.locator(".admonition.dropdown").first
    assert not solution.locator("p").nth(1).is_visible()
    solution.get_by_role("button").click()
    assert solution.locator("p").nth(1).is_visible()
