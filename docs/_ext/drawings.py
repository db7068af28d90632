"""The drawings of the site, as SVG that takes its colours from the page: what Llamba is, which model is which special
case, and what attention and a recurrence remember."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    """A line of text; `kind` is a class of docs/_static/site.css."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, lines: Iterable[str], kind: str = "") -> str:
    """A rounded box around its centre (x, y); the first line is its name, the others are small."""
    lines = list(lines)
    first = y + 6 - 9.5 * (len(lines) - 1)
    words = "".join(text(x, first + 20 * i, line, "small" if i else "name") for i, line in enumerate(lines))
    corner = f'x="{x - width / 2:g}" y="{y - height / 2:g}"'
    return f'<g class="box {kind}"><rect {corner} width="{width:g}" height="{height:g}" rx="8"/>{words}</g>'


def arrow(x1: float, y1: float, x2: float, y2: float, words: str = "") -> str:
    """An arrow with words on the right of its middle."""
    line = f'<path class="arrow" d="M{x1:g} {y1:g} L{x2:g} {y2:g}" marker-end="url(#head)"/>'
    return line + (text((x1 + x2) / 2 + 8, (y1 + y2) / 2 + 5, words, "small", "start") if words else "")


def drawing(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """The whole picture; `title` is what a screen reader says."""
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse">'
        '<path d="M0 0 L10 5 L0 10 z"/></marker></defs>'
    )
    return (
        f'<div class="drawing" tabindex="0"><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}">'
        f"{head}{''.join(parts)}</svg></div>\n"
    )


def special_cases() -> str:
    """The map: from GateLoop down, each arrow gives up one freedom of the gates."""
    heads = [text(180, 22, "gates from the input", "head"), text(540, 22, "gates fixed after training", "head")]
    boxes = [
        box(180, 75, 300, 62, ["GateLoop", "complex, one gate for each channel"], "main"),
        box(180, 205, 300, 62, ["GLA, HGRN2", "real, one for each channel"]),
        box(180, 335, 300, 62, ["Mamba-2 (SSD)", "real, one for each head"], "main"),
        box(180, 465, 300, 62, ["Llamba's discrete Mamba-2", "real, one for each head: a sigmoid"], "main"),
        box(540, 75, 300, 62, ["S4D, S5, LRU", "complex, queries and keys fixed too"]),
        box(540, 205, 300, 62, ["RetNet, xPos", "complex: a decay times a fixed turn"]),
        box(540, 335, 300, 62, ["RoPE (without softmax)", "only a turn"]),
        box(540, 465, 300, 62, ["linear attention", "the gate is 1"]),
    ]
    arrows = [
        arrow(180, 106, 180, 172, "no phase"),
        arrow(180, 236, 180, 302, "the same gate in a head"),
        arrow(180, 366, 180, 432, "no step size"),
        arrow(330, 75, 388, 75),
        arrow(330, 90, 388, 190),
        arrow(540, 236, 540, 302, "no decay"),
        arrow(540, 366, 540, 432, "no turn"),
        arrow(330, 350, 388, 450),
    ]
    return drawing(
        720,
        505,
        "Map of models. GateLoop is the most general. Without phase it becomes GLA and HGRN2, with one gate for each "
        "head Mamba-2, and without a step size Llamba's discrete Mamba-2. With fixed gates it becomes S4D, S5 and LRU, "
        "or RetNet and xPos, which without decay are RoPE without softmax, and without a turn linear attention. "
        "Mamba-2 with gates of 1 is linear attention too.",
        [*heads, *arrows, *boxes],
    )


def matrix(x: float, y: float, size: float, entry, count: int = 12) -> str:
    """A lower triangular matrix of squares, entry(t, s) between 0 and 1 as opacity."""
    side = size / count
    cells = "".join(
        f'<rect x="{x + s * side:.1f}" y="{y + t * side:.1f}" width="{side - 1:.1f}" height="{side - 1:.1f}" '
        f'opacity="{entry(t, s):.2f}"/>'
        for t in range(count)
        for s in range(t + 1)
    )
    return f'<g class="cells">{cells}</g>'


def llama_to_llamba() -> str:
    """What the book does: attention layers are replaced, three stages make the new layers do the old ones' work."""
    def attention(t, s):
        scores = [math.cos(1.9 * t + 0.7 * j * j) - 0.12 * (t - j) for j in range(t + 1)]
        return 0.06 + 0.94 * math.exp(scores[s] - max(scores))

    def recurrence(t, s):
        decay = math.prod(0.25 if r == 6 else 0.88 for r in range(s + 1, t + 1))
        return 0.06 + 0.94 * decay * (0.55 + 0.45 * math.cos(1.9 * t + 0.7 * s * s))

    left, right, top = 140, 580, 48
    def column(x, name, mixer, entry, memory):
        return [
            text(x, 24, name, "head"),
            matrix(x - 80, top, 160, entry),
            text(x, top + 184, mixer, "name"),
            text(x, top + 206, memory, "small"),
        ]

    between = [
        arrow(240, y, 482, y) + text(360, y - 9, words, "name") + text(360, y + 19, small, "small")
        for y, words, small in (
            (78, "1 orientation", "the matrices agree"),
            (133, "2 alignment", "the layers' outputs agree"),
            (188, "3 distillation", "the predictions agree"),
        )
    ]
    return drawing(
        720,
        262,
        "A Llama with attention, whose memory grows with each token, becomes a Llamba with Mamba-2, whose memory stays "
        "the same, in three stages: orientation, in which the matrices agree, alignment, in which the layers' outputs "
        "agree, and distillation, in which the predictions agree.",
        [
            *column(left, "Llama", "attention", attention, "its memory grows with each token"),
            *between,
            *column(right, "Llamba", "Mamba-2", recurrence, "its memory stays the same"),
        ],
    )


def attention_and_state() -> str:
    """What is kept of six tokens: attention has all of them, a recurrence one table, which each token changes."""
    places = [170 + 100 * i for i in range(6)]

    def tokens(y):
        return [box(x, y, 74, 34, [f"token {i + 1}"]) for i, x in enumerate(places)]

    arcs = [
        f'<path class="arrow" d="M{places[-1]} 84 Q{(x + places[-1]) / 2:g} {156 - 0.1 * x:g} {x} 86" '
        'marker-end="url(#head)"/>'
        for x in places[:-1]
    ]
    table = [f'<g class="box main"><rect x="{x - 24}" y="253" width="48" height="48" rx="4"/>'
             f'<path class="arrow" d="M{x - 24} 269 h48 M{x - 24} 285 h48 M{x - 8} 253 v48 M{x + 8} 253 v48"/></g>'
             for x in places]
    return drawing(
        740,
        336,
        "Above, attention: the sixth token looks back at all five before it, so all of them are kept. Below, a "
        "recurrence: each token writes into a table of three by three numbers, which is handed on from token to token "
        "and is all that is kept.",
        [
            text(20, 28, "attention looks back: every token is kept", "head", "start"),
            *tokens(66), *arcs,
            text(20, 176, "a recurrence hands on a table: nothing else is kept", "head", "start"),
            *tokens(216), *table,
            *(arrow(x, 234, x, 251) for x in places),
            *(arrow(x + 26, 277, x + 74, 277) for x in places[:-1]),
            *(text(x, 323, f"S{i + 1}", "small") for i, x in enumerate(places)),
            text(90, 71, "read", "small", "end"), text(90, 221, "write", "small", "end"),
            text(90, 282, "state", "small", "end"),
        ],
    )
