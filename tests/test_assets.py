"""What ships with the package is what its notes say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gateloop_lm import texts
from llamba_ref.checkpoint import EMBEDDED, find_checkpoint
from llamba_ref.conventions import load_result, relative_error
from llamba_ref.data import load_documents, pack, split_documents
from llamba_ref.evaluate import evaluate
from llamba_ref.gateloop_lm import GateLoopLM
from llamba_ref.llamba import Llamba
from llamba_ref.mamba2 import Mamba2LM
from llamba_ref.memory_horizon import horizon_accuracy, horizon_sequences
from llamba_ref.models import load_model

MEGABYTE = 10**6


def test_the_embedded_llama_has_the_perplexity_that_its_log_ends_with():
    model, tokenizer = load_model("tiny")
    held_out = split_documents(load_documents("austen"))[1]
    result = evaluate(model, pack(held_out, tokenizer, 256))
    log = (find_checkpoint("tiny") / "training.log").read_text().splitlines()[-1]
    perplexity, bits = re.fullmatch(r"held-out perplexity ([\d.]+), ([\d.]+) bits per byte", log).groups()
    assert float(perplexity) == pytest.approx(result.perplexity, abs=0.006)
    assert float(bits) == pytest.approx(result.bits_per_byte, abs=0.0006)
    assert f"| {perplexity} ({bits} bits per byte)" in (find_checkpoint("tiny") / "README.md").read_text()


def test_prefill_and_64_steps_of_the_tiny_student_equal_forward():
    teacher, tokenizer = load_model("tiny")
    ids = pack(split_documents(load_documents("austen"))[1], tokenizer, 128, max_blocks=2).blocks
    for keep_attention in ((), (0, 2)):
        student = Llamba.from_teacher(teacher, keep_attention, d_state=32, chunk_size=32)
        with torch.no_grad():
            logits, state = student.prefill(ids[:, :64])
            rows = list(logits.unbind(1))
            for token_ids in ids[:, 64:].unbind(1):
                logits, state = student.step(token_ids, state)
                rows.append(logits)
            assert relative_error(torch.stack(rows, 1), student(ids)) < 1e-5


@pytest.mark.parametrize("name", EMBEDDED)
def test_what_ships_is_small(name):
    folder = find_checkpoint(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8 * MEGABYTE
    assert (folder.parent / "austen.txt").stat().st_size < 2 * MEGABYTE


def recorded(name):
    """The run with complex gates and seed 0 of a saved result: the one whose weights come with the package."""
    return next(run for run in load_result(name)["runs"] if (run["name"], run["seed"]) == ("complex gates", 0))


def test_the_gateloop_of_the_horizon_is_the_recorded_one():
    model, record = GateLoopLM.from_pretrained("horizon"), recorded("memory_horizon")
    ids = horizon_sequences(128, 256, generator=torch.Generator().manual_seed(10_256))  # as in bench.memory_horizon
    by_distance = horizon_accuracy(model, ids, load_result("memory_horizon")["edges"][:9])
    assert (
        max(abs(found - saved) for found, saved in zip(by_distance, record["by_distance"])) < 2e-3
    )  # weights in float16
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def test_the_gateloop_language_model_is_the_recorded_one():
    model = load_model("tiny-gateloop")[0]
    record, found = recorded("gateloop_lm"), evaluate(model, texts()[2]).perplexity
    assert abs(found / record["curve"][-1]["perplexity"] - 1) < 1e-3  # weights in float16


def test_the_mamba2_language_model_is_the_recorded_one():
    model = load_model("tiny-mamba2")[0]
    assert isinstance(model, Mamba2LM)
    record, found = load_result("mamba2_lm")["runs"][0], evaluate(model, texts()[2]).perplexity
    assert abs(found / record["curve"][-1]["perplexity"] - 1) < 1e-3  # weights in float16
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def test_readme_shows_the_saved_measurements():
    root = Path(__file__).parent.parent
    check = subprocess.run([sys.executable, "-m", "bench.report", "--check"], cwd=root, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_the_examples_in_the_readme_run(capsys):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    distilling, recurrences, in_transformers = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(in_transformers.replace("runs/demo/student", str(find_checkpoint("tiny-llamba"))), {})
    assert len(capsys.readouterr().out.split()) > 20
    exec(distilling.replace('", 50, ', '", 2, '), {})
    assert float(capsys.readouterr().out.splitlines()[-1]) > 1
    exec(recurrences, names := {})
    assert names["y"].shape == names["h"].shape == names["v"].shape and names["y"].is_complex()
