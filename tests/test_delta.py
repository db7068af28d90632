"""The delta rule: every mode against the loop that defines it, its special cases, its two mixers in a backbone."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import llama_config, one_line, shaken

from llamba_ref.conventions import relative_error
from llamba_ref.data import Batches, TokenBlocks
from llamba_ref.decoder import Backbone, Decoder, with_mixers
from llamba_ref.delta import (
    RWKV7,
    RWKV7LM,
    GatedDeltaNet,
    GatedDeltaNetConfig,
    GatedDeltaNetLM,
    RWKV7Config,
    delta_matrix,
    delta_rule,
    generalized_delta_matrix,
    generalized_delta_rule,
    unit_length,
)
from llamba_ref.gateloop import gateloop
from llamba_ref.llama import Llama
from llamba_ref.models import KINDS
from llamba_ref.mohawk import distill
from llamba_ref.ssd import ssd
from llamba_ref.training import Stage

MODES = ("recurrent", "scan", "attention", "chunked")
LENGTHS = (1, 2, 3, 63, 64, 65, 200)
GATES = (0.0, -1e-6, -50.0, -0.3)
BETAS = (0.0, 1.0, 2.0)


def definition(q, k, v, log_a, read, erase, state):
    """The recurrence with the matrix of every step written out."""
    outputs = []
    for q_t, k_t, v_t, log_t, r_t, e_t in zip(*(z.unbind(1) for z in (q, k, v, log_a, read, erase))):
        matrix = torch.diag_embed(log_t.exp().expand_as(k_t)) - e_t[..., :, None] * r_t[..., None, :]
        state = matrix @ state + k_t[..., :, None] * v_t[..., None, :]
        outputs.append((q_t[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, 1), state


def delta_definition(q, k, v, beta, log_a, state):
    """Fade, look, write the difference."""
    outputs = []
    for q_t, k_t, v_t, beta_t, log_t in zip(*(z.unbind(1) for z in (q, k, v, beta, log_a))):
        state = log_t.exp()[..., None] * state
        found = (k_t[..., None] * state).sum(-2)
        state = state + k_t[..., None] * (beta_t[..., None] * (v_t - found))[..., None, :]
        outputs.append((q_t[..., None] * state).sum(-2))
    return torch.stack(outputs, 1), state


def drawn(numbers, shape, generator):
    return torch.tensor(numbers, dtype=torch.float64)[torch.randint(len(numbers), shape, generator=generator)]


def example(length, heads=3, key=4, value=5, per_head=True, batch=2, seed=0, gates=GATES, betas=BETAS):
    """q, k, v, beta, log_a and a state with gradients in float64; keys of length 1."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, length, heads, key, generator=g, dtype=torch.float64) for _ in range(2))
    v, state = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in
                ((batch, length, heads, value), (batch, heads, key, value)))
    beta = drawn(betas, (batch, length, heads), g)
    log_a = drawn(gates, (batch, length, heads, 1 if per_head else key), g)
    return [z.requires_grad_() for z in (q, F.normalize(k, dim=-1), v, beta, log_a, state)]


def general_example(length, **options):
    """q, k, v, log_a, read, erase and a state; a step makes no vector longer than 1.5 times."""
    q, k, v, _, log_a, state = example(length, **options)
    g = torch.Generator().manual_seed(5)
    read = F.normalize(torch.randn(k.shape, generator=g, dtype=torch.float64), dim=-1)
    erase = read * torch.rand(k.shape, generator=g, dtype=torch.float64)
    return [q, k, v, log_a, (read * log_a.detach().exp()).requires_grad_(), erase.requires_grad_(), state]


def flat(tensors):
    return torch.cat([z.flatten() for z in tensors])


def gradients(out, inputs):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True)


