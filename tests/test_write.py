"""The page where the student writes, in a browser: its models are the library's, every control does what it says."""

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.browser
pytest.importorskip("playwright", reason="make test-docs installs what the browser tests need")

from docs._ext.write_models import MODELS, packed, rows_of_8_bits  # noqa: E402
from docs.browser import NARROW, SITE, WIDE, settle  # noqa: E402
from llamba_ref.checkpoint import find_checkpoint, read_json  # noqa: E402
from llamba_ref.models import load_model  # noqa: E402

PARTS = ("student", "teacher")
TEXT = 'It is a truth "universally" known -- isn\'t it? -- that 3 wives,\n\n  and café owners…\tmust be  in want.\r\n'
STEPS = """([part, ids]) => {
  const m = llambaPage.sides[part].model, s = m.start();
  return ids.map(id => [...m.step(id, s)]); }"""
GREEDY = """([part, ids, more]) => {
  const m = llambaPage.sides[part].model, s = m.start(), found = [];
  let logits;
  for (const id of ids) logits = m.step(id, s);
  for (let i = 0; i < more; i++) { found.push(llambaWrite.draw(logits, 0)); logits = m.step(found.at(-1), s); }
  return found; }"""


@pytest.fixture(scope="module", params=["served", "opened as a file"])
def opened(request, browser, site):
    page = browser.new_page(viewport=WIDE)
    page.goto(site + "write.html" if request.param == "served" else (SITE / "write.html").as_uri())
    settle(page)
    yield page
    page.close()


@pytest.fixture
def page(opened):
    """Each test finds the page as it loads; nothing goes wrong in it, and it asks nobody for anything."""
    errors, asked = [], []
    note, ask = lambda error: errors.append(str(error)), lambda request: asked.append(request.url)
    opened.on("pageerror", note)
    opened.reload()
    opened.wait_for_function("window.llambaPage")
    opened.on("request", ask)
    yield opened
    opened.remove_listener("pageerror", note)
    opened.remove_listener("request", ask)
    assert not errors and not asked


def written(page):
    """Token ids of both models, and how many of them each has read."""
    return page.evaluate("Object.values(llambaPage.sides).map(side => [side.ids, side.state.tokens])")


def write(page, tokens, temperature="0", button="#write-go"):
    page.fill("#write-tokens", str(tokens))
    page.evaluate("t => { document.getElementById('write-temperature').value = t; }", temperature)
    page.click(button)
    page.wait_for_function("document.getElementById('write-status').textContent.startsWith('Done')", timeout=60_000)


def as_on_the_page(part):
    """The library's model with the page's weights, and its tokenizer."""
    model, tokenizer = load_model(MODELS[part])
    for weight in model.parameters():
        if weight.ndim == 2:
            whole, scales = rows_of_8_bits(weight.data)
            weight.data = whole.float() * scales[:, None]
    return model, tokenizer


@pytest.mark.parametrize("part", PARTS)
def test_logits_and_greedy_text_are_the_librarys(page, part):
    model, tokenizer = as_on_the_page(part)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = model(ids)[0]
    found = torch.tensor(page.evaluate(STEPS, [part, ids[0].tolist()]))
    assert (found - expected).abs().max() < 1e-4
    assert page.evaluate(GREEDY, [part, ids[0].tolist(), 200]) == model.generate(ids, 200)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("part, kind", [("student", "Llamba"), ("teacher", "Llama")])
def test_logits_with_float_weights(page, part, kind):
    path = find_checkpoint(MODELS[part])
    config, weights = read_json(path / "config.json"), packed(load_file(path / "model.safetensors"), 32)
    model, tokenizer = load_model(MODELS[part])
    ids = tokenizer(TEXT)["input_ids"]
    found = page.evaluate(
        f"([config, weights, ids]) => {{ const m = new llambaWrite.{kind}(config, llambaWrite.weightsOf(weights)), "
        "s = m.start(); return ids.map(id => [...m.step(id, s)]); }", [config, weights, ids])
    with torch.no_grad():
        assert (torch.tensor(found) - model(torch.tensor([ids]))[0]).abs().max() < 1e-4


def test_the_tokenizer_is_the_librarys(page):
    from llamba_ref.data import load_documents, split_documents
    text = "\n".join(row["text"] for row in split_documents(load_documents("austen"), 20)[1])[:60_000] + TEXT
    ids = load_model("tiny")[1](text)["input_ids"]
    assert page.evaluate("text => llambaPage.tokenizer.encode(text)", text) == ids
    assert page.evaluate("ids => llambaPage.tokenizer.decode(ids)", ids) == text


