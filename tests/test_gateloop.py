"""GateLoop: every mode against the loop that defines it, its special cases, its mixer and its language model."""

import copy
import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamba_ref.cli import main
from llamba_ref.conventions import relative_error
from llamba_ref.data import train_tokenizer
from llamba_ref.decoder import RMSNorm
from llamba_ref.gateloop import GATELOOP_MODES, GateLoop, gateloop, gateloop_matrix, log_decay_to_end
from llamba_ref.gateloop_lm import GateLoopConfig, GateLoopLM
from llamba_ref.llama import Llama, LlamaConfig, Rope, apply_rope, rope_frequencies
from llamba_ref.models import load_model, save_model
from llamba_ref.mohawk import distill
from llamba_ref.scan import linear_scan
from llamba_ref.ssd import ssd
from llamba_ref.training import Stage

MODES = ("recurrent", "scan", "attention", "chunked")
LENGTHS = (1, 2, 3, 63, 64, 65, 500)
GATES = (0.0, -1e-6, -50.0, -0.3, -1.0)
TURNS = (1e-3, 1.0, 1000.0)  # sizes of the phases
KINDS = {  # do gates turn, are inputs complex
    "real": (False, False),
    "complex gates": (True, False),
    "complex inputs": (False, True),
    "all complex": (True, True),
}
NAMES = ("q", "k", "v", "log_a", "phase", "initial_state")


def definition(q, k, v, log_a, phase=None, initial_state=None):
    """The recurrence, token by token, written without anything from the library."""
    size = log_a.exp()
    a = size if phase is None else torch.complex(size * phase.cos(), size * phase.sin())
    state = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :]) if initial_state is None else initial_state
    outputs = []
    for q_t, k_t, v_t, a_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), a.unbind(1)):
        state = a_t[..., :, None] * state + k_t[..., :, None] * v_t[..., None, :]
        outputs.append((q_t[..., :, None] * state).sum(-2))
    return torch.stack(outputs, 1), state


def example(length, kind="real", batch=2, heads=3, key=4, value=5, per_head=(False, False), gates=GATES, turns=TURNS,
            dtype=torch.float64, seed=0):  # fmt: skip
    """q, k, v, log_a, phase (None unless gates turn) and a state, all with gradients; log_a is drawn from `gates`."""
    generator = torch.Generator().manual_seed(seed)
    (turning, complex_inputs), wide = KINDS[kind], torch.promote_types(dtype, torch.float32)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def values(*shape, complex_too=complex_inputs):
        if complex_too:
            return torch.complex(normal(*shape), normal(*shape)).to(wide.to_complex()).requires_grad_()
        return normal(*shape).to(dtype).requires_grad_()

    def drawn(numbers, shape):
        return torch.tensor(numbers, dtype=torch.float64)[torch.randint(len(numbers), shape, generator=generator)]

    q, k, v = (values(batch, length, heads, size) for size in (key, key, value))
    of_log_a, of_phase = ((batch, length, heads, 1 if shared else key) for shared in per_head)
    log_a = drawn(gates, of_log_a).to(dtype).requires_grad_()
    phase = (drawn(turns, of_phase) * normal(*of_phase)).to(dtype).requires_grad_() if turning else None
    return q, k, v, log_a, phase, values(batch, heads, key, value, complex_too=turning or complex_inputs)


@cache
def case(length, kind, per_head=(False, False), with_state=True):
    """An example, its state or None, and outputs and last state by the definition: computed once for all tests."""
    *inputs, state = example(length, kind, per_head=per_head)
    start = state if with_state else None
    return inputs, start, *definition(*inputs, start)


def given_ones(*tensors) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def each(change, *inputs) -> list:
    """Change every input that was given."""
    return [None if z is None else change(z) for z in inputs]


def widened(*inputs) -> list:
    return each(lambda z: z.to(torch.promote_types(z.dtype, torch.float64)), *inputs)


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradients(out: Tensor, inputs) -> list[Tensor]:
    """Gradients of a fixed random weighting of `out`, of its real and of its imaginary part."""
    wide = torch.complex128 if out.is_complex() else torch.float64
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=wide).to(out.dtype)
    loss = (out * weight).sum()
    return torch.autograd.grad(loss.real if loss.is_complex() else loss, inputs, retain_graph=True)


def run(inputs, start=None, **options) -> Tensor:
    """Outputs and last state in one vector."""
    return flat(gateloop(*inputs, initial_state=start, return_state=True, **options))


# the modes


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_head", [(False, False), (True, True)])
@pytest.mark.parametrize("with_state", [False, True])
def test_modes_equal_the_definition(length, kind, per_head, with_state):
    inputs, start, y, last = case(length, kind, per_head, with_state)
    leaves = given_ones(*inputs, start)
    if length == 1 and not with_state:
        leaves = leaves[:3]  # the first gate meets a zero
    expected = flat([y, last])
    with_gradients = length <= 65 or with_state  # zeros in the place of a state: the longest once is enough
    expected_grads = flat(gradients(expected, leaves)) if with_gradients else None
    for mode in MODES:
        ours, our_last = gateloop(*inputs, mode=mode, initial_state=start, return_state=True)
        assert (ours.shape, ours.dtype, our_last.shape, our_last.dtype) == (y.shape, y.dtype, last.shape, last.dtype)
        out = flat([ours, our_last])
        assert relative_error(out, expected) < 1e-10, mode
        assert not with_gradients or relative_error(flat(gradients(out, leaves)), expected_grads) < 1e-8, mode
        if length <= 65:  # where it is quick: asking for the state changes nothing
            assert torch.equal(gateloop(*inputs, mode=mode, initial_state=start), ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_head", [(False, False), (True, True), (True, False), (False, True)])
def test_each_gradient_by_itself(kind, per_head):
    """One vector of all gradients could hide a wrong small one."""
    *inputs, state = example(70, kind, per_head=per_head, gates=(-1e-6, -0.01, -0.5, -3.0))
    leaves = given_ones(*inputs, state)
    expected = gradients(flat(definition(*inputs, state)), leaves)
    for mode in MODES:
        found = gradients(run(inputs, state, mode=mode, chunk_size=16), leaves)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-8, mode


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64, 65, 100, 1000, 10**15])  # the last costs no more than the sequence
@pytest.mark.parametrize("kind", KINDS)
def test_any_chunk_size(chunk_size, kind):
    inputs, state, y, last = case(65, kind)
    leaves, expected = given_ones(*inputs, state), flat([y, last])
    out = run(inputs, state, mode="chunked", chunk_size=chunk_size)
    assert relative_error(out, expected) < 1e-10
    for ours, theirs in zip(gradients(out, leaves), gradients(expected, leaves)):
        assert relative_error(ours, theirs) < 1e-8


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40), batch=st.integers(1, 3), heads=st.integers(1, 3),
    key=st.integers(1, 5), value=st.integers(1, 5),
    chunk_size=st.integers(1, 50), kind=st.sampled_from(list(KINDS)), per_head=st.tuples(st.booleans(), st.booleans()),
    complex_inputs=st.tuples(*[st.booleans()] * 4), with_state=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(length, batch, heads, key, value, chunk_size, kind, per_head, complex_inputs, with_state, seed):
    """Each of q, k, v and the state real or complex, whatever the others are."""
    q, k, v, log_a, phase, state = example(length, kind, batch, heads, key, value, per_head, seed=seed)
    inputs = zip((q, k, v, state), complex_inputs)
    q, k, v, state = (z if stays or not z.is_complex() else z.real for z, stays in inputs)
    inputs, start = (q, k, v, log_a, phase), state if with_state else None
    y, last = definition(*inputs, start)
    complex_result = phase is not None or any(z.is_complex() for z in given_ones(q, k, v, start))
    for mode in MODES:
        ours, our_last = gateloop(*inputs, mode=mode, chunk_size=chunk_size, initial_state=start, return_state=True)
        assert ours.shape == y.shape and our_last.shape == last.shape
        assert ours.is_complex() == our_last.is_complex() == complex_result
        assert relative_error(ours, y) < 1e-10 and relative_error(our_last, last) < 1e-10
    matrix = gateloop_matrix(q, k, log_a, phase)
    assert matrix.shape == (batch, heads, length, length)
    wide = torch.promote_types(matrix.dtype, v.dtype)
    by_matrix = torch.einsum("bhts,bshp->bthp", matrix.to(wide), v.to(wide))
    assert relative_error(by_matrix, definition(*inputs)[0]) < 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_head", [(False, False), (True, True)])
