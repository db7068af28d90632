"""Newer recurrences beside Mamba-2 on the two tasks of this book that ask for memory: chapters 27 and 28.

    python -m bench.frontier        all runs, two at a time with one thread each; an hour and a half on two cores

Memory Horizon (`bench.memory_horizon`: forget on cue) and associative recall (`bench.recall`: many pairs at once), with
the data and the batches of those commands, and half of their steps. All models here have two layers of width 64, MLPs
that make their numbers of parameters equal, and 1024 numbers in the state of a layer. The rate of RATES with the lowest
final loss on seed 0 is used for the other seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import tyro
from torch import nn
from torch.utils._pytree import tree_leaves

from bench import memory_horizon, recall
from bench.common import best_rate_runs, equal_size, save
from llamba_ref.associative_recall import WithConvolution
from llamba_ref.decoder import Backbone, Decoder
from llamba_ref.delta import RWKV7, GatedDeltaNet
from llamba_ref.gateloop import GateLoop
from llamba_ref.mamba2 import Mamba2
from llamba_ref.mamba3 import Mamba3

WIDTH, LAYERS, MLP, HEADS, SIZE = 64, 2, 128, 4, 16  # heads with SIZE x SIZE numbers of state
SEEDS, RATES, RECALL_STEPS, HORIZON_STEPS = (0, 1, 2), (3e-3, 1e-2), 800, 500
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "GateLoop": partial(GateLoop, WIDTH, HEADS, SIZE // 2),  # a complex number counts as two
    "Mamba-2": partial(Mamba2, WIDTH, d_state=SIZE, headdim=SIZE, expand=1, chunk_size=32),
    "Mamba-3": partial(Mamba3, WIDTH, d_state=SIZE, headdim=SIZE, expand=1, chunk_size=32),
    "Mamba-3, rank 2": partial(Mamba3, WIDTH, d_state=SIZE, headdim=SIZE, rank=2, expand=1, chunk_size=64),
    "Gated DeltaNet": partial(GatedDeltaNet, WIDTH, HEADS, SIZE, chunk_size=32),
    "Gated DeltaNet, beta to 2": partial(GatedDeltaNet, WIDTH, HEADS, SIZE, reflect=True, chunk_size=32),
    "RWKV-7": partial(RWKV7, WIDTH, HEADS, chunk_size=32),
}
LARGEST = "RWKV-7"  # has most parameters with MLPs of equal width


def model(vocabulary: int, name: str, mlp: int = MLP) -> Decoder:
    """A language model with a mixer's name."""
    return Decoder(Backbone([MIXERS[name]() for _ in range(LAYERS)], vocabulary, WIDTH, mlp), tie_embeddings=False)


def state_numbers(name: str) -> int:
    """Real numbers in the recurrent state of a layer, without the windows of convolutions."""
    return max(part.numel() * (2 if part.is_complex() else 1) for part in tree_leaves(MIXERS[name]().init_state(1)))


def prepared(vocabulary: int, name: str, seed: int) -> Decoder:
    """A model of the size of all others."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return equal_size(partial(model, vocabulary), name, LARGEST, MLP, 3 * WIDTH * LAYERS)


def horizon(name: str, lr: float, seed: int) -> dict:
    """One model on the Memory Horizon."""
    return memory_horizon.learn(prepared(memory_horizon.MODULUS + 1, name, seed), name, lr, seed, HORIZON_STEPS)


def pairs(name: str, lr: float, seed: int) -> dict:
    """One model on associative recall; GateLoop, which has none, with a convolution before its mixers."""
    net = prepared(recall.VOCABULARY, name, seed)
    if name == "GateLoop":
        for block in net.backbone.layers:
            block.mixer = WithConvolution(block.mixer, WIDTH)
    return recall.learn(net, name, lr, seed, state_numbers(name), RECALL_STEPS)


TASKS = {"recall": (pairs, lambda one: one["accuracy"][-1]), "horizon": (horizon, lambda one: one["accuracy"])}


def main(
    tasks: tuple[Literal["recall", "horizon"], ...] = ("recall", "horizon"),  # each has a file of its own
) -> None:
    torch.set_num_threads(1)  # as in every run, and for the record
    for task in tasks:
        run, share = TASKS[task]
        runs, trials = best_rate_runs(run, list(MIXERS), RATES, SEEDS, reach=1)
        for name in MIXERS:
            shares = [share(one) for one in runs if one["name"] == name]
            print(f"{task}, {name}: {statistics.mean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})")
        save(f"frontier_{task}", f"python -m bench.frontier --tasks {task}", rates=RATES, runs=runs, trials=trials)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
