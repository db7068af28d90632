"""Drawings of the site, as SVG that takes its colours from the page: what Llamba is, which model is which special
case, and which tensors with which shapes go through a mixer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import NamedTuple


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


class Shapes(NamedTuple):
    """What `mixer_shapes` draws: `rows` from top to bottom, of {key: (x, width, lines, kind)}, and `arrows` between."""

    title: str  # what a screen reader says
    rows: tuple[dict[str, tuple[float, float, tuple[str, ...], str]], ...]  # a box: its name and its shape
    arrows: tuple[tuple[str, str], ...]  # from one key to another, down


MIXERS = {
    "gateloop": Shapes(
        "Shapes in a GateLoop mixer. The input u of shape b, L, d goes through one linear map, which makes queries and "
        "keys of shape b, L, H, K, values of shape b, L, H, P, gates of shape b, L, H, K and the output gate's input z "
        "of shape b, L, d. Gates, keys and values make the state of shape b, H, K, P; the query reads it, which makes "
        "y of shape b, L, H, P; its heads are joined, multiplied by SiLU of z, and projected to b, L, d.",
        (
            {"u": (360, 150, ("u", "(b, L, d)"), "")},
            {"in": (360, 700, ("in_proj: one linear map",), "main")},
            {
                "q": (76, 132, ("q", "(b, L, H, K)"), ""),
                "k": (218, 132, ("k", "(b, L, H, K)"), ""),
                "v": (360, 132, ("v", "(b, L, H, P)"), ""),
                "a": (502, 132, ("log |a|, φ", "(b, L, H, K)"), ""),
                "z": (644, 132, ("z", "(b, L, d)"), ""),
            },
            {"S": (360, 330, ("S ← diag(a) S + kᵀv", "state (b, H, K, P), token by token"), "main")},
            {"y": (185, 250, ("y = Re(q S)", "(b, L, H, P)"), "main")},
            {"gated": (430, 400, ("y ∘ SiLU(z)", "heads joined: (b, L, d), d = H P"), "")},
            {"out": (430, 250, ("out_proj", "(b, L, d)"), "main")},
        ),
        (
            ("u", "in"), *(("in", key) for key in "qkvaz"), ("k", "S"), ("v", "S"), ("a", "S"), ("q", "y"), ("S", "y"),
            ("y", "gated"), ("z", "gated"), ("gated", "out"),
        ),
    ),
}  # fmt: skip


def mixer_shapes(name: str) -> str:
    """The tensors of a mixer and their shapes, from its input to its output; `name` is a key of `MIXERS`."""
    shapes, tall, gap = MIXERS[name], 54, 36
    height = len(shapes.rows) * (tall + gap) - gap + 12
    places = {key: (x, 6 + tall / 2 + i * (tall + gap), width) for i, row in enumerate(shapes.rows)
              for key, (x, width, _, _) in row.items()}
    lines = []
    for start, end in shapes.arrows:
        (x1, y1, wide1), (x2, y2, wide2) = places[start], places[end]
        reach1, reach2 = wide1 / 2 - 16, wide2 / 2 - 16
        left, right = max(x1 - reach1, x2 - reach2), min(x1 + reach1, x2 + reach2)
        if left <= right:  # one box stands above the other: straight down
            x1 = x2 = (left + right) / 2
        else:
            x1, x2 = (right, left) if x1 < x2 else (left, right)
        lines.append(arrow(x1, y1 + tall / 2, x2, y2 - tall / 2 - 2))
    boxes = [box(*places[key][:2], width, tall, words, kind)
             for row in shapes.rows for key, (_, width, words, kind) in row.items()]
    return drawing(720, height, shapes.title, [*lines, *boxes])
