"""What a student loses that perplexity hardly shows: copying, and facts from a page ago (chapter 17).

    python -m bench.lost        needs `make smollm2` and `bench.put_back` first; about five minutes on one core

SmolLM2-135M-Instruct, its hybrid that `make smollm2` distilled, the same with the two heads of attention back that
`bench.put_back` found to need it most, and windows of equal memory in the same six layers and in all. No weight is
trained. Filler: held-out State of the Union addresses.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import tyro

from bench.common import save
from bench.smollm2_hybrid import LAYERS, OPTIONS, OUT, Window
from bench.students import with_attention
from llamba_ref.conventions import load_result
from llamba_ref.data import pack
from llamba_ref.decoder import Decoder
from llamba_ref.evaluate import compare, copy_accuracy, fact_accuracy
from llamba_ref.llama import Llama
from llamba_ref.llamba import keep_heads
from llamba_ref.models import load_model

LENGTHS, DISTANCES = (16, 64, 256), (0, 64, 256)
PASSAGES, QUESTIONS = 4, 24


def models(teacher: Llama) -> Iterator[tuple[str, Decoder]]:
    """All that is measured, one after the other."""
    yield "teacher", teacher
    student = load_model(str(OUT))[0]
    yield "six layers distilled", student
    heads = load_result("put_back")["neediest_heads"]
    for index in {layer for layer, _ in heads}:
        block, theirs = student.backbone.layers[index], teacher.backbone.layers[index]
        block.mixer = keep_heads(block.mixer, theirs.mixer, [head for layer, head in heads if layer == index])
    yield "six layers distilled, two heads put back", student
    yield "six layers with a window", with_attention(teacher, Window, LAYERS)
    yield "all layers with a window", with_attention(teacher, Window)


def main() -> None:
    torch.set_num_threads(1)
    teacher, tokenizer = load_model("smollm2")
    blocks = pack(OPTIONS.corpus.documents()[0][1], tokenizer, 256, max_blocks=8)
    filler, rows = blocks.blocks.flatten(), []
    for name, model in models(teacher):
        row = {"name": name, "ratio": compare(teacher, model, blocks, 1).ratio,
               "copy": {length: copy_accuracy(model, length, PASSAGES) for length in LENGTHS},
               "facts": {distance: fact_accuracy(model, tokenizer, filler, distance, rows=QUESTIONS)
                         for distance in DISTANCES}}
        rows.append(row)
        shares = [" ".join(f"{share:4.0%}" for share in row[key].values()) for key in ("copy", "facts")]
        print(f"{name:>38}: {row['ratio']:.3f} x the teacher's, copies {shares[0]}, facts {shares[1]}", flush=True)
    save("lost", "python -m bench.lost", passages=PASSAGES, questions=QUESTIONS, rows=rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