def agree(ours, theirs, leaves):
    """Outputs and states to 1e-10, each gradient to 1e-8 of all of them."""
    ours, theirs = flat(ours), flat(theirs)
    assert relative_error(ours, theirs) < 1e-10
    found, expected = gradients(ours, leaves), gradients(theirs, leaves)
    size = flat(expected).norm()
    for one, other in zip(found, expected):
        assert (one - other).norm() < 1e-8 * max(other.norm(), 1e-6 * size)


# the modes


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_modes_equal_the_definition(length, per_head):
    q, k, v, beta, log_a, state = leaves = example(length, per_head=per_head)
    expected = delta_definition(q, k, v, beta, log_a, state)
    for mode in MODES:
        ours = delta_rule(q, k, v, beta, log_a, mode=mode, initial_state=state, return_state=True)
        assert all(one.shape == other.shape for one, other in zip(ours, expected))
        agree(ours, expected, leaves)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_modes_of_the_general_rule(length, per_head):
    *inputs, state = leaves = general_example(length, per_head=per_head)
    expected = definition(*inputs, state)
    for mode in MODES:
        agree(generalized_delta_rule(*inputs, mode=mode, initial_state=state, return_state=True), expected, leaves)


@pytest.mark.parametrize("mode", MODES)
def test_without_gate_and_state(mode):
    q, k, v, beta, log_a, state = example(65)
    expected = delta_definition(q, k, v, beta, torch.zeros_like(log_a), torch.zeros_like(state))[0]
    agree([delta_rule(q, k, v, beta, mode=mode)], [expected], [q, k, v, beta])


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 40), batch=st.integers(1, 3), heads=st.integers(1, 4), key=st.integers(1, 5),
       value=st.integers(1, 5), per_head=st.booleans(), size=st.integers(1, 50), seed=st.integers(0, 2**16))
def test_any_shape(length, batch, heads, key, value, per_head, size, seed):
    q, k, v, beta, log_a, state = example(length, heads, key, value, per_head, batch, seed)
    expected = flat(delta_definition(q, k, v, beta, log_a, state))
    for mode in MODES:
        ours = delta_rule(q, k, v, beta, log_a, mode=mode, chunk_size=size, initial_state=state, return_state=True)
        assert relative_error(flat(ours), expected) < 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_head", [True, False])
def test_gradcheck(mode, per_head):
    inputs = general_example(5, heads=1, key=2, value=2, batch=1, per_head=per_head, gates=(-0.1, -1.0))

    def function(*z):
        return generalized_delta_rule(*z[:6], mode=mode, chunk_size=2, initial_state=z[6], return_state=True)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_sequence_in_pieces(mode):
    q, k, v, beta, log_a, start = example(150)
    whole = delta_rule(q, k, v, beta, log_a, mode=mode, initial_state=start, return_state=True)
    pieces, state = [], start
    for i, j in ((0, 1), (1, 65), (65, 70), (70, 150)):
        parts = (z[:, i:j] for z in (q, k, v, beta, log_a))
        y, state = delta_rule(*parts, mode=mode, initial_state=state, return_state=True)
        pieces.append(y)
    assert relative_error(torch.cat(pieces, 1), whole[0]) < 1e-12 and relative_error(state, whole[1]) < 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("log_a", [0.0, -1e-6, -1e-3, -0.3, -50.0, "mixed"])
@torch.no_grad()
def test_float32_over_long_texts(mode, per_head, log_a):
    """All betas from 0 to 2. The scan holds a matrix for each token; one solve over all of the text loses digits."""
    length = {"scan": 1024, "attention": 512}.get(mode, 4096)
    q, k, v, beta, gates, state = example(length, heads=1, key=8, value=8, per_head=per_head, batch=1,
                                          betas=(0.0, 0.3, 1.0, 1.7, 2.0))
    gates = gates if log_a == "mixed" else torch.full_like(gates, log_a)
    inputs = [z.float() for z in (q, k, v, beta, gates, state)]
    exact = delta_definition(*(z.double() for z in inputs))
    ours = delta_rule(*inputs[:5], mode=mode, initial_state=inputs[5], return_state=True)
    assert relative_error(ours[0], exact[0]) < 1e-5 and relative_error(ours[1], exact[1]) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_head", [True, False])
