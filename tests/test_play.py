"""The page to play with, in a browser: its numbers are the library's.

Every control works by mouse, by finger and by keyboard."""

import cmath
import math
from itertools import pairwise

import pytest
import torch

pytestmark = pytest.mark.browser
pytest.importorskip("playwright", reason="make test-docs installs what the browser tests need")

from docs.browser import NARROW, SITE, WIDE, barriers, settle  # noqa: E402
from llamba_ref.gateloop import gateloop_matrix  # noqa: E402
from llamba_ref.scan import linear_scan  # noqa: E402
from llamba_ref.ssd import ssd_matrix  # noqa: E402

GATE, RESETS = ("gate-matrix", "gate-path"), ("strips", "reset-matrix")  # the pictures
LENGTH = 32


@pytest.fixture(scope="module")
def address(site):
    return site + "play.html"


@pytest.fixture(scope="module")
def opened(browser, address):
    page = browser.new_page(viewport=WIDE)
    page.goto(address)
    settle(page)
    yield page
    page.close()


@pytest.fixture
def page(opened):
    """Each test finds the page as it loads, and nothing goes wrong in it meanwhile."""
    errors = []
    note = lambda error: errors.append(str(error))
    opened.on("pageerror", note)
    opened.reload()
    opened.wait_for_selector("#gate-matrix rect")
    yield opened
    opened.remove_listener("pageerror", note)
    assert not errors


def drawn(page, *pictures):
    """All that pictures are made of."""
    return [page.locator(f"#{name}").inner_html() for name in pictures]


def text(page, name):
    return page.locator(f"#{name}").inner_text()


def said(page, name):
    """What a screen reader is told, once the sliders rest."""
    page.wait_for_timeout(300)
    return text(page, name)


def press(page, control, *keys):
    page.locator(control).focus()
    for key in keys:
        page.keyboard.press(key)


def complexes(pairs):
    return torch.view_as_complex(torch.tensor(pairs, dtype=torch.float64))


def gates(page, magnitudes, phases):
    return page.evaluate("([m, p]) => m.map((size, t) => llambaPlay.gate(size, p[t]))", [magnitudes, phases])


def full(rows):
    """The rows of a lower triangular matrix, filled up with zeros."""
    return complexes([row + [[0, 0]] * (len(rows) - len(row)) for row in rows])


# The sums


@pytest.mark.parametrize("magnitude, phase", [(0.9, 0.5), (1.0, -2.0), (0.3, math.pi), (0.99, 0.0)])
def test_decay_matrix_of_one_gate(page, magnitude, phase):
    found = full(page.evaluate("a => llambaPlay.decayMatrix(Array(32).fill(a))", gates(page, [magnitude], [phase])[0]))
    one = torch.ones(1, LENGTH, 1, 1, dtype=torch.float64)
    expected = gateloop_matrix(one, one, math.log(magnitude) * one, phase * one)[0, 0]
    assert (found - expected).abs().max() < 1e-12


def test_decay_matrix_with_a_reset(page):
    magnitudes = torch.linspace(0.2, 1.0, LENGTH, dtype=torch.float64)
    magnitudes[13] = 0
    found = full(page.evaluate("a => llambaPlay.decayMatrix(a)", gates(page, magnitudes.tolist(), [0.0] * LENGTH)))
    one = torch.ones(1, LENGTH, 1, 1, dtype=torch.float64)
    expected = ssd_matrix(magnitudes.log()[None, :, None], one, one)[0, 0]
    assert (found.real - expected).abs().max() < 1e-12 and not found.imag.any()


@pytest.mark.parametrize("mode", ["statePath", "scan", "attention", "division"])
def test_path_of_the_state(page, mode):
    """Any gates, resets too where they may be, any inputs, in each of the modes."""
    magnitudes, phases = torch.rand(LENGTH, dtype=torch.float64) * 0.5 + 0.5, torch.randn(LENGTH, dtype=torch.float64)
    if mode != "division":
        magnitudes[::7] = 0
    x = torch.randn(LENGTH, dtype=torch.complex128)
    found = complexes(
        page.evaluate(
            f"([a, x]) => llambaPlay.{mode}(a, x)",
            [gates(page, magnitudes.tolist(), phases.tolist()), torch.view_as_real(x).tolist()],
        )
    )
    expected = linear_scan(magnitudes.log()[None], x[None], phases[None])[0]
    assert (found - expected).abs().max() < 1e-12


