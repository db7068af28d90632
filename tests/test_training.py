"""The training loop: schedule, what trains, exact resume after every kind of kill, NaN, full disk, processes."""

import copy
import fcntl
import importlib
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from small import RELEASED
from together import process
from together import run as run_together

from llamba_ref import training
from llamba_ref.conventions import relative_error
from llamba_ref.data import Batches
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.llamba import Llamba
from llamba_ref.mohawk import OBJECTIVES, distill
from llamba_ref.operators import peak_bytes
from llamba_ref.training import (
    CrossEntropy,
    FreshBatches,
    Objective,
    Run,
    Stage,
    describe,
    first_bad,
    mean_over_chunks,
    next_tokens,
    optimizer_for,
    reached,
    read_metrics,
    seal,
    train,
    train_step,
    warmup_stable_decay,
)

VOCAB, LENGTH, BATCH = 48, 24, 4
STAGES = [Stage("language", 7, 1e-2), Stage("language", 5, 3e-3, weight_decay=0.0)]
PART = "backbone.layers.1.mlp.up_proj.weight"


def toy(seed=0, layers=2):
    """A tiny Llama, the same one for the same seed."""
    torch.manual_seed(seed)
    return Llama(LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True))


def rows(number=20):
    """Random tokens: what a test trains on."""
    return torch.randint(VOCAB, (number, LENGTH), generator=torch.Generator().manual_seed(7))


def pair():
    """A teacher and a student with new mixers."""
    teacher = toy()
    torch.manual_seed(1)
    return teacher, Llamba.from_teacher(teacher, d_state=4, chunk_size=8, **RELEASED)


def cpu():
    return Accelerator(cpu=True)


class Data(Batches):
    """Batches that do something when step `at` is asked for."""

    def __init__(self, at=None, do=None, **place):
        super().__init__(rows(), BATCH, **place)
        self.at, self.do = at, do

    def next(self):
        if self.step == self.at:
            self.do()
        return super().next()


def die():
    raise KeyboardInterrupt


def go(path, data=None, *, resume=False, model=None, stages=STAGES, accelerator=None, **options):
    """Train the toy in a run directory: the run, the model, the records of this call."""
    model = model or toy()
    run = Run(path, {"stages": len(stages)}, resume=resume)
    options = {"save_every": 3, "progress": False, **options}
    records = train(
        model,
        stages,
        data or Data(),
        lambda stage: CrossEntropy(model),
        run=run,
        accelerator=accelerator or cpu(),
        **options,
    )
    return run, model, records


def story(metrics):
    """What does not depend on the clock."""
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in metrics]


def equal(ours, theirs):
    """Two models hold the same bits."""
    theirs = theirs.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run that nothing happened to: to be copied."""
    path = tmp_path_factory.mktemp("run") / "unbroken"
    go(path)
    return path


@pytest.fixture(scope="module")
def unbroken(finished):
    """Its metrics and its model."""
    run, model = Run(finished, {"stages": 2}, resume=True), toy(seed=6)
    run.load(model)
    return story(run.metrics()), model


# Stage and schedule


def test_schedule_has_exact_corners():
    stage = Stage("language", 100, 0.3)
    values = [warmup_stable_decay(step, stage) for step in range(100)]
    assert values[10:90] == [0.3] * 80
    assert values[0] == 0.3 * (1 / 11) and values[9] == 0.3 * (10 / 11)
    assert values[90] == 0.3 * (10 / 11) and values[99] == 0.3 * (1 / 11)
    assert warmup_stable_decay(100, stage) == 1e-8
    assert values == values[::-1]


def test_schedule_without_warmup_or_decay():
    assert {warmup_stable_decay(step, Stage("language", 9, 0.5, warmup=0, decay=0)) for step in range(9)} == {0.5}
    assert warmup_stable_decay(0, Stage("language", 10, 0.5, warmup=0)) == 0.5
    assert warmup_stable_decay(9, Stage("language", 10, 0.5, decay=0)) == 0.5
    assert warmup_stable_decay(0, Stage("language", 1, 0.5, warmup=0, decay=0)) == 0.5


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1), st.floats(1e-6, 1.0))
@settings(max_examples=100, deadline=None)
def test_schedule_rises_then_falls_between_floor_and_lr(steps, warmup, decay, lr):
    stage = Stage("language", steps, lr, warmup=warmup, decay=min(decay, 1 - warmup))
    values = [warmup_stable_decay(step, stage) for step in range(steps)]
    assert all(1e-8 <= value <= lr for value in values)
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1]) and values[peak:] == sorted(values[peak:], reverse=True)


@pytest.mark.parametrize(
    "field, value",
    [("steps", -1), ("steps", 3.5), ("steps", "3"), ("lr", 0.0), ("lr", float("nan")), ("lr", float("inf")),
     ("weight_decay", -0.1), ("warmup", -0.1), ("warmup", 1.5), ("decay", 0.95), ("clip", 0.0),
     ("clip", float("nan"))],
)
def test_stage_refuses_senseless_numbers(field, value):
    with pytest.raises(ValueError, match=f"stage language: {field} is "):
        Stage(**{"objective": "language", "steps": 10, "lr": 0.1, field: value})


# What trains


def test_weight_decay_is_for_matrices_only():
    teacher, student = pair()
    for model in (teacher, student):
        matrices, vectors = optimizer_for(model, Stage("language", 10, 0.1, weight_decay=0.3)).param_groups
        assert matrices["weight_decay"] == 0.3 and vectors["weight_decay"] == 0.0
        assert all(p.dim() >= 2 for p in matrices["params"]) and all(p.dim() == 1 for p in vectors["params"])
        assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
        assert matrices["betas"] == (0.9, 0.95) and matrices["eps"] == 1e-8
    teacher.backbone.embedding.requires_grad_(False)
    matrices, _ = optimizer_for(teacher, Stage("language", 10, 0.1)).param_groups
    assert not any(p is teacher.backbone.embedding.weight for p in matrices["params"])


def test_language_reaches_everything():
    model = toy()
    counts = reached(model, CrossEntropy(model), rows(1))
    assert counts == {name: p.numel() for name, p in model.named_parameters()}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_orientation_leaves_x_z_and_out_proj_alone():
    teacher, student = pair()
    counts = reached(student, OBJECTIVES["orientation"](teacher, student), rows(1))
    mixer = "backbone.layers.0.mixer."
    assert counts[mixer + "out_proj.weight"] == counts[mixer + "z_bias"] == counts["backbone.embedding.weight"] == 0
    assert counts[mixer + "in_proj.weight"] == (2 * 2 * 4 + 2) * 16  # B, C and A_log: two heads, state size 4, width 16
    assert counts[mixer + "D"] == 2
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, count in counts.items() if count == 0}


def test_orientation_moves_no_weight_that_it_does_not_train():
    teacher, student = pair()
    before = copy.deepcopy(student.state_dict())
    distill(
        teacher, student, Data(), [Stage("orientation", 5, 0.05, weight_decay=0.0)], accelerator=cpu(), progress=False
    )
    after = student.state_dict()
    moved = {
        name.split("layers.0.")[1]
        for name in before
        if "layers.0." in name and not torch.equal(before[name], after[name])
    }
    assert moved == {
        "input_layernorm.weight",
        "mixer.D",
        "mixer.in_proj.weight",
        "mixer.conv1d.weight",
        "mixer.conv1d.bias",
    }
    weight = "backbone.layers.0.mixer.in_proj.weight"
    assert (before[weight] != after[weight]).any(1).tolist() == [False] * 16 + [True] * 16 + [False] * 16 + [True] * 2
    assert torch.equal(before["backbone.embedding.weight"], after["backbone.embedding.weight"])


def test_weight_decay_shrinks_rows_without_gradient():
    """Why stage 1 has none: the factor is the one that AdamW promises."""
    teacher, student = pair()
    x_rows = student.backbone.layers[0].mixer.in_proj.weight.detach().double()[:16].clone()
    stage = Stage("orientation", 5, 0.05, weight_decay=0.1)
    distill(teacher, student, Data(), [stage], accelerator=cpu(), progress=False)
    factor = math.prod(1 - 0.1 * warmup_stable_decay(step, stage) for step in range(5))
    assert relative_error(student.backbone.layers[0].mixer.in_proj.weight[:16], factor * x_rows) < 1e-6


def test_a_zero_start_hides_nothing():
    """A projection that starts at zero gives what lies before it no gradient at first: it must train all the same."""
    model = toy()
    for block in model.backbone.layers:
        torch.nn.init.zeros_(block.mixer.o_proj.weight)
    counts = reached(model, CrossEntropy(model), rows(1))
    assert counts["backbone.layers.0.mixer.q_proj.weight"] == 16 * 16
    before = copy.deepcopy(model)
    train(
        model,
        [Stage("language", 4, 1e-2, weight_decay=0.0)],
        Data(),
        lambda stage: CrossEntropy(model),
        accelerator=cpu(),
        progress=False,
    )
    assert not torch.equal(model.backbone.layers[0].mixer.q_proj.weight, before.backbone.layers[0].mixer.q_proj.weight)


# What the caller froze


FROZEN = ("mixer.D", "layers.0.mlp.up_proj.weight", "embedding.weight")


def freeze(model, *names):
    """Freeze the parameters whose names end like one of these: their values, and the flags of all."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(names))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return {name: p.detach().clone() for name, p in model.named_parameters() if not flags[name]}, flags


