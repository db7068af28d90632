"""The tables of symbols in the chapters agree with docs/notation.md, which joins them.

A chapter's row says symbol, name in the code, shape and meaning. It may hold several symbols, separated by commas, with
as many names and as many shapes, or with one for all, or with none. A name is `name`, or `name` (`local`) where the
chapter has a name of its own. A row agrees with notation when the symbol stands there with the chapter in its last
column, the same name, the chapter's local names among
the local names, and the same shape, letter by letter."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "nbs").glob("*.ipynb"))}
NOTATION = (ROOT / "docs" / "notation.md").read_text()
HEAD = "| symbol | in the code | shape | meaning |"
HEAD_OF_NOTATION = HEAD + " chapters |"
PART = r"\$[^$]*\$|`[^`]*`|\((?:`[^`]*`|[^`()])*\)|[^,$`()]"  # mathematics, code, parentheses, or one other character
NAME = re.compile(r"(`[^`]+`)(?: \((`[^`]+`(?:, `[^`]+`)*)\))?")


class Row(NamedTuple):
    """One symbol of a table."""

    symbol: str
    name: str
    local: frozenset
    shape: str
    chapters: frozenset


def pieces(cell):
    """What stands between the commas of a cell, but not those inside mathematics, code and parentheses."""
    return [piece.strip() for piece in re.findall(f"(?:{PART})+", cell) if piece.strip()]


def lines_of_tables(text, head):
    """The cells of all rows below a head, for every table in a text that has this head."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        if line == head:
            assert re.fullmatch(r"(\| --- )+\|", lines[start + 1])
            for row in lines[start + 2 :]:
                if not row.startswith("|"):
                    break
                cells = [cell.strip() for cell in row.strip("|").split("|")]
                assert len(cells) == head.count("|") - 1 and cells[0] and cells[3], row
                yield cells


def for_each(values, symbols):
    """As many values as symbols: they are as many, one for all, or none."""
    assert len(values) in (0, 1, len(symbols)), f"{len(values)} of {values} for {symbols}"
    return values * len(symbols) if len(values) == 1 else values or [""] * len(symbols)


def rows_of(text, head, chapters):
    """All symbols of the tables in a text; `chapters` makes the set of chapters from what follows the fourth cell."""
    for symbols, names, shapes, _, *more in lines_of_tables(text, head):
        symbols, names, shapes = map(pieces, (symbols, names, shapes))
        for symbol, name, shape in zip(symbols, for_each(names, symbols), for_each(shapes, symbols)):
            assert re.fullmatch(r"\$[^$]+\$", symbol) and re.fullmatch(r"(`\(.+\)`)?", shape), f"{symbol}: {shape}"
            main, local = NAME.fullmatch(name).groups() if name else ("", None)
            yield Row(symbol, main, frozenset(pieces(local or "")), shape, chapters(*more))


def chapter_rows(text, stem):
    """The symbols of a chapter."""
    return list(rows_of(text, HEAD, lambda: frozenset([stem])))


def notation_rows(text):
    """The symbols of the page, with the chapters that the links in the last column lead to."""
    stems = dict(re.findall(r"^\[(\w+)\]: nbs/(\w+)\.ipynb$", text, re.MULTILINE))
    return list(
        rows_of(
            text, HEAD_OF_NOTATION, lambda cell: frozenset(stems[label] for label in re.findall(r"\[(\w+)\]", cell))
        )
    )


def disagreements(chapters, notation):
    """What is wrong, a line for each fault; `chapters` is the prose of each chapter, `notation` that of the page."""
    page, wrong, used = notation_rows(notation), [], set()
    for number, row in enumerate(page):
        for other in page[:number]:
            if row.symbol == other.symbol and row.chapters & other.chapters:
                wrong.append(f"notation has {row.symbol} twice for {sorted(row.chapters & other.chapters)}")
    for stem, text in chapters.items():
        rows = chapter_rows(text, stem)
        for line in re.findall(r"^\| *symbol.*$", text, re.MULTILINE):
            if line != HEAD:
                wrong.append(f"{stem} has another head: {line}")
        for row in rows:
            if sum(row.symbol == other.symbol for other in rows) > 1:
                wrong.append(f"{stem} has {row.symbol} twice")
            for entry in (entry for entry in page if entry.symbol == row.symbol and stem in entry.chapters):
                used |= {(entry, stem)} | {(entry, local) for local in row.local}
                if (row.name, row.shape) != (entry.name, entry.shape) or not row.local <= entry.local:
                    wrong.append(f"{stem} has {row.symbol} as {row[1:4]}, notation as {entry[1:4]}")
            if not any(entry.symbol == row.symbol and stem in entry.chapters for entry in page):
                wrong.append(f"{stem} has {row.symbol}, notation does not have it for this chapter")
    for entry in page:
        wrong += [
            f"notation has {entry.symbol} for {thing}, which does not have it"
            for thing in sorted(entry.chapters | entry.local)
            if (entry, thing) not in used
        ]
    return wrong


def cells(stem, kind):
    """All cells of one kind of a notebook, as one text."""
    notebook = json.loads(NOTEBOOKS[stem].read_text())
    return "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind)


CHAPTERS = {stem: cells(stem, "markdown") for stem in NOTEBOOKS}
WITH_TABLES = [stem for stem, text in CHAPTERS.items() if chapter_rows(text, stem)]


def test_chapters_agree_with_notation():
    assert not disagreements(CHAPTERS, NOTATION)
    assert set(WITH_TABLES) >= {stem for stem in NOTEBOOKS if stem < "80"}  # appendices may have none
    assert len(notation_rows(NOTATION)) > 100


