"""The yardsticks of `bench.students`: equal tokens, equal memory, a seed that counts, no run of other code."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from small import llama_config

from bench import students
from bench.keep_attention import KEPT, choices
from bench.put_back import HeadsOfBoth
from bench.report import SHOWN
from bench.smollm2_hybrid import Window
from bench.students import BUDGETS, SINKS, WINDOW, Row, RunningMean, Silence, WindowAttention, rows, with_mixers
from llamba_ref.cli import Distill
from llamba_ref.conventions import relative_error
from llamba_ref.llama import Attention, Llama
from llamba_ref.llamba import Llamba
from llamba_ref.models import load_model


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
    model = with_mixers(teacher, WindowAttention, [1, 3])
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


def test_heads_of_both_mixers(teacher):
    """With no head of attention it is the mixer, with all of them attention, and heads add up."""
    student = Distill(start="published", rotation="fixed").student(teacher)
    u = torch.randn(2, 12, 128)
    outputs = {}
    for heads in ((), (0,), (1, 2, 3), (0, 1, 2, 3)):
        mixers = [copy.deepcopy(model.backbone.layers[1].mixer) for model in (student, teacher)]
        outputs[heads] = HeadsOfBoth(*mixers, heads)(u)
    mixer, attention = (model.backbone.layers[1].mixer(u) for model in (student, teacher))
    assert relative_error(outputs[()], mixer) < 1e-6 and relative_error(outputs[0, 1, 2, 3], attention) < 1e-6
    assert relative_error(outputs[0,] + outputs[1, 2, 3], mixer + attention) < 1e-6
    assert relative_error(outputs[0,], mixer) > 1e-2 < relative_error(outputs[1, 2, 3], mixer)


def test_trivial_answers_are_what_they_are_called(teacher):
    ids = torch.arange(60)[None]
    near, far = ids[:, : WINDOW + SINKS], ids
    window = with_mixers(teacher, WindowAttention)
    assert relative_error(window(near), teacher(near)) < 1e-6 < relative_error(window(far), teacher(far))
    u, attention = torch.randn(1, 9, 128), with_mixers(teacher, RunningMean).backbone.layers[0].mixer
    uniform = torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]
    v = attention.project(u, 0, None)[2].repeat_interleave(2, 1)
    assert relative_error(attention(u), attention.o_proj((uniform @ v).transpose(1, 2).flatten(2))) < 1e-5
    assert not with_mixers(teacher, Silence).backbone.layers[0].mixer(u).any()


def test_a_random_start_depends_on_the_seed(teacher):
    for row in (Row(start="published", rotation="none"), Row("scratch")):
        weights = [row.build(teacher, seed).backbone.layers[0].mixer.in_proj.weight for seed in (0, 0, 1)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_record_names_the_command_that_made_it():
    assert students.command(("full", "quarter", "sixteenth"), (0, 1, 2)) == "make compare"
    assert students.command(("quarter",), (0,)) == "python -m bench.students --budgets quarter --seeds 0"


@pytest.mark.parametrize("rate, edge", [(2e-3, True), (5e-4, False), (2.5e-4, True), (0.0, False)])
def test_a_row_tells_that_its_rate_is_at_the_edge_of_those_tried(rate, edge):
    one = {"lr": rate, "tokens": 1, "ratio": 1.0, "agreement": 1.0, "kl": 0.0, "seconds": 1.0}
    assert students.summary("a", [one, one | {"ratio": 2.0}]) == {
        **one, "name": "a", "seeds": 2, "ratio": 1.5, "lowest": 1.0, "highest": 2.0, "edge": edge}


def test_the_readme_shows_rows_that_exist():
    assert set(SHOWN) <= set(rows())


def test_a_run_of_other_code_or_another_row_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(students, "RUNS", tmp_path)
    row = Row("silence", stages="")
    files = {students.record_of(row, "silence", 0.0, 0)}
    files.add(students.record_of(replace(row, model="mean"), "silence", 0.0, 0))
    monkeypatch.setattr(students, "code", lambda: "other")
    files.add(students.record_of(row, "silence", 0.0, 0))
    assert len(files) == 3
    file = students.record_of(rows()["silence"], "silence", 0.0, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"found": True}))
    assert students.run("silence", 0.0, 0) == {"found": True}
