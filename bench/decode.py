"""How many tokens a second a GPU writes, for how many sequences at a time, until its memory is full: the paper's
figure, for Llama-3.2-1B and its student.

    python -m bench.decode        needs a CUDA device; about six minutes on an H100

Random weights in half precision: speed does not depend on them. A step is recorded as a CUDA graph, for all models; it
writes a greedy token for each sequence, with so many tokens behind it. These are not read before but made up: a state
or a cache of random numbers takes as long as another. The batch doubles until the memory is full; then the largest that
fits is looked for between.

transformers' Llama has its cache of fixed size, with the attention that it chooses there (sdpa, with a mask over the
whole cache), and with the quickest that PyTorch has: no mask, keys and values of the tokens that are there, shared by
the heads of a group.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import nn

from bench.common import save
from bench.device import (
    UNFINISHED, attempt, attempt_to_tidy, card_name, half_type, peak, recorded, require_card, seconds)
from bench.predict import SIZES
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.llamba import Llamba, LlambaConfig, student_config
from llamba_ref.operators import unchecked
from llamba_ref.throughput import as_transformers, step_cost

MODEL, CONTEXTS = "meta-llama/Llama-3.2-1B", (2048, 8192)
PACKAGES = ("triton", "transformers")
WANTED = 8  # times the sequences of the Transformer should fit at the longest context
Step = Callable[[], object]  # writes one token for each sequence, in memory that stays


class Contender(NamedTuple):
    """A model that is made when its turn comes, and how its step is made ready."""

    build: Callable[[], nn.Module]
    prepare: Callable[[nn.Module, int, int], Step]  # from the model, the batch and the context


def recurrent(model: Llamba, batch: int, context: int) -> Step:
    """A step of a student: its state is as large after any context."""
    token = torch.zeros(batch, dtype=torch.long, device=model.device)
    state = model.init_state(batch)

    def step():
        with torch.no_grad(), unchecked():
            logits, _ = model.step(token, state, in_place=True)
            token.copy_(logits.argmax(-1))

    return step


def there(module, query, key, value, attention_mask, past: int = 0, scaling: float | None = None, **_):
    """Attention to the `past` tokens of a static cache and to the new one, without a mask."""
    key, value = key[:, :, : past + 1], value[:, :, : past + 1]
    y = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return y.transpose(1, 2), None


def cached(attention: str, model: nn.Module, batch: int, context: int) -> Step:
    """A step of transformers' Llama after `context` tokens, which it finds in a static cache."""
    from transformers import AttentionInterface, StaticCache

    AttentionInterface.register("there", partial(there, past=context))
    model.set_attn_implementation(attention)
    config, weight = model.config, model.get_input_embeddings().weight
    token = torch.zeros(batch, dtype=torch.long, device=weight.device)
    cache = StaticCache(config, context + 1)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, weight.dtype, weight.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    places = torch.full((batch, 1), context, device=weight.device)

    def step():
        for layer in cache.layers:  # the last token is written over, so that the context stays what it is
            layer.cumulative_length.fill_(context)
        with torch.no_grad():
            out = model(token[:, None], past_key_values=cache, position_ids=places, use_cache=True)
            token.copy_(out.logits[:, -1].argmax(-1))

    return step


def sizes_of_student(config: LlamaConfig) -> LlambaConfig:
    """The published student: keys stand still."""
    return student_config(config, d_state=64, chunk_size=64, rotation="none", bias=False)


