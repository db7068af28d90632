"""What every measurement records: where and when it was made, and with which versions."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro

from llamba_ref.cli import Distill
from llamba_ref.conventions import load_result
from llamba_ref.decoder import Decoder
from llamba_ref.training import Stage

RESULTS = Path(__file__).parent / "results"  # a link into the package: the chapters plot what lies there


def device_name() -> str:
    """The GPU's name, or the processor's and how many threads torch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU"
    )
    return f"{model}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def version(package: str) -> str | None:
    """The version of an installed package; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def short(text: str) -> str:
    """A text in a few letters, other ones for another text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def save(name: str, command: str, *, packages: Sequence[str] = (), **content) -> Path:
    """Write bench/results/NAME.json: the command that made it, device, versions (of `packages` too, null where they are
    not installed), date, and the measurements."""
    versions = {package: version(package) for package in ("llamba_ref", "torch", "transformers", *packages)}
    record = {"command": command, "device": device_name(), "python": platform.python_version(), "versions": versions,
              "date": datetime.date.today().isoformat(), **content}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: bench/results/{name}.json")
    return path


def in_a_process(call: str, environment: dict[str, str]):
    """What a call such as "bench.threads.measure(2)" returns in a Python process of its own."""
    code = f"import json, {call.partition('(')[0].rpartition('.')[0]}; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout)


class Curve:
    """A learning curve, to be called after each step of `train`; CPU time counts the training alone."""

    def __init__(
        self,
        every: int,  # steps between two points
        measure: Callable[[int], dict],  # from the number of steps taken to what a point holds
        last: int | None = None,  # a step that is a point in any case
    ):
        self.every, self.measure, self.last = every, measure, last
        self.points, self.spent, self.began = [], 0.0, time.process_time()

    def __call__(self, step: int, stage: Stage) -> None:
        if step % self.every == 0 or step == self.last:
            self.spent += time.process_time() - self.began
            point = {"step": step, "stage": stage.objective, **self.measure(step), "cpu_seconds": self.spent}
            self.points.append(point)
            self.began = time.process_time()


def distill_options(command: str) -> Distill:
    """The options of a `llamba distill` command."""
    return tyro.cli(Distill, args=command.partition("distill")[2].split(), config=(tyro.conf.OmitArgPrefixes,))


Run = Callable[[str, float, int], dict]  # name, learning rate, seed -> a record with "score", of which lower is better


def attempt(run: Run, name: str, rate: float, seed: int) -> dict:
    """A run's record; a score of infinity where the rate was so high that training broke down."""
    try:
        record = run(name, rate, seed)
    except FloatingPointError:
        record = {"name": name, "lr": rate, "seed": seed, "score": math.inf}
    return record if math.isfinite(record["score"]) else record | {"score": math.inf}


def beyond(scores: dict[float, float], first: Sequence[float], reach: float) -> float | None:
    """The rate to try next, given the scores of some: double or half the best one, until it lies between two others or
    is `reach` times off the first ones."""
    best = min(scores, key=lambda rate: (scores[rate], rate))  # where all broke down: the lowest
    if best == min(scores):
        return best / 2 if best > min(first) / reach else None
    return best * 2 if best == max(scores) and best < reach * max(first) else None


def search(
    pool: ProcessPoolExecutor,  # makes runs side by side
    run: Run,  # trains one model
    models: Sequence[str],  # names of models
    first: Sequence[float],  # two or more learning rates that are tried in any case
    seed: int,
    reach: float = 16,  # how far from the first ones to look, a factor; 1: try only these
) -> list[dict]:  # the records of all runs
    """Look for the learning rate that suits each model best on one seed."""
    found, wanted = [], [(name, rate, seed) for name in models for rate in first]
    while wanted:
        found += pool.map(partial(attempt, run), *zip(*wanted))
        scores = {name: {one["lr"]: one["score"] for one in found if one["name"] == name} for name in models}
        wanted = [(name, rate, seed) for name in models if (rate := beyond(scores[name], first, reach))]
    return found


def best_rate_runs(
    run: Run,  # trains one model
    models: Sequence[str],  # names of models
    first: Sequence[float],  # learning rates, see `search`
    seeds: Sequence[int],  # the first one chooses the rate
    reach: float = 16,  # see `search`
) -> tuple[list[dict], list[dict]]:  # records for each model and seed with the model's best rate, and what was tried
    """Give every model the learning rate that suits it best, then run all seeds; two runs at a time.

    A rate with which another seed breaks down does not count. Raises RuntimeError where none is left."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        tried = sorted(search(pool, run, models, first, seeds[0], reach), key=lambda one: one["score"])
        usable = {name: [one for one in tried if one["name"] == name and math.isfinite(one["score"])]
                  for name in models}
        found, open_ = {}, list(models)
        while open_:
            if broken := [name for name in open_ if not usable[name]]:
                raise RuntimeError(f"training breaks down with every learning rate: {', '.join(broken)}")
            best = {name: usable[name].pop(0) for name in open_}
            wanted = [(name, best[name]["lr"], seed) for name in open_ for seed in seeds[1:]]
            others = list(pool.map(partial(attempt, run), *zip(*wanted)))
            found |= {name: [best[name], *(one for one in others if one["name"] == name)] for name in open_}
            open_ = [name for name in open_ if any(one["score"] == math.inf for one in found[name])]
    trials = [{"name": one["name"], "lr": one["lr"], "score": one["score"] if math.isfinite(one["score"]) else None}
              for one in sorted(tried, key=lambda one: (one["name"], one["lr"]))]
    return [one for name in models for one in found[name]], trials


def first_run(name: str, model: str) -> tuple[str, float, int]:
    """Model, learning rate and seed of the first run of a model in a saved result, to train it again."""
    return next((one["name"], one["lr"], one["seed"]) for one in load_result(name)["runs"] if one["name"] == model)


def parameters(model: Decoder) -> int:
    """How many numbers a model has."""
    return sum(p.numel() for p in model.parameters())


def equal_size(
    build: Callable[[str, int], Decoder],  # makes the model of a name with MLPs of a width
    name: str,  # which model
    largest: str,  # the model that has most parameters when all MLPs have width `mlp`
    mlp: int,  # the width of that model's MLPs
    cost: int,  # parameters of the whole model for one more unit of width
) -> Decoder:
    """A model whose MLPs make up for what its mixers lack in parameters."""
    lacking = parameters(build(largest, mlp)) - parameters(build(name, mlp))
    return build(name, mlp + round(lacking / cost))
