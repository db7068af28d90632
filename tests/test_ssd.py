"""State space duality: every mode against the loop that defines it, and every message against the mistake it names."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamba_ref.conventions import relative_error
from llamba_ref.ssd import segment_sum, ssd, ssd_matrix, ssd_step

MODES = ("recurrent", "attention", "chunked")
LENGTHS = (1, 2, 3, 63, 64, 65, 500)
GATES = (0.0, -1e-6, -50.0, -0.3, -1.0)


def definition(x, log_a, B, C, initial_state=None):
    """The recurrence with B and C copied to all heads, written without anything from the library."""
    batch, length, heads, headdim = x.shape
    B, C = (z.repeat_interleave(heads // B.shape[2], dim=2) for z in (B, C))
    state = x.new_zeros(batch, heads, headdim, B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for x_t, a_t, B_t, C_t in zip(x.unbind(1), log_a.exp().unbind(1), B.unbind(1), C.unbind(1)):
        state = a_t[..., None, None] * state + x_t[..., :, None] * B_t[..., None, :]
        outputs.append((state * C_t[..., None, :]).sum(-1))
    return torch.stack(outputs, 1), state


def example(length, batch=2, heads=4, groups=2, headdim=3, state=5, gates=GATES, dtype=torch.float64, seed=0):
    """x, log_a, B, C and a state that require gradients; each gate is drawn from `gates`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    drawn = torch.randint(len(gates), (batch, length, heads), generator=generator)
    log_a = torch.tensor(gates, dtype=dtype)[drawn].requires_grad_()
    B, C = normal(batch, length, groups, state), normal(batch, length, groups, state)
    return normal(batch, length, heads, headdim), log_a, B, C, normal(batch, heads, headdim, state)


def flat(*tensors: Tensor) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradients(out: Tensor, inputs) -> Tensor:
    """Gradient of a fixed random weighting of `out`; inputs that play no part count as zero."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True, allow_unused=True)
    return flat(*(torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs)))


# the modes


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("with_state", [False, True])
def test_modes_equal_the_definition(length, heads, groups, with_state):
    *inputs, state = example(length, heads=heads, groups=groups)
    start = state if with_state else None
    leaves = (*inputs, state) if with_state else inputs
    expected = flat(*definition(*inputs, start))
    expected_grads = gradients(expected, leaves)
    for mode in MODES:
        out = flat(*ssd(*inputs, mode=mode, initial_state=start, return_state=True))
        assert relative_error(out, expected) < 1e-10, mode
        assert relative_error(gradients(out, leaves), expected_grads) < 1e-8, mode


@pytest.mark.parametrize("cache", [1, 2 * 4 * 3 * 7 * 3, 10**9])
def test_chunks_by_the_cacheful(cache, monkeypatch):
    """One chunk of 7 tokens at a time, three at a time with a rest, all at once: the cache's size changes no number."""
    monkeypatch.setattr(sys.modules["llamba_ref.ssd"], "CACHE", cache)
    *inputs, state = example(75)
    leaves = (*inputs, state)
    expected = flat(*definition(*inputs, state))
    out = flat(*ssd(*inputs, chunk_size=7, initial_state=state, return_state=True))
    assert relative_error(out, expected) < 1e-10
    assert relative_error(gradients(out, leaves), gradients(expected, leaves)) < 1e-8