@pytest.mark.parametrize("end", ["done", "killed", "nan"])
@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_frozen_parameters_stay_frozen_and_flags_come_back(name, end):
    teacher, student = pair()
    values, flags = freeze(student, *FROZEN)
    during = []
    look = lambda step, stage: during.append({name: p.requires_grad for name, p in student.named_parameters()})
    data = Data(*{"done": (), "killed": (1, die), "nan": (1, lambda: teacher.state_dict()[PART].fill_(math.nan))}[end])
    stages = [Stage(name, 2, 0.01), Stage("distillation", 1, 0.01)]
    before = copy.deepcopy(student)
    try:
        distill(teacher, student, data, stages, accelerator=cpu(), progress=False, after_step=look)
        assert end == "done" or (end, name) == ("nan", "language")
    except (KeyboardInterrupt, FloatingPointError):
        assert end != "done"
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
    assert all(torch.equal(student.state_dict()[name], value) for name, value in values.items()) and len(values) == 4
    assert not equal(student, before) and all(p.grad is None for p in student.parameters())
    assert during and all(not flag or flags[name] for flags_then in during for name, flag in flags_then.items())


def test_reached_thaws_nothing():
    model = toy()
    freeze(model, "q_proj.weight")
    counts = reached(model, CrossEntropy(model), rows(1))
    assert {name for name, count in counts.items() if count == 0} == {
        f"backbone.layers.{i}.mixer.q_proj.weight" for i in (0, 1)
    }
    assert all(p.requires_grad == (counts[name] > 0) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_a_model_frozen_altogether_is_refused(name):
    teacher, student = pair()
    student.requires_grad_(False)
    with pytest.raises(ValueError, match=f"^stage {name}: no gradient reaches a parameter that has requires_grad$"):
        distill(teacher, student, Data(), [Stage(name, 1, 0.01)], accelerator=cpu(), progress=False)
    assert not any(p.requires_grad for p in student.parameters())


def test_a_frozen_layer_has_a_loss_and_no_gradient():
    """Its part is recorded, the others train."""
    teacher, student = pair()
    student.backbone.layers[0].requires_grad_(False)
    before = copy.deepcopy(student)
    records = distill(teacher, student, Data(), [Stage("orientation", 2, 0.01, 0.0)], accelerator=cpu(), progress=False)
    assert [len(record["parts"]) for record in records] == [2, 2]
    assert equal(student.backbone.layers[0], before.backbone.layers[0]) and not equal(student, before)


def test_what_trained_and_is_frozen_now_cannot_be_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", Data(5, die))
    model = toy()
    freeze(model, "q_proj.weight")
    with pytest.raises(
        ValueError, match="^cannot resume, backbone.layers.0.mixer.q_proj.weight was trained in stage language"
    ):
        go(tmp_path / "run", resume=True, model=model)


# The look at what trains


class Seen(CrossEntropy):
    """Keeps what it is asked about."""

    def __call__(self, batch, backward):
        seen.append(batch)
        return super().__call__(batch, backward)


seen = []


def test_what_trains_is_looked_at_with_the_first_batch(tmp_path):
    """Not with ids of its own, and not by taking a batch from the training."""
    model, data, run = toy(), Data(7, die), Run(tmp_path / "run", {})
    seen.clear()
    stages = [Stage("language", 4, 0.01), Stage("language", 6, 0.01)]
    options = {"run": run, "accelerator": cpu(), "save_every": 2, "progress": False, "micro_batch_size": 3}
    with pytest.raises(KeyboardInterrupt):
        train(model, stages, data, lambda stage: Seen(model, part="text"), **options)
    batches = Data()
    pieces = [[*batches.next().split(3)] for _ in range(7)]
    wanted = [pieces[0][0], *sum(pieces[:4], []), pieces[4][0], *sum(pieces[4:], [])]
    assert len(seen) == len(wanted) and all(torch.equal(one.ids, other.ids) for one, other in zip(seen, wanted))
    seen.clear()
    data.at = None
    train(model, stages, data, lambda stage: Seen(model), **options)  # resumed at step 6: what trains is known
    assert len(seen) == 2 * 4 and torch.equal(seen[0].ids, pieces[6][0].ids)


def test_what_trains_does_not_depend_on_when_a_run_was_killed(tmp_path):
    """What the first batch does not reach stays frozen for the stage, also where the batch after the kill would."""

    class Odd:
        parts = ("odd",)

        def __init__(self, model):
            self.models, self.calls = {"model": model}, 0

        def count(self, batch):
            return len(batch)

        def __call__(self, batch, backward):
            x = self.models["model"].backbone.layers[0].mlp.up_proj.weight.square().sum()
            if batch.ids.sum() % 2 == first:
                x = x + self.models["model"].backbone.layers[1].mlp.up_proj.weight.square().sum()
            backward(x)
            return x.detach()[None]

    batches = Data()
    parity = [int(batches.next().ids.sum() % 2) for _ in range(8)]
    first = 1 - parity[0]
    at = next(i for i in range(1, 8) if parity[i] == first)
    ends = []
    for path, kill in ((tmp_path / "whole", None), (tmp_path / "killed", at)):
        for resume in (False, True)[: 1 if kill is None else 2]:
            model = toy()
            run = Run(path, {}, resume)
            try:
                train(
                    model,
                    [Stage("odd", 8, 0.01)],
                    Data(None if resume else kill, die),
                    lambda stage: Odd(model),
                    run=run,
                    accelerator=cpu(),
                    save_every=1,
                    progress=False,
                )
            except KeyboardInterrupt:
                assert run.checkpoints()[-1].name == f"step-{at:08d}"
        ends.append(model)
    assert equal(*ends)


def test_describe_counts():
    teacher, student = pair()
    counts = reached(student, OBJECTIVES["orientation"](teacher, student), rows(1))
    lines = describe(student, counts).splitlines()
    total = sum(p.numel() for p in student.parameters())
    assert lines[0] == f"trains {sum(counts.values()):,} of {total:,} parameters, the rest is frozen:"
    assert "  backbone.layers.*.mixer.in_proj.weight: 576 of 1,600" in lines
    assert "  backbone.layers.*.mixer.D: 4" in lines
    assert not any("out_proj" in line or "mlp" in line for line in lines)


def test_train_leaves_everything_trainable():
    teacher, student = pair()
    distill(teacher, student, Data(), [Stage("orientation", 1, 0.01, 0.0)], accelerator=cpu(), progress=False)
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, student, Data(0, die), [Stage("orientation", 1, 0.01, 0.0)], accelerator=cpu(), progress=False)
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