def test_gradcheck(mode, kind, per_head):
    *inputs, state = example(3, kind, 1, 1, 2, 2, per_head, gates=(-1e-5, -0.1, -1.0), turns=(1.0,))
    names = [name for name, z in zip(NAMES, (*inputs, state)) if z is not None]

    def function(*leaves):
        return gateloop(**dict(zip(names, leaves)), mode=mode, chunk_size=2, return_state=True)

    assert torch.autograd.gradcheck(function, given_ones(*inputs, state))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_inputs_are_left_alone_and_may_be_strided(mode, kind):
    inputs = each(Tensor.detach, *example(20, kind))
    before = each(Tensor.clone, *inputs)
    strided = each(lambda z: z.transpose(0, -1).contiguous().transpose(0, -1), *inputs)
    assert not strided[0].is_contiguous()
    assert relative_error(run(strided[:5], strided[5], mode=mode), run(inputs[:5], inputs[5], mode=mode)) < 1e-14
    for axis in (0, 2):
        expanded = each(lambda z: z.narrow(axis, 0, 1).expand_as(z), *inputs)
        copied = each(Tensor.contiguous, *expanded)
        ours, theirs = (run(z[:5], z[5], mode=mode) for z in (expanded, copied))
        assert relative_error(ours, theirs) < 1e-14
    fixed = each(lambda z: z[:, :1].expand_as(z), *inputs[3:5])  # the same gates at every token
    ours, theirs = (run((*inputs[:3], *gates), mode=mode) for gates in (fixed, each(Tensor.contiguous, *fixed)))
    assert relative_error(ours, theirs) < 1e-14
    assert all(torch.equal(z, old) for z, old in zip(given_ones(*inputs), given_ones(*before)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["complex inputs", "all complex"])
def test_conjugated_inputs(mode, kind):
    """`conj()` is only a mark on a tensor, and some operations do not accept marked ones."""
    q, k, v, log_a, phase, state = example(20, kind)
    inputs = (q.conj(), k.conj(), v.conj(), log_a, phase)
    assert relative_error(run(inputs, state.conj(), mode=mode), flat(definition(*inputs, state.conj()))) < 1e-10
    by_matrix = torch.einsum("bhts,bshp->bthp", gateloop_matrix(q.conj(), k.conj(), log_a, phase), v)
    assert relative_error(by_matrix, definition(q.conj(), k.conj(), v, log_a, phase)[0]) < 1e-10


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_later_tokens_do_not_reach_back(mode):
    *inputs, state = example(100, "complex gates", turns=(1.0,))
    changed = [torch.cat([z[:, :60], -torch.rand_like(z[:, 60:])], 1) for z in inputs]
    early, other = (gateloop(*z, mode=mode, initial_state=state) for z in (inputs, changed))
    assert relative_error(other[:, :60], early[:, :60]) < 1e-14 < 1e-3 < relative_error(other[:, 60:], early[:, 60:])


# going on


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prefill_and_go_on_at_every_split(mode, kind):
    inputs, start, whole, last = case(40, kind)
    for k in range(1, 40):
        first, rest = (each(lambda z: z[:, part], *inputs) for part in (slice(k), slice(k, None)))
        early, state = gateloop(*first, mode=mode, chunk_size=16, initial_state=start, return_state=True)
        late, state = gateloop(*rest, mode=mode, chunk_size=16, initial_state=state, return_state=True)
        assert relative_error(torch.cat([early, late], 1), whole) < 1e-10 and relative_error(state, last) < 1e-10, k


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_pieces(mode, kind):
    inputs, start, *expected = case(150, kind)
    pieces, state = [], start
    for i, j in ((0, 1), (1, 65), (65, 70), (70, 150)):
        y, state = gateloop(*each(lambda z: z[:, i:j], *inputs), mode=mode, initial_state=state, return_state=True)
        pieces.append(y)
    out, expected, leaves = flat([torch.cat(pieces, 1), state]), flat(expected), given_ones(*inputs, start)
    assert relative_error(out, expected) < 1e-10
    for ours, theirs in zip(gradients(out, leaves), gradients(expected, leaves)):
        assert relative_error(ours, theirs) < 1e-8


@pytest.mark.parametrize("mode", MODES)
def test_a_state_is_not_changed_and_keeps_float32_token_by_token(mode):
    long = example(1024, "complex gates", 1, 2, gates=(-1e-6,), turns=(1.0,), dtype=torch.float32)
    *inputs, start = each(Tensor.detach, *long)
    exact = definition(*widened(*inputs, start))[1]
    state, kept = start, start.clone()
    for t in range(1024):
        token = each(lambda z: z[:, t : t + 1], *inputs)
        _, state = gateloop(*token, mode=mode, initial_state=state, return_state=True)
    assert torch.equal(start, kept) and relative_error(state, exact) < 1e-5


# numerics


UNIFORM = torch.rand(4096, 3, generator=torch.Generator().manual_seed(5))
CONSTANT = (0.0, -1e-7, -1e-6, -1e-5, -1e-4, -1e-3, -0.1, -50.0)
LONG_GATES = {str(gate): torch.full_like(UNIFORM, gate) for gate in CONSTANT} | {
    "resets": torch.where(UNIFORM < 0.01, -50.0, -1e-6),
    "rare resets": torch.where(UNIFORM < 0.002, -50.0, -1e-4 * UNIFORM),
    "log-uniform": -(10.0 ** (8.7 * UNIFORM - 7)),
    "everyday": -F.softplus(4 * UNIFORM - 6),
}
LONG_PHASES = {
    "real": None,
    "random": 3 * torch.randn(4096, 3, generator=torch.Generator().manual_seed(6)),
    "constant": torch.tensor([0.01, 0.3, -2.0]).expand(4096, 3),
}


def long_example(turns, positive, length=4096):
    """q, k, v, log_a and phase in float32, one head, a row for each kind of gate."""
    generator = torch.Generator().manual_seed(8)
    log_a = torch.stack([gates[:length] for gates in LONG_GATES.values()])[:, :, None]
    q, k, v = (torch.randn(len(log_a), length, 1, size, generator=generator) for size in (3, 3, 2))
    phase = None if LONG_PHASES[turns] is None else LONG_PHASES[turns][:length, None].expand_as(log_a)
    if positive:  # then nothing averages out
        q, k, v = q.abs(), k.abs(), v.abs()
    return q, k, v, log_a, phase


@cache
def long_case(turning):
    """What each row is, all long examples whose gates turn, or all others, as rows, and the definition of each."""
    kinds = [(turns, positive) for turns in LONG_PHASES for positive in (False, True) if (turns != "real") == turning]
    rows = [(*kind, gate) for kind in kinds for gate in LONG_GATES]
    inputs = [torch.cat(z) if turning or z[0] is not None else None for z in zip(*(long_example(*z) for z in kinds))]
    return rows, inputs, *definition(*widened(*inputs))


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("mode, size", [("recurrent", 64), ("scan", 64), ("chunked", 64), ("chunked", 4)])
def test_float32_over_4096_tokens(turning, mode, size):
    rows, inputs, y, last = long_case(turning)
    ours, our_last = gateloop(*inputs, mode=mode, chunk_size=size, return_state=True)
    for row, kind in enumerate(rows):
        assert relative_error(ours[row], y[row]) < 1e-5 and relative_error(our_last[row], last[row]) < 1e-5, kind


@pytest.mark.parametrize("turning", [False, True])
def test_attention_in_float32_over_4096_tokens(turning):
    """A matrix of 4096 x 4096 takes its time: each kind of gate once, real, and once with one of the phases in turn.

    All pairs of a gate and a phase are in `test_float32_gradients`, at 1024 tokens."""
    rows, inputs, y, _ = long_case(turning)
    for number, gate in enumerate(LONG_GATES):
        kind = (("random", True), ("constant", False))[number % 2] if turning else ("real", True)
        row = rows.index((*kind, gate))
        ours = gateloop(*each(lambda z: z[row : row + 1], *inputs), mode="attention")
        assert relative_error(ours[0], y[row]) < 1e-5, rows[row]


def float32_gradient_errors(*inputs):
    """For each mode and each input, the error of the gradient in each row."""
    wide, narrow = ([z.to(dtype).requires_grad_() for z in inputs] for dtype in (torch.float64, torch.float32))
    expected = gradients(definition(*wide)[0], wide)
    for mode in MODES:
        found = gradients(gateloop(*narrow, mode=mode), narrow)
        for name, outs, refs in zip(NAMES, found, expected):
            yield mode, name, [relative_error(out, ref) for out, ref in zip(outs, refs)]


@pytest.mark.parametrize("turns", LONG_PHASES)
def test_float32_gradients(turns):
    for mode, name, errors in float32_gradient_errors(*given_ones(*long_example(turns, False, 1024))):
        for kind, error in zip(LONG_GATES, errors):
            if (name, kind) != ("phase", "-50.0"):  # see the next test
                assert error < 1e-5, (mode, name, kind)


def test_float32_phase_gradients_where_most_is_forgotten():
    """There they are small beside all others, and a form that adds large terms of opposite sign loses them."""
    q, k, v, phase = (torch.randn(3, 1024, 1, 3) for _ in range(4))
    log_a = torch.tensor([-3.0, -10.0, -50.0])[:, None, None, None].expand_as(q)
    for mode, name, errors in float32_gradient_errors(q, k, v, log_a, phase):
        assert name != "phase" or max(errors) < 1e-5, (mode, errors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates_stay_finite(mode, kind, dtype):
    *inputs, state = example(130, kind, gates=(0.0, -1e-6, -1.0, -50.0, -5000.0, -1e30, -torch.inf), dtype=dtype)
    out = run(inputs, state, mode=mode)
    matrix = gateloop_matrix(*inputs[:2], *inputs[3:])
    assert out.isfinite().all() and matrix.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(out, given_ones(*inputs, state)))
    assert all(grad.isfinite().all() for grad in gradients(matrix, given_ones(*inputs[:2], *inputs[3:])))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_of_zero_separates_documents(mode, kind):
    q, k, v, log_a, phase, state = example(150, kind, gates=(-1e-6, -0.3))
    edges = [0, 1, 64, 100, 150]
    gates = log_a.detach().clone()
    gates[:, edges[:-1]] = -torch.inf
    packed = gateloop(q, k, v, gates, phase, mode=mode, initial_state=state)
    pieces = (each(lambda z: z[:, i:j], q, k, v, log_a, phase) for i, j in zip(edges, edges[1:]))
    alone = torch.cat([definition(*piece)[0] for piece in pieces], 1)
    *grads, of_state = gradients(packed, [q, k, v, state])
    assert relative_error(packed, alone) < 1e-10 and not of_state.any()
    assert relative_error(flat(grads), flat(gradients(alone, [q, k, v]))) < 1e-8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["real", "complex gates"])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_rounds_only_the_result(mode, kind, dtype, bound):
    inputs = each(Tensor.detach, *example(300, kind, gates=(-1e-3, -0.01, -0.5), turns=(1.0,), dtype=dtype))
    y, last = gateloop(*inputs[:5], mode=mode, initial_state=inputs[5], return_state=True)
    exact, exact_last = definition(*widened(*inputs))
    assert (y.dtype, last.dtype) == ((dtype, torch.float32) if kind == "real" else (torch.complex64, torch.complex64))
    assert relative_error(y, exact) < (bound if kind == "real" else 1e-5) and relative_error(last, exact_last) < 1e-5
    assert gateloop_matrix(*inputs[:2], *inputs[3:5]).dtype == y.dtype


