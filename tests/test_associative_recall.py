"""Associative recall: targets against dictionaries, sequences, a convolution before a mixer, memory lengths."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from llamba_ref.associative_recall import (
    WithConvolution,
    memory_length,
    recall_accuracy,
    recall_batches,
    recall_sequences,
    recall_targets,
)
from llamba_ref.conventions import load_result, relative_error
from llamba_ref.decoder import Backbone, Decoder
from llamba_ref.gateloop import GateLoop
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.training import CrossEntropy, FreshBatches, Run, Stage, train


def small_model():
    return Llama(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=2, head_dim=8))


def convolved(gates="real", heads=2):
    """A GateLoop with a convolution in front, in float64, that is not at its start."""
    torch.manual_seed(0)
    mixer = WithConvolution(GateLoop(8, heads, 3, gates=gates), 8).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4), n_keys=st.integers(1, 20), n_values=st.integers(1, 20), seed=st.integers(0, 99),
    data=st.data(),
)
def test_targets_are_looked_up_in_the_pairs(batch, n_keys, n_values, seed, data):
    pairs = data.draw(st.integers(1, n_keys))
    ids = recall_sequences(batch, pairs, n_keys, n_values, generator=torch.Generator().manual_seed(seed))
    assert ids.shape == (batch, 3 * pairs) and ids.dtype == torch.int64
    nothing, asked = recall_targets(ids).split([2 * pairs, pairs], 1)
    assert (nothing == -100).all()
    for row, answers in zip(ids.tolist(), asked.tolist()):
        keys, values, queries = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], row[2 * pairs :]
        assert len(set(keys)) == pairs and sorted(keys) == sorted(queries)
        assert set(keys) <= set(range(n_keys)) and set(values) <= set(range(n_keys, n_keys + n_values))
        assert answers == [dict(zip(keys, values))[query] for query in queries]


def test_keys_values_and_queries_are_drawn_evenly():
    ids = recall_sequences(4000, 4, 8, 5, generator=torch.Generator().manual_seed(0))
    for part, count in ((ids[:, :8:2], 8), (ids[:, 1:8:2] - 8, 5), (ids[:, 8:], 8)):
        shares = part.flatten().bincount(minlength=count).double()
        assert len(shares) == count and (shares / shares.mean() - 1).abs().max() < 0.06
    place = (ids[:, 8:, None] == ids[:, None, :8:2]).long().argmax(-1)  # which pair each query asks for
    assert (place.double().mean(0) - 1.5).abs().max() < 0.06  # no order is left
    again = recall_sequences(4000, 4, 8, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids, again) and not torch.equal(
        ids, recall_sequences(4000, 4, 8, 5, generator=torch.Generator().manual_seed(1))
    )


@pytest.mark.parametrize("sizes, message", [
    ((0, 2), "batch is 0"), ((1, 0), "pairs is 0"), ((1, 2, 0), "n_keys is 0"), ((1, 2, 4, 1.5), "n_values is 1.5"),
    ((1, 9, 8), "pairs is 9: there are only n_keys = 8"),
])
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        recall_sequences(*sizes)


def test_accuracy_counts_right_answers():
    ids = recall_sequences(50, 6, generator=torch.Generator().manual_seed(0))
    answers = torch.nn.functional.one_hot(recall_targets(ids)[:, 12:], 64).float()
    padded = torch.cat([torch.zeros(50, 12, 64), answers], 1)
    assert recall_accuracy(lambda _: padded, ids) == 1
    padded[:25, -3:] = padded[:25, -3:].roll(1, -1)  # half of the answers in half of the rows
    assert recall_accuracy(lambda _: padded, ids) == pytest.approx(0.75)


def test_objective_is_the_cross_entropy_where_it_is_asked():
    torch.manual_seed(0)
    model, ids, graphs = small_model(), recall_sequences(5, 7), []
    found = CrossEntropy(model, recall_targets)(ids, graphs.append)
    log_p = model(ids)[:, 14:].log_softmax(-1)
    assert relative_error(found[0], -log_p.gather(-1, recall_targets(ids)[:, 14:, None]).mean()) < 1e-6
    assert graphs[0].requires_grad and not found.requires_grad


def test_batches_take_turns_and_find_their_place_again():
    data = FreshBatches(recall_batches(32, (2, 4, 16)), seed=3)
    shapes = [tuple(data.next().shape) for _ in range(4)]
    assert shapes == [(16, 6), (8, 12), (2, 48), (16, 6)]
    state, following = data.state_dict(), [data.next() for _ in range(3)]
    other = FreshBatches(recall_batches(32, (2, 4, 16)), seed=99)
    other.load_state_dict(state)
    assert all(torch.equal(other.next(), ids) for ids in following)


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    def fit(out, stop=None):
        torch.manual_seed(0)
        model = small_model()

        def kill(step, stage):
            if step == stop:
                raise KeyboardInterrupt

        train(
            model,
            [Stage("recall", 8, 1e-2)],
            FreshBatches(recall_batches(16, (2, 4))),
            lambda stage: CrossEntropy(model, recall_targets),
            run=Run(out, {}, resume=(out / "metrics.jsonl").exists()),
            save_every=3,
            after_step=kill,
            progress=False,
            accelerator=Accelerator(cpu=True),
        )
        return model

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stop=5)
    resumed = fit(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize("gates", ["real", "complex"])
def test_convolution_and_step_at_every_split(gates):
    mixer = convolved(gates)
    u = torch.randn(2, 11, 8, dtype=torch.float64)
    whole = mixer(u)
    for k in range(1, 11):
        y, state = mixer(u[:, :k], mixer.init_state(2))
        rows = [y]
        for u_t in u[:, k:].unbind(1):
            y_t, state = mixer.step(u_t, state)
            rows.append(y_t[:, None])
        assert relative_error(torch.cat(rows, 1), whole) < 1e-13, k


def test_convolution_is_the_one_of_torch():
    mixer = convolved()
    u = torch.randn(2, 9, 8, dtype=torch.float64)
    conv = torch.nn.functional.conv1d(
        torch.nn.functional.pad(u.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=8
    ).mT
    assert relative_error(mixer(u), mixer.mixer(conv)) < 1e-14
    assert relative_error(mixer.matrix(u), mixer.mixer.matrix(conv)) < 1e-14


def test_a_padded_batch_with_a_convolution():
    mixers = [convolved(), convolved("complex")]
    model = Decoder(Backbone(mixers, 10, 8, 16), tie_embeddings=True).double()
    ids, mask = torch.randint(10, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, 6:] = 0
    logits = model(ids, mask)
    assert relative_error(logits[0, 4:], model(ids[:1, 4:])[0]) < 1e-13
    assert relative_error(logits[1, :6], model(ids[1:, :6])[0]) < 1e-13


def test_memory_length_of_constant_and_mixed_gates():
    log_a = torch.log(torch.tensor([0.5, 0.9, 1 - 1e-4], dtype=torch.float64)).expand(2, 7, 3)
    assert (
        relative_error(
            memory_length(log_a)[1], torch.tensor([-1 / math.log(a) for a in (0.5, 0.9, 1 - 1e-4)], dtype=torch.float64)
        )
        < 1e-12
    )
    mixed = torch.tensor([-0.2, -0.4, 0.0, -1.4], dtype=torch.float64)[None, :, None]
    assert memory_length(mixed).item() == pytest.approx(2, rel=1e-12)
    assert memory_length(torch.zeros(1, 3, 1)).item() == math.inf
    assert memory_length(torch.full((1, 3, 1), -torch.inf)).item() == 0


def test_the_record_says_what_the_chapter_shows():
    """Attention solves the task, larger states recall more, and no recurrent model learns it without a convolution."""
    saved = load_result("recall")
    most = {}
    for run in saved["runs"]:
        most.setdefault(run["name"], []).append(run["accuracy"][-1])
    mean = {name: sum(shares) / len(shares) for name, shares in most.items()}
    assert mean["Transformer"] > 0.99
    for kind in ("Mamba-2", "GateLoop + convolution"):
        small, large = (mean[f"{kind}, {saved['states'][i]}"] for i in (0, -1))
        assert small < 0.7 and large > small + 0.2
    assert mean["GateLoop, 16"] < 0.2 * mean["GateLoop + convolution, 16"]
    assert mean["Mamba-2 without convolution, 16"] < 0.2 * mean["Mamba-2, 16"]


def test_mamba2_without_its_convolution_keeps_it_at_the_identity():
    """What the measurement is about: a step of training leaves the frozen convolution alone."""
    from bench.recall import model

    torch.manual_seed(0)
    net = model("Mamba-2 without convolution, 2")
    before = copy.deepcopy(net)
    train(
        net,
        [Stage("recall", 1, 1e-2)],
        FreshBatches(recall_batches(16, (2, 4))),
        lambda stage: CrossEntropy(net, recall_targets),
        progress=False,
        accelerator=Accelerator(cpu=True),
    )
    for ours, start in zip(net.backbone.layers, before.backbone.layers):
        assert (
            torch.equal(ours.mixer.conv1d.weight, start.mixer.conv1d.weight)
            and (start.mixer.conv1d.weight[..., -1] == 1).all()
        )
        assert not torch.equal(ours.mixer.in_proj.weight, start.mixer.in_proj.weight)