# One step


class Recorder(torch.optim.SGD):
    """An optimiser that changes nothing and keeps the gradients that it was to use."""

    def step(self):
        self.seen = torch.cat(
            [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        )


def gradient(name, micro_batch_size, clip=float("inf")):
    """The gradient of a step and its losses, for a batch of 8 rows."""
    teacher, student = pair()
    objective = OBJECTIVES[name](teacher, student)
    optimizer = Recorder(student.parameters(), lr=0.0)
    losses, norm = train_step(
        student, Stage(name, 10, 0.1, clip=clip), objective, rows(8), optimizer, cpu(), micro_batch_size, "here"
    )
    return optimizer.seen, losses, norm


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("size", [1, 3, 5])
def test_micro_batches_give_the_gradient_of_the_batch(name, size):
    whole, losses, norm = gradient(name, 8)
    parts, losses_of_parts, norm_of_parts = gradient(name, size)
    assert relative_error(parts, whole) < 1e-6
    assert relative_error(losses_of_parts, losses) < 1e-6
    assert abs(norm_of_parts / norm - 1) < 1e-6


def test_gradient_is_clipped_and_its_norm_reported_before():
    whole, _, norm = gradient("language", 8)
    clipped, _, same = gradient("language", 8, clip=norm / 10)
    assert same == norm
    assert relative_error(clipped, whole / 10) < 1e-4 and abs(clipped.norm().item() / (norm / 10) - 1) < 1e-4


def test_the_first_loss_that_is_not_finite_is_named():
    model = toy()

    class Parts:
        parts, models = ("a", "b", "c"), {"model": model}

        def count(self, batch):
            return len(batch)

        def __call__(self, batch, backward):
            return torch.tensor([1.0, float("inf"), float("nan")])

    with pytest.raises(FloatingPointError, match="^here: the loss of b is inf; .* every layer of the model is finite$"):
        train_step(model, STAGES[0], Parts(), rows(2), None, cpu(), 2, "here")


@pytest.mark.parametrize(
    "weight, place",
    [("backbone.embedding.weight", "the embedding"), ("backbone.layers.0.mixer.q_proj.weight", "layer 0"),
     (PART, "layer 1"),
     ("backbone.final_layernorm.weight", "the head")],
)
def test_the_first_bad_layer_is_found(weight, place):
    model = toy()
    assert first_bad({"model": model}, rows(2), 1) == "what comes out of every layer of the model is finite"
    model.state_dict()[weight].fill_(float("nan"))
    assert first_bad({"teacher": toy(), "student": model}, rows(2), 1).endswith(f"comes out of {place} of the student")
    assert first_bad({"teacher": model, "student": model}, rows(2), 2).endswith(f"comes out of {place} of the teacher")


# NaN in a run


def test_nan_stops_before_anything_changes(tmp_path):
    model = toy()
    data = Data(8, lambda: model.state_dict()[PART][0, 0].fill_(float("nan")))
    with pytest.raises(
        FloatingPointError, match=r"^stage language, step 2 of 5: the loss of text is nan; .* layer 1 of the model$"
    ):
        go(tmp_path / "run", data, model=model, save_every=1)
    run = Run(tmp_path / "run", {"stages": 2}, resume=True)
    assert [record["step"] for record in run.metrics()] == list(range(1, 9))
    assert run.checkpoints()[-1].name == "step-00000008"
    kept = toy(seed=3)
    run.load(kept)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, kept.state_dict()[name])]
    assert changed == [PART] and model.state_dict()[PART].isnan().sum() == 1
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_nan_in_a_layer_of_stage_1_is_named():
    teacher, student = pair()
    data = Data(2, lambda: student.backbone.layers[1].mixer.in_proj.weight.data[20].fill_(float("nan")))
    with pytest.raises(
        FloatingPointError,
        match="stage orientation, step 3 of 4: the loss of layer 1 is nan; .* layer 1 of the student$",
    ):
        distill(teacher, student, data, [Stage("orientation", 4, 0.01, 0.0)], accelerator=cpu(), progress=False)