@pytest.mark.parametrize("mode", MODES)
def test_types_of_results(mode):
    zeros = torch.zeros(1, 2, 1, 1)
    for narrow in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        wide = torch.promote_types(narrow, torch.float32)
        values = [narrow] + [narrow.to_complex()] * (narrow == wide)  # no complex numbers in half precision
        for q, k, v in ((q, k, v) for q in values for k in values for v in values):
            for of_gates in (torch.bfloat16, torch.float32, torch.float64):
                for of_phase in (None, torch.float32, torch.float64):
                    y, state = gateloop(*each(zeros.to, q, k, v, of_gates, of_phase), mode=mode, return_state=True)
                    widest = torch.promote_types(torch.promote_types(wide, of_gates), of_phase or of_gates)
                    turning = of_phase is not None or any(dtype.is_complex for dtype in (q, k, v))
                    expected = (wide.to_complex(), widest.to_complex()) if turning else (narrow, widest)
                    assert (y.dtype, state.dtype) == expected, (q, k, v, of_gates, of_phase)


@pytest.mark.parametrize("mode", MODES)
def test_gates_may_be_wider_than_values(mode):
    inputs = each(Tensor.detach, *example(200, "complex gates", gates=(-1e-6, -0.01), dtype=torch.float32))
    halves = [*each(Tensor.bfloat16, *inputs[:3]), *inputs[3:5]]
    y, last = gateloop(*halves, mode=mode, initial_state=inputs[5], return_state=True)
    exact, exact_last = definition(*widened(*halves, inputs[5]))
    assert y.dtype == torch.complex64 and relative_error(y, exact) < 1e-5 and relative_error(last, exact_last) < 1e-5
    y = gateloop(*inputs[:3], *each(Tensor.double, *inputs[3:5]), mode=mode)
    exact = definition(*widened(*inputs[:5]))[0]
    assert y.dtype == torch.complex64 and relative_error(y, exact) < 5e-8  # rounded once, at the end
    y = gateloop(*inputs[:5], mode=mode, initial_state=inputs[5].to(torch.complex128))
    assert relative_error(y, definition(*widened(*inputs))[0]) < 5e-8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_narrow(mode, kind):
    *inputs, state = example(65, kind, dtype=torch.float32)
    plain, matrix = run(inputs, state, mode=mode), gateloop_matrix(*inputs[:2], *inputs[3:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, ours = run(inputs, state, mode=mode), gateloop_matrix(*inputs[:2], *inputs[3:])
    assert torch.equal(out, plain) and torch.equal(ours, matrix)
    leaves = given_ones(*inputs, state)
    assert all(torch.equal(one, other) for one, other in zip(gradients(out, leaves), gradients(plain, leaves)))


def test_log_decay_to_end_is_its_definition():
    log_a = torch.tensor([*GATES, -torch.inf], dtype=torch.float64).repeat(2, 3, 1).mT
    log_a = torch.cat([log_a, log_a[:, :5] - 0.7], 1)
    sums = log_decay_to_end(log_a)
    for t in range(log_a.shape[1]):
        assert torch.allclose(sums[:, t], log_a[:, t + 1 :].sum(1), rtol=1e-14, atol=0)
    assert sums.shape == log_a.shape and log_decay_to_end(log_a[:, :1]).tolist() == [[[0.0] * 3]] * 2


def test_log_decay_to_end_does_not_cancel():
    """The total less the running sum is the same on paper, and loses small decays behind a large one."""
    log_a = torch.full((1000, 1), -1e-4)
    log_a[3] = -5000.0
    exact = log_decay_to_end(log_a.double())
    assert relative_error(log_decay_to_end(log_a)[3:], exact[3:]) < 1e-6
    assert relative_error((log_a.sum(0) - log_a.cumsum(0))[3:], exact[3:]) > 1e-3


# the matrix


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_head", [(False, False), (True, True)])
def test_matrix_times_v(length, kind, per_head):
    (q, k, v, log_a, phase), _, expected, _ = case(length, kind, per_head, with_state=False)
    matrix = gateloop_matrix(q, k, log_a, phase)
    assert matrix.shape == (2, 3, length, length) and torch.equal(matrix, matrix.tril())
    assert matrix.dtype == (torch.float64 if kind == "real" else torch.complex128)
    by_matrix = torch.einsum("bhts,bshp->bthp", matrix, v.to(matrix.dtype))
    assert relative_error(by_matrix, expected) < 1e-10
    leaves = given_ones(q, k, v, log_a, phase) if length > 1 else [q, k, v]
    assert relative_error(flat(gradients(by_matrix, leaves)), flat(gradients(expected, leaves))) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_entry_by_entry(kind):
    q, k, _, log_a, phase, _ = example(9, kind, 1, 1)
    matrix = gateloop_matrix(q, k, log_a, phase)[0, 0]
    for t in range(9):
        for s in range(t + 1):
            gate = log_a[0, s + 1 : t + 1, 0].sum(0).exp()
            if phase is not None:
                gate = gate * torch.exp(1j * phase[0, s + 1 : t + 1, 0].sum(0))
            assert relative_error(matrix[t, s], (q[0, t, 0] * k[0, s, 0] * gate).sum()) < 1e-10


def test_gradient_of_the_matrix():
    *inputs, _ = example(7, "all complex", 1, 1, 2, gates=(-1e-5, -0.1, -1.0), turns=(1.0,))
    assert torch.autograd.gradcheck(gateloop_matrix, (*inputs[:2], *inputs[3:]))


# special cases


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_real_gate_a_head_is_ssd(mode, groups):
    """Mamba-2's recurrence: queries C, keys B, values x, the state on its side."""
    C, B, x, log_a, _, state = example(100, heads=4, per_head=(True, True))
    B, C = B[:, :, :groups], C[:, :, :groups]
    y, last = ssd(x, log_a[..., 0], B, C, initial_state=state.mT, return_state=True)
    B, C = (z.repeat_interleave(4 // groups, 2) for z in (B, C))
    ours, our_last = gateloop(C, B, x, log_a, mode=mode, initial_state=state, return_state=True)
    assert relative_error(ours, y) < 1e-10 and relative_error(our_last.mT, last) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_gates_of_one_are_linear_attention(mode):
    q, k, v = (torch.randn(2, 3, 100, 4, dtype=torch.float64) for _ in range(3))
    attended = (q @ k.mT).tril() @ v
    ours = gateloop(*(z.transpose(1, 2) for z in (q, k, v)), torch.zeros(2, 100, 3, 1, dtype=torch.float64), mode=mode)
    assert relative_error(ours.transpose(1, 2), attended) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_fixed_gates_are_a_state_space_model(mode):
    """LRU and S4D: y = Re(C h), h = lambda h + B u with fixed B, C and lambda is a convolution, done here by FFT."""
    length, states = 300, 4
    u = torch.randn(length, dtype=torch.float64)
    B, C = (torch.randn(states, dtype=torch.complex128) for _ in range(2))
    log_a, phase = -torch.rand(states, dtype=torch.float64), 3 * torch.randn(states, dtype=torch.float64)
    kernel = (torch.exp(torch.outer(torch.arange(length), torch.complex(log_a, phase))) * B * C).sum(1).real
    by_fft = torch.fft.irfft(torch.fft.rfft(kernel, 2 * length) * torch.fft.rfft(u, 2 * length))[:length]
    q, k, log_a, phase = (z.expand(1, length, 1, states) for z in (C, B, log_a, phase))
    y = gateloop(q, k, u.to(torch.complex128).view(1, length, 1, 1), log_a, phase, mode=mode)
    assert relative_error(y.real.flatten(), by_fft) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_retnet(mode):
    """One fixed decay a head, queries and keys turned by position: (Q Theta)(K conj(Theta))^T times gamma^(t - s)."""
    q, k, v = (torch.randn(100, 4, dtype=torch.float64) for _ in range(3))
    theta, t = torch.tensor([0.01, 0.1, 1.0, -2.0], dtype=torch.float64), torch.arange(100, dtype=torch.float64)
    gamma = 0.97
    turn = torch.exp(1j * torch.outer(t, theta))
    decay = (gamma ** (t[:, None] - t).clamp(min=0)).tril()
    retention = ((q * turn) @ (k * turn.conj()).mT * decay) @ v.to(torch.complex128)
    log_gamma = torch.tensor(gamma, dtype=torch.float64).log().expand(1, 100, 1, 1)
    y = gateloop(*(z[None, :, None] for z in (q, k, v)), log_gamma, theta.expand(1, 100, 1, 4), mode=mode)
    assert relative_error(y[0, :, 0], retention) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_gated_linear_attention(mode):
    """GLA: real gates from the input, one per key channel: ((Q * b)(K / b)^T, masked) V, b their running product."""
    q, k, v = (torch.randn(60, 4, dtype=torch.float64) for _ in range(3))
    log_a = F.logsigmoid(torch.randn(60, 4, dtype=torch.float64)) / 16
    b = log_a.exp().cumprod(0)
    attended = ((q * b) @ (k / b).mT).tril() @ v
    assert relative_error(gateloop(*(z[None, :, None] for z in (q, k, v, log_a)), mode=mode)[0, :, 0], attended) < 1e-10


@pytest.mark.parametrize("rope", [Rope(), Rope(5e5, 8.0, 1.0, 4.0, 16)])
def test_rope(rope):
    """Rotary positions are gates that only turn: channels (i, i + d/2) of a query are one complex number."""
    q, k = (torch.randn(2, 3, 200, 8, dtype=torch.float64) for _ in range(2))
    theta = rope_frequencies(rope, 8).double()
    turned_q, turned_k = (apply_rope(z, torch.arange(200)[None], theta) for z in (q, k))
    q, k = (torch.complex(*z.transpose(1, 2).chunk(2, -1)) for z in (q, k))
    phase = theta.expand(q.shape)
    matrix = gateloop_matrix(q, k.conj(), torch.zeros_like(phase), phase)
    assert relative_error(matrix.real, (turned_q @ turned_k.mT).tril()) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_heads_of_width_one_are_a_linear_scan(mode):
    """The paper's "max heads"."""
    q, k, v, log_a, phase, _ = example(100, "complex gates", heads=5, key=1, value=1)
    h = linear_scan(log_a[..., 0], (k * v)[..., 0], phase[..., 0])
    assert relative_error(gateloop(q, k, v, log_a, phase, mode=mode)[..., 0], q[..., 0] * h) < 1e-10


# bad input


def arguments():
    inputs = each(Tensor.detach, *example(6, "complex gates", dtype=torch.float32))
    return dict(zip(NAMES, inputs))


FIRST, REAL = "batch = 2, len = 6, heads = 3", "it must be a tensor of real floating-point numbers"


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("q", lambda z: z[0], r"q has shape \(6, 3, 4\): it must be \(batch, len, heads, key\)"),
        ("k", lambda z: z[..., :2], rf"k has shape \(2, 6, 3, 2\): it must be \({FIRST}, key = 4\)"),
        ("k", lambda z: z[:, :5], r"k has shape \(2, 5, 3, 4\)"),
        ("v", lambda z: z[:, :, :1], rf"v has shape \(2, 6, 1, 5\): it must be \({FIRST}, value\)"),
        ("log_a", lambda z: z[..., :2], rf"log_a has shape \(2, 6, 3, 2\): it must be \({FIRST}, key = 4 or 1\)"),
        ("log_a", lambda z: z[..., 0], r"log_a has shape \(2, 6, 3\)"),
        ("phase", lambda z: z[:, :, :1], r"phase has shape \(2, 6, 1, 4\): it must be .* key = 4 or 1\)"),
        ("phase", lambda z: z[..., :3], r"phase has shape \(2, 6, 3, 3\)"),
        ("initial_state", lambda z: z.mT,
         r"initial_state has shape \(2, 3, 5, 4\): it must be \(batch = 2, heads = 3, key = 4, value = 5\)"),
        ("initial_state", lambda z: z[:1], r"initial_state has shape \(1, 3, 4, 5\)"),
        ("q", lambda z: z.numpy(), "q is ndarray: it must be a tensor of floating-point numbers"),
        ("q", lambda z: z.long(), "q is torch.int64"),
        ("v", lambda z: z.int(), "v is torch.int32"),
        ("k", lambda z: None, "k is NoneType"),
        ("v", lambda z: None, "v is NoneType"),
        ("log_a", lambda z: None, "log_a is NoneType"),
        ("log_a", lambda z: z.to(torch.complex64), f"log_a is torch.complex64: {REAL}"),
        ("phase", lambda z: z.to(torch.complex64), f"phase is torch.complex64: {REAL}"),
        ("phase", lambda z: z.long(), "phase is torch.int64"),
        ("initial_state", lambda z: z.real.long(), "initial_state is torch.int64"),
        ("k", lambda z: z.double(), "k is torch.float64: it must have the precision of q, torch.float32"),
        ("v", lambda z: z.bfloat16(), "v is torch.bfloat16: it must have the precision of q, torch.float32"),
        ("k", lambda z: z.to(torch.complex128), "k is torch.complex128: it must have the precision of q"),
        ("log_a", lambda z: z + 50.5, "log_a reaches 50.5: it is the log of a decay and must be at most 0"),
    ],
)
def test_bad_tensors(name, change, message):
    wrong = arguments()
    wrong[name] = change(wrong[name])
    with pytest.raises(ValueError, match=message):
        gateloop(**wrong)
    if name in ("q", "k", "log_a", "phase"):
        del wrong["v"], wrong["initial_state"]
        with pytest.raises(ValueError, match=message):
            gateloop_matrix(**wrong)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"mode": "parallel"}, "mode is 'parallel': it must be 'recurrent', 'scan', 'attention' or 'chunked'"),
        ({"chunk_size": 0}, "chunk_size is 0: it must be an integer of at least 1"),
        ({"chunk_size": -3}, "chunk_size is -3"),
        ({"chunk_size": 1.5}, "chunk_size is 1.5"),
        ({"chunk_size": 0, "mode": "recurrent"}, "chunk_size is 0"),
        ({"backend": "cuda"}, "backend is 'cuda': it must be 'naive', 'triton' or 'auto'"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        gateloop(**arguments(), **option)


def test_options_are_named():
    with pytest.raises(TypeError):
        gateloop(*arguments().values())  # a state in the place of a mode
    assert GATELOOP_MODES == MODES


def test_triton_that_cannot_run_says_so():
    with pytest.raises(RuntimeError, match="backend='triton': mode='recurrent' has no Triton kernel; use"):
        gateloop(**arguments(), mode="recurrent", backend="triton")
    assert torch.equal(gateloop(**arguments(), backend="naive"), gateloop(**arguments()))


def test_empty_sequence():
    empty = {name: z[:, :0] if name != "initial_state" else z for name, z in arguments().items()}
    with pytest.raises(ValueError, match="q has len = 0: it must hold at least one token"):
        gateloop(**empty)
    with pytest.raises(ValueError, match="q has len = 0"):
        gateloop_matrix(empty["q"], empty["k"], empty["log_a"])


# the mixer


OF_MIXER = ("complex", "real", "fixed", "fixed real")


def mixer(gates="complex", mode="chunked", d_model=12, n_heads=3, d_state=2, dtype=torch.float64):
    """A mixer whose gates differ from token to token, and that remembers."""
    layer = GateLoop(d_model, n_heads, d_state, gates=gates, mode=mode).to(dtype)
    with torch.no_grad():
        layer.in_proj.weight.mul_(3)
    return layer


@pytest.mark.parametrize("gates", OF_MIXER)
def test_mixer_against_its_definition(gates):
    """The equations of the paper, from the weights alone."""
    layer, u = mixer(gates), torch.randn(2, 30, 12, dtype=torch.float64)
    W = layer.in_proj.weight
    q, k = (u @ W[i : i + 6].T for i in (0, 6))
    v, z = u @ W[12:24].T, u @ W[24:36].T
    alpha, beta = layer.alpha.expand(2, 30, 6), None if "real" in gates else layer.beta.expand(2, 30, 6)
    if "fixed" not in gates:
        alpha = alpha + u @ W[36:42].T
    if gates == "complex":
        beta = beta + u @ W[42:48].T
    assert len(W) == {"complex": 48, "real": 42, "fixed": 36, "fixed real": 36}[gates]
    heads = [x if x is None else x.unflatten(-1, (3, -1)) for x in (q, k, v, torch.sigmoid(alpha).log(), beta)]
    y = definition(*heads)[0].real.flatten(2) * F.silu(z)
    assert relative_error(layer(u), y @ layer.out_proj.weight.T) < 1e-10


@pytest.mark.parametrize("gates", OF_MIXER)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_mixer_in_pieces_and_step_by_step(gates, mode):
    layer, u = mixer(gates, mode), torch.randn(2, 9, 12, dtype=torch.float64)
    whole = layer(u)
    kept = layer.init_state(2)
    for k in range(1, 9):
        first, state = layer(u[:, :k], layer.init_state(2))
        rest, state = layer(u[:, k:], state)
        assert relative_error(torch.cat([first, rest], 1), whole) < 1e-12, k
    last, state, steps = state, layer.init_state(2), []
    for t in range(9):
        y_t, new = layer.step(u[:, t], state)
        steps.append(y_t)
        assert new.shape == state.shape and new.dtype == state.dtype and (t > 0 or torch.equal(state, kept))
        state = new
    assert relative_error(torch.stack(steps, 1), whole) < 1e-12 and relative_error(state, last) < 1e-12


@pytest.mark.parametrize("gates", OF_MIXER)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_of_the_mixer(gates, dtype):
    layer = mixer(gates, dtype=dtype)
    state = layer.init_state(5)
    wide = torch.promote_types(dtype, torch.float32)
    assert state.shape == (5, 3, 2, 4) and not state.any()
    assert state.dtype == (wide if "real" in gates else wide.to_complex())
    y, new = layer(torch.randn(5, 7, 12, dtype=dtype), state)
    assert y.dtype == dtype and y.shape == (5, 7, 12) and new.dtype == state.dtype and new.abs().sum() > 0
    assert layer(torch.randn(5, 7, 12, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("gates", OF_MIXER)
def test_gates_of_a_narrow_mixer_are_wide(gates):
    """A gate of 0.999 in bfloat16 is 1, and its log 0."""
    layer = mixer(gates, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.in_proj.weight.zero_()
    _, _, _, log_a, phase, _ = layer.project(torch.randn(1, 1, 12, dtype=torch.bfloat16))
    assert log_a.dtype == torch.float32 and relative_error(log_a.flatten(), F.logsigmoid(layer.alpha.double())) < 1e-6
    assert phase is None or phase.dtype == torch.float32 and torch.equal(phase.flatten(), layer.beta.float())


@pytest.mark.parametrize("gates", OF_MIXER)
def test_mixer_is_its_matrix(gates):
    layer, u = mixer(gates), torch.randn(2, 9, 12, dtype=torch.float64)
    _, _, v, _, _, z = layer.project(u)
    matrix = layer.matrix(u)
    assert matrix.shape == (2, 3, 9, 9) and matrix.dtype == torch.float64
    heads = torch.einsum("bhts,bshp->bthp", matrix, v).flatten(2)
    assert relative_error(layer.out_proj(heads * F.silu(z)), layer(u)) < 1e-12


@pytest.mark.parametrize("gates", OF_MIXER)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_padding_of_the_mixer(gates, mode):
    layer, u, pads = mixer(gates, mode), torch.randn(3, 9, 12, dtype=torch.float64), (0, 4, 8)
    y, state = layer(u, layer.init_state(3), padding=torch.tensor(pads))
    assert relative_error(layer(u, padding=torch.tensor(pads)), y) < 1e-14
    for row, pad in enumerate(pads):
        alone, alone_state = layer(u[row : row + 1, pad:], layer.init_state(1))
        assert relative_error(y[row, pad:], alone[0]) < 1e-12 and relative_error(state[row], alone_state[0]) < 1e-12


def test_start_of_the_mixer():
    """Memories from 1 to 1000 tokens, not in the order of the heads; phases from 0 to 0.3."""
    layer = GateLoop(64, 64, 1)
    log_a = F.logsigmoid(layer.alpha)
    assert relative_error(log_a.sort().values, -torch.logspace(0, -3, 64)) < 1e-5
    assert not torch.equal(log_a, log_a.sort().values) and not torch.equal(log_a, log_a.sort(descending=True).values)
    assert 0 <= layer.beta.min() and 0.2 < layer.beta.max() <= 0.3
    assert GateLoop(64, 64, gates="real").beta is None
    with torch.no_grad():
        before = layer.alpha.clone()
        layer.alpha.zero_()
        layer.reset_parameters()
    assert relative_error(layer.alpha.sort().values, before.sort().values) < 1e-6


@pytest.mark.parametrize("gates", OF_MIXER)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_every_parameter(gates, mode):
    layer = mixer(gates, mode)
    layer(torch.randn(2, 9, 12, dtype=torch.float64)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        rows = parameter.grad.reshape(len(parameter), -1)
        assert rows.isfinite().all() and rows.any(1).all(), name


def test_gradients_of_the_matrix_reach_queries_keys_and_gates_only():
    layer = mixer()
    layer.matrix(torch.randn(2, 9, 12, dtype=torch.float64)).square().sum().backward()
    rows = layer.in_proj.weight.grad.any(1)
    assert rows[:12].all() and not rows[12:36].any() and rows[36:].all()
    assert layer.alpha.grad.all() and layer.beta.grad.all() and layer.out_proj.weight.grad is None


def test_extreme_gates_of_the_mixer_are_finite():
    """alpha = 120 (never forget) and -120 (forget at once), whose sigmoid's own log would be -inf in float32."""
    layer, u = mixer(dtype=torch.float32), torch.randn(1, 40, 12)
    with torch.no_grad():
        layer.in_proj.weight[36:42] = 0
        layer.in_proj.weight[36:42, 0] = 120
        u[..., 0] = u[..., 0].sign()
    y = layer(u.requires_grad_())
    y.square().sum().backward()
    assert y.isfinite().all() and all(z.grad.isfinite().all() for z in (u, *layer.parameters()))


@pytest.mark.parametrize("sizes, message", [
    (dict(d_model=10, n_heads=4), "n_heads is 4: it must divide d_model = 10"),
    (dict(d_model=0, n_heads=4), "d_model is 0: it must be an integer of at least 1"),
    (dict(d_model=12, n_heads=0), "n_heads is 0"),
    (dict(d_model=12, n_heads=-3), "n_heads is -3"),
    (dict(d_model=12, n_heads=4, d_state=2.5), "d_state is 2.5"),
    (dict(d_model=12, n_heads=4, d_state=True), "d_state is True"),
    (dict(d_model=12, n_heads=4, gates="imaginary"),
     "gates is 'imaginary': it must be 'complex', 'real', 'fixed' or 'fixed real'"),
    (dict(d_model=12, n_heads=4, mode="parallel"),
     "mode is 'parallel': it must be 'recurrent', 'scan', 'attention' or 'chunked'"),
])
def test_bad_sizes_of_a_mixer(sizes, message):
    with pytest.raises(ValueError, match=message):
        GateLoop(**sizes)


# the language model


VOCAB = 53
CONFIG = dict(vocab_size=VOCAB, d_model=16, n_layer=2, n_heads=4, intermediate_size=24, d_state=2)


def make(dtype=torch.float64, **changes) -> GateLoopLM:
    """A small model whose weights are large enough that its layers do something."""
    model = GateLoopLM(GateLoopConfig(**CONFIG | changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("gates", OF_MIXER)
@pytest.mark.parametrize("mode", ["scan", "chunked"])
@torch.no_grad()
def test_prefill_and_step_are_forward_at_every_split(gates, mode):
    model, ids = make(gates=gates, mode=mode), torch.randint(VOCAB, (2, 9))
    whole = model(ids)
    for k in range(10):
        logits, state = model.prefill(ids[:, :k]) if k else (whole[:, :0], model.init_state(2))
        pieces = [logits]
        for t in range(k, 9):
            logits, state = model.step(ids[:, t], state)
            pieces.append(logits[:, None])
        assert relative_error(torch.cat(pieces, 1), whole) < 1e-10, k
    first, state = model.prefill(ids[:, :4])
    rest, _ = model.prefill(ids[:, 4:], state=state)
    assert relative_error(torch.cat([first, rest], 1), whole) < 1e-10


@pytest.mark.parametrize("gates", OF_MIXER)
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@torch.no_grad()
def test_padding_changes_nothing(gates, kind):
    model, ids, after = make(gates=gates), torch.randint(VOCAB, (3, 11)), torch.randint(VOCAB, (3,))
    mask = torch.ones(3, 11, dtype=torch.long)
    for row, length in ((0, 5), (2, 1)):
        pads = {"left": range(11 - length), "right": range(length, 11), "holes": torch.randperm(11)[length:].tolist()}
        mask[row, list(pads[kind])] = 0
    logits, state = model.prefill(ids, mask)
    forward, (stepped, _) = model(ids, mask), model.step(after, state)
    for row in range(3):
        tokens = mask[row].bool()
        alone, alone_state = model.prefill(ids[row : row + 1, tokens])
        for ours in (logits, forward):
            assert relative_error(ours[row, tokens], alone[0]) < 1e-10
        assert relative_error(stepped[row], model.step(after[row : row + 1], alone_state)[0][0]) < 1e-10


@torch.no_grad()
def test_greedy_generation():
    model, ids = make(), torch.randint(VOCAB, (2, 3))
    out = model.generate(ids, 6)
    assert out.shape == (2, 9) and torch.equal(out[:, :3], ids)
    for t in range(3, 9):
        assert torch.equal(model(out[:, :t])[:, -1].argmax(-1), out[:, t])


@torch.no_grad()
def test_a_padded_batch_generates_what_single_prompts_do():
    model = make()
    ids, mask = torch.randint(VOCAB, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[0, :5] = 0
    together = model.generate(ids, 6, attention_mask=mask)[:, 8:]
    assert torch.equal(together[0], model.generate(ids[:1, 5:], 6)[0, 3:])
    assert torch.equal(together[1], model.generate(ids[1:], 6)[0, 8:])


@pytest.mark.parametrize("gates", OF_MIXER)
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_every_parameter_of_the_model(gates, tied):
    model = make(gates=gates, tie_embeddings=tied)
    model(torch.randint(VOCAB, (2, 9))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_start_of_the_model():
    model = GateLoopLM(GateLoopConfig(**CONFIG, norm_epsilon=0.5))
    assert [module.eps for module in model.modules() if isinstance(module, RMSNorm)] == [0.5] * 5
    for weight in (model.backbone.embedding.weight, model.backbone.layers[0].mlp.up_proj.weight):
        assert 0.015 < weight.std() < 0.025
    assert (F.logsigmoid(model.backbone.layers[1].mixer.alpha).min() + 1).abs() < 1e-5


def test_bfloat16_and_autocast_run():
    ids = torch.randint(VOCAB, (2, 9))
    model = make(torch.bfloat16)
    logits, state = model.prefill(ids)
    assert logits.dtype == model.step(ids[:, 0], state)[0].dtype == torch.bfloat16 and state[0].dtype == torch.complex64
    assert relative_error(logits.float(), model.float()(ids)) < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = model(ids)
    assert relative_error(narrow.float(), model(ids)) < 0.05


@pytest.mark.parametrize("changes", [
    {}, dict(gates="real", tie_embeddings=False), dict(gates="fixed", mode="scan", norm_epsilon=1e-6),
    dict(gates="fixed real"),
])
def test_save_and_load(tmp_path, changes):
    model, ids = make(torch.float32, **changes), torch.randint(VOCAB, (2, 7))
    model.save_pretrained(tmp_path / "model")
    loaded = GateLoopLM.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and torch.equal(loaded(ids), model(ids))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "gateloop"
    narrow = GateLoopLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llamba"}, "model_type is 'llamba': only 'gateloop' can be loaded here"),
    ({"model_type": None}, "model_type is None: it must be 'llama' or"),
    ({"d_conv": 4}, "unknown entry d_conv; known are vocab_size, d_model"),
    ({"d_model": 0}, "d_model is 0: it must be an integer from 1"),
    ({"n_heads": "4"}, "n_heads is '4'"),
    ({"n_heads": 5}, "n_heads is 5: it must divide d_model = 16"),
    ({"gates": "imaginary"}, "gates is 'imaginary'"),
    ({"mode": "parallel"}, "mode is 'parallel'"),
    ({"d_state": 3}, r"mixer.alpha has shape \(8,\) instead of \(12,\)"),
    ({"gates": "real"}, "unexpected .*mixer.beta"),
])
def test_a_config_that_does_not_fit_is_named(tmp_path, change, message):
    make(torch.float32).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        GateLoopLM.from_pretrained(tmp_path / "model")


def test_loading_is_strict(tmp_path):
    model = make(torch.float32)
    config, weights = {"model_type": "gateloop", **CONFIG}, model.state_dict()

    def load(name, config, weights):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        torch.save(weights, tmp_path / name / "pytorch_model.bin")
        return GateLoopLM.from_pretrained(tmp_path / name)

    ids = torch.randint(VOCAB, (1, 5))
    assert torch.equal(load("defaults", config, weights)(ids), model(ids))
    alpha = "backbone.layers.1.mixer.alpha"
    with pytest.raises(ValueError, match=f"1 missing .{alpha}"):
        load("missing", config, {name: weight for name, weight in weights.items() if name != alpha})
    with pytest.raises(ValueError, match="1 unexpected .backbone.layers.0.mixer.gamma"):
        load("more", config, weights | {"backbone.layers.0.mixer.gamma": torch.zeros(4)})
    with pytest.raises(ValueError, match="missing entry n_heads"):
        load("size", {name: value for name, value in config.items() if name != "n_heads"}, weights)
    twice = weights | {"lm_head.weight": weights["backbone.embedding.weight"].clone()}
    assert torch.equal(load("twice", config, twice)(ids), model(ids))
    with pytest.raises(ValueError, match="lm_head.weight is not backbone.embedding.weight"):
        load("untied", config, twice | {"lm_head.weight": torch.zeros(VOCAB, 16)})
    with pytest.raises(FileNotFoundError, match="no such directory"):
        GateLoopLM.from_pretrained("./nowhere")


def test_the_state_does_not_grow():
    model = make(torch.float32)

    def kept_alive(length):
        with torch.no_grad():
            ids = torch.randint(VOCAB, (1, length))
            _, state = model.prefill(ids)
            states = state, model.step(ids[:, 0], state)[1]
            return [sum(layer.untyped_storage().nbytes() for layer in layers) for layers in states]

    assert kept_alive(1) == kept_alive(300) == [2 * 4 * 2 * 4 * 8] * 2


# in the rest of the package


@pytest.mark.parametrize("gates", OF_MIXER)
def test_a_student_of_mohawk(gates):
    """A Transformer whose attention is replaced by GateLoop: nothing in the distillation knows what mixer it is."""
    teacher = Llama(LlamaConfig(vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                num_attention_heads=4, num_key_value_heads=2, head_dim=6, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    student = copy.deepcopy(teacher)
    for block in student.backbone.layers:
        block.mixer = GateLoop(24, 4, 6, gates=gates)

    class Data:
        ids = torch.randint(40, (4, 20))

        def next(self):
            return self.ids

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    before = copy.deepcopy(student.state_dict())
    stages = [Stage("orientation", 12, 1e-2, 0.0), Stage("alignment", 12, 1e-2), Stage("distillation", 12, 1e-2)]
    records = distill(teacher, student, Data(), stages, accelerator=Accelerator(cpu=True), progress=False)
    for stage in stages:
        losses = [record["loss"] for record in records if record["stage"] == stage.objective]
        assert len(losses) == 12 and losses[-1] < losses[0], stage.objective
    changed = {name for name, weight in student.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == set(before)


def test_the_command_line_knows_it(tmp_path, capsys):
    tokenizer = train_tokenizer(["She was not at home, and he was not at ease."] * 20, 280)
    model = GateLoopLM(GateLoopConfig(**CONFIG | {"vocab_size": len(tokenizer)}))
    save_model(tmp_path / "model", model, tokenizer)
    loaded, its_tokenizer = load_model(str(tmp_path / "model"))
    ids = torch.tensor([tokenizer("She was").input_ids])
    assert isinstance(loaded, GateLoopLM) and torch.equal(loaded(ids), model(ids))
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    main(["generate", str(tmp_path / "model"), "She was", "--tokens", "4"])
    assert capsys.readouterr().out.startswith("She was")