def test_division_fails_at_a_reset_and_the_others_do_not(page):
    magnitudes = [0.9] * LENGTH
    magnitudes[20] = 0.0
    a, x = gates(page, magnitudes, [0.3] * LENGTH), [[1.0, 0.0]] * LENGTH
    path = complexes(page.evaluate("([a, x]) => llambaPlay.statePath(a, x)", [a, x]))
    for mode in ("scan", "attention"):
        assert (complexes(page.evaluate(f"([a, x]) => llambaPlay.{mode}(a, x)", [a, x])) - path).abs().max() < 1e-12
    wrong = complexes(page.evaluate("([a, x]) => llambaPlay.division(a, x)", [a, x]))
    assert wrong[:20].isfinite().all() and wrong[20:].isnan().all()
    assert page.evaluate(
        "([a, x]) => Number.isNaN(llambaPlay.difference(llambaPlay.division(a, x), llambaPlay.scan(a, x)))", [a, x]
    )


def test_half_life_period_memory_and_horizon(page):
    assert abs(page.evaluate("0.9 ** llambaPlay.halfLife(0.9)") - 0.5) < 1e-12
    assert abs(page.evaluate("llambaPlay.halfLife(llambaPlay.magnitudeOf(7))") - 7) < 1e-12
    assert abs(cmath.exp(1j * 0.7 * page.evaluate("llambaPlay.period(-0.7)")) - 1) < 1e-12
    assert abs(page.evaluate("llambaPlay.memory(0.9)") - sum(0.9**n for n in range(500))) < 1e-12
    assert page.evaluate(
        "[llambaPlay.halfLife(1), llambaPlay.halfLife(0), llambaPlay.period(0), llambaPlay.memory(1)]"
    ) == [math.inf, 0, math.inf, math.inf]
    far = math.floor(math.log(0.05) / math.log(0.8))  # tokens back at which 0.8^n is still at least 0.05
    horizons = page.evaluate(
        "a => llambaPlay.horizons(llambaPlay.decayMatrix(a), 0.05)",
        gates(page, [0.8] * 12 + [0.0] + [0.8] * 17, [0.0] * 30),
    )
    assert horizons == [min(t, far) for t in range(12)] + [min(t, far) for t in range(18)]


# One gate


@pytest.mark.parametrize("slider", ["gate-magnitude", "gate-phase"])
def test_sliders_of_one_gate(page, slider):
    before = (
        drawn(page, *GATE),
        said(page, "gate-status"),
        text(page, f"{slider}-value"),
        page.locator(f"#{slider}").get_attribute("aria-valuetext"),
    )
    press(page, f"#{slider}", *["ArrowRight"] * 5)
    after = (
        drawn(page, *GATE),
        said(page, "gate-status"),
        text(page, f"{slider}-value"),
        page.locator(f"#{slider}").get_attribute("aria-valuetext"),
    )
    assert all(a != b for a, b in zip(before[0], after[0])) and all(a != b for a, b in zip(before[1:], after[1:]))


def test_numbers_of_one_gate(page):
    names = "gate-half-life", "gate-period", "gate-memory"
    assert [text(page, name) for name in names] == ["6.58", "12", "10"]
    press(page, "#gate-magnitude", "End")
    assert [text(page, name) for name in names] == ["∞", "12", "∞"] and text(page, "gate-magnitude-value").startswith(
        "1,"
    )
    press(page, "#gate-magnitude", "Home")
    assert [text(page, name) for name in names] == ["0", "12", "1"] and text(page, "gate-magnitude-value").startswith(
        "0,"
    )
    press(page, "#gate-phase", "Home")
    assert text(page, "gate-period") == "2" and text(page, "gate-phase-value") == "−3.14 rad, −180°"


def test_the_magnitude_is_fine_near_one(page):
    """Equal steps are equal factors of the half-life, and all gates from 0 to 1 are there."""
    places = page.evaluate("""() => Array.from({ length: 201 }, (_, place) => {
      const slider = document.getElementById("gate-magnitude");
      slider.value = place;
      slider.dispatchEvent(new Event("input"));
      return document.getElementById("gate-magnitude-value").textContent;
    })""")
    magnitudes = [float(place.split(",")[0]) for place in places]
    assert magnitudes[0] == 0 and magnitudes[-1] == 1 and all(a <= b for a, b in pairwise(magnitudes))
    assert sum(0.99 < magnitude < 1 for magnitude in magnitudes) > 40