@pytest.mark.parametrize(
    "name, part", [("orientation", "layer 1"), ("alignment", "layer 0"), ("distillation", "the logits")]
)
def test_nan_of_the_teacher_is_named_as_the_teachers(name, part):
    """Also where the student gets it as its input, and has nothing but NaN itself."""
    teacher, student = pair()
    teacher.state_dict()["backbone.layers.0.mlp.up_proj.weight"].fill_(float("nan"))
    wanted = f"the loss of {part} is nan; the first bad value comes out of layer 0 of the teacher$"
    with pytest.raises(FloatingPointError, match=wanted):
        distill(teacher, student, Data(), [Stage(name, 4, 0.01)], accelerator=cpu(), progress=False)


def test_nan_of_one_row_is_found_in_its_micro_batch():
    model = toy()
    model.backbone.embedding.weight.data[5] = float("nan")
    tokens = torch.full((4, LENGTH), 3)
    tokens[3, 0] = 5
    data = Batches(tokens, 4)
    with pytest.raises(FloatingPointError, match="the embedding of the model$"):
        train(
            model,
            [Stage("language", 2, 0.01)],
            data,
            lambda stage: CrossEntropy(model),
            accelerator=cpu(),
            micro_batch_size=1,
            progress=False,
        )


def test_gradient_that_overflows_alone():
    """A finite loss with an infinite gradient stops the run as well."""
    model = toy()

    class Steep:
        parts, models = ("steep",), {"model": model}

        def count(self, batch):
            return len(batch)

        def __call__(self, batch, backward):
            loss = (model.backbone.final_layernorm.weight - 1).clamp(min=0).sqrt().sum()
            backward(loss)
            return loss.detach()[None]

    before = copy.deepcopy(model)
    with pytest.raises(FloatingPointError, match="losses are finite, but the norm of the gradient is inf"):
        train(model, [Stage("language", 1, 0.1)], Data(), lambda stage: Steep(), accelerator=cpu(), progress=False)
    assert equal(model, before)


# Resume


def test_metrics_have_their_fields(unbroken):
    metrics, _ = unbroken
    assert [record["step"] for record in metrics] == list(range(1, 13))
    assert [record["lr"] for record in metrics] == [
        warmup_stable_decay(i, stage) for stage in STAGES for i in range(stage.steps)
    ]
    for record in metrics:
        assert set(record) == {"step", "stage", "loss", "parts", "lr", "gradient_norm", "tokens"}
        assert record["parts"] == [record["loss"]] and record["tokens"] == BATCH * LENGTH


def test_records_are_what_is_logged(tmp_path):
    run, _, records = go(tmp_path / "run")
    assert records == run.metrics() and all(record["tokens_per_second"] > 0 for record in records)


def test_two_runs_are_equal(tmp_path, unbroken):
    run, model, _ = go(tmp_path / "run")
    assert story(run.metrics()) == unbroken[0] and equal(model, unbroken[1])


# A checkpoint is written after steps 3 and 6 (of stage 1), 7 (its end), 9 (of stage 2) and 12 (its end).
@pytest.mark.parametrize(
    "steps, newest",
    [(0, None), (2, None), (3, 3), (4, 3), (6, 6), (7, 7), (8, 7), (9, 9), (11, 9)],
    ids=lambda value: str(value),
)
def test_killed_after_any_step_and_resumed(tmp_path, unbroken, steps, newest):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", Data(steps, die))
    run, model, records = go(tmp_path / "run", resume=True)
    assert story(run.metrics()) == unbroken[0], "a step is missing, twice, or different"
    assert equal(model, unbroken[1])
    assert [record["step"] for record in records] == list(range((newest or 0) + 1, 13))


def test_killed_again_and_again(tmp_path, unbroken):
    for number, steps in enumerate((4, 5, 8, 11)):
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "run", Data(steps, die), resume=number > 0)
    run, model, _ = go(tmp_path / "run", resume=True)
    assert story(run.metrics()) == unbroken[0] and equal(model, unbroken[1])


def test_after_step_is_called_after_every_step_with_its_stage(tmp_path):
    called = []
    _, _, records = go(tmp_path / "run", after_step=lambda step, stage: called.append((step, stage.objective)))
    assert called == [(record["step"], record["stage"]) for record in records] and len(called) == 12


def test_resume_of_a_finished_run_does_nothing(tmp_path, unbroken):
    go(tmp_path / "run")
    before = {file: file.read_bytes() for file in sorted((tmp_path / "run").rglob("*")) if file.is_file()}
    called = []
    run, model, records = go(
        tmp_path / "run", resume=True, model=toy(seed=5), after_stage=lambda *args: called.append(args)
    )
    assert records == [] and called == [] and equal(model, unbroken[1])
    assert {file: file.read_bytes() for file in sorted((tmp_path / "run").rglob("*")) if file.is_file()} == before