@pytest.mark.parametrize("name", ["x", "log_a", "B", "C", "initial_state"])
@pytest.mark.parametrize("mode", MODES)
def test_each_gradient_by_itself(mode, name):
    """One vector of all gradients could hide a wrong small one."""
    *inputs, state = example(70, gates=(-1e-6, -0.01, -0.5, -3.0))
    leaf = [(*inputs, state)[["x", "log_a", "B", "C", "initial_state"].index(name)]]
    expected = gradients(flat(*definition(*inputs, state)), leaf)
    out = flat(*ssd(*inputs, mode=mode, initial_state=state, return_state=True, chunk_size=16))
    assert relative_error(gradients(out, leaf), expected) < 1e-8


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64, 65, 100, 1000])
def test_any_chunk_size(chunk_size):
    *inputs, state = example(65)
    expected = flat(*definition(*inputs, state))
    out = flat(*ssd(*inputs, chunk_size=chunk_size, initial_state=state, return_state=True))
    assert relative_error(out, expected) < 1e-10
    assert relative_error(gradients(out, (*inputs, state)), gradients(expected, (*inputs, state))) < 1e-8


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40), batch=st.integers(1, 3), groups=st.integers(1, 3), ratio=st.integers(1, 3),
    headdim=st.integers(1, 5), state=st.integers(1, 5), chunk_size=st.integers(1, 50), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(length, batch, groups, ratio, headdim, state, chunk_size, seed):
    *inputs, start = example(length, batch, groups * ratio, groups, headdim, state, seed=seed)
    expected, expected_state = definition(*inputs, start)
    for mode in MODES:
        y, last = ssd(*inputs, mode=mode, chunk_size=chunk_size, initial_state=start, return_state=True)
        assert y.shape == inputs[0].shape and last.shape == start.shape
        assert relative_error(flat(y, last), flat(expected, expected_state)) < 1e-10
    matrix = ssd_matrix(*inputs[1:])
    zero_start = definition(*inputs)[0]
    assert relative_error(torch.einsum("bhts,bshp->bthp", matrix, inputs[0]), zero_start) < 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gates", [(-0.1, -1.0), (-1e-5, -50.0)])
def test_gradcheck(mode, gates):
    inputs = example(5, batch=1, heads=2, groups=1, headdim=2, state=2, gates=gates)

    def run(x, log_a, B, C, initial_state):
        return ssd(x, log_a, B, C, mode=mode, chunk_size=2, initial_state=initial_state, return_state=True)

    assert torch.autograd.gradcheck(run, inputs)


def test_inputs_are_left_alone_and_may_be_strided():
    *inputs, state = example(20)
    before = [z.detach().clone() for z in (*inputs, state)]
    strided = [z.detach().transpose(0, 1).contiguous().transpose(0, 1) for z in inputs]
    one_gate = inputs[1].detach()[:, :1, :1].expand(2, 20, 4)
    for mode in MODES:
        y = ssd(*inputs, mode=mode, initial_state=state)
        assert torch.equal(ssd(*strided, mode=mode, initial_state=state), y)
        expanded = ssd(inputs[0], one_gate, *inputs[2:], mode=mode)
        assert torch.equal(expanded, ssd(inputs[0], one_gate.contiguous(), *inputs[2:], mode=mode))
    assert all(torch.equal(z, old) for z, old in zip((*inputs, state), before))


def test_later_tokens_do_not_reach_back():
    *inputs, state = example(100)
    changed = [torch.cat([z[:, :60], torch.rand_like(z[:, 60:]).neg()], 1) for z in inputs]
    for mode in MODES:
        early, other = (ssd(*z, mode=mode, initial_state=state) for z in (inputs, changed))
        assert relative_error(other[:, :60], early[:, :60]) < 1e-15 < relative_error(other[:, 60:], early[:, 60:])


# numerics


