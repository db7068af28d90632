"""Which gates can forget on cue: five models of equal size on the Memory Horizon task of chapter 06.

    python -m bench.memory_horizon                 all runs, two at a time; about 50 minutes on two cores
    python -m bench.memory_horizon --save-to DIR   train the model with complex gates and seed 0 again, write it to DIR

On seed 0 the learning rate of each model is doubled or halved until the best, that with the lowest final loss, lies
between two others, or is sixteen times off the first; it is used for the other seeds. Equal sizes: where mixers have
fewer parameters, MLPs are wider.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
import tyro

from bench.common import Curve, best_rate_runs, equal_size, first_run, parameters, save
from llamba_ref.decoder import Decoder
from llamba_ref.gateloop_lm import GateLoopConfig, GateLoopLM
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.memory_horizon import horizon_accuracy, horizon_sequences, horizon_targets
from llamba_ref.training import CrossEntropy, FreshBatches, Stage, train

MODULUS, WIDTH, LAYERS, MLP = 5, 64, 2, 128
BATCH, LENGTH, LONG, STEPS = 32, 256, 2048, 1000
SEEDS, RATES = (0, 1, 2), (2.5e-3, 5e-3)  # rates that are tried first
EVERY = 50  # steps between two points of a curve
EDGES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
GATES = {"complex gates": "complex", "real gates": "real", "fixed complex gates": "fixed",
         "fixed real gates": "fixed real"}
MODELS = (*GATES, "Transformer")


def model(name: str, mlp: int = MLP) -> Decoder:
    """A model with MLPs of width `mlp`; recurrent ones have one number a head, the Transformer has four heads."""
    if name == "Transformer":
        return Llama(LlamaConfig(vocab_size=MODULUS + 1, hidden_size=WIDTH, intermediate_size=mlp,
                                 num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4,
                                 head_dim=WIDTH // 4))
    return GateLoopLM(GateLoopConfig(vocab_size=MODULUS + 1, d_model=WIDTH, n_layer=LAYERS, n_heads=WIDTH,
                                     intermediate_size=mlp, gates=GATES[name], mode="scan", tie_embeddings=False))


@torch.no_grad()
def accuracy(net: Decoder, input_ids: torch.Tensor) -> float:
    """Share of right answers, all distances together."""
    return (net(input_ids).argmax(-1) == horizon_targets(input_ids, MODULUS)).float().mean().item()


def fit(name: str, lr: float, seed: int) -> tuple[Decoder, dict]:
    """Train one model: the model and its record."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net = equal_size(model, name, MODELS[0], MLP, 3 * WIDTH * LAYERS)
    return net, learn(net, name, lr, seed)


def learn(net: Decoder, name: str, lr: float, seed: int, steps: int = STEPS) -> dict:
    """Train a model: its learning curve, and its accuracy against distance at both lengths."""
    short, long = (horizon_sequences(count, length, MODULUS, generator=torch.Generator().manual_seed(10_000 + length))
                   for length, count in ((LENGTH, 128), (LONG, 32)))
    curve = Curve(EVERY, lambda step: {"accuracy": accuracy(net, short[:32])})
    data = FreshBatches(lambda step, generator: horizon_sequences(BATCH, LENGTH, MODULUS, generator=generator), seed)
    objective = CrossEntropy(net, lambda input_ids: horizon_targets(input_ids, MODULUS), "sums")
    records = train(net, [Stage("horizon", steps, lr)], data, lambda stage: objective, after_step=curve, progress=False)
    result = {"name": name, "lr": lr, "seed": seed, "parameters": parameters(net), "curve": curve.points,
              "score": statistics.mean(record["loss"] for record in records[-20:]),
              "accuracy": accuracy(net, short), "by_distance": horizon_accuracy(net, short, EDGES[:9], MODULUS),
              "long_accuracy": accuracy(net, long), "long_by_distance": horizon_accuracy(net, long, EDGES, MODULUS)}
    print(f"{name:>19} lr {lr:g} seed {seed}: final loss {result['score']:.3f}, accuracy at {LENGTH} tokens "
          f"{result['accuracy']:.3f}, at {LONG} {result['long_accuracy']:.3f}", flush=True)
    return result


def run(name: str, lr: float, seed: int) -> dict:
    """The record of one model."""
    return fit(name, lr, seed)[1]


def main(
    save_to: Path | None = None,  # train the model with complex gates and seed 0 again and write it there
) -> None:
    if save_to is not None:
        fit(*first_run("memory_horizon", MODELS[0]))[0].half().save_pretrained(save_to)
        return
    torch.set_num_threads(1)  # as in every run, and for the record
    runs, trials = best_rate_runs(run, MODELS, RATES, SEEDS)
    for name in MODELS:
        rows = [one for one in runs if one["name"] == name]
        short, long = (statistics.mean(one[key] for one in rows) for key in ("accuracy", "long_accuracy"))
        print(f"{name:>19}: {rows[0]['parameters']:,} parameters, accuracy {short:.3f}, at {LONG} tokens {long:.3f}")
    save(
        "memory_horizon",
        "python -m bench.memory_horizon",
        modulus=MODULUS,
        length=LENGTH,
        long=LONG,
        batch_size=BATCH,
        steps=STEPS,
        edges=EDGES,
        rates=RATES,
        runs=runs,
        trials=trials,
    )


if __name__ == "__main__":
    tyro.cli(main)