def test_extreme_gates_are_finite(mode, per_head):
    inputs = example(130, per_head=per_head, gates=(0.0, -1e-6, -50.0, -5000.0, -1e30, -math.inf))
    inputs = [z.detach().float().requires_grad_() for z in inputs]
    out = delta_rule(*inputs[:5], mode=mode, initial_state=inputs[5])
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("mode", MODES)
def test_a_gate_of_zero_separates_documents(mode):
    q, k, v, beta, log_a, state = example(150, gates=(-1e-6, -0.3))
    edges, gates = [0, 1, 64, 100, 150], log_a.detach().clone()
    gates[:, edges[:-1]] = -math.inf
    packed = delta_rule(q, k, v, beta, gates, mode=mode, initial_state=state)
    pieces = ([z[:, i:j] for z in (q, k, v, beta, log_a)] for i, j in zip(edges, edges[1:]))
    alone = torch.cat([delta_definition(*piece, torch.zeros_like(state))[0] for piece in pieces], 1)
    assert torch.autograd.grad(packed.sum(), state, retain_graph=True)[0].abs().max() < 1e-12
    agree([packed], [alone], [q, k, v, beta])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@torch.no_grad()
def test_half_precision_rounds_only_the_result(mode, dtype, bound):
    inputs = [z.to(dtype) for z in example(100)]
    exact = delta_definition(*(z.double() for z in inputs))
    y, state = delta_rule(*inputs[:5], mode=mode, initial_state=inputs[5], return_state=True)
    assert y.dtype == dtype and state.dtype == torch.float32
    assert relative_error(y, exact[0]) < bound and relative_error(state, exact[1]) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_inputs_and_state_are_left_alone(mode):
    inputs = example(20)
    before = [z.clone() for z in inputs]
    delta_rule(*inputs[:5], mode=mode, initial_state=inputs[5], return_state=True)
    assert all(torch.equal(z, old) for z, old in zip(inputs, before))


# the matrix, special cases, peers


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("per_head", [True, False])
def test_matrix_times_v(length, per_head):
    q, k, v, beta, log_a, _ = example(length, per_head=per_head)
    T, y = delta_matrix(q, k, beta, log_a), delta_rule(q, k, v, beta, log_a, mode="recurrent")
    assert T.shape == (2, 3, length, length) and torch.equal(T, T.tril())
    leaves = [q, k, v, beta] if length == 1 else [q, k, v, beta, log_a]
    agree([torch.einsum("bhts,bshp->bthp", T, v)], [y], leaves)
    *inputs, _ = general_example(length, per_head=per_head)
    T = generalized_delta_matrix(*inputs[:2], *inputs[3:])
    assert relative_error(torch.einsum("bhts,bshp->bthp", T, v), generalized_delta_rule(*inputs)) < 1e-10


def test_special_cases():
    q, k, v, beta, log_a, _ = example(70, per_head=False)
    none, head = torch.zeros_like(k), log_a[..., :1]
    assert relative_error(generalized_delta_rule(q, k, v, log_a, none, none), gateloop(q, k, v, log_a)) < 1e-12
    assert relative_error(generalized_delta_rule(q, k, v, head, none, none), ssd(v, head[..., 0], k, q)) < 1e-12
    write = beta[..., None] * k
    assert relative_error(generalized_delta_rule(q, write, v, log_a, log_a.exp() * k, write),
                          delta_rule(q, k, v, beta, log_a)) < 1e-12


def peer(module):
    """A module of flash-linear-attention, which the extra `peers` installs; skipped without it."""
    return pytest.importorskip(module, reason="the extra peers brings it")


def of_fla(length=64, per_head=True):
    """Inputs in float32 with heads first, theirs, and as they are."""
    inputs = [z.detach().float() for z in example(length, key=8, value=8, per_head=per_head)]
    return inputs, [z.transpose(1, 2) for z in inputs[:5]]


