"""The page to play with, in a browser: its numbers are the library's, and every control works by mouse and by keyboard."""

import cmath
import math

import pytest
import torch

pytestmark = pytest.mark.browser
pytest.importorskip("playwright", reason="make test-docs installs what the browser tests need")

from docs.browser import NARROW, SITE, WIDE, chromium, served, settle  # noqa: E402
from llamba_ref.scan import linear_scan  # noqa: E402
from llamba_ref.ssd import ssd_matrix  # noqa: E402

PICTURES = ("gate-matrix", "gate-path", "strips", "reset-matrix")


@pytest.fixture(scope="module")
def play():
    """A browser with one page."""
    with served() as site, chromium() as browser:
        page = browser.new_page(viewport=dict(zip(("width", "height"), WIDE)))
        page.site = site
        yield page


@pytest.fixture
def page(play):
    """The page as it loads; nothing may go wrong in it meanwhile."""
    errors = []
    note = lambda error: errors.append(str(error))
    play.on("pageerror", note)
    play.set_viewport_size(dict(zip(("width", "height"), WIDE)))
    play.goto(play.site + "play.html")
    settle(play)
    yield play
    play.remove_listener("pageerror", note)
    assert not errors


def text(page, name):
    return page.locator(f"#{name}").inner_text()


def status(page, name):
    """What is said of the last change: it waits until a control rests."""
    page.wait_for_timeout(350)
    return text(page, name)


def shown(page, *names):
    """All that these pictures are drawn from."""
    return [page.locator(f"#{name}").inner_html() for name in names]


def press(page, name, *keys):
    page.locator(name).focus()
    for key in keys:
        page.keyboard.press(key)


# The sums


def numbers(pairs):
    """Complex numbers from the page."""
    return torch.view_as_complex(torch.tensor(pairs, dtype=torch.float64))


def random_gates(length):
    """log_a and phase, one gate in five a reset, and complex inputs, all (1, length, 1)."""
    generator = torch.Generator().manual_seed(0)
    uniform, phase = (torch.rand(1, length, 1, dtype=torch.float64, generator=generator) for _ in range(2))
    x = torch.randn(1, length, 1, dtype=torch.complex128, generator=generator)
    return torch.where(uniform < 0.2, -torch.inf, -uniform), 6 * phase - 3, x


def pairs(z):
    return torch.view_as_real(z.flatten()).tolist()


def test_the_decay_matrix_is_the_librarys(page):
    log_a, _, _ = random_gates(20)
    found = page.evaluate("g => llambaPlay.decayMatrix(g).map(row => row.concat(Array(g.length - row.length).fill([0, 0])))", pairs(log_a.exp() + 0j))
    one = torch.ones(1, 20, 1, 1, dtype=torch.float64)
    assert (numbers(found) - ssd_matrix(log_a, one, one)[0, 0]).abs().max() < 1e-12


@pytest.mark.parametrize("mode", ["statePath", "scan", "attention"])
def test_the_states_are_the_librarys(page, mode):
    log_a, phase, x = random_gates(32)
    found = page.evaluate(f"([gates, inputs]) => llambaPlay.{mode}(gates, inputs)", [pairs(torch.polar(log_a.exp(), phase)), pairs(x)])
    assert (numbers(found) - linear_scan(log_a, x, phase).flatten()).abs().max() < 1e-12


def test_half_life_period_memory_and_horizons(page):
    assert abs(page.evaluate("0.9 ** llambaPlay.halfLife(0.9)") - 0.5) < 1e-12
    assert abs(page.evaluate("llambaPlay.halfLife(llambaPlay.magnitudeOf(7))") - 7) < 1e-12
    assert abs(cmath.exp(1j * 0.7 * page.evaluate("llambaPlay.period(-0.7)")) - 1) < 1e-12
    assert page.evaluate("[llambaPlay.halfLife(1), llambaPlay.halfLife(0), llambaPlay.period(0), llambaPlay.memory(1)]") == [math.inf, 0, math.inf, math.inf]
    far = math.floor(math.log(0.05) / math.log(0.8))  # tokens back at which 0.8^n is still at least 0.05
    assert page.evaluate("llambaPlay.horizons(llambaPlay.decayMatrix(Array(30).fill([0.8, 0])), 0.05)") == [min(t, far) for t in range(30)]