UNIFORM = torch.rand(1, 4096, 2, generator=torch.Generator().manual_seed(5))
LONG = (0.0, -1e-7, -1e-6, -1e-5, -1e-4, -1e-3, -0.1, -50.0)
LONG_GATES = {str(gate): torch.full_like(UNIFORM, gate) for gate in LONG} | {
    "resets": torch.where(UNIFORM < 0.01, -50.0, -1e-6),
    "rare resets": torch.where(UNIFORM < 0.002, -50.0, -1e-4 * UNIFORM),
    "log-uniform": -(10.0 ** (8.7 * UNIFORM - 7)),
    "everyday": -torch.nn.functional.softplus(4 * UNIFORM - 6),
}


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("kind", LONG_GATES)
def test_float32_over_4096_tokens(kind, positive):
    x, _, B, C, _ = (z.detach() for z in example(4096, 1, 2, 1, 4, 8, dtype=torch.float32))
    if positive:  # nothing averages out
        x, B, C = x.abs(), B.abs(), C.abs()
    log_a = LONG_GATES[kind]
    exact = flat(*ssd(x.double(), log_a.double(), B.double(), C.double(), return_state=True))
    for mode, size in (("chunked", 64), ("chunked", 4), ("recurrent", 64)) + (("attention", 64),) * positive:
        out = flat(*ssd(x, log_a, B, C, mode=mode, chunk_size=size, return_state=True))
        assert relative_error(out, exact) < 1e-5, (mode, size)


@pytest.mark.parametrize("kind", ["-1e-06", "resets", "log-uniform", "everyday"])
def test_float32_gradients(kind):
    inputs = [z.detach()[:, :1024] for z in example(1024, 1, 2, 1, 4, 8, dtype=torch.float32)[:4]]
    inputs[1] = LONG_GATES[kind][:, :1024]
    wide = [z.double().requires_grad_() for z in inputs]
    narrow = [z.clone().requires_grad_() for z in inputs]
    expected = ssd(*wide)
    for mode in MODES:
        out = ssd(*narrow, mode=mode)
        for leaf, wide_leaf in zip(narrow, wide):
            assert relative_error(gradients(out, [leaf]), gradients(expected, [wide_leaf])) < 1e-5, mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates_stay_finite(mode, dtype):
    gates = (0.0, -1e-6, -1.0, -50.0, -5000.0, -1e30, -torch.inf)
    *inputs, state = example(130, gates=gates, dtype=dtype)
    y, last = ssd(*inputs, mode=mode, initial_state=state, return_state=True)
    grads = torch.autograd.grad(flat(y, last).square().sum(), (*inputs, state))
    assert all(z.isfinite().all() for z in (y, last, *grads))


@pytest.mark.parametrize("mode", MODES)
def test_a_gate_of_zero_separates_documents(mode):
    *inputs, _ = example(150, gates=(-1e-6, -0.3))
    edges = [0, 1, 64, 100, 150]
    gates = inputs[1].detach().clone()
    gates[:, edges[:-1]] = -torch.inf
    packed = ssd(inputs[0], gates, *inputs[2:], mode=mode)
    alone = [definition(*(z[:, i:j] for z in inputs))[0] for i, j in zip(edges, edges[1:])]
    assert relative_error(packed, torch.cat(alone, 1)) < 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_rounds_only_the_result(mode, dtype, bound):
    *inputs, state = (z.detach() for z in example(300, gates=(-1e-3, -0.01, -0.5), dtype=dtype))
    y, last = ssd(*inputs, mode=mode, initial_state=state, return_state=True)
    exact, exact_state = definition(*(z.double() for z in (*inputs, state)))
    assert y.dtype == dtype and last.dtype == torch.float32
    assert relative_error(y, exact) < bound and relative_error(last, exact_state) < 1e-5
    assert ssd_matrix(*inputs[1:]).dtype == dtype
    y_t, new = ssd_step(*(z[:, 0] for z in inputs), state)
    assert y_t.dtype == dtype and new.dtype == torch.float32