def contenders(config: LlamaConfig, dtype: torch.dtype, device: str) -> dict[str, Contender]:
    """Everybody who takes part."""
    def build(model: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            return model().to(dtype).eval()

    theirs = partial(build, lambda: as_transformers(Llama(config)))
    return {"Llamba": Contender(partial(build, lambda: Llamba(sizes_of_student(config))), recurrent),
            "transformers, sdpa": Contender(theirs, partial(cached, "sdpa")),
            "transformers, sdpa without a mask": Contender(theirs, partial(cached, "there"))}


def measure(model, prepare, batch: int, context: int, graph: bool, device: str, budget: float) -> dict:
    """Time of a step and memory of state and step, beside the weights."""
    kept = []

    def whole() -> None:
        step = prepare(model, batch, context)
        step()
        kept.append(step)

    taken = peak(whole, device)
    step = recorded(kept[0], device) if graph else kept[0]
    spent = seconds(step, device, budget)
    return {"seconds": spent, "tokens_per_second": batch / spent, "peak_bytes": taken}


def row(name: str, model, prepare, budget: float, batch: int, context: int, graph: bool, device: str) -> dict:
    """A line of the table, with the reason where there is no time."""
    found, reason = attempt(lambda: measure(model, prepare, batch, context, graph, device, budget))
    attempt_to_tidy()
    head = {"model": name, "context": context, "batch": batch, "graph": graph, "reason": reason}
    said = reason or f"{found['tokens_per_second']:.0f} tokens/s, {found['peak_bytes'] / 2**30:.2f} GiB"
    print(f"{name:>34} context {context} batch {batch:6}{'' if graph else ' without a graph'}: {said}", flush=True)
    return head | (found or {})


def sweep(
    name: str, one: Contender, context: int, device: str, until: float, most: int = 2**16, budget: float = 0.3
) -> list[dict]:
    """Rows of one model: the batch doubles until there is no room, then the gap is halved twice. Another failure than
    that ends it too."""
    measured = partial(row, name, one.build(), one.prepare, budget)
    rows, batch, fits, fails = [measured(1, context, False, device)], 1, 0, None
    while time.time() < until and batch <= most:
        rows.append(measured(batch, context, True, device))
        if rows[-1]["reason"]:
            fails = batch
            break
        fits, batch = batch, 2 * batch
    for _ in range(2):
        if not fits or not fails or fails - fits < 2 or rows[-1]["reason"] not in (None, "out of memory"):
            break
        if time.time() > until:
            break
        rows.append(measured((fits + fails) // 2, context, True, device))
        fits, fails = (fits, rows[-1]["batch"]) if rows[-1]["reason"] else (rows[-1]["batch"], fails)
    return rows


def largest(rows: list[dict], name: str, context: int) -> int:
    """The most sequences that went through at a time; 0: none."""
    return max((one["batch"] for one in rows
                if (one["model"], one["context"]) == (name, context) and one["graph"] and not one["reason"]), default=0)


def full(rows: list[dict], name: str, context: int) -> bool:
    """Whether the memory was filled, so that the largest batch is a limit."""
    return any(one["reason"] == "out of memory" for one in rows if (one["model"], one["context"]) == (name, context))


def goals(rows: list[dict]) -> dict:
    """How many times the sequences, and the tokens a second, of the better of transformers' two."""
    found = {}
    for context in sorted({one["context"] for one in rows}):
        limits = {name: largest(rows, name, context) for name in {one["model"] for one in rows}}
        speeds = {name: max((one["tokens_per_second"] for one in rows
                             if (one["model"], one["context"]) == (name, context) and not one["reason"]), default=0)
                  for name in limits}
        peers = [name for name in limits if name.startswith("transformers")]
        if all(limits[name] for name in ("Llamba", *peers)) and peers:
            found[str(context)] = {
                "batch": limits["Llamba"] / max(limits[name] for name in peers),
                "batch_is_limit": full(rows, "Llamba", context) and all(full(rows, name, context) for name in peers),
                "tokens_per_second": speeds["Llamba"] / max(speeds[name] for name in peers)}
    return found


def predicted(config: LlamaConfig, memory: float) -> dict:
    """The largest batches that fit beside the weights, if nothing else needs room."""
    with torch.device("meta"):
        teacher, student = Llama(config), Llamba(sizes_of_student(config))
    costs = {"Llamba": step_cost(student.bfloat16()), "transformers": step_cost(teacher.bfloat16())}
    return {name: {str(context): cost.largest_batch(memory, context) for context in CONTEXTS}
            for name, cost in costs.items()}


def main(
    stop_after: float = inf,  # begin no row after so many seconds
) -> None:
    require_card("bench.decode")
    until, rows, memory = time.time() + stop_after, [], torch.cuda.mem_get_info()[1]
    everybody = contenders(SIZES[MODEL], half_type(), "cuda")
    for context in reversed(CONTEXTS):  # the longest first: it is the one that the goal names
        for name, one in everybody.items():
            rows += sweep(name, one, context, "cuda", until)
            found = goals(rows)
            save(f"decode_{card_name()}", "python -m bench.decode", packages=PACKAGES,
                 size=MODEL, dtype=str(half_type()).removeprefix("torch."), memory=memory, wanted=WANTED, rows=rows,
                 goals=found, predicted_batches=predicted(SIZES[MODEL], memory))
    for context, ratios in found.items():
        print(f"context {context}: Llamba fits {ratios['batch']:.1f} times the sequences"
              f"{'' if ratios['batch_is_limit'] else ' (not all limits were reached)'}, and writes "
              f"{ratios['tokens_per_second']:.2f} times the tokens a second")
    if time.time() > until:
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
