"""Tasks of lm-eval on our models: the harness's numbers are those that can be had by hand."""

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from math import log

import pytest
import torch
from small import one_line

import llamba_ref as lr
from llamba_ref import harness
from llamba_ref.cli import main, score_lines
from llamba_ref.data import TokenBlocks
from llamba_ref.evaluate import evaluate
from llamba_ref.harness import LOCAL, Score, endings, last_words, local_tasks, passages, run_tasks, sentences


@pytest.fixture(scope="module")
def texts():
    """The held-out chapters."""
    return [row["text"] for row in lr.split_documents(lr.load_documents("austen"))[1]]


@pytest.fixture(scope="module")
def models():
    """A student in float32, a hybrid by heads before its training, their teacher."""
    teacher, tokenizer = lr.load_model("tiny")
    hybrid = lr.Llamba.from_teacher(teacher, [(0, 1), (2, 0), (2, 3)], d_state=32, chunk_size=32)
    return {"student": (lr.load_model("tiny-llamba")[0].float(), tokenizer), "hybrid": (hybrid, tokenizer),
            "teacher": (teacher, tokenizer)}


@pytest.fixture(scope="module")
def scores(models, texts):
    """All local tasks, sixteen items each."""
    return run_tasks(models, LOCAL, texts, limit=16)


def value(scores, task, model, metric=None):
    return [s.value for s in scores if (s.task, s.model) == (task, model) and metric in (None, s.metric)][0]


@torch.no_grad()
def log_p(model, ids):
    return model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


# Items


def test_items_depend_on_text_and_seed_alone(texts):
    assert sentences(texts, 1) == sentences(texts, 1) != sentences(texts, 2)
    whole = "".join(texts)
    for before, sentence in sentences(texts):
        assert before + sentence in whole and len(before) == harness.BEFORE
    for item, (before, sentence) in zip(last_words(sentences(texts)), sentences(texts)):
        assert f"{item['context']} {item['word']}" == before + sentence[:-1] and item["word"].isalpha()
    for item, (before, sentence) in zip(endings(sentences(texts)), sentences(texts)):
        assert f"{item['context']} {item['choices'][item['label']]}" == before + sentence
        assert len(set(item["choices"])) == 4
    labels = [item["label"] for item in endings(sentences(texts))]
    assert min(labels.count(label) for label in range(4)) > len(labels) / 8
    assert sum(len(item["text"]) for item in passages(texts)) > 0.9 * len(whole)


def test_a_text_without_sentences_is_refused():
    with pytest.raises(ValueError) as error:
        local_tasks(["Too short. " * 100])
    assert "0 sentences" in one_line(error)


# Numbers


def test_scores_are_complete(scores, models):
    assert {(s.task, s.model) for s in scores} == {(task, model) for task in LOCAL for model in models}
    assert [s.task for s in scores] == sorted([s.task for s in scores], key=LOCAL.index)
    for score in scores:
        assert score.items == 16 and score.higher_is_better == (score.task != "text")
        error = (score.value * (1 - score.value) / 15) ** 0.5
        assert score.stderr is None if score.task == "text" else abs(score.stderr - error) < 1e-9


@pytest.mark.parametrize("name", ["student", "hybrid", "teacher"])
def test_log_likelihood_tasks_by_hand(name, models, scores, texts):
    model, tokenizer = models[name]
    right = 0
    for item in last_words(sentences(texts))[:16]:
        context, word = tokenizer(item["context"]).input_ids, tokenizer(" " + item["word"]).input_ids
        with torch.no_grad():
            guess = model(torch.tensor([context + word]))[0, len(context) - 1 : -1].argmax(-1).tolist()
        right += guess == word
    assert value(scores, "last_word", name) == right / 16
    counts = [0, 0]
    for item in endings(sentences(texts))[:16]:
        start = len(tokenizer(item["context"]).input_ids)
        whole = [torch.tensor([tokenizer(f"{item['context']} {choice}").input_ids]) for choice in item["choices"]]
        sums = [log_p(model, ids)[start - 1 :].sum().item() for ids in whole]
        each = [one / len(choice) for one, choice in zip(sums, item["choices"])]
        for i, kind in enumerate((sums, each)):
            counts[i] += kind.index(max(kind)) == item["label"]
    assert [value(scores, "choices", name, metric) for metric in ("acc", "acc_norm")] == [n / 16 for n in counts]