def test_chance_is_that_of_the_distribution(page):
    """20,000 draws at two temperatures, against the softmax; 0 is the most likely one."""
    logits = torch.tensor([1.0, 0.0, 2.0, -30.0])
    for temperature in (0.5, 1.0):
        draws = page.evaluate(
            "([l, t]) => { const n = [0, 0, 0, 0];"
            " for (let i = 0; i < 20000; i++) n[llambaWrite.draw(l, t, Math.random)]++; return n; }",
            [logits.tolist(), temperature])
        assert (torch.tensor(draws) / 20_000 - (logits / temperature).softmax(0)).abs().max() < 0.02
    assert page.evaluate("l => llambaWrite.draw(l, 0)", logits.tolist()) == 2


def test_both_write_and_the_cache_grows(page):
    write(page, 150)
    (student, read), (teacher, its) = written(page)
    given = len(load_model("tiny")[1]("It is a truth universally acknowledged, that")["input_ids"])
    assert len(student) == len(teacher) == read == its == given + 150
    assert student[:given] == teacher[:given]
    bytes_ = page.evaluate("Object.values(llambaPage.sides).map(side => side.model.bytes(side.state))")
    layers = load_model("tiny-llamba")[0].init_state(1)  # all heads turn alike: the page keeps their angles once
    state = sum(z.conv.nbytes + z.ssm.nbytes + z.angle[:, 0].nbytes for z in layers)
    assert bytes_ == [state, 2048 * (given + 150)]
    assert page.inner_text("#write-student .count") == str(given + 150)
    assert page.locator("#write-speed path.student").count() == page.locator("#write-memory path.teacher").count() == 1
    assert page.locator("#write-next li").count() == 6


def test_greedy_text_on_the_page_is_the_librarys(page):
    write(page, 60)
    for part, (ids, _) in zip(PARTS, written(page)):
        model, tokenizer = as_on_the_page(part)
        given = tokenizer("It is a truth universally acknowledged, that")["input_ids"]
        assert ids == model.generate(torch.tensor([given]), 60)[0].tolist()


def test_another_ending_goes_on_from_any_token(page):
    """Greedily, going back and writing again gives the same text: nothing of what was cut is left."""
    write(page, 70)
    before = written(page)
    for tokens in (1, 16, 17, 40, 83):
        page.evaluate("n => { document.getElementById('write-back').value = n; }", tokens)
        page.fill("#write-tokens", str(len(before[0][0]) - tokens))
        page.click("#write-again")
        page.wait_for_function("document.getElementById('write-status').textContent.startsWith('Done')")
        if tokens > 18:  # behind the prompt
            assert written(page) == before
        else:
            assert [len(ids) for ids, _ in written(page)] == [len(before[0][0])] * 2
            write(page, 70)


def test_chance_writes_another_ending(page):
    write(page, 60, "1")
    before = written(page)
    page.evaluate("document.getElementById('write-back').value = 30")
    write(page, 40, "1", "#write-again")
    assert [ids[:30] for ids, _ in written(page)] == [ids[:30] for ids, _ in before]
    assert all(ids != old for (ids, _), (old, _) in zip(written(page), before))


def test_stop_and_keyboard(page):
    page.fill("#write-tokens", "5000")
    page.locator("#write-tokens").press("Enter")
    page.wait_for_function("llambaPage.sides.student.state.tokens > 60")
    assert page.get_attribute("#write-again", "aria-disabled") == "true" and page.is_disabled("#write-back")
    page.locator("#write-stop").press("Enter")
    assert page.inner_text("#write-status") == "Stopped."
    (ids, _), _ = written(page)
    page.wait_for_timeout(200)
    assert written(page)[0][0] == ids
    page.locator("#write-back").press("Home")
    assert page.inner_text("#write-back-value") == "1"


def test_an_empty_beginning_and_a_wrong_number(page):
    page.fill("#write-prompt", "")
    page.click("#write-go")
    assert page.inner_text("#write-status") == "Give at least one letter to begin with."
    page.fill("#write-prompt", "Emma")
    page.fill("#write-tokens", "-3")
    page.click("#write-go")
    assert written(page)[0][0] == []


def test_heads_and_themes(page):
    picture = lambda: page.evaluate("document.getElementById('write-state').toDataURL()")
    write(page, 30)
    one = picture()
    page.select_option("#write-head", "2,1")
    two = picture()
    assert one != two and page.locator("#write-head option").count() == 16
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_timeout(100)
    assert picture() != two
    page.evaluate("document.documentElement.dataset.theme = 'light'")


def test_on_a_phone(page):
    page.set_viewport_size(NARROW)
    write(page, 30)
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    page.set_viewport_size(WIDE)