def test_presets(page):
    seen = set()
    for name, status in (
        ("linear attention", "Nothing fades, and nothing turns."),
        ("decay", "Half is left after 6.58 tokens, and nothing turns."),
        ("RoPE", "Nothing fades, and a full turn takes 12 tokens."),
        ("RetNet", "Half is left after 6.58 tokens, and a full turn takes 12 tokens."),
        ("reset", "Everything is forgotten at once: a state holds its own token only."),
    ):
        button = page.locator("#gate button", has_text=name).first
        press(page, f"#gate button:has-text('{name}') >> nth=0", "Enter")
        assert said(page, "gate-status") == status and button.get_attribute("aria-pressed") == "true"
        assert page.locator("[aria-pressed=true]").count() == 1
        seen.add(drawn(page, "gate-matrix")[0])
    assert len(seen) == 5
    press(page, "#gate .start-over", "Enter")
    assert (
        text(page, "gate-magnitude-value") == "0.9, half-life 6.58 tokens"
        and text(page, "gate-phase-value") == "0.524 rad, 30°"
    )


def test_what_is_drawn_of_one_gate(page):
    matrix, path = drawn(page, *GATE)
    assert 'class="minus"' in matrix
    page.get_by_label("every token does").check()
    assert drawn(page, "gate-matrix") == [matrix] and drawn(page, "gate-path") != [path]
    rest = 1 / (1 - 0.9 * cmath.exp(1j * math.pi / 6))
    assert said(page, "gate-status").endswith(f"comes to rest at {rest.real:.3g} + {rest.imag:.3g}i.")
    page.locator("#gate-absolute").check()
    assert 'class="minus"' not in drawn(page, "gate-matrix")[0]


def middle(locator):
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_the_gate_is_dragged(page):
    """By its ring, to i on the circle of magnitude 1: a quarter turn, and nothing fades."""
    page.locator("#gate-path").scroll_into_view_if_needed()
    ring, circle = page.locator("#gate-path .grip"), page.locator("#gate-path .unit").bounding_box()
    page.mouse.move(*middle(ring))
    page.mouse.down()
    page.mouse.move(circle["x"] + circle["width"] / 2, circle["y"] - 3, steps=4)
    page.mouse.up()
    page.mouse.move(*middle(page.locator("#gate-matrix")))  # after the button is up nothing moves
    assert said(page, "gate-status") == "Nothing fades, and a full turn takes 4 tokens."
    assert page.locator("#gate-magnitude").input_value() == "200" and page.locator("#gate-phase").input_value() == "90"


# Resets


def place_of(page, flag, token):
    """Where a flag is when it stands at a token."""
    box = flag.bounding_box()
    thumb = 1.5 * 16
    return box["x"] + thumb / 2 + (token - 1) * (box["width"] - thumb) / 31, box["y"] + 14


def test_a_reset_is_moved_by_keyboard(page):
    assert (
        said(page, "reset-status")
        == "Resets at tokens 9 and 21. Token 19 sees 10 tokens back, to token 9, a reset. The fixed gate sees 17."
    )
    before = drawn(page, *RESETS)
    press(page, ".reset >> nth=0", "ArrowRight", "ArrowRight")
    assert all(a != b for a, b in zip(before, drawn(page, *RESETS)))
    assert (
        said(page, "reset-status")
        == "Resets at tokens 11 and 21. Token 19 sees 8 tokens back, to token 11, a reset. The fixed gate sees 17."
    )
    assert (
        text(page, "reset-horizon") == "8"
        and page.locator(".reset").first.get_attribute("aria-valuetext") == "token 11"
    )
    press(page, ".reset >> nth=0", "End")
    assert said(page, "reset-status").startswith(
        "Resets at tokens 21 and 32. Token 19 sees 18 tokens back, to token 1."
    )


def test_a_reset_is_dragged(page):
    flag = page.locator(".reset").first
    flag.scroll_into_view_if_needed()
    page.mouse.move(*place_of(page, flag, 9))
    page.mouse.down()
    seen = []
    for token in (10, 14, 18):
        page.mouse.move(*place_of(page, flag, token))
        seen.append((flag.input_value(), text(page, "reset-horizon"), *drawn(page, *RESETS)))
    page.mouse.up()
    page.mouse.move(*place_of(page, flag, 3))
    assert [one[:2] for one in seen] == [("10", "9"), ("14", "5"), ("18", "1")] and flag.input_value() == "18"
    assert all(len({one[picture] for one in seen}) == 3 for picture in (2, 3))


def test_the_flags_stand_on_their_tokens(page):
    """The line that a flag draws through the strips is below its middle."""
    for token in ("Home", "PageUp", "End"):
        press(page, ".reset >> nth=0", token)
        place = int(page.locator(".reset").first.input_value())
        lines = [
            box["x"] + box["width"] / 2 for box in (one.bounding_box() for one in page.locator("#strips .cut").all())
        ]
        assert min(abs(line - place_of(page, page.locator(".reset").first, place)[0]) for line in lines) < 1


