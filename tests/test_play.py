"""The page to play with, in a browser: its numbers are the library's, and every control works by mouse and by keyboard."""

import cmath
import math

import pytest
import torch

pytestmark = pytest.mark.browser
pytest.importorskip("playwright", reason="make test-docs installs what the browser tests need")

from docs.browser import WIDE, chromium, served, settle  # noqa: E402
from llamba_ref.scan import linear_scan  # noqa: E402
from llamba_ref.ssd import ssd_matrix  # noqa: E402


@pytest.fixture(scope="module")
def play():
    """The page, opened once; each test starts from the page as it loads."""
    with served() as site, chromium() as browser:
        page = browser.new_page(viewport=dict(zip(("width", "height"), WIDE)))
        page.site = site
        yield page


@pytest.fixture
def page(play):
    play.goto(play.site + "play.html")
    settle(play)
    return play


def text(page, name):
    return page.locator(f"#{name}").inner_text()


def shown(page, name):
    """All that a picture is drawn from."""
    return page.locator(f"#{name}").inner_html()


def test_the_decay_matrix_is_the_librarys(page):
    magnitudes = torch.linspace(0.2, 1.0, 20, dtype=torch.float64)
    found = torch.tensor(page.evaluate("([m, p]) => llambaPlay.decayMatrix(m, p).map(row => row.concat(Array(m.length - row.length).fill([0, 0])))",
                                       [magnitudes.tolist(), [0.0] * 20]), dtype=torch.float64)
    one = torch.ones(1, 20, 1, 1, dtype=torch.float64)
    expected = ssd_matrix(magnitudes.log()[None, :, None], one, one)[0, 0]
    assert (found[..., 0] - expected).abs().max() < 1e-12 and not found[..., 1].any()


@pytest.mark.parametrize("magnitude, phase", [(0.9, 0.5), (1.0, -2.0), (0.0, 0.3), (0.99, 0.0)])
def test_the_path_is_the_librarys(page, magnitude, phase):
    x = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.view_as_complex(torch.tensor(page.evaluate("([m, p, x]) => llambaPlay.statePath(m, p, x)", [magnitude, phase, x.tolist()]), dtype=torch.float64))
    gates = torch.full((1, 30, 1), magnitude, dtype=torch.float64).log(), torch.full((1, 30, 1), phase, dtype=torch.float64)
    assert (found - linear_scan(gates[0], x[None, :, None], gates[1])[0, :, 0]).abs().max() < 1e-12


def test_half_life_period_and_horizon(page):
    assert abs(page.evaluate("0.9 ** llambaPlay.halfLife(0.9)") - 0.5) < 1e-12
    assert abs(cmath.exp(1j * 0.7 * page.evaluate("llambaPlay.period(-0.7)")) - 1) < 1e-12
    assert page.evaluate("[llambaPlay.halfLife(1), llambaPlay.halfLife(0), llambaPlay.period(0)]") == [math.inf, 0, math.inf]
    far = math.floor(math.log(0.05) / math.log(0.8))  # tokens back at which 0.8^n is still at least 0.05
    horizons = page.evaluate("llambaPlay.horizons(llambaPlay.decayMatrix(Array(30).fill(0.8), Array(30).fill(0)), 0.05)")
    assert horizons == [min(t, far) for t in range(30)]


@pytest.mark.parametrize("slider", ["gate-magnitude", "gate-phase"])
def test_sliders_of_one_gate(page, slider):
    before = [shown(page, name) for name in ("gate-matrix", "gate-path")], text(page, "gate-status"), text(page, f"{slider}-value")
    page.locator(f"#{slider}").focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    after = [shown(page, name) for name in ("gate-matrix", "gate-path")], text(page, "gate-status"), text(page, f"{slider}-value")
    assert all(a != b for a, b in zip(before[0], after[0])) and before[1] != after[1] and before[2] != after[2]


