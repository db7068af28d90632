"""Where a student differs from its teacher: by position, by kind of token, and in what it writes (chapter 17).

    python -m bench.where        needs `make teacher` and `make smollm2` first; about ten minutes on one core

SmolLM2-135M-Instruct, its hybrid that `make smollm2` distilled on blocks of 256 tokens, and windows of equal memory in
the same six layers and in all, on blocks of held-out State of the Union addresses eight times as long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from bench.common import save
from bench.smollm2_hybrid import LAYERS, OPTIONS, OUT, Window
from bench.students import with_attention
from llamba_ref.data import pack
from llamba_ref.decoder import Decoder
from llamba_ref.llama import Llama
from llamba_ref.models import load_model

TRAINED, LENGTH, BLOCKS = 256, 2048, 6
PLACES = (0, TRAINED, 2 * TRAINED, 4 * TRAINED, LENGTH)  # positions between which losses are averaged
KINDS = ("new", "seen", "pair near", "pair far")
PROMPT, CONTINUED, PROMPTS = 128, 48, 8


def kinds(ids: list[int], reach: int) -> list[int]:
    """For each token but the first, an index of KINDS: it is new in this block; or it was there before; or it was there
    before after the same token as now, last at most `reach` tokens back, or farther."""
    seen, pairs, found = {ids[0]}, {}, []
    for place in range(1, len(ids)):
        pair = tuple(ids[place - 1 : place + 1])
        near = pair in pairs and place - pairs[pair] <= reach
        found.append((2 if near else 3) if pair in pairs else int(ids[place] in seen))
        seen.add(ids[place])
        pairs[pair] = place
    return found


def models(teacher: Llama) -> Iterator[tuple[str, Decoder]]:
    """All that is measured beside the teacher."""
    yield "six layers distilled", load_model(str(OUT))[0]
    yield "six layers with a window", with_attention(teacher, Window, LAYERS)
    yield "all layers with a window", with_attention(teacher, Window)


@torch.no_grad()
def predictions(model: Decoder, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of every token but the first of each block: nats, and the token that the model found most likely."""
    nats, likeliest = [], []
    for ids in blocks.split(1):
        logits = model(ids)[:, :-1]
        nats.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))
        likeliest.append(logits.argmax(-1))
    return torch.cat(nats), torch.cat(likeliest)


def repeated(ids: list[int]) -> float:
    """The share of runs of four tokens that are there more than once."""
    runs = Counter(tuple(ids[start : start + 4]) for start in range(len(ids) - 3))
    return sum(count for count in runs.values() if count > 1) / sum(runs.values())


@torch.no_grad()
def greedily(model: Decoder, ids: Tensor) -> Tensor:
    """Prompts, and the likeliest token again and again; without a state, which a window does not keep here."""
    for _ in range(CONTINUED):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


def written(texts: Tensor, teacher: Llama, theirs: Tensor) -> dict:
    """How a model went on from prompts: how long as the teacher did, and what the teacher thinks of it."""
    nats = predictions(teacher, texts)[0][:, -CONTINUED:]
    same = (texts == theirs)[:, -CONTINUED:].long().cumprod(1).sum(1)
    return {"as the teacher": same.double().mean().item(), "teacher's nats": nats.mean().item(),
            "repeated": sum(repeated(row[-CONTINUED:]) for row in texts.tolist()) / len(texts)}


def main() -> None:
    torch.set_num_threads(1)
    teacher, tokenizer = load_model("smollm2")
    blocks = pack(OPTIONS.corpus.documents()[0][1], tokenizer, LENGTH, max_blocks=BLOCKS).blocks.long()
    kind = torch.tensor([kinds(row, Window.window) for row in blocks.tolist()])
    place = torch.arange(1, LENGTH).expand_as(kind)
    groups = {"place": {f"{low} to {high}": (place >= low) & (place < high) for low, high in zip(PLACES, PLACES[1:])},
              "kind": {name: kind == index for index, name in enumerate(KINDS)}}
    nats, likeliest = predictions(teacher, blocks)
    prompts = blocks.reshape(-1, LENGTH // 2)[:PROMPTS, :PROMPT]
    theirs = greedily(teacher, prompts)
    rows = [{"name": "teacher", "written": written(theirs, teacher, theirs)}
            | {key: {name: {"share": chosen.double().mean().item(), "nats": nats[chosen].mean().item()}
                     for name, chosen in parts.items()} for key, parts in groups.items()}]
    for name, model in models(teacher):
        own, guesses = predictions(model, blocks)
        row = {"name": name, "written": written(greedily(model, prompts), teacher, theirs)}
        for key, parts in groups.items():
            row[key] = {part: {"ratio": (own - nats)[chosen].mean().exp().item(),
                               "agreement": (guesses == likeliest)[chosen].double().mean().item()}
                        for part, chosen in parts.items()}
        rows.append(row)
        print(f"{name:>26}: " + "  ".join(f"{part} {found['ratio']:.3f}" for key in groups
                                          for part, found in row[key].items()), row["written"], flush=True)
    save("where", "python -m bench.where", trained=TRAINED, length=LENGTH, blocks=len(blocks), reach=Window.window,
         prompt=PROMPT, continued=CONTINUED, prompts=len(prompts), rows=rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
