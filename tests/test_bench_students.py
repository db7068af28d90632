"""The yardsticks of `bench.students`: equal tokens, equal memory, a seed that counts, no run of other code."""

import json
import math
from dataclasses import replace

import pytest
import torch
from small import llama_config

from bench import common, recall_students, smollm2_all, smollm2_hybrid, students, where
from bench.common import best_rate_runs, search
from bench.keep_attention import KEPT, choices
from bench.recall import model
from bench.report import SHOWN
from bench.smollm2_hybrid import Window
from bench.students import (
    BUDGETS,
    LOSSES,
    RATES,
    SINKS,
    WINDOW,
    HalfWindow,
    Row,
    RunningMean,
    Silence,
    WindowAttention,
    rows,
    with_attention,
)
from llamba_ref.cli import Distill
from llamba_ref.conventions import relative_error
from llamba_ref.llama import Attention, Llama
from llamba_ref.llamba import Llamba
from llamba_ref.models import load_model
from llamba_ref.mohawk import OBJECTIVES
from llamba_ref.training import Stage


@pytest.fixture(scope="module")
def teacher():
    return load_model("tiny")[0]


def test_all_rows_of_a_budget_have_the_same_steps():
    for row in rows().values():
        assert sum(stage.steps for stage in row.plan(1e-3)) == (sum(BUDGETS[row.budget]) if row.stages else 0)


@pytest.mark.parametrize("rotation", ["none", "fixed"])
def test_the_window_keeps_as_many_numbers_as_the_student(teacher, rotation):
    student = Distill(start="published", rotation=rotation).student(teacher)
    token = 2 * teacher.config.num_key_value_heads * teacher.config.head_dim
    for block in student.backbone.layers:
        assert 0 <= sum(part.numel() for part in block.mixer.init_state(1)) - (WINDOW + SINKS) * token < token


def test_the_window_of_the_real_teacher_keeps_as_many_numbers_as_a_mixer():
    shape = llama_config(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64)  # SmolLM2-135M's
    mixer = Llamba.from_teacher(Llama(shape), start="published", d_state=64).backbone.layers[0].mixer
    numbers = sum(part.numel() for part in mixer.init_state(1))
    assert 0 <= numbers - (Window.window + Window.sinks) * 2 * 3 * 64 < 2 * 3 * 64


def test_mixers_of_some_layers(teacher):
    model = with_attention(teacher, WindowAttention, [1, 3])
    kinds = [type(block.mixer) for block in model.backbone.layers]
    assert kinds == [Attention, WindowAttention, Attention, WindowAttention]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("layers, count", [(30, count) for count in KEPT] + [(4, 3)])
def test_layers_that_keep_attention_are_as_many_as_asked_for(layers, count):
    need = torch.randn(layers, generator=torch.Generator().manual_seed(0))
    for rule, kept in choices(need, count).items():
        assert len(set(kept)) == count and set(kept) <= set(range(layers)), rule
    kept, others = choices(need, count)["most needed"], choices(need, layers - count)["least needed"]
    assert set(kept) | set(others) == set(range(layers))


def test_trivial_answers_are_what_they_are_called(teacher):
    ids = torch.arange(60)[None]
    near, far = ids[:, : WINDOW + SINKS], ids
    window = with_attention(teacher, WindowAttention)
    assert relative_error(window(near), teacher(near)) < 1e-6 < relative_error(window(far), teacher(far))
    u, attention = torch.randn(1, 9, 128), with_attention(teacher, RunningMean).backbone.layers[0].mixer
    uniform = torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]
    v = attention.project(u, 0, None)[2].repeat_interleave(2, 1)
    assert relative_error(attention(u), attention.o_proj((uniform @ v).transpose(1, 2).flatten(2))) < 1e-5
    assert not with_attention(teacher, Silence).backbone.layers[0].mixer(u).any()


