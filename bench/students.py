"""What each part of a distillation is worth, beside answers that need none: students of the demo's teacher on its text.

    python -m bench.students        the same as `make compare`

Every row that is trained has the same tokens, and its own learning rate, all stages scaled alike: on seed 0 the rate
is doubled or halved until the best of those tried lies between two others, or is sixteen times off the first; then come
three seeds. Rates are chosen on one half of the held-out text, and all figures are of the other half. Rows without
training are measured once. A quarter of the demo's steps tells rows apart; some rows are trained with a sixteenth, with
an eighth, and with all of them, these last with the rate of the quarter. Runs are kept in runs/students, so that
the command goes on where it was stopped; after a change of the code they are made anew. Two runs at a time with one
thread each: about two hours on two cores.
"""

from __future__ import annotations

import ast
import json
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn

import llamba_ref
from bench.common import best_rate_runs, parameters, save, short
from llamba_ref.cli import Distill
from llamba_ref.data import Batch, Batches, TokenBlocks, load_documents, pack, split_documents
from llamba_ref.decoder import Decoder
from llamba_ref.evaluate import compare, evaluate
from llamba_ref.llama import Attention, Llama
from llamba_ref.llamba import Llamba
from llamba_ref.mamba2 import SSDMixer
from llamba_ref.models import load_model
from llamba_ref.mohawk import OBJECTIVES, EndToEnd, LayerByLayer, alignment_loss
from llamba_ref.training import Stage, train

RATES = (2.5e-4, 5e-4)  # tried first, of stage 3 and of language modelling; stages 1 and 2 have four times as much
SEEDS = (0, 1, 2)
RUNS = Path("runs/students")
# Steps of the three stages, which a row has in all
BUDGETS = {"quarter": (10, 75, 90), "sixteenth": (3, 19, 22), "eighth": (5, 38, 45), "full": (40, 300, 360)}
CURVES = ("published 1+2+3", "standing keys 3", "turning keys 3", "turning keys 1+2+3", "window 3",
          "teacher, language modelling")  # rows that have all budgets
# Keys and values of so many tokens take as many numbers, 5632, as the state of a student whose keys stand still,
WINDOW, SINKS = 40, 4  # its convolution's included; keys that turn need 64 more, half a token's


def whole(state) -> None:
    """Raise ValueError for a state: these mixers are yardsticks that read whole sequences."""
    if state is not None:
        raise ValueError("state was given: this mixer keeps none, read the whole sequence at once")


class WindowAttention(Attention):
    """Attention to the first tokens and the last ones: a cache of fixed size."""

    window, sinks = WINDOW, SINKS

    def forward(self, u: Tensor, state=None) -> Tensor:
        whole(state)
        q, k, v = self.project(u, 0, None)
        place = torch.arange(u.shape[1], device=u.device)
        distance = place[:, None] - place
        seen = (distance >= 0) & ((distance < self.window) | (place < self.sinks))
        y = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        return self.o_proj(rearrange(y, "b h l d -> b l (h d)"))


