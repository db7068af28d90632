"""How many pairs fit into a state: multi-query associative recall with Mamba-2, GateLoop and a Transformer (chapter
10_recall).

    python -m bench.recall        all runs, two at a time with one thread each; about half an hour on two cores

Every model has two layers of width 64. It is trained with each learning rate of LEARNING_RATES and seed 0; the rate
with the lowest final loss is then used for the other seed. Names end with the state size N, the width of a key in each
head. "+ convolution" puts the convolution that Mamba-2 has inside in front of the mixer; "without convolution" holds
Mamba-2's own at the identity.
"""

from __future__ import annotations

import statistics

import torch
import tyro
from torch import nn

from bench.common import Curve, best_rate_runs, parameters, save
from llamba_ref.associative_recall import (
    WithConvolution,
    recall_accuracy,
    recall_batches,
    recall_sequences,
    recall_targets,
)
from llamba_ref.decoder import Decoder
from llamba_ref.gateloop_lm import GateLoopConfig, GateLoopLM
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.mamba2 import Mamba2Config, Mamba2LM
from llamba_ref.training import CrossEntropy, FreshBatches, Stage, train

VOCABULARY, WIDTH, LAYERS, HEADS, MLP = 64, 64, 2, 4, 128
PAIRS, PAIRS_IN_BATCH, STEPS = (2, 4, 8, 16), 256, 1600
SEEDS, LEARNING_RATES = (0, 1), (3e-3, 1e-2)
STATES = (2, 4, 8, 16, 32)
EVERY = 100  # steps between two points of a curve
MODELS = ("Transformer", *(f"Mamba-2, {N}" for N in STATES), *(f"GateLoop + convolution, {N}" for N in STATES),
          "Mamba-2 without convolution, 16", "GateLoop, 16", "GateLoop with complex gates + convolution, 16")


def model(name: str) -> Decoder:
    """The model of a name."""
    kind, _, state = name.partition(", ")
    if kind == "Transformer":
        return Llama(LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=MLP,
                                 num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
                                 head_dim=WIDTH // HEADS))
    if kind.startswith("Mamba-2"):
        net = Mamba2LM(Mamba2Config(vocab_size=VOCABULARY, d_model=WIDTH, n_layer=LAYERS, d_state=int(state),
                                    headdim=64, chunk_size=32, tie_embeddings=False))
        if kind.endswith("without convolution"):
            for block in net.backbone.layers:
                conv = block.mixer.conv1d.requires_grad_(False)
                nn.init.zeros_(conv.weight)[..., -1] = 1
                nn.init.zeros_(conv.bias)
        return net
    gates = "complex" if "complex" in kind else "real"
    net = GateLoopLM(GateLoopConfig(vocab_size=VOCABULARY, d_model=WIDTH, n_layer=LAYERS, n_heads=HEADS,
                                    intermediate_size=MLP, d_state=int(state), gates=gates, mode="recurrent",
                                    tie_embeddings=False))
    if kind.endswith("+ convolution"):
        for block in net.backbone.layers:
            block.mixer = WithConvolution(block.mixer, WIDTH)
    return net


def state_numbers(name: str) -> int | None:
    """Real numbers in the recurrent state of a layer; None for the Transformer, whose cache grows."""
    kind, _, state = name.partition(", ")
    if kind == "Transformer":
        return None
    return int(state) * (2 * WIDTH if kind.startswith("Mamba-2") or "complex" in kind else WIDTH)


def run(name: str, lr: float, seed: int) -> dict:
    """The record of one model."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return learn(model(name), name, lr, seed, state_numbers(name))


def learn(net: Decoder, name: str, lr: float, seed: int, state: int | None, steps: int = STEPS) -> dict:
    """Train a model with `state` numbers in a layer: its learning curve, and its accuracy for each number of pairs."""
    tests = {
        pairs: recall_sequences(4096 // pairs, pairs, generator=torch.Generator().manual_seed(10_000 + pairs))
        for pairs in PAIRS
    }
    curve = Curve(EVERY, lambda step: {"accuracy": recall_accuracy(net, tests[PAIRS[-1]])})
    data = FreshBatches(recall_batches(PAIRS_IN_BATCH, PAIRS), seed)
    objective = CrossEntropy(net, recall_targets, "values")
    records = train(net, [Stage("recall", steps, lr)], data, lambda stage: objective, after_step=curve, progress=False)
    accuracy = {pairs: recall_accuracy(net, ids) for pairs, ids in tests.items()}
    print(
        f"{name:>46} lr {lr:g} seed {seed}: "
        + "  ".join(f"{pairs}: {share:.3f}" for pairs, share in accuracy.items())
        + f"  {curve.spent:.0f} s",
        flush=True,
    )
    return {
        "name": name,
        "lr": lr,
        "seed": seed,
        "parameters": parameters(net),
        "state_numbers": state,
        "curve": curve.points,
        "score": statistics.mean(record["loss"] for record in records[-50:]),
        "accuracy": list(accuracy.values()),
    }


def main() -> None:
    torch.set_num_threads(1)  # as in every run, and for the record
    runs, _ = best_rate_runs(run, MODELS, LEARNING_RATES, SEEDS, reach=1)
    save("recall", "python -m bench.recall", pairs=PAIRS, steps=STEPS, rates=LEARNING_RATES, states=STATES, runs=runs)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
