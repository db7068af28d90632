"""What a step costs, counted and measured, and transformers' Llama as an opponent."""

import json
from dataclasses import astuple

import pytest
import torch
from small import llama_config, llamba_config, mamba2_config, shaken
from torch.utils._pytree import tree_leaves

from llamba_ref import throughput
from llamba_ref.conventions import load_result, relative_error
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.llamba import LLAMBA_SIZES, Llamba
from llamba_ref.mamba2 import Mamba2LM
from llamba_ref.models import load_model
from llamba_ref.operators import peak_bytes
from llamba_ref.throughput import (
    CARDS,
    StepCost,
    TransformersLlama,
    as_transformers,
    measure_decoding,
    step_cost,
)


def hybrid(keep):
    return Llamba.from_teacher(Llama(llama_config()), keep, start="published", d_state=8, chunk_size=4)


MODELS = {
    "llama": lambda: Llama(llama_config()),
    "tied": lambda: Llama(llama_config(tie_word_embeddings=True)),
    "mamba2": lambda: Mamba2LM(mamba2_config()),
    "llamba": lambda: Llamba(llamba_config()),
    "some layers": lambda: hybrid([1]),
    "some heads": lambda: hybrid([(0, 1), (1, 2)]),
    "gateloop": lambda: load_model("tiny-gateloop")[0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_counted_is_what_is_there(name, dtype):
    """Memory by the formula, against the tensors of a state; and on the device without memory it is the same."""
    model = MODELS[name]().to(dtype)
    cost = step_cost(model)
    assert cost.stored == sum(weight.nbytes for weight in model.parameters())
    for batch, context in ((1, 5), (3, 11)):
        _, state = model.read(torch.zeros(batch, context, dtype=torch.long))
        held = sum(part.nbytes for part in tree_leaves(state) if part is not None)
        assert cost.resident(batch, context) == cost.stored + held
    assert astuple(step_cost(model.to("meta"))) == astuple(cost)


def test_a_step_reads_all_weights_but_an_embedding_that_is_not_the_head():
    untied, tied = step_cost(Llama(llama_config())), step_cost(Llama(llama_config(tie_word_embeddings=True)))
    assert untied.weights == tied.weights == tied.stored < untied.stored


def test_published_sizes():
    """A cache of 128 KiB a token for Llama-3.1-8B; a Llamba-8B of 32 layers with 32 heads of 128 x 64."""
    sizes = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                 num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    with torch.device("meta"):
        teacher, model = (part.to(torch.bfloat16) for part in (Llama(LlamaConfig(**sizes)), Llamba(
            LLAMBA_SIZES["llamba-8b"])))
    assert step_cost(teacher).cache == 2**17 and step_cost(teacher).state == 0
    assert step_cost(teacher).operations_before == 32 * 4 * 4096
    cost, c = step_cost(model), model.config
    window = 4 * (c.hidden_size + 2 * 32 * 64) * 2
    assert cost.cache == 0 and cost.state == 32 * (32 * 128 * 64 * 4 + window)


def test_the_roofline():
    cost, card = StepCost(100, 60, 5, 2, 1000, 10), CARDS["A100"]
    assert cost.moved(3, 7) == 60 + 3 * (10 + 14) and cost.resident(3, 7) == 100 + 3 * (5 + 14)
    slow = type(card)(1e3, 1.0, 1e9, "no")
    assert cost.seconds(slow, 3, 7) == 3 * (1000 + 70) and cost.seconds(card, 3, 7) == 132 / card.bandwidth
    for memory in (99, 118, 119, 138, 1000):
        batch = cost.largest_batch(memory, 7)
        assert cost.resident(batch + 1, 7) > memory and (batch == 0 or cost.resident(batch, 7) <= memory)


@pytest.mark.parametrize("name", MODELS)
def test_a_measurement(name):
    """Peak memory has all weights and states in it, and not much more than what reading the prompt takes besides."""
    model = MODELS[name]()
    found, cost = measure_decoding(model, 2, 40, 2), step_cost(model)
    assert found.tokens_per_second == 2 / found.step > 0 and found.first > 0
    with torch.no_grad():
        reading = peak_bytes(lambda: model.read(torch.zeros(2, 40, dtype=torch.long)))
    assert cost.resident(2, 40) < found.peak < cost.stored + 2.5 * reading


@pytest.mark.parametrize("size", ["batch", "context", "new"])
def test_sizes_below_one(size):
    sizes = {"batch": 1, "context": 1, "new": 1} | {size: 0}
    with pytest.raises(ValueError, match=f"^{size} is 0"):
        measure_decoding(MODELS["llama"](), **sizes)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_transformers_writes_what_we_write(cache):
    ours = shaken(Llama(llama_config()).double())
    theirs = TransformersLlama(as_transformers(ours), cache)
    ids = torch.randint(ours.vocab_size, (2, 9))
    (expected, state), (logits, past) = ours.read(ids), theirs.read(ids, 16)
    for _ in range(6):
        assert relative_error(logits, expected) < 1e-6  # transformers' rotary angles are float32
        token = expected.argmax(-1)
        (expected, state), (logits, past) = ours.step(token, state), theirs.step(token, past)
    assert measure_decoding(theirs, 2, 9, 2).peak > sum(weight.nbytes for weight in ours.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("first", ["llama", "transformers"])
def test_every_compiled_step_is_compiled(first, monkeypatch):
    """Also after models with growing caches, which are compiled again and again: there is a limit for that."""
    entered, compile, ours = [], torch.compile, Llama(llama_config())

    def counting(graph, inputs):
        def run(*args):
            entered.append(1)
            return graph(*args)
        return run

    monkeypatch.setattr(torch, "compile", lambda step: compile(step, backend=counting))
    theirs = as_transformers(ours)
    models = [ours] if first == "llama" else [TransformersLlama(theirs, cache) for cache in ("dynamic", "static")]
    for model in (*models, Llamba(llamba_config()), hybrid([1])):
        for batch in (1, 2):
            entered.clear()
            measure_decoding(model, batch, 9, 6, compile=True)
            assert len(entered) >= 3 + 3 * 6


def test_an_unknown_cache():
    with pytest.raises(ValueError, match="^cache is 'paged'"):
        TransformersLlama(torch.nn.Linear(1, 1), "paged")


def test_rows_are_json():
    found = measure_decoding(MODELS["llamba"](), 1, 4, 1)
    assert json.loads(json.dumps(astuple(found)))[:2] == [1, 4]


# --- tables of kernels: measured where a card has a file, predicted where none has


MEASURED = {
    "predicted": False, "device": "NVIDIA A100", "date": "2031-01-01", "command": "make bench BENCH=kernels", "rows": [
        {"operation": "ssd", "model": "1B", "sizes": {"batch": 8, "length": 8192}, "dtype": "bfloat16",
         "pass": "forward", "seconds": 0.0012, "fraction": 0.61, "reason": None,
         "peers": {"naive": {"ratio": 9.5}, "fla": {"ratio": 1.25}, "mamba_ssm": {"reason": "not installed"}}},
        {"operation": "ssd", "model": "1B", "sizes": {"batch": 1, "length": 65536}, "dtype": "bfloat16",
         "pass": "forward", "reason": "out of memory", "peers": {}},
        {"operation": "ssd_step", "model": "1B", "sizes": {"batch": 32}, "dtype": "bfloat16", "pass": "forward",
         "seconds": 2e-5, "fraction": 0.8, "reason": None, "peers": {}},
        {"operation": "ssd", "model": "demo", "sizes": {"batch": 8, "length": 8192}, "dtype": "bfloat16",
         "pass": "forward", "seconds": 7.0, "fraction": 0.5, "reason": None, "peers": {}},
    ],
}


@pytest.fixture
def saved(monkeypatch):
    """Results that `kernel_times` finds: what a test puts there."""
    results = {"kernels_predicted": load_result("kernels_predicted")}
    monkeypatch.setattr(throughput, "load_result", results.__getitem__)
    monkeypatch.setattr(throughput, "result_names", lambda prefix: sorted(n for n in results if n.startswith(prefix)))
    return results


def test_times_are_predicted_where_no_card_has_a_file(saved):
    first, second, *lines = throughput.kernel_times("ssd", "ssd_step").splitlines()
    assert first == "predicted from data sheets, nothing was run: the least milliseconds on T4, A100, H100,"
    assert second == "and how many times as long as the kernels plain PyTorch takes, both counted call by call"
    rows = saved["kernels_predicted"]["rows"]
    long = [row for row in rows if row["operation"] == "ssd" and row["model"] == "1B" and row["half"]][::2]
    assert len(long) == 4 and {row["pass"] for row in long} == {"forward"}
    numbers = [f"{1e3 * time:.4f}" for time in long[0]["seconds"].values()]
    numbers += [f"{min(row['plain_seconds'][card] / row['launched_seconds'][card] for row in long):.1f}"
                for card in long[0]["seconds"]]
    assert lines[0].split() == ["ssd", "65536", "tokens,", "32", "heads", "forward", *numbers]
    assert len(lines) == 5 and len({line.rstrip("0123456789. ") for line in lines}) == 5  # a line for as many tokens
    assert all(len(line) < 110 for line in (first, second, *lines))


def test_measured_times_leave_no_room_for_predicted_ones(saved):
    saved["kernels_a100"] = MEASURED
    head, *lines = throughput.kernel_times("ssd").splitlines()
    assert head == "measured on NVIDIA A100, 2031-01-01, make bench BENCH=kernels"
    assert len(lines) == 1 and "predicted" not in lines[0]  # neither what failed, nor another model or operation
    assert lines[0].split() == ["ssd", "8", "x", "8192", "bfloat16", "forward", "1.2000", "ms", "61%", "of", "the",
                                "limit", "fla", "takes", "1.25", "times", "as", "long"]
    assert "takes" not in throughput.kernel_times("ssd_step")  # nobody to compare with
    saved["kernels_t4"] = MEASURED | {"device": "Tesla T4"}
    both = throughput.kernel_times("ssd").split("\n\n")
    assert [part.splitlines()[0].split(",")[0] for part in both] == ["measured on NVIDIA A100", "measured on Tesla T4"]