@pytest.mark.slow
def test_a_random_start_depends_on_the_seed(teacher):
    for row in (Row(start="published", rotation="none"), Row("scratch")):
        weights = [row.build(teacher, seed).backbone.layers[0].mixer.in_proj.weight for seed in (0, 0, 1)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_record_names_the_command_that_made_it():
    assert students.command(("full", "quarter", "eighth", "sixteenth"), (0, 1, 2)) == "make compare"
    assert students.command(("quarter",), (0,)) == "python -m bench.students --budgets quarter --seeds 0"


def test_a_row_has_means_and_a_range():
    one = {"lr": 5e-4, "tokens": 1, "parameters": 3, "ratio": 1.0, "agreement": 1.0, "kl": 0.0, "seconds": 1.0}
    assert students.summary("a", [one, one | {"ratio": 2.0}]) == {
        **one, "name": "a", "seeds": 2, "ratio": 1.5, "lowest": 1.0, "highest": 2.0}


class Alone:
    """A pool that makes one run after the other."""

    map = map

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("best, found", [(8e-3, 8e-3), (1, 8e-3), (5e-4, 5e-4), (2.5e-4, 2.5e-4), (1e-9, 1.5625e-5)])
def test_the_rate_found_lies_between_two_worse_ones_or_far_off(best, found):
    tried = search(Alone, lambda name, rate, seed: {
        "name": name, "lr": rate, "score": abs(math.log(rate / best)) if rate < 0.1 else math.inf}, ["a"], RATES, 0)
    rates = {one["lr"]: one["score"] for one in tried}
    assert len(tried) == len(rates) and min(rates, key=rates.get) == found
    assert {found / 2, found * 2} <= set(rates) or found in (16 * max(RATES), min(RATES) / 16)


def breaking(highest: dict[int, float]):
    """Runs of which higher rates score better, up to one for each seed, above which they break down."""
    def run(name, rate, seed):
        if rate > highest[seed]:
            raise FloatingPointError
        return {"name": name, "lr": rate, "seed": seed, "score": math.nan if rate > highest[seed] / 2 else 1 / rate}
    return run


@pytest.mark.parametrize("highest", [2e-3, 7e-4, 4e-4, 2e-4, 4e-5])
def test_a_rate_that_diverges_is_not_taken(highest):
    """Also where all first rates do."""
    tried = search(Alone, breaking({0: highest}), ["a"], RATES, 0)
    best = min(tried, key=lambda one: one["score"])["lr"]
    assert best <= highest / 2 < 2 * best and {best, 2 * best} <= {one["lr"] for one in tried}


def test_a_rate_with_which_another_seed_diverges_is_not_taken(monkeypatch):
    monkeypatch.setattr(common, "ProcessPoolExecutor", Alone)
    found, trials = best_rate_runs(breaking({0: 5e-3, 1: 1.2e-3, 2: 9e-3}), ["a", "b"], RATES, (0, 1, 2))
    assert [(one["name"], one["seed"], one["lr"]) for one in found] == [
        (name, seed, 5e-4) for name in "ab" for seed in range(3)]
    assert [one["score"] for one in trials if one["name"] == "b"] == [4000, 2000, 1000, 500, None]
    with pytest.raises(RuntimeError, match="with every learning rate: b$"):
        best_rate_runs(lambda name, rate, seed: breaking({0: 1 if name == "a" else 1e-9})(name, rate, seed), ["a", "b"],
                       RATES, (0,))


@pytest.mark.slow
def test_a_window_beside_a_state_keeps_no_more_than_a_student_and_starts_as_the_window(teacher):
    model = Row("both", stages="3").build(teacher, 0)
    token = 2 * teacher.config.num_key_value_heads * teacher.config.head_dim
    half, whole = (sum(part.numel() for part in mixer.init_state(1)) for mixer in (
        model.backbone.layers[0].mixer.recurrent, Row().build(teacher, 0).backbone.layers[0].mixer))
    assert 0 <= whole - half - (HalfWindow.window + HalfWindow.sinks) * token < token
    ids = torch.arange(60)[None]
    assert torch.equal(model(ids), with_attention(teacher, HalfWindow)(ids))


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_is_least_for_the_teacher_itself(teacher, loss):
    objectives, student = OBJECTIVES | LOSSES[loss], Row().build(teacher, 0)
    ids = torch.randint(1024, (2, 24), generator=torch.Generator().manual_seed(0))
    for name in ("alignment", "distillation"):
        ours = objectives[name](teacher, student)(ids, lambda part: part.backward())
        theirs = objectives[name](teacher, student)
        theirs.models["student"] = teacher
        assert theirs(ids, lambda part: None).sum() < ours.sum()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in student.parameters())