def test_resume_with_micro_batches_and_distillation(tmp_path):
    """Three objectives, parts, micro-batches, a hybrid: a kill in each stage."""
    stages = [Stage("orientation", 4, 0.01, 0.0), Stage("alignment", 4, 0.01), Stage("distillation", 4, 0.01)]

    def student_of(path, data, resume):
        teacher = toy(layers=3)
        torch.manual_seed(1)
        student = Llamba.from_teacher(teacher, [1], d_state=4, chunk_size=8, **RELEASED)
        run = Run(path, {}, resume)
        distill(
            teacher, student, data, stages, run=run, accelerator=cpu(), save_every=2, micro_batch_size=3, progress=False
        )
        return run, student

    whole, model = student_of(tmp_path / "whole", Data(), False)
    for number, steps in enumerate((3, 7, 11)):
        with pytest.raises(KeyboardInterrupt):
            student_of(tmp_path / "run", Data(steps, die), number > 0)
    run, resumed = student_of(tmp_path / "run", Data(), True)
    assert story(run.metrics()) == story(whole.metrics()) and equal(resumed, model)
    assert [len(record["parts"]) for record in run.metrics()] == [2] * 8 + [1] * 4


def test_random_numbers_go_on_where_they_were(tmp_path):
    """An objective that draws random numbers is resumed exactly too."""

    class Noisy(CrossEntropy):
        def __call__(self, batch, backward):
            return super().__call__(batch.ids[:, : 8 + int(torch.randint(8, ()))], backward)

    def noisy(path, data, resume=False):
        model, run = toy(), Run(path, {}, resume)
        train(
            model,
            [Stage("language", 8, 0.01)],
            data,
            lambda stage: Noisy(model),
            run=run,
            accelerator=cpu(),
            save_every=3,
            progress=False,
        )
        return story(run.metrics())

    whole = noisy(tmp_path / "whole", Data())
    with pytest.raises(KeyboardInterrupt):
        noisy(tmp_path / "run", Data(5, die))
    torch.rand(100)
    assert noisy(tmp_path / "run", Data(), resume=True) == whole


def test_load_keeps_type_and_storage(tmp_path):
    """Weights are read into the model's own tensors: same objects, same type, and no window on the file."""
    run, model, _ = go(tmp_path / "run", model=toy().double())
    other = toy(seed=4).double()
    before = {name: (id(p), p.data_ptr()) for name, p in other.named_parameters()}
    run.load(other)
    assert equal(other, model)
    assert {name: (id(p), p.data_ptr()) for name, p in other.named_parameters()} == before
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(run.path) not in maps.read_text()


def test_stage_of_no_steps_is_left_out():
    model, called = toy(), []
    stages = [Stage("language", 0, 0.1), Stage("language", 2, 0.01)]
    records = train(model, stages, Data(), lambda stage: CrossEntropy(model), accelerator=cpu(), progress=False,
                    after_stage=lambda step, stage: called.append((step, stage.lr)))
    assert len(records) == 2 and called == [(2, 0.01)]


def test_after_stage_is_called_again_when_killed_before_the_checkpoint(tmp_path, unbroken):
    calls = []

    def evaluate(step, stage):
        run = Run(tmp_path / "run", {"stages": 2}, resume=True)
        run.log(step=step, evaluation=1.5)
        calls.append(step)
        if calls == [7]:
            die()

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", after_stage=evaluate)
    run, model, _ = go(tmp_path / "run", resume=True, after_stage=evaluate)
    assert calls == [7, 7, 12] and equal(model, unbroken[1])
    assert [record["step"] for record in run.metrics() if "evaluation" in record] == [7, 12]
    assert story(record for record in run.metrics() if "loss" in record) == unbroken[0]


# A real kill


def slow_run(path):
    """What the process that is killed runs: the run of the other tests, with a pause at every step."""
    data = Data()
    draw = data.next
    data.next = lambda: (time.sleep(0.15), draw())[1]
    go(path, data)


def test_sigkill(tmp_path, unbroken):
    """While the process lives, no other can write its run; once it is killed, another goes on as if nothing was."""
    run = tmp_path / "run"
    first = process(slow_run, run)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert first.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    before = metrics.read_text().splitlines()[:5]
    for write in (lambda run: run.log(step=99), lambda run: run.forget_after(0), lambda run: run.save(99, toy(), {})):
        with pytest.raises(
            BlockingIOError, match=f"^{run}: another process is writing this run: wait until it ends, or stop it$"
        ):
            write(Run(run, {"stages": 2}, resume=True))
    with pytest.raises(BlockingIOError, match="another process"):
        go(run, resume=True)
    assert metrics.read_text().splitlines()[:5] == before and first.is_alive()
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    left = read_metrics(run)
    assert 5 <= len(left) < 12, "the kill came too late to prove anything"

    _, model, _ = go(run, resume=True)  # in another process than the one that was killed
    assert story(read_metrics(run)) == unbroken[0] and equal(model, unbroken[1])


# Checkpoints that are whole or absent


