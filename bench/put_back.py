"""Which layer, and which heads, a distilled hybrid needs to copy: attention put back, one at a time (chapter 17).

    python -m bench.put_back        needs `make teacher` and `make smollm2` first; about five minutes on one core

The hybrid of SmolLM2-135M-Instruct that `make smollm2` distilled. No weight is trained. First each of its recurrent
layers has the teacher's attention back; then, in the layer that brings back most, each head alone, and those two
together that bring back most alone. Beside it the need of each layer and head by `attention_need`, on texts that the
teacher writes itself, told once, or half as long and told twice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import tyro

from bench.common import save
from bench.keep_attention import told
from bench.lost import PASSAGES
from bench.smollm2_hybrid import LAYERS, OUT
from llamba_ref.evaluate import copy_accuracy
from llamba_ref.llamba import attention_need, keep_heads, neediest
from llamba_ref.models import load_model

LENGTH = 64


def main() -> None:
    torch.set_num_threads(1)
    (teacher, _), (student, _) = load_model("smollm2"), load_model(str(OUT))
    rows = []

    def measure(name: str, layer: int | None = None, heads: Sequence[int] | None = None) -> float:
        """Copies of the student with attention in a layer, in all heads or some."""
        model = copy.deepcopy(student)
        if layer is not None:
            block, attention = model.backbone.layers[layer], copy.deepcopy(teacher.backbone.layers[layer].mixer)
            block.mixer = attention if heads is None else keep_heads(block.mixer, attention, heads)
        share = copy_accuracy(model, LENGTH, PASSAGES)
        print(f"{name:>24}: copies {share:.0%}", flush=True)
        rows.append({"name": name, "layer": layer, "heads": heads, "copy": share})
        return share

    measure("nothing")
    best = max(LAYERS, key=lambda layer: measure(f"layer {layer}", layer))
    heads = teacher.config.num_attention_heads
    shares = torch.tensor([measure(f"layer {best}, head {head}", best, [head]) for head in range(heads)])
    pair = sorted(shares.topk(2).indices.tolist())
    measure(f"layer {best}, heads {pair[0]} and {pair[1]}", best, pair)
    texts = told(teacher)
    need = {times: attention_need(teacher, student, one).tolist() for times, one in texts.items()}
    chosen = neediest(attention_need(teacher, student, texts[2], heads=True), 2)
    print(f"need of layers {LAYERS}: {need}; the two neediest heads: {chosen}")
    save("put_back", "python -m bench.put_back", length=LENGTH, passages=PASSAGES, heads=heads * len(LAYERS),
         need=need, neediest_heads=chosen, rows=rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