@pytest.mark.parametrize("size, tokens", recall_students.STATES.items())
def test_the_recalling_window_keeps_as_many_numbers_as_the_student(size, tokens):
    teacher = model("Transformer")
    student = recall_students.Recaller(d_state=size, start="published").build(teacher, 0)
    token = 2 * teacher.config.num_key_value_heads * teacher.config.head_dim
    assert 0 <= sum(part.numel() for part in student.backbone.layers[0].mixer.init_state(1)) - tokens * token < token
    window = recall_students.Recaller("window", d_state=size).build(teacher, 0)
    near = torch.arange(tokens)[None]
    assert relative_error(window(near), teacher(near)) < 1e-5


def test_the_readme_shows_rows_that_exist():
    assert set(SHOWN) <= set(rows())


def test_a_run_of_other_code_or_another_row_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(students, "RUNS", tmp_path)
    row = Row("silence", stages="")
    files = {students.record_of(row, "silence", 0.0, 0)}
    files.add(students.record_of(replace(row, model="mean"), "silence", 0.0, 0))
    monkeypatch.setattr(students, "CODE", "other")
    files.add(students.record_of(row, "silence", 0.0, 0))
    assert len(files) == 3
    file = students.record_of(rows()["silence"], "silence", 0.0, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"found": True}))
    assert students.run("silence", 0.0, 0) == {"found": True}


def test_kinds_of_tokens():
    """new; a pair; then the same pair near and far."""
    assert where.kinds([1, 2, 1, 2, 3, 4, 5, 1, 2], 3) == [0, 1, 2, 0, 0, 0, 1, 3]
    assert where.kinds([1, 1, 1, 1], 1) == [1, 2, 2]


def test_repeated_runs():
    assert where.repeated([1, 2, 3, 4] * 3) == 1.0 and where.repeated(list(range(9))) == 0.0
    assert where.repeated([1, 2, 3, 4, 9, 1, 2, 3, 4]) == 2 / 6


def test_yardsticks_keep_no_state(teacher):
    for kind in (WindowAttention, RunningMean):
        with pytest.raises(ValueError, match="state was given: this mixer keeps none"):
            with_attention(teacher, kind).generate(torch.zeros(1, 3, dtype=torch.long), 2)
    for mixer in (Silence(), Row("both").build(teacher, 0).backbone.layers[0].mixer):
        with pytest.raises(ValueError, match="state was given: this mixer keeps none"):
            mixer(torch.zeros(1, 3, 128), ())


def test_what_is_written_is_scored(teacher, monkeypatch):
    monkeypatch.setattr(where, "CONTINUED", 6)
    prompts = torch.arange(20).view(2, 10)
    theirs = where.greedily(teacher, prompts)
    assert torch.equal(theirs, torch.cat([teacher.generate(prompt, 6) for prompt in prompts.split(1)]))
    found = where.written(theirs, teacher, theirs)
    assert found["as the teacher"] == 6 and found["teacher's nats"] > 0
    silent = where.greedily(with_attention(teacher, Silence), prompts)
    assert where.written(silent, teacher, theirs)["as the teacher"] < 6


@pytest.mark.slow
@pytest.mark.parametrize("bench, layers", [(smollm2_all, ()), (smollm2_hybrid, (0, 2))])
def test_the_benches_of_the_real_teacher_run_from_their_commands(bench, layers, monkeypatch, tmp_path):
    replaced = f"--replace {' '.join(map(str, layers))}" if layers else ""
    command = (f"distill --teacher tiny {replaced} --d-state 32 --chunk-size 32 --batch-size 2 --steps 0 1 1 --seed 3 "
               f"--validation-blocks 4 --save-every 0 --threads 1 --out {tmp_path / 'run'}")
    found = {}
    small = {"COMMAND": command, "OPTIONS": common.distill_options(command), "OUT": tmp_path / "run", "EVERY": 1,
             "LAYERS": layers, "WINDOW_STAGE": Stage("distillation", 1, 1e-5),
             "save": lambda name, command, **content: found.update(json.loads(json.dumps(content)))}
    for name, value in small.items():
        if hasattr(bench, name):
            monkeypatch.setattr(bench, name, value)
    bench.main()
    assert found["arguments"] == command and len(found["rows"]) == 3
    assert all(set(row["ratios"]) == {"256", "1024"} and min(row["ratios"].values()) > 0 for row in found["rows"])
    student = load_model(str(tmp_path / "run"))[0]
    assert [type(block.mixer) is Attention for block in student.backbone.layers] == [
        bool(layers) and index not in layers for index in range(4)]
