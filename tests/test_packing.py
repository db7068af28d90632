"""Several documents in a row: the numbers of each are those that it has alone, whatever the mixer."""

import pytest
import torch
from small import VOCAB, llama_config, llamba_config, mamba2_config, one_line, shaken

from llamba_ref.associative_recall import WithConvolution
from llamba_ref.conv import causal_conv
from llamba_ref.conventions import document_begin, forget, relative_error
from llamba_ref.decoder import Backbone, Decoder
from llamba_ref.gateloop import GateLoop
from llamba_ref.gateloop_lm import GateLoopConfig, GateLoopLM
from llamba_ref.llama import Llama
from llamba_ref.llamba import AttentionConfig, Llamba, RotaryConfig
from llamba_ref.mamba2 import Mamba2LM

EDGES = (0, 1, 2, 5, 16, 32, 37, 40)  # documents of length 1, borders at those of chunks (16) and in between


def gateloop(gates="complex", mode="chunked"):
    return GateLoopLM(GateLoopConfig(
        vocab_size=VOCAB, d_model=16, n_layer=2, n_heads=2, intermediate_size=24, d_state=3, gates=gates, mode=mode))


def hybrid(**heads):
    return Llamba(llamba_config(attn_cfg=AttentionConfig((1,), 4, 2, 8, **heads)))


MODELS = {
    "llama": lambda: Llama(llama_config()),
    "mamba2": lambda: Mamba2LM(mamba2_config()),
    "llamba": lambda: Llamba(llamba_config()),
    **{f"llamba, {kind}": lambda kind=kind: Llamba(llamba_config(
        ssm_cfg=llamba_config().ssm_cfg.__class__(6, 4, 4, chunk_size=16), rotary_cfg=RotaryConfig(kind)))
       for kind in ("fixed", "learned", "data")},
    "hybrid by layer": hybrid,
    "hybrid by head": lambda: hybrid(heads=(2,)),
    **{f"gateloop, {mode}": lambda mode=mode: gateloop(mode=mode) for mode in ("chunked", "scan", "recurrent")},
    "gateloop, real": lambda: gateloop("real"),
    "a convolution before": lambda: Decoder(
        Backbone([WithConvolution(GateLoop(16, 2, 3), 16)], VOCAB, 16, 24), tie_embeddings=True),
}


def build(name):
    return shaken(MODELS[name]()).double()


def starts_at(places, length=EDGES[-1], rows=1):
    return torch.zeros(rows, length, dtype=torch.bool).index_fill(1, torch.tensor(places), True)


def documents(ids, edges=EDGES):
    return [ids[:, i:j] for i, j in zip(edges, edges[1:])]