@pytest.mark.filterwarnings("ignore:Triton is not supported")
def test_equal_to_their_delta_rule():
    naive = peer("fla.ops.delta_rule.naive")
    (q, k, v, beta, _, state), (fq, fk, fv, fbeta, _) = of_fla()
    y, last = naive.delta_rule_recurrence(fq * q.shape[-1] ** 0.5, fk, fv, fbeta, state)
    ours = delta_rule(q, k, v, beta, initial_state=state, return_state=True)
    assert relative_error(ours[0], y.transpose(1, 2)) < 1e-5 and relative_error(ours[1], last) < 1e-5


@pytest.mark.filterwarnings("ignore:Triton is not supported")
def test_equal_to_their_gated_delta_rule():
    naive = peer("fla.ops.gated_delta_rule.naive")
    (q, k, v, beta, log_a, state), _ = of_fla()
    y, last = naive.naive_recurrent_gated_delta_rule(q, k, v, beta, log_a[..., 0], scale=1.0, initial_state=state,
                                                     output_final_state=True)
    ours = delta_rule(q, k, v, beta, log_a, initial_state=state, return_state=True)
    assert relative_error(ours[0], y) < 1e-5 and relative_error(ours[1], last) < 1e-5


@pytest.mark.filterwarnings("ignore:Triton is not supported")
def test_equal_to_their_gate_for_each_channel():
    naive = peer("fla.ops.kda.naive")
    (q, k, v, beta, log_a, state), _ = of_fla(per_head=False)
    y, last = naive.naive_recurrent_kda(q, k, v, log_a, beta, scale=1.0, initial_state=state, output_final_state=True)
    ours = delta_rule(q, k, v, beta, log_a, initial_state=state, return_state=True)
    assert relative_error(ours[0], y) < 1e-5 and relative_error(ours[1], last) < 1e-5


@pytest.mark.filterwarnings("ignore:Triton is not supported")
def test_equal_to_their_diagonal_plus_low_rank():
    """Their alpha is what is read, their beta, with the other sign, what is erased."""
    naive = peer("fla.ops.generalized_delta_rule.dplr.naive")
    *inputs, state = (z.detach().float() for z in general_example(64, key=8, value=8, per_head=False))
    q, k, v, log_a, read, erase = (z.transpose(1, 2) for z in inputs)
    y, last = naive.dplr_recurrence(q * q.shape[-1] ** 0.5, k, v, read, -erase, log_a, state)
    ours = generalized_delta_rule(*inputs, initial_state=state, return_state=True)
    assert relative_error(ours[0], y.transpose(1, 2)) < 1e-5 and relative_error(ours[1], last) < 1e-5


# what it can do


@pytest.mark.parametrize("mode", MODES)
def test_the_last_value_of_a_key_is_read(mode):
    places = torch.randint(4, (1, 90), generator=torch.Generator().manual_seed(0))
    k, v = torch.eye(4).double()[places][:, :, None], torch.randn(1, 90, 1, 3, dtype=torch.float64)
    _, state = delta_rule(k, k, v, torch.ones(1, 90, 1).double(), mode=mode, return_state=True)
    last = torch.stack([v[0, (places[0] == i).nonzero().max(), 0] for i in range(4)])
    assert relative_error(state[0, 0], last) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_parity_and_swaps(mode):
    g = torch.Generator().manual_seed(0)
    bits, one = torch.randint(2, (1, 700), generator=g), torch.ones(1, 700, 1, 1).double()
    start = torch.ones(1, 1, 1, 1).double()
    sign = delta_rule(one, one, 0 * one, 2.0 * bits[..., None], mode=mode, initial_state=start)
    assert torch.equal((sign.flatten() < 0).long(), bits[0].cumsum(0) % 2)
    swaps, cups = [torch.randperm(5, generator=g)[:2].tolist() for _ in range(300)], list(range(5))
    k = torch.zeros(1, 300, 1, 5).double()
    for t, (i, j) in enumerate(swaps):
        cups[i], cups[j] = cups[j], cups[i]
        k[0, t, 0, i], k[0, t, 0, j] = 0.5**0.5, -(0.5**0.5)
    begin = torch.eye(5).double()[None, None]
    _, state = delta_rule(k, k, 0 * k, torch.full((1, 300, 1), 2.0).double(), mode=mode, initial_state=begin,
                          return_state=True)
    assert torch.allclose(state[0, 0], torch.eye(5).double()[cups], atol=1e-10)