def test_presets_and_choices_of_one_gate(page):
    pictures = set()
    for preset in ("attention", "rope", "retnet", "real", "forget"):
        page.locator(f"[data-preset={preset}]").click()
        pictures.add(shown(page, "gate-matrix"))
    assert len(pictures) == 5
    assert text(page, "gate-status") == "Everything is forgotten at once. No turn."
    page.locator("[data-preset=rope]").click()
    assert text(page, "gate-status").startswith("Nothing is forgotten. A full turn takes 12.4 tokens")
    matrix, path = shown(page, "gate-matrix"), shown(page, "gate-path")
    page.get_by_label("the same at every token").check()
    assert shown(page, "gate-path") != path and shown(page, "gate-matrix") == matrix
    assert 'class="minus"' in matrix
    page.locator("#gate-absolute").check()
    assert 'class="minus"' not in shown(page, "gate-matrix")


def test_the_reset_is_moved_by_keyboard(page):
    handle = page.locator("#reset-handle")
    horizon = shown(page, "reset-horizon")
    handle.focus()
    page.keyboard.press("ArrowRight")
    assert handle.get_attribute("aria-valuenow") == "14" and text(page, "reset-place-value") == "14"
    assert shown(page, "reset-horizon") != horizon
    assert text(page, "reset-status") == "Token 24 remembers 10 of the 23 tokens before it. Without the reset at token 14 it would be 23."
    for key, place in (("Home", "1"), ("ArrowLeft", "1"), ("End", "32"), ("PageDown", "24"), ("ArrowUp", "25")):
        page.keyboard.press(key)
        assert handle.get_attribute("aria-valuenow") == place
    assert "makes no difference" in text(page, "reset-status")


def test_the_reset_is_dragged(page):
    page.locator("#reset-tokens").scroll_into_view_if_needed()
    box = page.locator("#reset-tokens").bounding_box()
    at = lambda token: box["x"] + box["width"] * (20 + (token - 0.5) * 17.5) / 600
    middle = box["y"] + box["height"] / 2
    page.mouse.move(at(13), middle)
    page.mouse.down()
    seen = []
    for token in (14, 18, 22):
        page.mouse.move(at(token), middle)
        seen.append((page.locator("#reset-handle").get_attribute("aria-valuenow"), shown(page, "reset-horizon"), shown(page, "reset-matrix")))
    page.mouse.up()
    page.mouse.move(at(5), middle)  # after the button is up nothing moves
    assert [place for place, *_ in seen] == ["14", "18", "22"] and len({picture for _, picture, _ in seen}) == len({picture for *_, picture in seen}) == 3
    assert text(page, "reset-place-value") == "22" and "remembers 2 of" in text(page, "reset-status")


@pytest.mark.parametrize("slider", ["reset-magnitude", "reset-place", "reset-query"])
def test_sliders_of_the_reset(page, slider):
    before = shown(page, "reset-matrix") + shown(page, "reset-horizon"), text(page, "reset-status")
    page.locator(f"#{slider}").focus()
    for _ in range(5 if slider != "reset-magnitude" else 400):
        page.keyboard.press("ArrowLeft")
    assert before[0] != shown(page, "reset-matrix") + shown(page, "reset-horizon") and before[1] != text(page, "reset-status")


def test_pictures_are_put_into_words(page):
    """A screen reader gets a description of each picture, which follows the controls."""
    pictures = page.locator(".play svg[role=img]")
    before = [picture.get_attribute("aria-label") for picture in pictures.all()]
    assert len(before) == 4 and all(len(words) > 40 for words in before)
    for slider in ("gate-magnitude", "reset-place"):
        page.locator(f"#{slider}").focus()
        page.keyboard.press("Home")
    assert all(a != b for a, b in zip(before, [picture.get_attribute("aria-label") for picture in pictures.all()]))


def test_colours_follow_the_mode(page):
    colour = "getComputedStyle(document.querySelector('#gate-matrix .plus')).fill"
    light = page.evaluate(colour)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert page.evaluate(colour) != light


def test_it_works_from_a_file(page):
    """Downloaded and opened without a server, the page still draws."""
    from docs.browser import SITE

    page.goto((SITE / "play.html").resolve().as_uri())
    page.wait_for_selector("#gate-matrix rect")
    assert page.locator("#gate-matrix rect").count() == 24 * 25 / 2
