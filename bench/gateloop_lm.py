"""A small GateLoop language model against a Transformer and against gates that do not listen: equal parameters, tokens
and text.

    python -m bench.gateloop_lm                 all runs, two at a time, one thread each; about 45 minutes on two cores
    python -m bench.gateloop_lm --save-to DIR   train the model with complex gates and seed 0 again, write it to DIR

All models are trained on the shipped novels with the tokenizer of the embedded Llama, and tested on held-out chapters.
On seed 0 the learning rate of each model is doubled or halved until the best lies between two others, or is sixteen
times off the first; it is used for the other seeds. One half of the held-out text chooses it, and what is reported is
the other half's.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from bench.common import Curve, best_rate_runs, equal_size, first_run, parameters, save
from llamba_ref.checkpoint import find_checkpoint
from llamba_ref.data import Batches, load_documents, load_tokenizer, pack, split_documents
from llamba_ref.decoder import Decoder
from llamba_ref.evaluate import evaluate
from llamba_ref.gateloop_lm import GateLoopConfig, GateLoopLM
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.models import save_model
from llamba_ref.training import CrossEntropy, Stage, train

VOCABULARY, WIDTH, LAYERS, MLP, HEADS = 1024, 128, 4, 256, 4
BATCH, LENGTH, STEPS = 8, 256, 600
SEEDS, RATES = (0, 1, 2), (2.5e-3, 5e-3)  # rates that are tried first
EVERY = 50  # steps between two points of a curve
GATES = {"complex gates": "complex", "real gates": "real", "fixed complex gates": "fixed",
         "fixed real gates": "fixed real"}
MODELS = (*GATES, "Transformer")


def model(name: str, mlp: int = MLP) -> Decoder:
    """A model with MLPs of width `mlp`; recurrent ones have one number a head."""
    if name == "Transformer":
        return Llama(LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=mlp,
                                 num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
                                 head_dim=WIDTH // HEADS, tie_word_embeddings=True))
    return GateLoopLM(GateLoopConfig(vocab_size=VOCABULARY, d_model=WIDTH, n_layer=LAYERS, n_heads=WIDTH,
                                     intermediate_size=mlp, gates=GATES[name], mode="scan"))


def texts():
    """Training blocks, the halves of the held-out blocks that choose rates and are reported, and the tokenizer."""
    tokenizer = load_tokenizer(find_checkpoint("tiny"))
    training, held_out = (pack(documents, tokenizer, LENGTH) for documents in split_documents(load_documents("austen")))
    return training, *(replace(held_out, tokens=held_out.tokens[start::2]) for start in (0, 1)), tokenizer


def fit(name: str, lr: float, seed: int, steps: int = STEPS) -> tuple[Decoder, dict]:
    """Train one model: the model, and its curve of held-out perplexity."""
    torch.manual_seed(seed)
    return train_on_novels(equal_size(model, name, MODELS[0], MLP, 3 * WIDTH * LAYERS), name, lr, seed, steps)


def train_on_novels(net: Decoder, name: str, lr: float, seed: int, steps: int = STEPS) -> tuple[Decoder, dict]:
    """Train a new model on the novels, with one thread: the model, and its curve of held-out perplexity."""
    torch.set_num_threads(1)
    training, choosing, reported, _ = texts()
    curve = Curve(
        EVERY, lambda step: {"tokens": step * BATCH * LENGTH, "perplexity": evaluate(net, reported).perplexity}
    )
    train(
        net,
        [Stage("language", steps, lr)],
        Batches(training, BATCH, seed),
        lambda stage: CrossEntropy(net),
        after_step=curve,
        progress=False,
    )
    found, size = curve.points[-1]["perplexity"], parameters(net)
    print(f"{name:>19} lr {lr:g} seed {seed}: {size:,} parameters, held-out perplexity {found:.2f}", flush=True)
    return net, {"name": name, "lr": lr, "seed": seed, "parameters": size, "curve": curve.points,
                 "score": evaluate(net, choosing).nll}


def run(name: str, lr: float, seed: int) -> dict:
    """The record of one model."""
    return fit(name, lr, seed)[1]


def main(
    save_to: Path | None = None,  # train the model with complex gates and seed 0 again and write it there
) -> None:
    if save_to is not None:
        save_model(save_to, fit(*first_run("gateloop_lm", MODELS[0]))[0].half(), texts()[-1])
        return
    torch.set_num_threads(1)  # as in every run, and for the record
    runs, trials = best_rate_runs(run, MODELS, RATES, SEEDS)
    for name in MODELS:
        ends = [one["curve"][-1]["perplexity"] for one in runs if one["name"] == name]
        print(f"{name:>19}: held-out perplexity {statistics.mean(ends):.2f} ({min(ends):.2f} to {max(ends):.2f})")
    save("gateloop_lm", "python -m bench.gateloop_lm", batch_size=BATCH, length=LENGTH, rates=RATES, runs=runs,
         trials=trials)


if __name__ == "__main__":
    tyro.cli(main)