# wrong arguments


@pytest.mark.parametrize("change, message", [
    (dict(log_a=torch.ones(2, 9, 3, 1)), "log_a reaches 1"),
    (dict(beta=torch.ones(2, 9, 2)), "beta has shape"),
    (dict(v=torch.ones(2, 8, 3, 5)), "v has shape"),
    (dict(k=torch.ones(2, 9, 3, 4).long()), "k is torch.int64"),
    (dict(k=torch.ones(2, 9, 3, 4).double()), "k is torch.float64"),
    (dict(mode="fast"), "mode is 'fast'"),
    (dict(chunk_size=0), "chunk_size is 0"),
    (dict(initial_state=torch.ones(2, 3, 5, 4)), "initial_state has shape"),
])
def test_wrong_arguments_are_named(change, message):
    names = ("q", "k", "v", "beta", "log_a")
    inputs = dict(zip(names, (z.detach().float() for z in example(9))))
    with pytest.raises(ValueError) as error:
        delta_rule(**inputs | change)
    assert one_line(error).startswith(message)


def test_wrong_arguments_of_the_general_rule():
    inputs = [z.detach() for z in general_example(9)[:6]]
    with pytest.raises(ValueError, match="read has shape"):
        generalized_delta_rule(*inputs[:4], inputs[4][..., :2], inputs[5])
    with pytest.raises(ValueError, match="q has len = 0"):
        generalized_delta_rule(*(z[:, :0] for z in inputs))
    with pytest.raises(ValueError, match="read has shape"):
        generalized_delta_matrix(*inputs[:2], inputs[3], inputs[4][:, :3], inputs[5])


@pytest.mark.parametrize("kind", [lambda **sizes: GatedDeltaNet(d_state=3, **sizes), RWKV7])
@pytest.mark.parametrize("change, message", [
    (dict(n_heads=3), "n_heads is 3"), (dict(mode="fast"), "mode is 'fast'"), (dict(chunk_size=0), "chunk_size is 0"),
    (dict(d_model=0), "d_model is 0")])
def test_wrong_sizes_of_a_mixer(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**dict(d_model=16, n_heads=4) | change)


# the mixers

MIXERS = {
    "gated": lambda: GatedDeltaNet(16, 4, 3, chunk_size=16),
    "gated, recurrent": lambda: GatedDeltaNet(16, 4, 3, mode="recurrent"),
    "gated, scan": lambda: GatedDeltaNet(16, 4, 3, mode="scan"),
    "reflecting": lambda: GatedDeltaNet(16, 2, 6, reflect=True, chunk_size=16),
    "ungated": lambda: GatedDeltaNet(16, 4, 3, gated=False, chunk_size=16),
    "rwkv7": lambda: RWKV7(16, 4, rank=3, chunk_size=16),
}