def test_gates_may_be_wider_than_values():
    x, log_a, B, C, state = (z.detach() for z in example(40, dtype=torch.float32))
    half = [z.bfloat16() for z in (x, B, C)]
    y, last = ssd(half[0], log_a, *half[1:], initial_state=state, return_state=True)
    exact = definition(half[0].double(), log_a.double(), half[1].double(), half[2].double(), state.double())[1]
    assert y.dtype == torch.bfloat16 and relative_error(last, exact) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_autocast_does_not_narrow(mode):
    *inputs, state = example(65, dtype=torch.float32)
    plain = flat(*ssd(*inputs, mode=mode, initial_state=state, return_state=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flat(*ssd(*inputs, mode=mode, initial_state=state, return_state=True))
        y_t, _ = ssd_step(*(z[:, 0] for z in inputs), state)
        matrix = ssd_matrix(*inputs[1:4])
    assert torch.equal(out, plain) and matrix.dtype == torch.float32
    assert relative_error(y_t, definition(*(z[:, :1] for z in inputs), state)[0][:, 0]) < 1e-6


# segment sum


def test_segment_sum_is_its_definition():
    log_a = torch.tensor(GATES, dtype=torch.float64).repeat(2, 3, 4)
    sums = segment_sum(log_a)
    for t in range(20):
        for s in range(20):
            wanted = log_a[..., s + 1 : t + 1].sum(-1) if s <= t else torch.full((2, 3), -torch.inf).double()
            assert torch.allclose(sums[..., t, s], wanted, rtol=1e-14, atol=0)
    assert sums.shape == (2, 3, 20, 20) and segment_sum(log_a[..., :1]).tolist() == [[[[0.0]]] * 3] * 2


def test_segment_sum_where_other_formulas_fail():
    uniform = torch.rand(1024, generator=torch.Generator().manual_seed(0))
    log_a = torch.where(uniform < 0.02, -50.0, -0.02 * uniform)
    exact = segment_sum(log_a.double()).exp()
    p, g = log_a.exp().cumprod(0), log_a.cumsum(0)
    future = torch.ones(1024, 1024, dtype=torch.bool).triu(1)
    differences = (g[:, None] - g[None, :]).masked_fill(future, -torch.inf).exp()
    assert relative_error(segment_sum(log_a).exp(), exact) < 1e-6
    assert (p[:, None] / p[None, :]).tril().isnan().any()
    assert relative_error(differences, exact) > 1e-5


def test_segment_sum_has_a_gradient_where_masking_after_exp_has_none():
    log_a = torch.full((200,), -1.0, requires_grad=True)
    g = log_a.cumsum(0)
    late, = torch.autograd.grad((g[:, None] - g[None, :]).exp().tril().sum(), log_a)
    ours, = torch.autograd.grad(segment_sum(log_a).exp().sum(), log_a)
    assert late.isnan().any() and ours.isfinite().all()
    short = (-torch.rand(6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: segment_sum(z).exp(), short)


# matrix


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 2), (4, 1)])
def test_matrix_times_x(length, heads, groups):
    x, log_a, B, C, _ = example(length, heads=heads, groups=groups)
    D = torch.linspace(-1, 2, heads, dtype=torch.float64).requires_grad_()
    matrix = ssd_matrix(log_a, B, C, D)
    assert matrix.shape == (2, heads, length, length) and torch.equal(matrix, matrix.tril())
    by_matrix = torch.einsum("bhts,bshp->bthp", matrix, x)
    expected = definition(x, log_a, B, C)[0] + D[:, None] * x
    assert relative_error(by_matrix, expected) < 1e-10
    leaves = (x, log_a, B, C, D)
    assert relative_error(gradients(by_matrix, leaves), gradients(expected, leaves)) < 1e-8


@pytest.mark.parametrize("state", [1, 3, 8])
def test_semiseparable_ranks(state):
    _, log_a, B, C, _ = (z.detach() for z in example(32, state=state, gates=(-1e-6, -0.1, -0.3)))
    mask = segment_sum(log_a.mT).exp()
    matrix = ssd_matrix(log_a, B, C)
    for k in range(32):
        assert torch.linalg.matrix_rank(mask[..., k:, : k + 1], rtol=1e-12).max() == 1
        rank = torch.linalg.matrix_rank(matrix[..., k:, : k + 1], rtol=1e-12).max()
        assert rank == min(state, k + 1, 32 - k)