def test_the_division_fails_after_a_reset_only(page):
    fine, broken = ([[0.5, 0]] * 8, [[0.5, 0]] * 4 + [[0, 0]] + [[0.5, 0]] * 3)
    differ = "gates => { const x = gates.map(() => [1, 0]); return llambaPlay.difference(llambaPlay.division(gates, x), llambaPlay.statePath(gates, x)); }"
    assert page.evaluate(differ, fine) < 1e-12 and math.isnan(page.evaluate(differ, broken))


# One gate


@pytest.mark.parametrize("slider", ["gate-magnitude", "gate-phase"])
def test_sliders_of_one_gate(page, slider):
    before = *shown(page, "gate-matrix", "gate-path"), status(page, "gate-status"), text(page, f"{slider}-value")
    press(page, f"#{slider}", *["ArrowRight"] * 10)
    assert all(a != b for a, b in zip(before, (*shown(page, "gate-matrix", "gate-path"), status(page, "gate-status"), text(page, f"{slider}-value"))))


def test_presets_of_one_gate(page):
    said = {}
    for name in ("linear attention", "decay", "RoPE", "RetNet", "reset"):
        button = page.locator("#gate").get_by_role("button", name=name).first
        button.click()
        assert button.get_attribute("aria-pressed") == "true" and page.locator("[aria-pressed=true]").count() == 1
        said[name] = status(page, "gate-status"), *shown(page, "gate-matrix")
    assert len(set(said.values())) == 5
    assert said["linear attention"][0] == "Nothing fades, and nothing turns."
    assert said["RoPE"][0] == "Nothing fades, and a full turn takes 12 tokens."
    assert said["decay"][0] == "Half is left after 6.58 tokens, and nothing turns."
    assert said["reset"][0].startswith("Everything is forgotten at once")
    page.locator("#gate .start-over").click()
    assert status(page, "gate-status") == "Half is left after 6.58 tokens, and a full turn takes 12 tokens."


def test_choices_of_one_gate(page):
    matrix, path = shown(page, "gate-matrix", "gate-path")
    page.get_by_label("every token does").check()
    assert shown(page, "gate-matrix") == [matrix] and shown(page, "gate-path") != [path]
    assert "comes to rest at" in status(page, "gate-status")
    assert 'class="minus"' in matrix
    page.get_by_label("magnitude", exact=True).check()
    assert 'class="minus"' not in shown(page, "gate-matrix")[0]


def test_the_gate_is_dragged(page):
    page.locator("#gate-path").scroll_into_view_if_needed()
    ring, whole = (page.locator(f"#gate-path{part}").bounding_box() for part in (" .grip", ""))
    middle = whole["x"] + whole["width"] / 2, whole["y"] + whole["height"] / 2
    page.mouse.move(ring["x"] + ring["width"] / 2, ring["y"] + ring["height"] / 2)
    page.mouse.down()
    page.mouse.move(middle[0], middle[1] - whole["height"] / 4, steps=5)  # straight up: a quarter turn
    page.mouse.up()
    page.mouse.move(*middle)  # after the button is up nothing moves
    assert "90°" in text(page, "gate-phase-value") and "a full turn takes 4 tokens" in status(page, "gate-status")


# Resets


def test_a_reset_is_moved_by_keyboard(page):
    flag, before = page.locator("#resets .reset").first, shown(page, "strips", "reset-matrix")
    assert status(page, "reset-status") == "Resets at tokens 9 and 21. Token 19 sees 10 tokens back, to token 9, a reset. The fixed gate sees 17."
    press(page, "#resets .reset >> nth=0", *["ArrowRight"] * 5)
    assert flag.input_value() == "14" and flag.get_attribute("aria-valuetext") == "token 14"
    assert all(a != b for a, b in zip(before, shown(page, "strips", "reset-matrix")))
    assert text(page, "reset-horizon") == "5" and "Token 19 sees 5 tokens back, to token 14" in status(page, "reset-status")
    press(page, "#resets .reset >> nth=0", "Home")
    assert flag.input_value() == "1" and text(page, "reset-horizon") == "18"