def test_resets_are_added_and_removed(page):
    press(page, "#add-reset", "Enter")
    assert (
        said(page, "reset-status").startswith("Resets at tokens 9, 15 and 21.") and text(page, "reset-horizon") == "4"
    )
    full = drawn(page, *RESETS)
    press(page, "#add-reset", "Enter")  # three are the most
    assert page.locator("#add-reset").get_attribute("aria-disabled") == "true" and drawn(page, *RESETS) == full
    press(page, "#remove-reset", *["Enter"] * 4)
    assert said(page, "reset-status") == "No reset. Token 19 sees 18 tokens back, to token 1. The fixed gate sees 17."
    assert (
        page.locator("#remove-reset").get_attribute("aria-disabled") == "true"
        and page.locator(".reset:visible").count() == 0
    )
    press(page, "#resets .start-over", "Enter")
    assert (
        said(page, "reset-status").startswith("Resets at tokens 9 and 21.")
        and page.locator(".reset:visible").count() == 2
    )


@pytest.mark.parametrize("slider", ["listening", "fixed", "query"])
def test_sliders_of_the_resets(page, slider):
    before = drawn(page, *RESETS), said(page, "reset-status"), text(page, f"{slider}-value")
    press(page, f"#{slider}", *["PageDown"] * 4)
    after = drawn(page, *RESETS), said(page, "reset-status"), text(page, f"{slider}-value")
    assert before[0] != after[0] and before[1:] != after[1:] and before[2] != after[2]


def test_no_fixed_gate_has_the_horizons_of_one_that_listens(page):
    """What the page asks its reader to try."""
    best = page.evaluate("""() => Math.max(...Array.from({ length: 201 }, (_, place) => {
      const slider = document.getElementById("fixed");
      slider.value = place;
      slider.dispatchEvent(new Event("input"));
      return Number(document.getElementById("same-horizon").textContent);
    }))""")
    assert best < LENGTH
    press(page, "#remove-reset", "Enter", "Enter")
    press(page, "#fixed", "End")
    assert text(page, "same-horizon") == "32"


def test_a_screen_reader_hears_the_end_of_a_move_only(page):
    page.evaluate("""() => { window.heard = []; const status = document.getElementById("reset-status");
      const watched = { childList: true, characterData: true, subtree: true };
      new MutationObserver(() => heard.push(status.textContent)).observe(status, watched); }""")
    page.locator("#query").evaluate(
        "e => { for (let token = 20; token <= 30; token++) { e.value = token; e.dispatchEvent(new Event('input')); } }"
    )
    last = said(page, "reset-status")
    assert "Token 30" in last and page.evaluate("heard") == [last]


# Four ways to the same states


def test_four_ways(page):
    differences = lambda: [text(page, f"{mode}-difference") for mode in ("scan", "attention", "division")]
    *two, third = differences()
    assert all(float(one.replace("−", "-")) < 1e-12 for one in two) and third == "NaN"
    assert (
        said(page, "modes-status")
        == "With the gates of the second picture three ways agree. The fourth has divided 0 by 0."
    )
    state = text(page, "recurrent-state")
    page.locator("#modes-gate").check()
    assert all(float(one.replace("−", "-")) < 1e-12 for one in differences()) and text(page, "recurrent-state") != state
    assert said(page, "modes-status") == "With the gate of the first picture all four ways agree."
    press(page, "#gate-magnitude", "Home")
    assert differences()[2] == "NaN"


# The page


def test_it_stays_at_home_and_says_nothing(browser, address):
    page, outside, console = browser.new_page(), [], []
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(address.removesuffix("play.html")) else outside.append(request.url)
        ),
    )
    page.on("console", lambda message: console.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    page.goto(address)
    settle(page)
    for control in page.locator(".play input:visible, .play button:visible").all():
        control.focus()
        for key in ("Home", "ArrowRight", "Space", "End"):
            page.keyboard.press(key)
    assert not outside and not console
    page.close()


def test_every_control_can_be_reached_and_has_a_name(page):
    page.locator("#play-with-the-gate h1").click()
    expected = page.locator(".play button:visible, .play input[type=range]:visible, .play input:checked").count()
    seen = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("""() => { const e = document.activeElement;
          return e.closest(".play") && [...document.querySelectorAll(".play input, .play button")].indexOf(e); }"""))
    assert len(seen - {None}) == expected
    unnamed = page.locator(".play input").evaluate_all(
        "all => all.filter(e => !e.labels.length && !e.ariaLabel).map(e => e.id)"
    )
    assert not unnamed