def model(name, layers=2, vocab=48):
    torch.manual_seed(0)
    return shaken(Decoder(Backbone([MIXERS[name]() for _ in range(layers)], vocab, 16, 24), True)).double()


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_step_and_matrix_equal_forward(name):
    torch.manual_seed(0)
    mixer, u = shaken(MIXERS[name]()).double(), torch.randn(2, 70, 16, dtype=torch.float64)
    y, last = mixer(u, mixer.init_state(2))
    state, steps = mixer.init_state(2), []
    for u_t in u.unbind(1):
        y_t, state = mixer.step(u_t, state)
        steps.append(y_t)
    assert relative_error(mixer(u), y) < 1e-12 and relative_error(torch.stack(steps, 1), y) < 1e-12
    assert all(relative_error(one, other) < 1e-12 for one, other in zip(state, last))
    inputs, rest, _ = mixer.project(u, None, None, None)
    seen, own = torch.einsum("bhts,bshp->bthp", mixer.matrix(u), inputs[2]), [z.clone() for z in inputs]
    if isinstance(mixer, RWKV7):  # the matrix has the bonus already
        mixer.rho.zero_()
    assert relative_error(mixer.finish(seen, own, rest), y) < 1e-10


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_prefill_and_step_in_a_decoder(name):
    net, ids = model(name), torch.randint(48, (2, 40), generator=torch.Generator().manual_seed(1))
    whole = net(ids)
    for split in (1, 15, 16, 39):
        logits, state = net.prefill(ids[:, :split])
        parts = [logits]
        for token in ids[:, split:].unbind(1):
            logits, state = net.step(token, state)
            parts.append(logits[:, None])
        assert relative_error(torch.cat(parts, 1), whole) < 1e-10
    assert net.generate(ids[:, :5], 7).shape == (2, 12)


@pytest.mark.parametrize("name", MIXERS)
def test_documents_in_a_row_are_separate_documents(name):
    edges, net = (0, 1, 2, 5, 16, 32, 37, 40), model(name)
    ids = torch.randint(48, (2, 40), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros(2, 40, dtype=torch.bool).index_fill(1, torch.tensor(edges[:-1]), True)
    packed = net(ids, starts=starts)
    alone = torch.cat([net(ids[:, i:j]) for i, j in zip(edges, edges[1:])], 1)
    assert relative_error(packed, alone) < 1e-10
    found, expected = (torch.autograd.grad(y.square().sum(), list(net.parameters())) for y in (packed, alone))
    assert relative_error(flat(found), flat(expected)) < 1e-8
    for layer in net.walk(ids, starts):
        matrix, inside = layer.matrix(), starts.cumsum(1)
        assert not matrix.masked_fill((inside[:, :, None] == inside[:, None])[:, None], 0).any()


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_padding_is_as_good_as_absent(name):
    net, ids = model(name), torch.randint(48, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    logits, state = net.prefill(ids, attention_mask=mask)
    short, after = net.prefill(ids[:1, 11:])
    assert relative_error(logits[:1, 11:], short) < 1e-12
    assert relative_error(state[1].state[:1], after[1].state) < 1e-12


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_and_autocast(name):
    net, u = shaken(MIXERS[name]()), torch.randn(2, 20, 16)
    exact = net(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = net(u, net.init_state(2))
    assert relative_error(y.float(), exact) < 0.05 and state.state.dtype == torch.float32
    net = net.bfloat16()
    y, state = net(u.bfloat16(), net.init_state(2))
    assert y.dtype == torch.bfloat16 and state.state.dtype == torch.float32
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_keys_have_length_one_and_zeros_a_gradient():
    z = torch.cat([torch.zeros(1, 8), torch.randn(5, 8)]).requires_grad_()
    unit = unit_length(z)
    assert unit[0].eq(0).all() and (unit[1:].norm(dim=-1) - 1).abs().max() < 1e-5
    assert torch.autograd.grad(unit.sum(), z)[0].abs().max() <= 1001


LANGUAGE_MODELS = [
    GatedDeltaNetLM(GatedDeltaNetConfig(vocab_size=48, d_model=16, n_layer=2, n_heads=4, intermediate_size=24,
                                        d_state=3, d_conv=3, reflect=True, gated=False, chunk_size=8)),
    RWKV7LM(RWKV7Config(vocab_size=48, d_model=16, n_layer=2, n_heads=4, intermediate_size=24, rank=3,
                        tie_embeddings=False))]


@pytest.mark.parametrize("net", LANGUAGE_MODELS, ids=lambda net: type(net).__name__)
def test_language_models_are_saved_and_loaded(net, tmp_path):
    net, ids = shaken(net), torch.randint(48, (2, 20))
    net.save_pretrained(tmp_path / "model")
    loaded = KINDS[net.config.model_type].from_pretrained(tmp_path / "model")
    assert type(loaded) is type(net) and repr(loaded.config) == repr(net.config)
    assert torch.equal(loaded(ids), net(ids)) and torch.equal(loaded.generate(ids, 5), net.generate(ids, 5))


@pytest.mark.parametrize("net", LANGUAGE_MODELS, ids=lambda net: type(net).__name__)
def test_what_is_loaded_may_be_refused(net, tmp_path):
    net.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"n_heads": 3}))
    with pytest.raises(ValueError, match="n_heads is 3: it must divide d_model = 16") as error:
        type(net).from_pretrained(tmp_path / "model")
    one_line(error)


