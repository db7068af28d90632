"""Students of a teacher that remembers: associative recall, which a window of equal memory cannot do (chapter 17).

    python -m bench.recall_students        about a quarter of an hour on two cores

The teacher is the Transformer of chapter 10 (`bench.recall`), trained to answer all questions about up to 16 pairs.
Its students have states of three sizes; a window of attention keeps as many numbers as each. All that is trained has
the steps of the demo and sequences that neither saw before, and its own learning rate: on seed 0 doubled or halved
until the best lies between two others, or is sixteen times off the first. Rates are chosen by the likelihood of the
answers to other questions than those that are counted. Three seeds; two runs at a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from bench import recall
from bench.common import best_rate_runs, first_run, save, short
from bench.recall import PAIRS, PAIRS_IN_BATCH, STEPS, model
from bench.students import CODE, Row, RunningMean, Silence, WindowAttention, with_attention
from llamba_ref.associative_recall import recall_accuracy, recall_batches, recall_sequences, recall_targets
from llamba_ref.decoder import Decoder
from llamba_ref.llama import Llama
from llamba_ref.llamba import Llamba
from llamba_ref.mohawk import distill
from llamba_ref.training import CrossEntropy, FreshBatches, Stage, train

SEEDS = (0, 1, 2)
STATES = {8: 8, 16: 14, 32: 26}  # size of the state -> tokens whose keys and values are as many numbers
RATES = (1e-3, 2e-3)  # tried first


@cache
def teacher() -> Llama:
    """The Transformer of chapter 10, trained as there."""
    name, rate, seed = first_run("recall", "Transformer")
    made_of = f"{CODE} {Path(recall.__file__).read_text()} {rate} {seed}"
    kept = Path("runs") / f"recall_teacher-{short(made_of)}"
    if kept.exists():
        return Llama.from_pretrained(kept)
    torch.manual_seed(seed)
    net, data = model(name), FreshBatches(recall_batches(PAIRS_IN_BATCH, PAIRS), seed)
    objective = CrossEntropy(net, recall_targets, "values")
    train(net, [Stage("recall", STEPS, rate)], data, lambda stage: objective, progress=False)
    net.save_pretrained(kept)
    return net


@dataclass(frozen=True)
class Recaller(Row):
    """A student of that teacher, and how it is trained."""

    d_state: int = 16
    budget: str = "full"

    def build(self, teacher: Llama, seed: int) -> Decoder:
        """The model before training."""
        torch.manual_seed(seed)
        if self.model == "student":
            texts = recall_sequences(16, PAIRS[-1], generator=torch.Generator().manual_seed(0))
            return Llamba.from_teacher(teacher, start=self.start, rotation=self.rotation, d_state=self.d_state,
                                       chunk_size=16, texts=texts if self.start == "teacher" else None)
        window = type("Window", (WindowAttention,), {"window": STATES[self.d_state], "sinks": 0})
        return with_attention(teacher, {"silence": Silence, "mean": RunningMean, "window": window}[self.model])


def rows() -> dict[str, Recaller]:
    """All rows, by what they are called in the table."""
    table = {"silence": Recaller("silence", stages=""), "running mean": Recaller("mean", stages="")}
    for size, tokens in STATES.items():
        window, turning = Recaller("window", stages="", d_state=size), Recaller(stages="3", d_state=size)
        table |= {
            f"window of {tokens} tokens": window, f"window of {tokens} tokens, distilled": replace(window, stages="3"),
            f"state {size}, no training": replace(turning, stages=""),
            f"state {size}, turning keys 3": turning,
        }
    table |= {"state 16, turning keys 1+2+3": Recaller(),
              "state 16, turning keys, data 3": Recaller(rotation="data", stages="3"),
              "state 16, standing keys 3": Recaller(rotation="none", stages="3"),
              "state 16, standing keys 1+2+3": Recaller(rotation="none"),
              "state 16, published 1+2+3": Recaller(start="published", rotation="none"),
              "state 16, turning keys, answers alone": Recaller(stages="l")}
    return table


def run(name: str, rate: float, seed: int) -> dict:
    """Train one model, and ask it."""
    torch.set_num_threads(1)
    row = rows()[name]
    net, stages = row.build(teacher(), seed), row.plan(rate)
    data = FreshBatches(recall_batches(PAIRS_IN_BATCH, PAIRS), 1000 + seed)  # the teacher's have a smaller number
    if row.stages == "l":
        objective = CrossEntropy(net, recall_targets, "values")
        train(net, stages, data, lambda stage: objective, progress=False)
    elif stages:
        distill(teacher(), net, data, stages, progress=False)
    found, score = accuracies(net), nats(net)
    shares = "  ".join(f"{share:6.1%}" for share in found.values())
    print(f"{name:>40}, lr {rate:g}, seed {seed}: {shares}", flush=True)
    return {"name": name, "lr": rate, "seed": seed, "score": score, "accuracy": found}


@torch.no_grad()
def nats(net: Decoder) -> float:
    """What the right answers cost, over all numbers of pairs."""
    losses = []
    for pairs in PAIRS:
        ids = recall_sequences(1024 // pairs, pairs, generator=torch.Generator().manual_seed(20_000 + pairs))
        losses.append(F.cross_entropy(net(ids).flatten(0, 1), recall_targets(ids).flatten()).item())
    return statistics.mean(losses)


@torch.no_grad()
def accuracies(net: Decoder) -> dict[int, float]:
    """The share of right answers, for each number of pairs."""
    tests = {pairs: torch.Generator().manual_seed(10_000 + pairs) for pairs in PAIRS}
    return {pairs: recall_accuracy(net, recall_sequences(4096 // pairs, pairs, generator=generator))
            for pairs, generator in tests.items()}


def summary(runs: Sequence[dict]) -> dict:
    """One row of the table: means over the seeds, and the range for the most pairs."""
    most = [one["accuracy"][PAIRS[-1]] for one in runs]
    mean = {pairs: statistics.mean(one["accuracy"][pairs] for one in runs) for pairs in PAIRS}
    return {"name": runs[0]["name"], "lr": runs[0]["lr"], "seeds": len(runs), "accuracy": mean, "lowest": min(most),
            "highest": max(most)}


def main() -> None:
    torch.set_num_threads(1)  # as in every run, and for the record
    trained = [name for name, row in rows().items() if row.stages]
    teacher()  # here, once: the runs load it
    found, trials = best_rate_runs(run, trained, RATES, SEEDS)
    found += [run(name, 0.0, 0) for name, row in rows().items() if not row.stages]
    summaries = [summary([one for one in found if one["name"] == name]) for name in rows()]
    save("recall_students", "python -m bench.recall_students", pairs=PAIRS, seeds=SEEDS, states=STATES,
         teacher=accuracies(teacher()), rows=summaries, trials=trials)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