def test_pictures_are_put_into_words(page):
    """A screen reader gets a description of each picture, which follows the controls."""
    pictures = page.locator(".play svg[role=img]")
    before = [picture.get_attribute("aria-label") for picture in pictures.all()]
    assert len(before) == 4 and all(len(words) > 40 for words in before)
    press(page, "#gate-magnitude", "Home")
    press(page, ".reset >> nth=0", "Home")
    assert all(a != b for a, b in zip(before, [picture.get_attribute("aria-label") for picture in pictures.all()]))


def test_colours_follow_the_mode(page):
    """At once, and in what is seen, not only in what is computed."""
    shot = lambda: page.locator("#gate-matrix").screenshot()
    colour = "getComputedStyle(document.querySelector('#gate-matrix .plus')).fill"
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    light = page.evaluate(colour), shot()
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_timeout(400)
    assert page.evaluate(colour) != light[0] and shot() != light[1]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_no_serious_barrier_in_use(browser, address, mode):
    """As it loads is for test_site; here everything has been moved."""
    page = browser.new_page(viewport=WIDE, color_scheme=mode)
    page.goto(address)
    settle(page)
    page.locator("#gate-constant").check()
    page.locator("#modes-gate").check()
    press(page, "#add-reset", "Enter")
    press(page, "#gate-magnitude", "Home")
    page.wait_for_timeout(400)
    assert not barriers(page, mode)
    page.close()


def drag_by_finger(page, *points):
    """Touch events as a screen sends them."""
    session = page.context.new_cdp_session(page)
    send = lambda kind, *at: session.send(
        "Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in at]}
    )
    send("touchStart", points[0])
    for point in points[1:]:
        send("touchMove", point)
        page.wait_for_timeout(50)
    send("touchEnd")
    page.wait_for_timeout(300)


@pytest.fixture
def phone(browser, address):
    context = browser.new_context(viewport=NARROW, has_touch=True, device_scale_factor=3)
    page = context.new_page()
    page.goto(address)
    settle(page)
    yield page
    context.close()


def test_on_a_phone(phone):
    """Nothing scrolls sideways, and text in the pictures keeps its size."""
    assert phone.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    for picture in phone.locator(".play svg").all():
        scale, size = picture.evaluate(
            "e => ["
            "e.getBoundingClientRect().width / e.viewBox.baseVal.width, "
            "e.getBoundingClientRect().height / e.viewBox.baseVal.height]"
        )
        assert abs(scale - 1) < 0.01 and abs(size - 1) < 0.01
    phone.set_viewport_size({"width": 700, "height": 900})
    phone.wait_for_timeout(200)
    assert (
        phone.locator("#strips").evaluate(
            "e => Math.abs(e.getBoundingClientRect().width / e.viewBox.baseVal.width - 1)"
        )
        < 0.01
    )


def test_dragged_by_a_finger(phone):
    """A flag and the gate follow, and the page does not."""
    phone.locator("#strips").evaluate("e => e.scrollIntoView({ block: 'center' })")
    flag, height = phone.locator(".reset").first, phone.evaluate("scrollY")
    drag_by_finger(phone, *[place_of(phone, flag, token) for token in (9, 10, 12, 15)])
    assert flag.input_value() == "15" and text(phone, "reset-horizon") == "4" and phone.evaluate("scrollY") == height

    phone.locator("#gate-path").evaluate("e => e.scrollIntoView({ block: 'center' })")
    (x, y), height = middle(phone.locator("#gate-path .grip")), phone.evaluate("scrollY")
    circle = phone.locator("#gate-path .unit").bounding_box()
    below = circle["x"] + circle["width"] / 2, circle["y"] + circle["height"] + 3  # -i: a quarter turn the other way
    drag_by_finger(phone, *[(x + part * (below[0] - x), y + part * (below[1] - y)) for part in (0, 0.3, 0.6, 1)])
    assert phone.locator("#gate-phase").input_value() == "-90" and phone.evaluate("scrollY") == height


def test_it_works_from_a_file(browser):
    """Downloaded and opened without a server, the page still draws."""
    page = browser.new_page()
    page.goto((SITE / "play.html").resolve().as_uri())
    page.wait_for_selector("#gate-matrix rect")
    press(page, "#gate-magnitude", "End")
    assert text(page, "gate-memory") == "∞"
    page.close()


def test_without_javascript(browser, address):
    """The page says why there is nothing to play with, and shows no dead controls."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("noscript p").is_visible() and not page.locator(".play").first.is_visible()
    context.close()
