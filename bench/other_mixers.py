"""Other mixers as students of the demo's teacher: GateLoop, Gated DeltaNet and Mamba-3 beside Llamba's own.

    python -m bench.other_mixers        about twenty minutes on two cores

The teacher's attention is replaced by mixers that begin at random, with four heads whose states have 32 x 32 numbers.
All are trained in MOHAWK's three stages as the rows of `bench.students`: a quarter of the demo's steps, a learning rate
of their own, three seeds, figures of held-out text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import tyro
from torch import nn

from bench import students
from bench.common import best_rate_runs, save
from bench.students import Row, learn, material, summary
from llamba_ref.decoder import Decoder, with_mixers
from llamba_ref.delta import RWKV7, GatedDeltaNet
from llamba_ref.discrete import DiscreteMamba2
from llamba_ref.gateloop import GateLoop
from llamba_ref.llama import Llama
from llamba_ref.mamba3 import Mamba3

WIDTH, HEADS, SIZE = 128, 4, 32
RATES, REACH = (1e-3, 2e-3), 4


def mamba3(_: nn.Module) -> Mamba3:
    """Its own start is far from any attention (chapter 28): queries with biases of 1 / SIZE, no skip connection."""
    mixer = Mamba3(WIDTH, SIZE, SIZE, expand=1, chunk_size=32)
    mixer.C_bias.data /= SIZE
    mixer.D.data.zero_()
    return mixer


MIXERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "discrete Mamba-2": lambda _: DiscreteMamba2(WIDTH, SIZE, HEADS, HEADS, chunk_size=32),
    "GateLoop, real gates": lambda _: GateLoop(WIDTH, HEADS, SIZE, gates="real"),
    "Gated DeltaNet": lambda _: GatedDeltaNet(WIDTH, HEADS, SIZE, chunk_size=32),
    "RWKV-7": lambda _: RWKV7(WIDTH, HEADS, chunk_size=32),
    "Mamba-3": mamba3,
}


def student(teacher: Llama, name: str, seed: int) -> Decoder:
    """The teacher with other mixers in it."""
    torch.manual_seed(seed)
    return with_mixers(teacher, MIXERS[name])


def run(name: str, rate: float, seed: int) -> dict:
    """Train one student."""
    torch.set_num_threads(1)
    found = material(seed)
    record = learn(student(found.teacher, name, seed), Row(start="published", rotation="none"), name, rate, seed, found)
    print(f"{name:>22} lr {rate:g} seed {seed}: {record['ratio']:.3f} x the teacher's perplexity", flush=True)
    return record


def main() -> None:
    torch.set_num_threads(1)  # as in every run, and for the record
    found, trials = best_rate_runs(run, list(MIXERS), RATES, students.SEEDS, REACH)
    rows = [summary(name, [one for one in found if one["name"] == name]) for name in MIXERS]
    for row in rows:
        print(f"{row['name']:>22}: {row['ratio']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f}), lr {row['lr']:g}")
    save("other_mixers", "python -m bench.other_mixers", rates=RATES, rows=rows, trials=trials)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