def test_a_reset_is_dragged(page):
    flag = page.locator("#resets .reset").first
    flag.scroll_into_view_if_needed()
    box = flag.bounding_box()
    at = lambda token: box["x"] + box["width"] * (token - 0.5) / 32
    y = box["y"] + box["height"] / 2
    page.mouse.move(at(9), y)
    page.mouse.down()
    seen = []
    for token in (12, 15, 18):
        page.mouse.move(at(token), y, steps=3)
        seen.append((flag.input_value(), text(page, "reset-horizon"), *shown(page, "strips", "reset-matrix")))
    page.mouse.up()
    assert [(place, horizon) for place, horizon, *_ in seen] == [("12", "7"), ("15", "4"), ("18", "1")]
    assert len({one[2] for one in seen}) == len({one[3] for one in seen}) == 3


def test_resets_come_and_go(page):
    page.get_by_role("button", name="Add a reset").click()
    assert page.locator("#resets .reset:visible").count() == 3
    assert page.locator("#add-reset").get_attribute("aria-disabled") == "true"
    for _ in range(3):
        page.get_by_role("button", name="Remove a reset").click()
    assert page.locator("#remove-reset").get_attribute("aria-disabled") == "true"
    assert page.locator("#resets .reset:visible").count() == 0
    assert status(page, "reset-status").startswith("No reset. Token 19 sees 18 tokens back, to token 1.")
    page.locator("#resets .start-over").click()
    assert page.locator("#resets .reset:visible").count() == 2


@pytest.mark.parametrize("slider, key", [("listening", "Home"), ("fixed", "End"), ("query", "ArrowLeft")])
def test_sliders_of_the_resets(page, slider, key):
    before = *shown(page, "strips"), status(page, "reset-status")
    press(page, f"#{slider}", key)
    assert all(a != b for a, b in zip(before, (*shown(page, "strips"), status(page, "reset-status"))))


# The same states in four ways


def test_four_ways(page):
    assert text(page, "scan-difference") != "NaN" and float(text(page, "attention-difference").replace("−", "-")) < 1e-12
    assert text(page, "division-difference") == "NaN" and "divided 0 by 0" in text(page, "modes-status")
    page.get_by_label("the first picture").check()
    assert text(page, "division-difference") != "NaN" and "all four ways agree" in status(page, "modes-status")


# For everybody


def test_pictures_are_put_into_words(page):
    """A screen reader gets a description of each picture, which follows the controls."""
    words = lambda: [page.locator(f"#{name}").get_attribute("aria-label") for name in PICTURES]
    before = words()
    assert all(len(one) > 40 for one in before)
    press(page, "#gate-magnitude", "Home")
    press(page, "#resets .reset >> nth=0", "Home")
    assert all(a != b for a, b in zip(before, words()))


def test_every_control_can_be_reached_by_keyboard(page):
    """From the first button, Tab comes to each control of the page in turn."""
    wanted = page.evaluate("[...document.querySelectorAll('.play button, .play input:not([type=radio])')].filter(e => e.offsetParent).length")
    page.locator(".play button").first.focus()
    seen = set()
    for _ in range(60):
        seen.add(page.evaluate("[...document.querySelectorAll('.play button, .play input:not([type=radio])')].indexOf(document.activeElement)"))
        page.keyboard.press("Tab")
    assert len(seen - {-1}) == wanted > 12


def test_colours_follow_the_mode(page):
    colour = "getComputedStyle(document.querySelector('#gate-matrix .plus')).fill"
    light = page.evaluate(colour)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert page.evaluate(colour) != light


def test_pictures_fit_a_phone(page):
    page.set_viewport_size(dict(zip(("width", "height"), NARROW)))
    page.wait_for_timeout(300)
    for name in PICTURES:
        box = page.locator(f"#{name}").bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= NARROW[0] and box["width"] > 250
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW[0]


def test_it_works_from_a_file(page):
    """Downloaded and opened without a server, the page still draws."""
    page.goto((SITE / "play.html").resolve().as_uri())
    page.wait_for_selector("#gate-matrix rect")
    assert page.locator("#gate-path circle.state").count() == 31