def test_keep(tmp_path):
    run = Run(tmp_path / "run", {}, keep=1)
    for step in (1, 2, 10):
        run.save(step, toy(), {"step": step})
        assert [path.name for path in run.checkpoints()] == [f"step-{step:08d}"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    with pytest.raises(ValueError, match="keep is 0"):
        Run(tmp_path / "other", {}, keep=0)


def test_run_keeps_two_checkpoints(tmp_path):
    run, _, _ = go(tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == ["step-00000009", "step-00000012"]
    assert sorted(file.name for file in run.checkpoints()[0].iterdir()) == [
        "checksums.json",
        "training.pt",
        "weights.safetensors",
    ]


@pytest.mark.parametrize("function", ["write_state", "write_tensors"])
def test_full_disk(tmp_path, monkeypatch, unbroken, function):
    """The second checkpoint does not fit: OSError, the first one is whole, and there the run goes on."""
    write, calls = getattr(training, function), []

    def full(file, *args):
        calls.append(file)
        if len(calls) == 2:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(file))
        write(file, *args)

    monkeypatch.setattr(training, function, full)
    with pytest.raises(OSError, match="No space left"):
        go(tmp_path / "run")
    run = Run(tmp_path / "run", {"stages": 2}, resume=True)
    assert [path.name for path in run.checkpoints()] == ["step-00000003"]
    assert not list((run.path / "checkpoints").glob(".*")), "what was half written is gone"
    assert run.load(toy())["step"] == 3
    run, model, _ = go(tmp_path / "run", resume=True)
    assert story(run.metrics()) == unbroken[0] and equal(model, unbroken[1])


@pytest.mark.parametrize("save_every", [3, 0], ids=["training state", "weights"])
def test_system_refuses_to_write(tmp_path, unbroken, save_every):
    """As a full disk, but a real error of the system: files must not grow beyond 12 kB. Its words are different."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))

    try:
        with pytest.raises(OSError):
            go(tmp_path / "run", Data(5, small_files), save_every=save_every)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    run = Run(tmp_path / "run", {"stages": 2}, resume=True)
    assert [path.name for path in run.checkpoints()] == (["step-00000003"] if save_every else [])
    run, model, _ = go(tmp_path / "run", resume=True)
    assert story(run.metrics()) == unbroken[0] and equal(model, unbroken[1])


def test_interrupted_while_saving(tmp_path, monkeypatch, unbroken):
    monkeypatch.setattr(training, "write_tensors", lambda *args: die())
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run")
    monkeypatch.undo()
    assert Run(tmp_path / "run", {"stages": 2}, resume=True).checkpoints() == []
    run, model, _ = go(tmp_path / "run", resume=True)
    assert story(run.metrics()) == unbroken[0] and equal(model, unbroken[1])


def test_what_a_kill_left_unfinished_is_no_checkpoint_and_goes(tmp_path, unbroken):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", Data(8, die))
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000007", checkpoints / ".step-00000009-abc")  # killed while writing it
    (checkpoints / ".step-00000009-abc" / "weights.safetensors").unlink()
    shutil.copytree(checkpoints / "step-00000006", checkpoints / ".step-00000003-old")  # killed while removing it
    assert [path.name for path in Run(tmp_path / "run", {"stages": 2}, True).checkpoints()] == [
        "step-00000006",
        "step-00000007",
    ]
    run, model, _ = go(tmp_path / "run", resume=True)
    assert story(run.metrics()) == unbroken[0] and equal(model, unbroken[1])
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000009", "step-00000012"]


def test_what_a_kill_left_in_the_directory_goes_and_nothing_else(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", Data(8, die))
    run = tmp_path / "run"
    for name in (".student-0a1b2c3d", ".git", ".student-of-mine", "figures"):
        (run / name).mkdir()
    for name in (".metrics.jsonl", ".config.json", ".hidden", "note.txt"):
        (run / name).write_text("half")
    go(run, resume=True)
    assert sorted(path.name for path in run.iterdir()) == [
        ".git",
        ".hidden",
        ".lock",
        ".student-of-mine",
        "checkpoints",
        "config.json",
        "figures",
        "metrics.jsonl",
        "note.txt",
    ]


def test_a_run_can_be_opened_many_times_in_one_process(tmp_path, monkeypatch):
    """By other paths too: the lock is the process's."""
    run = Run(tmp_path / "run", {})
    run.log(step=1)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "run", "run", "link"):
        Run(path, {}, resume=True).log(step=1)
    assert len(run.metrics()) == 4


def test_the_lock_ends_with_the_run(tmp_path):
    run = Run(tmp_path / "run", {})
    lock = tmp_path / "run" / ".lock"
    assert locked(lock)
    del run
    assert not locked(lock)


def locked(file):
    """Whether a file is locked, asked of the system by a descriptor of its own."""
    with open(file) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_checkpoint_that_runs_code_is_refused(tmp_path):
    class Surprise:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "harm", "done")

    run, _, _ = go(tmp_path / "run")
    torch.save({"step": 12, "data": Surprise()}, run.checkpoints()[-1] / "training.pt")
    seal(run.checkpoints()[-1])
    with pytest.raises(ValueError, match="training.pt: damaged, or not a training state"):
        go(tmp_path / "run", resume=True)
    assert not (tmp_path / "harm").exists()


def cut(file):
    os.truncate(file, 30)


def empty(file):
    file.write_bytes(b"")


def flip(file):
    """Turn one bit, in the middle of a tensor where there are some."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, empty])
@pytest.mark.parametrize("name", ["training.pt", "weights.safetensors", "checksums.json"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_offered(tmp_path, finished, unbroken, name, damage):
    """And there the run goes on, once the damaged one is removed as the message says."""
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    checkpoints = Run(path, {"stages": 2}, resume=True).checkpoints()
    damage(checkpoints[-1] / name)
    hint = f"; remove {checkpoints[-1]} to go on from step-00000009$"
    wanted = f"(step-00000012/[a-z.]+: |No such file .*step-00000012/{name}').*{hint}"
    with pytest.raises(ValueError, match=wanted) as error:
        go(path, resume=True)
    assert "\n" not in str(error.value) and (damage is flip and name == "checksums.json" or name in str(error.value))
    shutil.rmtree(checkpoints[-1])
    run, model, records = go(path, resume=True)
    assert len(records) == 3 and story(run.metrics()) == unbroken[0] and equal(model, unbroken[1])
    damage(run.checkpoints()[-1] / name)
    shutil.rmtree(run.checkpoints()[0])
    with pytest.raises(ValueError, match="; none is before it, begin a new run$"):
        go(path, resume=True)


@pytest.mark.parametrize("text", ['{"stages": 2', "", "[1]", "\xff"])
def test_damaged_config_is_named(tmp_path, finished, text):
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    (path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{path}/config.json: ") as error:
        go(path, resume=True)
    assert "\n" not in str(error.value)


class OtherText(Data):
    """Batches of another text than the checkpoint's, which know it."""

    def load_state_dict(self, state):
        raise ValueError("the text is another one than the run's")


def test_resume_with_another_text_is_refused(tmp_path, finished):
    """The data say so: a position in them means nothing elsewhere. Nothing of the run has changed then."""
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    before = (path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="the text is another one"):
        go(path, OtherText(), resume=True, stages=[*STAGES, STAGES[0]][:2])
    assert (path / "metrics.jsonl").read_text() == before


def test_checkpoint_of_another_model_is_refused(tmp_path):
    go(tmp_path / "run")
    with pytest.raises(ValueError, match=r"step-00000012: the weights do not fit the model: .*layers\.2"):
        go(tmp_path / "run", resume=True, model=toy(layers=3))


