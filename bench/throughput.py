"""How fast models write, beside transformers' own Llama at its best (chapter 19).

    python -m bench.throughput        about a quarter of an hour on one core

A Llama of 8 layers with the widths of SmolLM2-135M, and students of it: recurrent in all layers, and in six of eight.
Random weights: speed does not depend on them. All models take turns, twice, at each batch and context, as PyTorch runs
them, and once with the step through torch.compile. transformers' Llama has the same weights; it takes part with the
cache that grows and with the one of fixed size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

import torch
import tyro

from bench.common import save
from llamba_ref.decoder import Decoder
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.llamba import Llamba
from llamba_ref.throughput import Decoding, TransformersLlama, as_transformers, measure_decoding, step_cost

CONFIG = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=8,
                     num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True)
WRITING, READING = ((1, 256), (1, 2048), (8, 1024)), ((1, 1024), (1, 8192))  # batch, context
ROUNDS = 2


def models() -> dict[str, Decoder | TransformersLlama]:
    """Everybody who takes part."""
    torch.manual_seed(0)
    teacher = Llama(CONFIG)
    theirs = as_transformers(teacher)
    found = {f"transformers, {cache} cache": TransformersLlama(theirs, cache) for cache in ("dynamic", "static")}
    found["Llama"] = teacher
    options = {"start": "published", "d_state": 64, "chunk_size": 64}
    found["Llamba"] = Llamba.from_teacher(teacher, rotation="none", **options)
    found["hybrid"] = Llamba.from_teacher(teacher, (3, 7), rotation="none", **options)
    return found


def bandwidth() -> float:
    """Bytes a second that one thread reads from memory: a matrix of 256 MB times a vector, the best of some."""
    matrix, vector, times = torch.randn(8192, 8192), torch.randn(8192), []
    for _ in range(20):
        begun = time.perf_counter()
        matrix @ vector
        times.append(time.perf_counter() - begun)
    return matrix.nbytes / min(times)


def in_turns(
    chosen: dict[str, Decoder | TransformersLlama], batch: int, context: int, new: int, compile: bool = False
) -> list[dict]:
    """Rows of medians: every model in each round, so that all see the same noise."""
    found = {name: [] for name in chosen}
    for _ in range(1 if compile else ROUNDS):  # compiling takes longer than all the rest
        for name, model in chosen.items():
            found[name].append(measure_decoding(model, batch, context, new, compile))
    rows = []
    for name, runs in found.items():
        middle = {key: median(asdict(run)[key] for run in runs) for key in ("first", "step", "peak")}
        row = Decoding(batch, context, **middle)
        rows.append({"model": name, "compiled": compile, **asdict(row), "tokens_per_second": row.tokens_per_second})
        print(f"{name:>30}{' compiled' * compile:10} batch {batch}, context {context}: first token after "
              f"{row.first:.2f} s, {row.tokens_per_second:.1f} tokens/s, {row.peak / 1e6:.0f} MB", flush=True)
    return rows


def goal(rows: Sequence[dict], what: str, batch: int, context: int) -> dict[str, float]:
    """How many times faster Llamba is than the quickest of transformers' Llamas, compiled or not."""
    alike = [row for row in rows if (row["batch"], row["context"]) == (batch, context)]
    peer = min(row[what] for row in alike if row["model"].startswith("transformers"))
    return {"compiled" if row["compiled"] else "eager": peer / row[what] for row in alike if row["model"] == "Llamba"}


def main() -> None:
    torch.set_num_threads(1)
    everybody, written, read, reach = models(), [], [], bandwidth()
    print(f"one thread reads {reach / 1e9:.1f} GB a second")
    costs = {name: asdict(step_cost(model)) for name, model in everybody.items() if isinstance(model, Decoder)}
    for batch, context in READING:
        read += in_turns(everybody, batch, context, new=1)
    for compile in (False, True):
        for batch, context in WRITING:
            written += in_turns(everybody, batch, context, 32, compile)
    goals = {f"batch {batch}, context {context}": goal(written, "step", batch, context) for batch, context in WRITING}
    goals |= {f"reading {context}": goal(read, "first", batch, context) for batch, context in READING}
    for name, ratios in goals.items():
        print(f"{name}: Llamba is " + ", ".join(f"{ratio:.2f} times as fast {how}" for how, ratio in ratios.items()))
    save("throughput", "python -m bench.throughput", rounds=ROUNDS, bandwidth=reach, costs=costs, writing=written,
         reading=read, goals=goals)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