@pytest.mark.parametrize("name", ["student", "hybrid", "teacher"])
def test_a_written_word_is_the_greedy_one(name, models, scores, texts):
    model, tokenizer = models[name]
    right = 0
    for item in last_words(sentences(texts))[:16]:
        ids = torch.tensor([tokenizer(item["context"]).input_ids])
        words = tokenizer.decode(model.generate(ids, 8)[0, ids.shape[1] :]).split()
        right += words[0].strip(".,;:!?'\"") == item["word"]
    assert value(scores, "written_word", name) == right / 16


@pytest.mark.parametrize("name", ["student", "hybrid", "teacher"])
def test_bits_per_byte_are_ours(name, models, scores, texts):
    """Windows of the context's length, each beginning with the last token of the one before; the last one is filled up
    with tokens that were asked for already."""
    model, tokenizer = models[name]
    length, total, size = 256, 0.0, 0
    for item in passages(texts)[:16]:
        ids = [tokenizer.bos_token_id, *tokenizer(item["text"]).input_ids]
        size += len(item["text"].encode())
        for start in range(0, len(ids) - 1, length):
            asked = len(ids[start + 1 : start + 1 + length])
            window = ids[max(0, start + asked - length) : start + asked + 1]
            total -= log_p(model, torch.tensor([window]))[-asked:].sum().item()
        if len(ids) <= length:
            blocks = TokenBlocks(torch.tensor([ids], dtype=torch.int32), len(ids), 1, len(item["text"].encode()))
            assert abs(evaluate(model, blocks).nll * (len(ids) - 1) + log_p(model, torch.tensor([ids])).sum()) < 1e-3
    assert abs(value(scores, "text", name) - total / log(2) / size) < 1e-7


def test_the_size_of_a_batch_changes_no_score(models, scores, texts):
    for other in run_tasks(models, LOCAL, texts, limit=16, batch_size=1):
        same = value(scores, other.task, other.model, other.metric)
        assert abs(other.value - same) <= (1e-6 if other.task == "text" else 0)


def test_all_models_have_the_same_window(models):
    contexts = [model.config for model, _ in models.values()]
    assert [c.max_position_embeddings for c in contexts] == [256, 256, 256]
    short = lr.Llama(replace(lr.Llama.from_pretrained("tiny").config, max_position_embeddings=64))
    assert harness.common_context([short, models["teacher"][0]]) == 64
    assert harness.common_context([lr.load_model("tiny-gateloop")[0]]) == 2048


def test_groups_filters_and_errors_that_are_none():
    """What lm-eval returns for a group with a number, one without, and a task with two filters."""
    found = {
        "results": {
            "big": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "big"},
            "a": {"acc,none": 0.4, "acc_stderr,none": "N/A"}, "b": {"acc,none": 0.6}, "loose": {"alias": "loose"},
            "math": {"exact_match,strict": 0.3, "exact_match_stderr,strict": float("nan"), "exact_match,flexible": 0.4},
            "c": {"perplexity,none": 8.0}},
        "group_subtasks": {"big": ["inner"], "inner": ["a", "b"], "loose": ["c"]},
        "n-samples": {name: {"effective": n} for name, n in (("a", 3), ("b", 4), ("c", 5), ("math", 6))},
        "higher_is_better": {"c": {"perplexity": False}}}
    scores = harness.scores_of(found, ["big", "math", "loose"], "m")
    assert scores == [
        Score("big", "acc", "m", 0.5, 0.1, 7, True), Score("math", "exact_match", "m", 0.3, None, 6, True, "strict"),
        Score("math", "exact_match", "m", 0.4, None, 6, True, "flexible"),
        Score("c", "perplexity", "m", 8.0, None, 5, False)]
    assert len(score_lines(scores)) == 5 and score_lines([]) == [score_lines([])[0]]