# decoding


@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 2)])
def test_prefill_and_step_at_every_split(heads, groups):
    *inputs, start = example(70, heads=heads, groups=groups)
    whole, last = definition(*inputs, start)
    for k in range(71):
        y, state = whole[:, :0], start
        if k:
            y, state = ssd(*(z[:, :k] for z in inputs), initial_state=start, return_state=True)
        rest = []
        for t in range(k, min(k + 5, 70)):
            y_t, state = ssd_step(*(z[:, t] for z in inputs), state)
            rest.append(y_t)
        if rest:
            y = torch.cat([y, torch.stack(rest, 1)], 1)
        assert relative_error(y, whole[:, : k + 5]) < 1e-10
    assert relative_error(state, last) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_in_pieces(mode):
    *inputs, start = example(150)
    whole, last = definition(*inputs, start)
    pieces, state = [], start
    for i, j in ((0, 1), (1, 65), (65, 70), (70, 150)):
        y, state = ssd(*(z[:, i:j] for z in inputs), mode=mode, initial_state=state, return_state=True)
        pieces.append(y)
    out, expected = flat(torch.cat(pieces, 1), state), flat(whole, last)
    assert relative_error(out, expected) < 1e-10
    assert relative_error(gradients(out, (*inputs, start)), gradients(expected, (*inputs, start))) < 1e-8


def test_step_is_functional_and_keeps_float32_over_4096_steps():
    *inputs, start = (z.detach() for z in example(4096, 1, 2, 1, 2, 4, gates=(-1e-6,), dtype=torch.float32))
    exact = definition(*(z.double() for z in (*inputs, start)))[1]
    state, kept = start, start.clone()
    for step in zip(*(z.unbind(1) for z in inputs)):
        _, state = ssd_step(*step, state)
    assert torch.equal(start, kept) and relative_error(state, exact) < 1e-5


def test_step_gradcheck():
    *inputs, start = example(1, batch=1, heads=2, groups=1, headdim=2, state=2, gates=(-0.1, -1.0))
    leaves = [z[:, 0].detach().requires_grad_() for z in inputs]
    assert torch.autograd.gradcheck(ssd_step, (*leaves, start))


# compilers


def test_compiles_into_one_graph():
    *inputs, start = (z.detach() for z in example(130, dtype=torch.float32))
    compiled = torch.compile(ssd, fullgraph=True, backend="eager")
    options = dict(initial_state=start, return_state=True)
    for one, other in zip(compiled(*inputs, **options), ssd(*inputs, **options)):
        assert relative_error(one, other) < 1e-6
    step = *(z[:, 0] for z in inputs), start
    for one, other in zip(torch.compile(ssd_step, fullgraph=True, backend="eager")(*step), ssd_step(*step)):
        assert relative_error(one, other) < 1e-6


# bad input


