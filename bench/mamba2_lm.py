"""A small Mamba-2 language model on the text and with the budget of bench.gateloop_lm, to look into in chapter
10_recall.

    python -m bench.mamba2_lm                 learning rates, two at a time; about 15 minutes on two cores
    python -m bench.mamba2_lm --save-to DIR   train the best one again and write it to DIR

It has no MLPs and twice the layers, and 1% fewer parameters than the models of bench.gateloop_lm. One seed: the model
is made to be looked into; for a comparison of models a single seed is not enough.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro

from bench.common import best_rate_runs, first_run, save
from bench.gateloop_lm import BATCH, LAYERS, LENGTH, RATES, VOCABULARY, WIDTH, train_on_novels
from llamba_ref.checkpoint import find_checkpoint
from llamba_ref.data import load_tokenizer
from llamba_ref.decoder import Decoder
from llamba_ref.mamba2 import Mamba2Config, Mamba2LM
from llamba_ref.models import save_model

STATE, HEADDIM = 16, 32


def fit(name: str, lr: float, seed: int) -> tuple[Decoder, dict]:
    """Train the model: itself, and its curve of held-out perplexity."""
    torch.manual_seed(seed)
    return train_on_novels(Mamba2LM(Mamba2Config(vocab_size=VOCABULARY, d_model=WIDTH, n_layer=2 * LAYERS,
                                                 d_state=STATE, headdim=HEADDIM, chunk_size=64)), name, lr, seed)


def run(name: str, lr: float, seed: int) -> dict:
    """The record of one model."""
    return fit(name, lr, seed)[1]


def main(
    save_to: Path | None = None,  # train the best model again and write it there
) -> None:
    if save_to is not None:
        save_model(save_to, fit(*first_run("mamba2_lm", "Mamba-2"))[0].half(), load_tokenizer(find_checkpoint("tiny")))
        return
    torch.set_num_threads(1)  # as in every run, and for the record
    runs, trials = best_rate_runs(run, ("Mamba-2",), RATES, (0,))
    print(f"Mamba-2: held-out perplexity {runs[0]['curve'][-1]['perplexity']:.2f} with lr {runs[0]['lr']:g}")
    save("mamba2_lm", "python -m bench.mamba2_lm", batch_size=BATCH, length=LENGTH, rates=RATES, runs=runs,
         trials=trials)


if __name__ == "__main__":
    tyro.cli(main)