def test_a_student_with_other_mixers_is_not_saved(tmp_path):
    """Its config still speaks of attention: nobody could load the files."""
    student = with_mixers(Llama(llama_config()), lambda _: GatedDeltaNet(16, 4, 4))
    with pytest.raises(ValueError, match="differs in it from its LlamaConfig.*cannot be saved") as error:
        student.save_pretrained(tmp_path / "student")
    one_line(error)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_documents_behind_padding(name):
    torch.manual_seed(0)
    mixer, u = shaken(MIXERS[name]()).double(), torch.randn(2, 40, 16, dtype=torch.float64)
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[0, [5, 20]] = True  # the first lies in the padding
    y = mixer(u, padding=torch.tensor([9, 0]), starts=starts)
    apart = torch.cat([mixer(u[:1, 9:20]), mixer(u[:1, 20:])], 1)
    assert relative_error(y[:1, 9:], apart) < 1e-10 and relative_error(y[1:], mixer(u[1:])) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_gradients_where_everything_is_forgotten(mode):
    q, k, v, beta, log_a, state = example(6, heads=1, key=2, value=2, batch=1)
    gates = log_a.detach().index_fill(1, torch.tensor([3]), -math.inf)

    def function(q, k, v, beta, state):
        return delta_rule(q, k, v, beta, gates, mode=mode, chunk_size=4, initial_state=state, return_state=True)

    assert torch.autograd.gradcheck(function, (q, k, v, beta, state))


@pytest.mark.parametrize("mode", MODES)
def test_zero_keys_write_nothing_and_have_gradients(mode):
    q, k, v, beta, log_a, state = example(70)
    k = torch.zeros_like(k).requires_grad_()
    y = delta_rule(q, k, v, beta, mode=mode)
    assert not y.any() and all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [q, k, v, beta]))


def test_a_llama_is_distilled_into_it():
    torch.manual_seed(0)
    teacher = Llama(llama_config())
    student = with_mixers(teacher, lambda _: GatedDeltaNet(16, 4, 4, chunk_size=16))
    assert student.backbone.embedding.weight.data_ptr() != teacher.backbone.embedding.weight.data_ptr()
    before = {name: p.clone() for name, p in student.named_parameters() if ".mixer." not in name}
    blocks = TokenBlocks(torch.randint(48, (8, 24), dtype=torch.int32), 192, 1, 192)
    stages = [Stage("orientation", 12, 1e-2, weight_decay=0.0), Stage("alignment", 12, 1e-2, weight_decay=0.0),
              Stage("distillation", 4, 1e-3)]
    records = distill(teacher, student, Batches(blocks, 4), stages, progress=False)
    losses = {name: [r["loss"] for r in records if r["stage"] == name] for name in ("orientation", "alignment")}
    assert all(values[-1] < values[0] for values in losses.values())
    assert before.keys() <= dict(student.named_parameters()).keys()