def test_notation_has_one_head_and_no_link_too_many():
    """Every table of the page has the head, and every chapter that a link is defined for is a notebook and is used."""
    assert set(re.findall(r"^\| *symbol.*$", NOTATION, re.MULTILINE)) == {HEAD_OF_NOTATION}
    linked = re.findall(r"^\[\w+\]: nbs/(\w+)\.ipynb$", NOTATION, re.MULTILINE)
    assert set(linked) == {stem for row in notation_rows(NOTATION) for stem in row.chapters} <= set(NOTEBOOKS)
    assert len(linked) == len(set(linked))


@pytest.mark.parametrize("stem", WITH_TABLES)
def test_names_are_in_the_code(stem):
    """A reader finds the name of each symbol, or its local name, in the code, or as an axis of a shape in the table."""
    here = NOTEBOOKS if stem == "01_conventions" else [stem]  # that chapter names what others define
    code = "\n".join(cells(other, "code") for other in here)
    rows = chapter_rows(CHAPTERS[stem], stem)
    words = set(re.findall(r"\w+", code)) | {word for row in rows for word in re.findall(r"\w+", row.shape)}
    for row in rows:
        names = [
            re.sub(r"[(\[].*", "", name) for name in (row.name, *row.local) if name
        ]  # not what an array or a function is given
        assert not names or any(set(re.findall(r"[A-Za-z_]\w*", name)) <= words for name in names), (
            f"{row.symbol}: {names}"
        )


# The test itself


def test_pieces():
    assert pieces("$L$, $x_{a, b}$") == ["$L$", "$x_{a, b}$"]
    assert pieces("`len` (`length`, `N`), `f(a, b)`") == ["`len` (`length`, `N`)", "`f(a, b)`"]
    assert pieces("`x` (`layer.matrix()`)") == ["`x` (`layer.matrix()`)"]
    assert pieces("") == []


def test_rows():
    rows = "| --- | --- | --- | --- |\n| $q$, $k$ | `q`, `k` (`key`) | `(len, 3)` | two |\n| $r$ | | | place |"
    text = f"Words.\n\n{HEAD}\n{rows}\n\n{HEAD}"
    q, k, r = chapter_rows(text.rsplit("\n", 1)[0], "02_scan")
    assert q == Row("$q$", "`q`", frozenset(), "`(len, 3)`", frozenset(["02_scan"]))
    assert k == Row("$k$", "`k`", frozenset(["`key`"]), "`(len, 3)`", frozenset(["02_scan"]))
    assert r[:4] == ("$r$", "", frozenset(), "")


SMALL = f"""{HEAD}
| --- | --- | --- | --- |
| $L$, $H$ | `len` (`length`), `heads` | | tokens, heads |
| $x_t$ | `x` | `(batch, len)` | values |
"""
PAGE = f"""{HEAD_OF_NOTATION}
| --- | --- | --- | --- | --- |
| $L$ | `len` (`length`) | | tokens | [scan] |
| $H$ | `heads` | | heads | [scan] |
| $x_t$ | `x` | `(batch, len)` | values | [scan] |
| $x_t$ | `x` | `(batch,)` | tokens | |

[scan]: nbs/02_scan.ipynb
"""


def test_small_tables_agree():
    assert not disagreements({"02_scan": SMALL, "81_checkpoint": "no table"}, PAGE)


@pytest.mark.parametrize("where, old, new, message", [
    ("chapter", "`heads`", "`n_heads`", "02_scan has $H$ as"),
    ("chapter", "(`length`)", "(`size`)", "02_scan has $L$ as"),
    ("chapter", " (`length`)", "", "notation has $L$ for `length`"),
    ("chapter", "`(batch, len)`", "`(batch, length)`", "02_scan has $x_t$ as"),
    ("chapter", "`(batch, len)`", "", "02_scan has $x_t$ as"),
    ("chapter", "$x_t$", "$v_t$", "02_scan has $v_t$, notation does not"),
    ("chapter", "$x_t$", "$v_t$", "notation has $x_t$ for 02_scan"),
    ("chapter", "| $x_t$", "| $H$ | `heads` | | heads |\n| $x_t$", "02_scan has $H$ twice"),
    ("chapter", "in the code", "name in code", "02_scan has another head"),
    ("chapter", "| meaning |", "| |", "02_scan has another head"),
    ("page", "| heads | [scan] |", "| heads | |", "02_scan has $H$, notation does not"),
    ("page", "| tokens | |", "| tokens | [scan] |", "notation has $x_t$ twice"),
    ("page", "`x` | `(batch, len)`", "`y` | `(batch, len)`", "02_scan has $x_t$ as"),
])
def test_faults_are_found(where, old, new, message):
    chapter, page = (
        text.replace(old, new, 1) if place == where else text for place, text in (("chapter", SMALL), ("page", PAGE))
    )
    assert (chapter, page) != (SMALL, PAGE)
    assert any(fault.startswith(message) for fault in disagreements({"02_scan": chapter}, page))


def test_tables_that_do_not_add_up_are_refused():
    for old, new in (
        ("`heads`", "`heads`, `x`"),
        ("$H$ |", "$H$, $G$ |"),
        ("| $x_t$ |", "| x_t |"),
        ("`(batch, len)`", "batch"),
        ("`x`", "x"),
        ("| values |", "|"),
        ("`x` |", "`x` | |"),
    ):
        assert old in SMALL
        with pytest.raises((AssertionError, AttributeError)):
            chapter_rows(SMALL.replace(old, new, 1), "02_scan")