class RunningMean(Attention):
    """The mean of all values so far in every head."""

    def forward(self, u: Tensor, state=None) -> Tensor:
        whole(state)
        v = self.v_proj(u).cumsum(1) / torch.arange(1, u.shape[1] + 1, device=u.device)[:, None]
        v = rearrange(v, "b l (h d) -> b l h d", d=self.head_dim)
        return self.o_proj(v.repeat_interleave(self.n_heads // self.n_kv_heads, 2).flatten(2))


class Silence(nn.Module):
    """Nothing."""

    def forward(self, u: Tensor, state=None) -> Tensor:
        whole(state)
        return torch.zeros_like(u)


class WindowBesideState(nn.Module):
    """Attention in a window and a recurrent mixer, each with about half of the memory: the sum. It starts as the window
    alone, for the mixer is silent."""

    def __init__(self, attention: WindowAttention, recurrent: SSDMixer):
        super().__init__()
        self.attention, self.recurrent = attention, recurrent
        nn.init.zeros_(recurrent.out_proj.weight)

    def forward(self, u: Tensor, state=None) -> Tensor:
        whole(state)
        return self.attention(u) + self.recurrent(u)


class HalfWindow(WindowAttention):
    """Beside a mixer of `d_state` 16 it takes no more memory than a student whose keys turn."""

    window, sinks = 18, 2


def match_mixer(block: nn.Module, layer) -> Tensor:
    """Stage 2 on what the mixer gives, in place of the block."""
    return alignment_loss(block.mixer(layer.mixer_input), layer.mixer_output)


class ReverseKL(EndToEnd):
    """Stage 3 with the divergence the other way round: the student is to predict nothing that the teacher does not."""

    def __call__(self, batch: Batch | Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        ids = Batch.of(batch).ids
        with torch.no_grad():
            log_p = self.models["teacher"](ids).log_softmax(-1)
        log_q = self.models["student"](ids).log_softmax(-1)
        loss = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        backward(loss)
        return loss.detach()[None]


LOSSES = {
    "as published": {},
    "mixer output": {"alignment": lambda teacher, student: LayerByLayer(teacher, student, match_mixer)},
    "reverse KL": {"distillation": ReverseKL},
}


def with_attention(teacher: Llama, kind: type, layers: Sequence[int] | None = None) -> Llama:
    """A copy of the teacher with another kind of attention in some layers, or all; it keeps the weights."""
    model = Llama(teacher.config)
    for index in range(len(model.backbone.layers)) if layers is None else layers:
        block = model.backbone.layers[index]
        block.mixer = Silence() if kind is Silence else block.mixer
        block.mixer.__class__ = kind
    model.load_state_dict(teacher.state_dict(), strict=kind is not Silence)
    return model


@dataclass(frozen=True)
class Row:
    """A student and how it is trained."""

    model: Literal["student", "silence", "mean", "window", "both", "teacher", "scratch"] = "student"
    start: str = "teacher"  # of the student
    rotation: str = "fixed"
    stages: str = "123"  # which of MOHAWK's stages; "l": language modelling in their place; "": no training
    budget: str = "quarter"
    loss: str = "as published"  # of LOSSES

    def build(self, teacher: Llama, seed: int) -> Decoder:
        """The model before training."""
        torch.manual_seed(seed)
        if self.model in ("student", "scratch", "both"):
            sizes = {"d_state": 16} if self.model == "both" else {}
            student = Distill(start=self.start, rotation=self.rotation, seed=seed, **sizes).student(teacher)
            if self.model == "both":
                windows = with_attention(teacher, HalfWindow).backbone.layers
                for block, window in zip(student.backbone.layers, windows):
                    block.mixer = WindowBesideState(window.mixer, block.mixer)
            return Llamba(student.config) if self.model == "scratch" else student
        kind = {"silence": Silence, "mean": RunningMean, "window": WindowAttention, "teacher": Attention}[self.model]
        return with_attention(teacher, kind)

    def plan(self, rate: float) -> list[Stage]:
        """The stages; one that is left out gives its steps to the last one."""
        steps = BUDGETS[self.budget]
        if self.stages in ("", "l"):
            return [Stage("language", sum(steps), rate)] if self.stages else []
        given = {number: steps[number - 1] for number in map(int, self.stages)}
        given[int(self.stages[-1])] += sum(steps) - sum(given.values())
        lengths = tuple(given.get(number, 0) for number in (1, 2, 3))
        return Distill(steps=lengths, lr=(4 * rate, 4 * rate, rate)).stages()


def rows() -> dict[str, Row]:
    """All rows, by what they are called in the table."""
    published = partial(Row, start="published", rotation="none")
    table = {
        "silence": Row("silence", stages=""), "running mean": Row("mean", stages=""),
        f"window of {WINDOW} + {SINKS} tokens": Row("window", stages=""),
        "published start": published(stages=""),
        "start from the teacher, keys stand still": Row(rotation="none", stages=""),
        "start from the teacher, keys turn": Row(stages=""),
    }
    for stages in ("3", "13", "23", "123"):
        table[f"published {'+'.join(stages)}"] = published(stages=stages)
    table |= {"standing keys 3": Row(rotation="none", stages="3"), "standing keys 1+2+3": Row(rotation="none")}
    for stages in ("1", "2", "3", "12", "13", "23", "123"):
        table[f"turning keys {'+'.join(stages)}"] = Row(stages=stages)
    table |= {f"turning keys, {rotation} 3": Row(rotation=rotation, stages="3") for rotation in ("learned", "data")}
    table |= {
        "turning keys, data 1+2+3": Row(rotation="data"),
        "turning keys 2+3, mixer output": Row(stages="23", loss="mixer output"),
        "turning keys 3, reverse KL": Row(stages="3", loss="reverse KL"),
        "turning keys, language modelling": Row(stages="l"),
        "window 3": Row("window", stages="3"), "window, language modelling": Row("window", stages="l"),
        "window beside a state 3": Row("both", stages="3"),
        "teacher, language modelling": Row("teacher", stages="l"), "from scratch": Row("scratch", stages="l"),
    }
    for name in CURVES:
        for budget in ("sixteenth", "eighth", "full"):
            table[f"{name}, {budget}"] = replace(table[name], budget=budget)
    return table


def code() -> str:
    """A digest of what is run: the package and this file, comments aside."""
    files = [Path(__file__), *sorted(Path(llamba_ref.__file__).parent.glob("*.py"))]
    return short("".join(ast.dump(ast.parse(file.read_text())) for file in files))


CODE = code()  # of what is imported, whatever becomes of the files meanwhile


def record_of(row: Row, name: str, rate: float, seed: int) -> Path:
    """Where the record of a run is kept: another place for another row of that name, and for other code."""
    digest = short(f"{CODE} {row} {row.plan(rate)}")
    return RUNS / f"{name}, {rate:g}, {seed}, {digest}.json".replace(" ", "_")


class Material(NamedTuple):
    """What every row is made of."""

    teacher: Llama
    batches: Batches  # the training text, in the order of a seed
    choosing: TokenBlocks  # one half of the held-out text, by which learning rates are chosen
    reported: TokenBlocks  # the other half, of which all figures are


def material(seed: int) -> Material:
    """The demo's teacher and text."""
    demo = Distill(seed=seed)
    teacher, tokenizer = load_model(demo.teacher)
    training, held_out = split_documents(load_documents(*demo.corpus.text), demo.corpus.held_out)
    blocks, validation = (pack(documents, tokenizer, demo.corpus.length) for documents in (training, held_out))
    halves = (replace(validation, tokens=validation.tokens[start::2]) for start in (0, 1))
    return Material(teacher, Batches(blocks, demo.batch_size, seed), *halves)


def learn(model: Decoder, row: Row, name: str, rate: float, seed: int, given: Material) -> dict:
    """Train a model as a row says, and measure it."""
    stages, losses, seconds = row.plan(rate), OBJECTIVES | LOSSES[row.loss], 0.0
    if stages:
        objectives = {stage.objective: losses[stage.objective](given.teacher, model) for stage in stages}
        begun = time.process_time()
        train(model, stages, given.batches, lambda stage: objectives[stage.objective],
              accelerator=Accelerator(cpu=True), progress=False)
        seconds = time.process_time() - begun
    score, found = evaluate(model, given.choosing).nll, compare(given.teacher, model, given.reported)
    return {"name": name, "lr": rate, "seed": seed, "score": score, "ratio": found.ratio,
            "agreement": found.agreement, "kl": found.kl, "parameters": parameters(model), "seconds": seconds,
            "tokens": sum(stage.steps for stage in stages) * given.batches.batch_size * given.batches.blocks.length}


def run(name: str, rate: float, seed: int) -> dict:
    """Train one model, or find the record of it that is there."""
    torch.set_num_threads(1)
    row = rows()[name]
    file = record_of(row, name, rate, seed)
    if file.exists():
        return json.loads(file.read_text())
    given = material(seed)
    record = learn(row.build(given.teacher, seed), row, name, rate, seed, given)
    RUNS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))
    return record


def summary(name: str, runs: list[dict]) -> dict:
    """One row of the table: means over the seeds, and the range of the ratio."""
    mean = {key: statistics.mean(one[key] for one in runs) for key in ("ratio", "agreement", "kl", "seconds")}
    row = {"name": name, "lr": runs[0]["lr"], "tokens": runs[0]["tokens"], "parameters": runs[0]["parameters"],
           "seeds": len(runs), **mean}
    return row | {"lowest": min(one["ratio"] for one in runs), "highest": max(one["ratio"] for one in runs)}


def command(budgets: tuple[str, ...], seeds: tuple[int, ...], names: tuple[str, ...] = ()) -> str:
    """What makes these measurements again."""
    if (set(budgets), seeds, names) == (set(BUDGETS), SEEDS, ()):
        return "make compare"
    chosen = f" --names {shlex.join(names)}" if names else ""
    return f"python -m bench.students --budgets {' '.join(budgets)} --seeds {' '.join(map(str, seeds))}{chosen}"


def main(
    # rows of which budgets; those without training always
    budgets: tuple[Literal["quarter", "sixteenth", "eighth", "full"], ...] = tuple(BUDGETS),
    seeds: tuple[int, ...] = SEEDS,  # the first one chooses the learning rates
    names: tuple[str, ...] = (),  # rows to train; none given: all
) -> None:
    torch.set_num_threads(1)  # as in every run, and for the record
    table = {name: row for name, row in rows().items()
             if not row.stages or row.budget in budgets and (not names or name in names)}
    quarter = {name: name.removesuffix(", full") for name, row in table.items() if row.stages}  # whose rate it has
    found, trials = best_rate_runs(run, sorted(set(quarter.values())), RATES, seeds)
    rates = {one["name"]: one["lr"] for one in found}
    wanted = [(name, rates[base], seed) for name, base in quarter.items() if name != base for seed in seeds]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found += pool.map(run, *zip(*wanted))
    found += [run(name, 0.0, 0) for name, row in table.items() if not row.stages]
    summaries = [summary(name, [one for one in found if one["name"] == name]) for name in table]
    for row in summaries:
        print(f"{row['name']:>45}: {row['tokens'] / 1e6:.2f} M tokens, {row['ratio']:7.3f} x the teacher's "
              f"({row['lowest']:.3f} to {row['highest']:.3f}), KL {row['kl']:.3f}, lr {row['lr']:g}")
    demo = Distill()
    save("students", command(budgets, seeds, names), seeds=seeds, rates=RATES, budgets=BUDGETS, window=WINDOW,
         sinks=SINKS, batch_size=demo.batch_size, length=demo.corpus.length, d_state=demo.d_state, curves=CURVES,
         rows=summaries, trials=trials)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