def test_a_model_in_training_stays_in_training(models, texts):
    model, tokenizer = models["student"]
    model.train()
    run_tasks({"student": (model, tokenizer)}, ["last_word"], texts, limit=2)
    assert all(part.training for part in model.modules())
    model.eval()


def test_a_tokenizer_without_an_end_is_refused(models, texts):
    model, tokenizer = models["student"]
    other = deepcopy(tokenizer)
    other.bos_token = other.eos_token = None
    with pytest.raises(ValueError) as error:
        run_tasks({"student": (model, other)}, ["text"], texts)
    assert "no token that begins or ends" in one_line(error)


# Errors


@pytest.mark.parametrize("tasks, kind, word", [
    ((), ValueError, "tasks is empty"), (("last_words",), ValueError, "tasks holds 'last_words'"),
    (("ai2_arc",), ValueError, "that is a tag"), (("text", "piqa"), ConnectionError, "task piqa comes from the hub")])
def test_tasks_that_cannot_be_run(tasks, kind, word, monkeypatch):
    monkeypatch.setattr(harness, "hub_problem", lambda: "the hub cannot be reached (ConnectError)")
    with pytest.raises(kind) as error:
        run_tasks({}, tasks)
    assert word in one_line(error)


def test_without_lm_eval_the_command_says_how_to_install_it():
    program = "import sys; sys.modules['lm_eval'] = None; from llamba_ref.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", program, "evaluate", "tiny", "--tasks", "text"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 1 and "pip install 'llamba_ref[eval]'" in done.stderr and done.stderr.count("\n") == 1


# The command


def test_llamba_evaluate_shows_a_table(capsys):
    main(["evaluate", "tiny-llamba", "--teacher", "tiny", "--tasks", "last_word, choices", "--limit", "8"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "metric", "tiny-llamba", "tiny"]
    assert [row.split()[:2] for row in rows] == [["last_word", "acc"], ["choices", "acc"], ["choices", "acc_norm"]]
    assert rows[1].endswith("x tiny") and rows[1].count("+-") == 2


def test_llamba_evaluate_writes_json(capsys):
    main(["evaluate", "tiny-llamba", "tiny", "--tasks", "text", "--limit", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(score["model"], score["items"]) for score in found] == [("tiny-llamba", 3), ("tiny", 3)]


def test_several_models_without_tasks(capsys):
    main(["evaluate", "tiny-llamba", "tiny", "--validation-blocks", "2", "--json"])
    both = json.loads(capsys.readouterr().out)
    main(["evaluate", "tiny", "--validation-blocks", "2", "--json"])
    assert both["tiny"] == json.loads(capsys.readouterr().out) and both.keys() == {"tiny-llamba", "tiny"}


def test_a_model_that_is_named_twice(capsys):
    for args in (["tiny", "tiny"], ["tiny", "--teacher", "tiny"]):
        with pytest.raises(SystemExit):
            main(["evaluate", *args, "--tasks", "text"])
        assert "name each once" in capsys.readouterr().err


def test_an_exported_file_takes_no_tasks(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "student.onnx", "--tasks", "text"])
    assert "tasks are for models, not for exported files" in capsys.readouterr().err


def test_a_table_without_a_ratio_where_there_is_nothing_to_compare_with():
    one = Score("piqa", "acc", "a", 0.5, 0.01, 10, True)
    assert "x a" not in score_lines([one])[1]
    zero = Score("piqa", "acc", "b", 0.0, None, 10, True)
    assert "x b" not in score_lines([one, zero])[1] and "0.500 +- 0.010" in score_lines([one, zero])[1]
