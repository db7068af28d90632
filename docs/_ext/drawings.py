"""Drawings of the site, as SVG that takes its colours from the page: what Llamba is, which model is which special
case, what attention and a recurrence remember, and which tensors with which shapes go through a mixer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from html import escape
from pathlib import Path
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
    "conv": Shapes(
        "Shapes in the short convolution. The window of shape b, channels, W and the inputs x of shape b, L, channels "
        "are joined to W + L inputs. W shifted copies of them, each times its tap, make y of shape b, L, channels; the "
        "last W inputs are the next window.",
        (
            {
                "before": (130, 220, ("window before", "(b, channels, W)"), ""),
                "x": (390, 220, ("x", "(b, L, channels)"), ""),
                "taps": (625, 170, ("weight", "(channels, 1, W)"), ""),
            },
            {"joined": (260, 480, ("joined", "W + L inputs of each channel"), "")},
            {
                "after": (130, 220, ("window after", "the last W: (b, channels, W)"), "main"),
                "y": (490, 440, ("y: W shifted copies, each times its tap", "(b, L, channels)"), "main"),
            },
        ),
        (("before", "joined"), ("x", "joined"), ("joined", "after"), ("joined", "y"), ("taps", "y")),
    ),
    "mamba2": Shapes(
        "Shapes in Mamba-2's mixer. The input u of shape b, L, d goes through one linear map, which makes z of shape "
        "b, L, H P, what enters the convolution of shape b, L, H P + 2 G N, and step sizes of shape b, L, H. The "
        "convolution gives values x of shape b, L, H, P and keys B and queries C of shape b, L, G, N. They and the "
        "decays make the state of shape b, H, P, N; the query reads y of shape b, L, H, P. It is gated with z, "
        "normalised, and projected to b, L, d.",
        (
            {"u": (360, 150, ("u", "(b, L, d)"), "")},
            {"in": (360, 700, ("in_proj: one linear map",), "main")},
            {
                "z": (76, 132, ("z", "(b, L, H P)"), ""),
                "a": (232, 150, ("Δ, log a = Δ A", "(b, L, H)"), ""),
                "conv": (516, 388, ("convolution of 4 taps, SiLU", "window (b, H P + 2 G N, 4)"), "main"),
            },
            {
                "x": (384, 124, ("x", "(b, L, H, P)"), ""),
                "B": (516, 124, ("B", "(b, L, G, N)"), ""),
                "C": (648, 124, ("C", "(b, L, G, N)"), ""),
            },
            {"S": (368, 430, ("S ← a S + (Δ x) Bᵀ", "state (b, H, P, N), token by token"), "main")},
            {"y": (505, 410, ("y = S C + D x", "(b, L, H, P)"), "")},
            {"gated": (290, 560, ("norm(y ∘ SiLU(z))", "heads joined: (b, L, H P)"), "")},
            {"out": (360, 250, ("out_proj", "(b, L, d)"), "main")},
        ),
        (
            ("u", "in"), *(("in", key) for key in ("z", "a", "conv")), *(("conv", key) for key in "xBC"),
            *((key, "S") for key in "axB"), ("S", "y"), ("C", "y"), ("y", "gated"), ("z", "gated"), ("gated", "out"),
        ),
    ),
    "attention": Shapes(
        "Shapes in Llama's attention. The input u of shape b, L, d goes through three linear maps, which make queries "
        "of shape b, H, L, d_h and keys and values of shape b, H_kv, L, d_h. Queries and keys are rotated by their "
        "positions. Keys and values join the cache, which grows with each token. A softmax over the scores gives the "
        "matrix A of shape b, H, L, L, which multiplies the values; the heads are joined and projected to b, L, d.",
        (
            {"u": (360, 150, ("u", "(b, L, d)"), "")},
            {"in": (360, 700, ("q_proj, k_proj, v_proj: linear maps",), "main")},
            {
                "q": (120, 200, ("q", "(b, H, L, d_h)"), ""),
                "k": (370, 200, ("k", "(b, H_kv, L, d_h)"), ""),
                "v": (600, 200, ("v", "(b, H_kv, L, d_h)"), ""),
            },
            {
                "turned": (120, 200, ("R_t q", "turned by position"), ""),
                "keys": (370, 200, ("R_t k", "turned by position"), ""),
            },
            {"cache": (485, 430, ("cache of k and v", "2 × (b, H_kv, tokens so far, d_h): it grows"), "main")},
            {"A": (205, 370, ("A = softmax(q kᵀ / √d_h), causal", "(b, H, L, L), each k for H / H_kv heads"), "main")},
            {"y": (430, 400, ("y = A v", "(b, H, L, d_h)"), "")},
            {"out": (430, 400, ("o_proj", "heads joined, (b, L, d)"), "main")},
        ),
        (
            ("u", "in"), *(("in", key) for key in "qkv"), ("q", "turned"), ("k", "keys"), ("keys", "cache"),
            ("v", "cache"), ("turned", "A"), ("cache", "A"), ("cache", "y"), ("A", "y"), ("y", "out"),
        ),
    ),
    "discrete": Shapes(
        "Shapes in Llamba's mixer. The input u of shape b, L, d goes through one linear map, which makes z of shape "
        "b, L, d, what enters the convolution, and alpha of shape b, L, H. The convolution gives values x of shape "
        "b, L, H, P and for each head its own keys B and queries C of shape b, L, H, N. They and the decays make the "
        "state of shape b, H, P, N; the query reads y of shape b, L, H, P. It is gated with z and projected to "
        "b, L, d. There is no step size and no norm.",
        (
            {"u": (360, 150, ("u", "(b, L, d)"), "")},
            {"in": (360, 700, ("in_proj: one linear map",), "main")},
            {
                "z": (76, 132, ("z", "(b, L, d)"), ""),
                "a": (232, 150, ("log a = log σ(α)", "(b, L, H)"), ""),
                "conv": (516, 388, ("convolution of 4 taps", "window (b, H P + 2 H N, 4)"), "main"),
            },
            {
                "x": (384, 124, ("x", "(b, L, H, P)"), ""),
                "B": (516, 124, ("B", "(b, L, H, N)"), ""),
                "C": (648, 124, ("C", "(b, L, H, N)"), ""),
            },
            {"S": (368, 430, ("S ← a S + x Bᵀ", "state (b, H, P, N), token by token"), "main")},
            {"y": (505, 410, ("y = S C + D x", "(b, L, H, P)"), "")},
            {"gated": (290, 560, ("y ∘ SiLU(z + b_z)", "heads joined: (b, L, d), d = H P"), "")},
            {"out": (360, 250, ("out_proj", "(b, L, d)"), "main")},
        ),
        (
            ("u", "in"), *(("in", key) for key in ("z", "a", "conv")), *(("conv", key) for key in "xBC"),
            *((key, "S") for key in "axB"), ("S", "y"), ("C", "y"), ("y", "gated"), ("z", "gated"), ("gated", "out"),
        ),
    ),
    "rotation": Shapes(
        "Shapes in a mixer whose keys turn. The input u of shape b, L, d makes values x, decays, keys B and queries C "
        "as in Llamba's mixer, and turns phi of shape b, L, G, N/2. Their running sum, the angle Phi, rotates keys and "
        "queries, whose shape b, L, G, N stays. The state has the shape b, H, P, N as before, and beside it one angle "
        "of shape b, G, N/2 is remembered. Gate and output projection are those of Llamba's mixer.",
        (
            {"u": (360, 150, ("u", "(b, L, d)"), "")},
            {
                "in": (215, 410, ("in_proj, convolution", "as in Llamba's mixer"), ""),
                "turn": (575, 270, ("φ = ω · speed of the token", "(b, L, G, N/2)"), "main"),
            },
            {
                "x": (105, 190, ("x, log a", "(b, L, H, P), (b, L, H)"), ""),
                "BC": (310, 170, ("B, C", "(b, L, G, N)"), ""),
                "angle": (575, 270, ("Φ: sum of φ so far", "state: angle (b, G, N/2)"), "main"),
            },
            {"turned": (440, 430, ("R(Φ) B, R(Φ) C", "(b, L, G, N)"), "main")},
            {"S": (330, 620, ("S ← a S + x (R(Φ) B)ᵀ", "state (b, H, P, N), token by token"), "")},
            {"out": (330, 620, ("y = S R(Φ) C + D x, gate, out_proj", "as in Llamba's mixer, (b, L, d)"), "")},
        ),
        (
            ("u", "in"), ("u", "turn"), ("in", "x"), ("in", "BC"), ("turn", "angle"), ("BC", "turned"),
            ("angle", "turned"), ("x", "S"), ("turned", "S"), ("S", "out"),
        ),
    ),
    "delta": Shapes(
        "Shapes in Gated DeltaNet's mixer. The input u of shape b, L, d goes through one linear map, which makes z "
        "of shape b, L, d, rates beta and gates of shape b, L, H, and what enters the convolution. The convolution "
        "gives queries and keys of length one, of shape b, L, H, K, and values of shape b, L, H, P. The state of "
        "shape b, H, K, P fades, loses what stands under the key, and takes the new value there; the query reads y "
        "of shape b, L, H, P. Each head is normalised, gated with z, and projected to b, L, d.",
        (
            {"u": (360, 150, ("u", "(b, L, d)"), "")},
            {"in": (360, 700, ("in_proj: one linear map",), "main")},
            {
                "z": (76, 132, ("z", "(b, L, d)"), ""),
                "a": (232, 150, ("β, log a", "(b, L, H) each"), ""),
                "conv": (516, 388, ("convolution of 4 taps, SiLU", "window (b, 2 H K + H P, 4)"), "main"),
            },
            {
                "v": (384, 124, ("v", "(b, L, H, P)"), ""),
                "k": (516, 124, ("k / |k|", "(b, L, H, K)"), ""),
                "q": (648, 124, ("q / |q|", "(b, L, H, K)"), ""),
            },
            {"S": (345, 480, ("S ← (I − β kᵀk) a S + β kᵀv", "state (b, H, K, P), token by token"), "main")},
            {"y": (505, 410, ("y = q S", "(b, L, H, P)"), "")},
            {"gated": (290, 560, ("norm(y) ∘ SiLU(z)", "heads joined: (b, L, d), d = H P"), "")},
            {"out": (360, 250, ("out_proj", "(b, L, d)"), "main")},
        ),
        (
            ("u", "in"), *(("in", key) for key in ("z", "a", "conv")), *(("conv", key) for key in "vkq"),
            *((key, "S") for key in "avk"), ("S", "y"), ("q", "y"), ("y", "gated"), ("z", "gated"), ("gated", "out"),
        ),
    ),
    "mamba3": Shapes(
        "Shapes in Mamba-3's mixer. The input u of shape b, L, d goes through one linear map, without a convolution "
        "after it. It makes z and values x of shape b, L, H, P, which become R values; step sizes, decays and "
        "weights of a step's end, of shape b, L, H; R keys and queries of shape b, L, R, H, N; and turns. The "
        "angle, a running sum of turns times step sizes, rotates keys and queries. The state of shape b, H, P, N "
        "takes the values of this token and of the one before; R queries read y of shape b, L, R, H, P, which is "
        "gated with z, summed over R, and projected to b, L, d.",
        (
            {"u": (360, 150, ("u", "(b, L, d)"), "")},
            {"in": (360, 700, ("in_proj: one linear map",), "main")},
            {
                "z": (70, 120, ("z", "(b, L, H, P)"), ""),
                "x": (205, 126, ("x", "(b, L, H, P)"), ""),
                "dt": (355, 150, ("Δ, log a, λ", "(b, L, H) each"), ""),
                "BC": (508, 132, ("B, C (normed)", "(b, L, R, H, N)"), ""),
                "turn": (650, 128, ("Φ: angle", "(b, L, H, ≤ N/2)"), ""),
            },
            {
                "values": (232, 156, ("x for each of R", "(b, L, R, H, P)"), ""),
                "turned": (540, 320, ("B and C, turned by Φ", "(b, L, R, H, N)"), "main"),
            },
            {
                "S": (
                    436, 560, ("S ← a S + λ Δ x Bᵀ + (1 − λ) Δ a x Bᵀ of the token before",
                               "state (b, H, P, N), and the last x, B and angle"), "main",
                ),
            },
            {"y": (430, 330, ("y = S C + D x", "(b, L, R, H, P)"), "")},
            {"gated": (290, 560, ("y ∘ SiLU(z), summed over R", "heads joined: (b, L, H P)"), "")},
            {"out": (360, 250, ("out_proj", "(b, L, d)"), "main")},
        ),
        (
            ("u", "in"), *(("in", key) for key in ("z", "x", "dt", "BC", "turn")), ("x", "values"), ("BC", "turned"),
            ("turn", "turned"), *((key, "S") for key in ("values", "dt", "turned")), ("S", "y"), ("y", "gated"),
            ("z", "gated"), ("gated", "out"),
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


STYLE = """<style>
:root { color: #222832; font-family: sans-serif; }
@media (prefers-color-scheme: dark) { :root { color: #ced6dd; background: #14181e; } }
text { fill: currentColor; font-size: 16px; }
.name { font-weight: 600; }
.small { font-size: 14.5px; opacity: 0.8; }
rect { fill: none; stroke: currentColor; stroke-opacity: 0.4; }
.main rect { stroke-opacity: 1; stroke-width: 2; }
.arrow { stroke: currentColor; stroke-width: 1.5; fill: none; }
marker path { fill: currentColor; }
</style>"""


def alone(picture: str) -> str:
    """A drawing as a file of its own, for a notebook that is read outside of the site."""
    svg = picture[picture.index("<svg") : picture.index("</svg>")]
    head, rest = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{STYLE}{rest}</svg>\n'


IN_CHAPTERS = {"attention_and_state": attention_and_state} | {
    f"shapes_{name}": partial(mixer_shapes, name) for name in MIXERS}  # what notebooks show

if __name__ == "__main__":  # docs/images holds them for readers outside of the site
    for name, draw in IN_CHAPTERS.items():
        (Path(__file__).resolve().parents[1] / "images" / f"{name}.svg").write_text(alone(draw()))