# The directory of a run


def test_a_run_that_exists_is_not_overwritten(tmp_path):
    run, _, _ = go(tmp_path / "run")
    before = run.metrics()
    with pytest.raises(FileExistsError, match="there is a run already"):
        go(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        Run(tmp_path / "file", {})
    assert Run(tmp_path / "run", {"stages": 2}, resume=True).metrics() == before


def test_a_directory_where_a_kill_left_no_config_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json").write_text('{"lr"')
    with pytest.raises(FileNotFoundError, match="there is no run to resume"):
        Run(tmp_path / "run", {"lr": 1}, resume=True)
    Run(tmp_path / "run", {"lr": 1})
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"lr": 1}


def test_resume_with_other_settings_names_them(tmp_path):
    config = {"lr": 0.1, "steps": (1, 2, 3), "text": "austen", "seed": 0}
    Run(tmp_path / "run", config)
    Run(tmp_path / "run", config, resume=True)
    with pytest.raises(ValueError, match="these settings differ from the config.json of the run: lr, seed, steps$"):
        Run(tmp_path / "run", {"lr": 0.2, "steps": (1, 2, 4), "text": "austen"} | {"seed": 1}, resume=True)
    with pytest.raises(ValueError, match="differ from the config.json of the run: extra, text$"):
        Run(tmp_path / "run", {"lr": 0.1, "steps": [1, 2, 3], "seed": 0, "extra": 1}, resume=True)


def test_resume_with_other_stages_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", Data(10, die))  # the newest checkpoint lies in the second stage
    for stages in ([Stage("language", 6, 1e-2), STAGES[1]], STAGES[:1], [STAGES[0], Stage("language", 5, 1e-3)]):
        with pytest.raises(ValueError, match="cannot resume, the run's stages were"):
            train(
                toy(),
                stages,
                Data(),
                lambda stage: None,
                run=Run(tmp_path / "run", {"stages": 2}, True),
                accelerator=cpu(),
            )


def test_forget_after_without_a_file(tmp_path):
    run = Run(tmp_path / "run", {})
    run.forget_after(3)
    assert run.metrics() == [] and sorted(path.name for path in run.path.iterdir()) == [".lock", "config.json"]


@pytest.mark.parametrize("last", ['{"step": 3, "lo', '{"step": 3}', ""])
def test_line_that_a_kill_cut_short(tmp_path, last):
    run = Run(tmp_path / "run", {})
    for step in (1, 2):
        run.log(step=step)
    with open(run.path / "metrics.jsonl", "a") as handle:
        handle.write(last)
    run.metrics()
    run.forget_after(2)
    run.log(step=3)
    assert [record["step"] for record in run.metrics()] == [1, 2, 3]


def test_resume_over_a_line_cut_short(tmp_path, unbroken):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", Data(8, die))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 9, "stage": "lang')
    run, model, _ = go(tmp_path / "run", resume=True)
    assert story(run.metrics()) == unbroken[0] and equal(model, unbroken[1])


