"""The moving pictures: their numbers are the library's, every step says what it does, every control works.

The sums and the frames need no page, so Node runs them where it is installed; controls are tried in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import torch

from llamba_ref.gateloop import gateloop, gateloop_matrix
from llamba_ref.scan import linear_scan
from llamba_ref.ssd import ssd, ssd_matrix

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "_static" / "moving.js"
PICTURES = {"scan-tree": "02_scan", "three-modes": "03_gateloop", "state-filling": "07_ssd", "chunks": "07_ssd"}
picture = pytest.mark.parametrize("name", PICTURES)
EXACT = 1e-12


@pytest.fixture(scope="module")
def js():
    """What an expression gives, with an argument `x` that is data."""
    program = shutil.which("node")
    if not program:
        pytest.skip("needs Node")

    def run(expression, x=None):
        code = f"{SCRIPT.read_text()}\nconst x = {json.dumps(x)}; console.log(JSON.stringify({expression}));"
        done = subprocess.run([program, "-"], input=code, capture_output=True, text=True, check=True, timeout=60)
        return json.loads(done.stdout)

    return run


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def numbers(length, *sizes, seed=0):
    """Gates between 0 and 1, some of them 0, and normal numbers for the rest."""
    make = torch.Generator().manual_seed(seed)
    gates = torch.rand(length, generator=make, dtype=torch.float64)
    gates[::5] = 0
    return gates, *(torch.randn(length, size, generator=make, dtype=torch.float64) for size in sizes)


def close(found, expected):
    return found.shape == expected.shape and (found - expected).abs().max() < EXACT


# The sums


@pytest.mark.parametrize("shown", [True, False], ids=["shown", "random"])
def test_scan(js, shown):
    gates, inputs = numbers(16, 1)
    pairs = js("llambaMoving.data.scan") if shown else torch.cat([gates[:, None], inputs], 1).tolist()
    expected = linear_scan(tensor(pairs)[None, :, 0].log(), tensor(pairs)[None, :, 1])[0]
    rounds = tensor(js("llambaMoving.rounds(x)", pairs))
    assert len(rounds) == 1 + {8: 3, 16: 4}[len(pairs)]
    assert close(rounds[-1, :, 1], expected) and close(tensor(js("llambaMoving.loop(x)", pairs)), expected)
    for r, level in enumerate(rounds):  # what is blue is a state
        assert close(level[: 2**r, 1], expected[: 2**r])


@pytest.mark.parametrize("shown", [True, False], ids=["shown", "random"])
def test_memory(js, shown):
    a, x, B, C = numbers(12, 3, 2, 2)
    given = {"x": x.tolist(), "a": a.tolist(), "B": B.tolist(), "C": C.tolist()}
    given = js("llambaMoving.data.memory") if shown else given
    steps = js("llambaMoving.memory(x)", given)
    x, a, B, C = (tensor(given[name]) for name in "xaBC")
    arguments = x[None, :, None], a.log()[None, :, None], B[None, :, None], C[None, :, None]
    for t, step in enumerate(steps):
        until = [z[:, : t + 1] for z in arguments]
        y, state = ssd(*until, mode="recurrent", return_state=True)
        assert close(tensor(step["written"]), state[0, 0]) and close(tensor(step["y"]), y[0, -1, 0])
        before = tensor(steps[t - 1]["written"]) if t else torch.zeros_like(state[0, 0])
        assert close(tensor(step["faded"]), a[t] * before)


@pytest.mark.parametrize("shown", [True, False], ids=["shown", "random"])
def test_chunks(js, shown):
    Q, (a, x, B, C) = 4, numbers(16, 1, 3, 3)
    given = {"x": x[:, 0].tolist(), "a": a.tolist(), "B": B.tolist(), "C": C.tolist()}
    given = js("llambaMoving.data.chunks") if shown else given
    found = js("llambaMoving.chunked(x, 4)", given)
    x, a, B, C = (tensor(given[name]) for name in "xaBC")
    arguments = x[None, :, None, None], a.log()[None, :, None], B[None, :, None], C[None, :, None]
    y, state = ssd(*arguments, mode="chunked", chunk_size=Q, return_state=True)
    assert close(tensor(found["y"]), y[0, :, 0, 0]) and close(tensor(found["states"][-1]), state[0, 0, 0])
    M = torch.nn.utils.rnn.pad_sequence([tensor(row) for row in found["M"]], batch_first=True)
    assert close(M, ssd_matrix(*arguments[1:])[0, 0])
    for j, own in enumerate(found["own"]):
        part = [z[:, Q * j : Q * j + Q] for z in arguments]
        inside, alone = ssd(*part, return_state=True)
        assert close(tensor(own), alone[0, 0, 0])
        assert close(tensor(found["within"][Q * j : Q * j + Q]), inside[0, :, 0, 0])
        after = ssd(*(z[:, : Q * j + Q] for z in arguments), return_state=True)[1]
        assert close(tensor(found["states"][j]), after[0, 0, 0])


@pytest.mark.parametrize("shown", [True, False], ids=["shown", "random"])
def test_three_modes(js, shown):
    _, q, k, v, a = numbers(16, 3, 3, 1, 3)
    given = {"q": q.tolist(), "k": k.tolist(), "v": v[:, 0].tolist(), "a": a.sigmoid().tolist()}
    given = js("llambaMoving.data.modes") if shown else given
    q, k, v, a = (tensor(given[name]) for name in "qkva")
    q, k, log_a = (z[None, :, None] for z in (q, k, a.log()))
    for mode in ("recurrent", "scan", "attention"):
        found = js(f"llambaMoving.{mode}(x)", given)
        expected = gateloop(q, k, v[None, :, None, None], log_a, mode=mode)
        assert close(tensor(found["y"]), expected[0, :, 0, 0])
    T = torch.nn.utils.rnn.pad_sequence([tensor(row) for row in found["T"]], batch_first=True)
    assert close(T, gateloop_matrix(q, k, log_a)[0, 0])


# The frames


class Drawn(HTMLParser):
    """A drawing's tags in balance, and the texts in it."""

    def __init__(self, source):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        assert not any("NaN" in (value or "") or "undefined" in (value or "") for _, value in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        self.texts.append(words)


@picture
def test_every_step_is_drawn_and_said(js, name):
    """At the width of a phone and of a wide page: no step is like another in what it shows or says."""
    for width in (324, 760):
        given = {"name": name, "width": width}
        frames = js(
            "Array.from({ length: llambaMoving.pictures[x.name].last + 1 }, "
            "(_, step) => llambaMoving.pictures[x.name].frame(step, x.width))",
            given,
        )
        assert len({one["svg"] for one in frames}) == len({one["words"] for one in frames}) == len(frames)
        for one in frames:
            texts = Drawn(one["svg"]).texts + [one["words"]]
            assert not any(re.search("NaN|undefined|null|Infinity", words) for words in texts)
            places = re.findall(r' x="([-\d.]+)" y="([-\d.]+)"', one["svg"])
            assert all(-2 <= float(x) <= width and 0 <= float(y) <= one["height"] for x, y in places)
            assert '"' not in one["words"]  # it is an attribute too


def test_outputs_of_the_modes_are_written_alike(js):
    """The last frame has each output in three places."""
    texts = Drawn(js("llambaMoving.pictures['three-modes'].frame(8, 700).svg")).texts
    outputs = js("llambaMoving.recurrent(llambaMoving.data.modes).y")
    for y in outputs:
        assert texts.count(f"{y:.2f}".rstrip("0").rstrip(".")) >= 3


@picture
def test_what_stands_there_without_javascript(js, name):
    """The files that pages include are the last frames. To write them anew: save what llambaMoving.html(name) gives."""
    assert (ROOT / "docs" / "_moving" / f"{name}.html").read_text() == js("llambaMoving.html(x)", name)


@picture
def test_places_in_pages(name):
    """On a page of their own, and in the chapter that derives what they show: there a sentence outside the site."""
    assert f":file: _moving/{name}.html" in (ROOT / "docs" / "moving.md").read_text()
    notebook = nbformat.read(ROOT / "nbs" / f"{PICTURES[name]}.ipynb", 4)
    cell = next(c.source for c in notebook.cells if f'data-picture="{name}"' in c.source)
    sentence = re.search(r'<div class="moving" data-picture="[\w-]+">(.*?)</div>', cell)[1]
    assert "Moving pictures" in sentence and "<script" not in cell


# In a browser

browser_only = pytest.mark.browser


@pytest.fixture(scope="module")
def address(site):
    return site + "moving.html"


def of(page, name, what):
    return page.locator(f"section[data-picture={name}] {what}")


def opened(browser, address, **options):
    from docs.browser import settle

    page = browser.new_page(**options)
    page.goto(address)
    settle(page)
    return page


@browser_only
@picture
def test_controls(browser, address, name):
    page = opened(browser, address, viewport={"width": 1280, "height": 900})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    words, slider = of(page, name, ".moving-words"), of(page, name, "input")
    last = int(slider.get_attribute("max"))
    assert slider.input_value() == "0"
    page.wait_for_timeout(2500)
    assert slider.input_value() == "0"  # nothing moves by itself
    heard = [words.inner_text()]
    for _ in range(last):
        of(page, name, ".on").press("Enter")
        heard.append(words.inner_text())
        assert of(page, name, "svg").get_attribute("aria-label") == heard[-1]
    assert len(set(heard)) == last + 1 and of(page, name, ".on").get_attribute("aria-disabled") == "true"
    of(page, name, ".on").press("Enter")
    assert slider.input_value() == str(last)
    of(page, name, ".back").press("Space")
    assert words.inner_text() == heard[-2]
    slider.press("Home")
    assert words.inner_text() == heard[0] and of(page, name, ".back").get_attribute("aria-disabled") == "true"
    slider.press("ArrowRight")
    assert words.inner_text() == heard[1] and slider.get_attribute("aria-valuetext") == f"1 of {last}"
    of(page, name, ".run").press("Enter")
    assert words.inner_text() == heard[2] and of(page, name, ".run").inner_text() == "Pause"
    page.wait_for_timeout(2000)
    assert words.inner_text() == heard[3]
    of(page, name, ".run").press("Enter")
    page.wait_for_timeout(2000)
    assert words.inner_text() == heard[3] and of(page, name, ".run").inner_text() == "Play"
    slider.press("End")
    of(page, name, ".run").press("Enter")
    assert words.inner_text() == heard[0]  # again from the start
    assert not errors
    page.close()


@browser_only
def test_motion_is_left_out_where_it_is_not_wanted(browser, address):
    for choice, animation in (("reduce", "none"), ("no-preference", "moving-appear")):
        page = opened(browser, address, reduced_motion=choice)
        of(page, "scan-tree", ".on").click()
        name = of(page, "scan-tree", "svg .fresh").first.evaluate("e => getComputedStyle(e).animationName")
        assert name == animation
        page.close()


@browser_only
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_barrier_and_nothing_sticks_out(browser, address, mode, width):
    from docs.browser import barriers

    page = opened(browser, address, viewport={"width": width, "height": 900}, color_scheme=mode)
    for share in (0, 0.5, 1):
        for name in PICTURES:
            of(page, name, "input").evaluate(
                "(e, share) => { e.value = Math.round(share * e.max); e.dispatchEvent(new Event('input')); }", share
            )
            scale = of(page, name, "svg").evaluate("e => e.getBoundingClientRect().width / e.viewBox.baseVal.width")
            assert abs(scale - 1) < 0.01
        page.wait_for_timeout(700)
        assert not barriers(page, mode)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@browser_only
def test_without_javascript(browser, address):
    """The last step is there, and no dead control."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    for name in PICTURES:
        assert of(page, name, "svg").is_visible() and of(page, name, ".moving-words").is_visible()
        assert not of(page, name, "button").first.is_visible()
    context.close()


@browser_only
@picture
def test_each_has_an_address(browser, address, name):
    page = opened(browser, f"{address}#{name}")
    found = "document.querySelector(location.hash)?.querySelector('section.moving')?.dataset.picture"
    assert page.evaluate(found) == name
    page.close()


@browser_only
@picture
def test_in_its_chapter(browser, site, name):
    page = opened(browser, f"{site}nbs/{PICTURES[name]}.html")
    before = of(page, name, ".moving-words").inner_text()
    of(page, name, ".on").press("Enter")
    assert of(page, name, ".moving-words").inner_text() != before
    page.close()