def gradients(model, y):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    found = torch.autograd.grad((y * weight).sum(), list(model.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("first", [True, False], ids=["a start at 0", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_documents_is_its_documents(name, first):
    """Logits and all gradients."""
    model, ids = build(name), torch.randint(VOCAB, (2, EDGES[-1]))
    packed = model(ids, starts=starts_at(EDGES[0 if first else 1 : -1], rows=2))
    alone = torch.cat([model(document) for document in documents(ids)], 1)
    assert relative_error(packed, alone) < 1e-10
    assert relative_error(model(ids), alone) > 1e-3  # without starts the documents do reach each other
    assert relative_error(gradients(model, packed), gradients(model, alone)) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_rows_may_have_borders_of_their_own(name):
    model, ids = build(name), torch.randint(VOCAB, (3, 20))
    starts = torch.zeros(3, 20, dtype=torch.bool)
    starts[0, 7], starts[1, [0, 3, 18, 19]] = True, True
    packed = model(ids, starts=starts)
    for row, edges in enumerate(((0, 7, 20), (0, 3, 18, 19, 20), (0, 20))):
        alone = torch.cat([model(document) for document in documents(ids[row : row + 1], edges)], 1)
        assert relative_error(packed[row], alone[0]) < 1e-10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cut", [1, 5, 9, 12])
def test_the_first_document_goes_on_from_the_state(name, cut):
    """A text cut in two at any place: in a document, at a border, one token behind one; then steps."""
    model, ids = build(name), torch.randint(VOCAB, (1, 16))
    edges = (0, 4, 5, 9, 14)
    starts = starts_at(edges[:-1], 14)
    head, state = model.prefill(ids[:, :cut], starts=starts[:, :cut])
    tail, state = model.prefill(ids[:, cut:14], state=state, starts=starts[:, cut:])
    alone = torch.cat([model(document) for document in documents(ids, edges)], 1)
    assert relative_error(torch.cat([head, tail], 1), alone) < 1e-10
    last, steps = model(ids[:, 9:]), []
    for token in ids[:, 14:].unbind(1):  # what is written on goes on from the last document
        logits, state = model.step(token, state)
        steps.append(logits)
    assert relative_error(torch.stack(steps, 1), last[:, 5:]) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_a_start_at_the_first_token_forgets_the_state(name):
    model, ids = build(name), torch.randint(VOCAB, (1, 12))
    _, state = model.prefill(ids[:, :6])
    logits, _ = model.prefill(ids[:, 6:], state=state, starts=starts_at([0], 6))
    assert relative_error(logits, model(ids[:, 6:])) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_masked_tokens_in_a_row_of_documents(name):
    """Masked means absent, also where the masked token begins a document."""
    model, ids = build(name), torch.randint(VOCAB, (2, 12))
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1]])
    starts = starts_at([0, 4, 7], 12, rows=2)
    packed = model(ids, mask, starts=starts)
    for row, kept in ((0, ([0, 1, 2, 3], [5, 6], [7, 8, 10, 11])), (1, ([1, 2, 3], [4, 5], [9, 10, 11]))):
        for document in kept:
            assert relative_error(packed[row, document], model(ids[row : row + 1, document])[0]) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_block_diagonal(name):
    """Each block is the matrix of its document alone."""
    model, ids = build(name), torch.randint(VOCAB, (1, EDGES[-1]))
    packed = [layer.matrix() for layer in model.walk(ids, starts_at(EDGES[:-1]))]
    blocks = [[layer.matrix() for layer in model.walk(document)] for document in documents(ids)]
    for index, matrix in enumerate(packed):
        expected = torch.zeros_like(matrix)
        for i, j, block in zip(EDGES, EDGES[1:], blocks):
            expected[:, :, i:j, i:j] = block[index]
        assert relative_error(matrix, expected) < 1e-10 and not matrix[expected == 0].any()


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    """Single precision, long enough for sums to go wrong."""
    model, ids = shaken(MODELS[name]()), torch.randint(VOCAB, (1, 300))
    edges = (0, 3, 150, 151, 300)
    packed = model(ids, starts=starts_at(edges[:-1], 300))
    assert relative_error(packed, torch.cat([model(document) for document in documents(ids, edges)], 1)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "llamba", "gateloop, chunked"])
def test_wrong_starts(name):
    model, ids = build(name), torch.randint(VOCAB, (1, 6))
    for starts, what in (
        (torch.zeros(1, 5, dtype=torch.bool), r"torch.bool of shape \(1, 5\)"),
        (torch.zeros(1, 6), r"torch.float32 of shape \(1, 6\)"),
    ):
        for call in (model, model.hidden, model.prefill, lambda ids, starts: next(model.walk(ids, starts))):
            with pytest.raises(ValueError, match=f"^starts is {what}: it must be bool of shape \\(1, 6\\)$") as error:
                call(ids, starts=starts)
            one_line(error)


def test_where_documents_begin():
    starts = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert document_begin(starts).tolist() == [[0, 1, 1, 1, 4], [0] * 5, [0] * 5]
    earliest = torch.tensor([[-1], [-2], [-3]])
    assert document_begin(starts, earliest).tolist() == [[-1, 1, 1, 1, 4], [0] * 5, [-3] * 5]
    log_a = torch.full((3, 5, 2), -0.5)
    assert forget(log_a, None) is log_a
    assert torch.equal(forget(log_a, starts).isinf(), starts[..., None].expand(3, 5, 2))


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_window_holds_the_last_document_alone(width, length):
    x, weight = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(3, 1, width, dtype=torch.float64)
    before, starts = torch.randn(2, 3, width, dtype=torch.float64), torch.zeros(2, length, dtype=torch.bool)
    starts[0, length - 1] = True
    _, window = causal_conv(x, weight, None, before, starts)
    _, alone = causal_conv(x[:1, -1:], weight, None)
    _, whole = causal_conv(x[1:], weight, None, before[1:])
    assert torch.equal(window[:1], alone) and torch.equal(window[1:], whole)