def test_damage_elsewhere_in_the_metrics_is_named(tmp_path):
    run = Run(tmp_path / "run", {})
    (run.path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl: line 2 is no JSON object"):
        run.metrics()


@pytest.mark.parametrize(
    "options, message",
    [({"save_every": -1}, "save_every is -1"), ({"micro_batch_size": 0}, "micro_batch_size is 0"),
     ({"data": Data(rank=1, world_size=2)}, "data has rank 1, world_size 2: this process needs 0 and 1")],
)
def test_settings_that_do_not_fit(options, message):
    data = options.pop("data", Data())
    with pytest.raises(ValueError, match=message):
        train(toy(), STAGES, data, lambda stage: None, accelerator=cpu(), **options)


def test_half_precision_that_needs_loss_scaling_is_refused():
    accelerator = types.SimpleNamespace(
        mixed_precision="fp16", gradient_accumulation_steps=1, process_index=0, num_processes=1
    )
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'"):
        train(toy(), STAGES, Data(), lambda stage: None, accelerator=accelerator)


def test_gradients_are_not_divided_by_accelerate():
    """It would divide them in silence: an Accelerator that accumulates is refused."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="^gradient_accumulation_steps is 4: it must be 1; micro_batch_size cuts"):
        train(toy(), STAGES, Data(), lambda stage: None, accelerator=accelerator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", [PART, "backbone.embedding.weight", "backbone.final_layernorm.weight"])
def test_16_bit_weights_are_refused_before_the_first_step(tmp_path, dtype, part):
    """Any of those that may train; frozen ones may be what they are."""
    model = toy()
    parameter = model.get_parameter(part)
    parameter.data = parameter.data.to(dtype)
    with pytest.raises(ValueError, match=rf"^{part} is {dtype}, .* load the model in float32; mixed precision 'bf16'"):
        go(tmp_path / "run", model=model)
    assert read_metrics(tmp_path / "run") == []
    training.check_settings(freeze(model, part) and model, Data(), cpu(), 0, None)


# Targets that are a function of the tokens, and logits in chunks


def test_next_tokens():
    assert next_tokens(torch.tensor([[3, 1, 4], [1, 5, 9]])).tolist() == [[1, 4, -100], [5, 9, -100]]


@pytest.mark.parametrize("at_once", [2**24, 5 * VOCAB, VOCAB, 1], ids=["all", "some", "one", "less"])
def test_cross_entropy_is_the_mean_over_what_is_asked(monkeypatch, at_once):
    """Loss and gradient against the definition, in float64, with all logits alive at a time or few."""
    monkeypatch.setattr(training, "LOGITS", at_once)
    model, ids = toy().double(), rows(3)
    asked = torch.rand(3, LENGTH) < 0.4
    answers = ids.flip(1).masked_fill(~asked, -100)
    loss = CrossEntropy(model, lambda input_ids: answers, "answers")(ids, lambda loss: loss.backward())
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    expected = -model(ids).log_softmax(-1)[asked].gather(1, answers[asked][:, None]).mean()
    expected.backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert relative_error(loss[0], expected) < 1e-14 and relative_error(ours, theirs) < 1e-13


def test_nothing_asked_is_refused():
    model = toy()
    with pytest.raises(ValueError, match=r"input_ids has shape \(2, 1\): too short"):
        CrossEntropy(model)(rows(2)[:, :1], lambda loss: None)


@pytest.mark.parametrize("language", [True, False])
def test_few_logits_are_alive_at_a_time(monkeypatch, language):
    """A step on 512 tokens with a vocabulary of 1,500 takes less than two copies of its logits, all else included."""
    monkeypatch.setattr(training, "LOGITS", 32 * 1500)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1500, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    teacher, student = (Llama(config) for _ in range(2))
    objective = CrossEntropy(student) if language else OBJECTIVES["distillation"](teacher, student)
    ids = torch.randint(1500, (8, 64))
    assert peak_bytes(lambda: objective(ids, lambda loss: loss.backward())) < 2 * 4 * 512 * 1500


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_chunks_of_any_size_give_the_mean(tokens, vocabulary, at_once):
    x = torch.randn(tokens, dtype=torch.float64, requires_grad=True)
    kept, training.LOGITS = training.LOGITS, at_once
    try:
        loss = mean_over_chunks(lambda rows: rows.exp().mean(), vocabulary, x)
        (grad,) = torch.autograd.grad(loss, x)
    finally:
        training.LOGITS = kept
    assert relative_error(loss, x.exp().mean()) < 1e-14 and relative_error(grad, x.exp() / tokens) < 1e-14


def test_fresh_batches_go_back_to_where_they_were():
    data = FreshBatches(lambda step, generator: torch.randint(9, (2, 3 + step), generator=generator), seed=3)
    data.next()
    state, following = data.state_dict(), [data.next(), data.next()]
    other = FreshBatches(data.draw, seed=99)
    other.load_state_dict(state)
    assert all(torch.equal(other.next(), ids) for ids in following) and following[1].shape == (2, 5)


# What the user sees


def test_a_file_gets_lines_and_no_carriage_returns(monkeypatch, capsys):
    clock = iter(range(0, 1000, 3))  # three seconds a step
    fake = types.SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(training, "time", fake)
    model = toy()
    train(model, STAGES[:1], Data(), lambda stage: CrossEntropy(model), accelerator=cpu())
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert "\r" not in output.out + output.err
    assert lines[1].startswith("language: 7 steps, lr 0.01; trains ")
    shown = [line for line in lines if line.startswith("language: step ")]
    assert [line.split(", loss ")[0] for line in shown] == ["language: step 4 of 7", "language: step 7 of 7"]
    assert shown[-1].endswith(" tokens/s")


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    model = toy()
    train(model, STAGES[:1], Data(), lambda stage: CrossEntropy(model), accelerator=cpu())
    assert "\rlanguage: 100%" in terminal.getvalue() and "tokens_s=" in terminal.getvalue()


def test_no_progress_is_silent(capsys):
    model = toy()
    train(model, STAGES[:1], Data(), lambda stage: CrossEntropy(model), accelerator=cpu(), progress=False)
    assert capsys.readouterr() == ("", "")


# Several processes


def share_of_a_run(path):
    """What each of several processes runs: its rows, a run that is broken off at step 5, and resumed."""
    accelerator = cpu()
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    assert place["world_size"] == 2
    for at, resume in ((5, False), (None, True)):
        model = toy(seed=0 if accelerator.is_main_process else 9)  # the others start from the weights of the first
        with accelerator.main_process_first():
            run = Run(path, {"stages": 2}, resume=resume or not accelerator.is_main_process)
        try:
            train(
                model,
                STAGES,
                Data(at, die, **place),
                lambda stage: CrossEntropy(model),
                run=run,
                accelerator=accelerator,
                save_every=3,
                progress=False,
            )
        except KeyboardInterrupt:
            accelerator.wait_for_everyone()
    torch.save(model.state_dict(), Path(f"{path}-{accelerator.process_index}.pt"))


def test_two_processes_give_what_one_gives(tmp_path, unbroken):
    run_together(2, share_of_a_run, str(tmp_path / "run"))  # both must end well
    first, second = (torch.load(tmp_path / f"run-{rank}.pt", weights_only=True) for rank in range(2))
    for name, expected in unbroken[1].state_dict().items():
        assert torch.equal(first[name], second[name]), "processes drifted apart"
        assert relative_error(first[name], expected) < 1e-5
    metrics = read_metrics(tmp_path / "run")
    assert [record["step"] for record in metrics] == list(range(1, 13))
    for ours, theirs in zip(metrics, unbroken[0]):
        assert abs(ours["loss"] / theirs["loss"] - 1) < 1e-5 and ours["tokens"] == theirs["tokens"]


def resumed_on_a_gpu(path):
    acc = Accelerator()
    assert acc.device.type == "cuda"
    whole, _, _ = go(path / "whole", accelerator=acc)
    with pytest.raises(KeyboardInterrupt):
        go(path / "run", Data(8, die), accelerator=acc)
    run, again, _ = go(path / "run", resume=True, accelerator=acc)
    assert all(p.is_cuda for p in again.parameters())
    for a, b in zip(run.metrics(), whole.metrics(), strict=True):
        assert a["step"] == b["step"] and abs(a["loss"] / b["loss"] - 1) < 1e-4


@pytest.mark.gpu
def test_resume_on_a_gpu(tmp_path):
    """Weights and optimiser state come back to the device; the losses agree to rounding."""
    on_gpu = process(resumed_on_a_gpu, tmp_path)
    on_gpu.join()
    assert on_gpu.exitcode == 0


def no_matplotlib():
    for name in ("training", "mohawk", "evaluate", "memory_horizon", "associative_recall"):
        importlib.import_module(f"llamba_ref.{name}")
    assert [name for name in sys.modules if name.startswith("matplotlib")] == []


def test_nothing_but_plots_needs_matplotlib():
    """In a process that has imported nothing for the tests of other files."""
    alone = process(no_matplotlib)
    alone.join()
    assert alone.exitcode == 0


def test_language_is_an_objective():
    """The protocol: parts with names, one loss for each."""
    model = toy()
    objective: Objective = CrossEntropy(model)
    losses = objective(rows(2), lambda loss: loss.backward())
    assert losses.shape == (len(objective.parts),) and not losses.requires_grad
    assert abs(losses.item() - math.log(VOCAB)) < 0.1