def arguments():
    x, log_a, B, C, state = (z.detach() for z in example(6, dtype=torch.float32))
    return {"x": x, "log_a": log_a, "B": B, "C": C, "initial_state": state}


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("x", lambda z: z[0], r"x has shape \(6, 4, 3\): it must be \(batch, len, heads, headdim\)"),
        ("log_a", lambda z: z[..., :3], r"log_a has shape \(2, 6, 3\): it must be \(batch = 2, len = 6, heads = 4\)"),
        ("log_a", lambda z: z[..., None], r"log_a has shape \(2, 6, 4, 1\)"),
        ("B", lambda z: z[:, :5], r"B has shape \(2, 5, 2, 5\): it must be \(batch = 2, len = 6, groups, state\)"),
        ("C", lambda z: z[..., :4],
         r"C has shape \(2, 6, 2, 4\): it must be \(batch = 2, len = 6, groups = 2, state = 5\)"),
        ("C", lambda z: z[:, :, :1], r"C has shape \(2, 6, 1, 5\)"),
        ("initial_state", lambda z: z.mT, r"initial_state has shape .* headdim = 3, state = 5\)"),
        ("x", lambda z: z.to(torch.complex64), "x is torch.complex64: it must be a tensor of real floating-point"),
        ("log_a", lambda z: z.to(torch.complex64), "log_a is torch.complex64"),
        ("B", lambda z: z.long(), "B is torch.int64"),
        ("x", lambda z: z.numpy(), "x is ndarray"),
        ("initial_state", lambda z: z.long(), "initial_state is torch.int64"),
        ("C", lambda z: z.double(), "C is torch.float64: it must have the precision of x, torch.float32"),
        ("log_a", lambda z: z + 50.5, r"log_a reaches 50.5: it is the log of a decay and must be at most 0"),
    ],
)
def test_bad_tensors(name, change, message):
    wrong = arguments()
    wrong[name] = change(wrong[name])
    with pytest.raises(ValueError, match=message):
        ssd(**wrong)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"mode": "scan"}, "mode is 'scan': it must be 'recurrent', 'attention' or 'chunked'"),
        ({"chunk_size": 0}, "chunk_size is 0: it must be an integer of at least 1"),
        ({"chunk_size": -3}, "chunk_size is -3"),
        ({"chunk_size": 1.5}, "chunk_size is 1.5"),
        ({"chunk_size": 0, "mode": "recurrent"}, "chunk_size is 0"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        ssd(**arguments(), **option)


def test_triton_that_cannot_run_says_so():
    with pytest.raises(RuntimeError, match="backend='triton'"):
        ssd(**arguments(), backend="triton")
    assert torch.equal(ssd(**arguments(), backend="naive"), ssd(**arguments()))


def test_empty_sequence():
    empty = {name: z[:, :0] if name != "initial_state" else z for name, z in arguments().items()}
    with pytest.raises(ValueError, match="x has len = 0: it must hold at least one token"):
        ssd(**empty)
    with pytest.raises(ValueError, match="log_a has len = 0"):
        ssd_matrix(empty["log_a"], empty["B"], empty["C"])


def test_groups_that_do_not_divide_the_heads():
    wrong = arguments()
    wrong["B"] = wrong["C"] = torch.zeros(2, 6, 3, 5)
    with pytest.raises(ValueError, match="B has groups = 3: it must be a divisor of heads = 4"):
        ssd(**wrong)
    wrong["B"] = wrong["C"] = torch.zeros(2, 6, 0, 5)
    with pytest.raises(ValueError, match="B has groups = 0"):
        ssd(**wrong)


def test_bad_step_and_matrix():
    x, log_a, B, C, state = arguments().values()
    step = [z[:, 0] for z in (x, log_a, B, C)]
    with pytest.raises(ValueError, match=r"x_t has shape \(2, 6, 4, 3\): it must be \(batch, heads, headdim\)"):
        ssd_step(x, *step[1:], state)
    with pytest.raises(ValueError, match=r"state has shape \(1, 4, 3, 5\): it must be \(batch = 2, "):
        ssd_step(*step, state[:1])
    with pytest.raises(ValueError, match="log_a_t reaches 1"):
        ssd_step(step[0], torch.ones(2, 4), *step[2:], state)
    with pytest.raises(ValueError, match="B_t is torch.float64: it must have the precision of x_t, torch.float32"):
        ssd_step(step[0], step[1], step[2].double(), step[3], state)
    with pytest.raises(ValueError, match=r"D has shape \(3,\): it must be \(heads = 4\)"):
        ssd_matrix(log_a, B, C, torch.ones(3))
    with pytest.raises(ValueError, match="C is torch.float64: it must have the precision of B, torch.float32"):
        ssd_matrix(log_a, B, C.double())
    with pytest.raises(ValueError, match="log_a reaches 1"):
        ssd_matrix(log_a.abs().clamp(max=1), B, C)
