"""Linear scans: both modes against the loop that defines them, gradients of gradients, edges, time and memory."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamba_ref.conventions import relative_error
from llamba_ref.operators import cumulative_rotation, peak_bytes, polar_gate
from llamba_ref.scan import linear_scan, recurrence, recurrence_step, split_gate

MODES = ("sequential", "parallel")
LENGTHS = (1, 2, 3, 63, 64, 65, 500)
GATES = (0.0, -1e-6, -50.0, -0.3, -1.0)
TURNS = (1e-3, 1.0, 1000.0)  # sizes of the phases
KINDS = {"real": (False, False), "complex gates": (True, False),
         "complex inputs": (False, True), "all complex": (True, True)}


def definition(log_a, x, phase=None, initial_state=None):
    """The recurrence, step by step, written without anything from the library."""
    size = log_a.exp()
    a = size if phase is None else torch.complex(size * phase.cos(), size * phase.sin())
    h = torch.zeros_like(x[:, 0]) if initial_state is None else initial_state
    states = []
    for a_t, x_t in zip(a.unbind(1), x.unbind(1)):
        h = a_t * h + x_t
        states.append(h)
    return torch.stack(states, 1)


def example(length, kind="real", batch=2, rest=(3, 4), gate_rest=None, gates=GATES, turns=TURNS, dtype=torch.float64,
            seed=0):
    """log_a, x, phase (None unless gates turn) and a state that require gradients; log_a is drawn from `gates`."""
    generator = torch.Generator().manual_seed(seed)
    (turning, complex_inputs), wide = KINDS[kind], torch.promote_types(dtype, torch.float32)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def values(*shape):
        z = normal(*shape)
        z = torch.complex(z, normal(*shape)).to(wide.to_complex()) if complex_inputs else z.to(dtype)
        return z.requires_grad_()

    def drawn(numbers, shape):
        return torch.tensor(numbers, dtype=torch.float64)[torch.randint(len(numbers), shape, generator=generator)]

    shape = (batch, length, *(rest if gate_rest is None else gate_rest))
    log_a = drawn(gates, shape).to(dtype).requires_grad_()
    phase = (drawn(turns, shape) * normal(*shape)).to(dtype).requires_grad_() if turning else None
    return log_a, values(batch, length, *rest), phase, values(batch, *rest)


def given_ones(*tensors) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def each(change, *inputs) -> list:
    """Change every input that was given."""
    return [None if z is None else change(z) for z in inputs]


def gradients(out: Tensor, inputs) -> list[Tensor]:
    """Gradients of a fixed random weighting of `out`, of its real and of its imaginary part."""
    wide = torch.complex128 if out.is_complex() else torch.float64
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=wide).to(out.dtype)
    loss = (out * weight).sum()
    return torch.autograd.grad(loss.real if loss.is_complex() else loss, inputs, retain_graph=True)


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


# the modes


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate_rest", [(3, 4), (3, 1)])
@pytest.mark.parametrize("with_state", [False, True])
def test_modes_equal_the_definition(length, kind, gate_rest, with_state):
    log_a, x, phase, state = example(length, kind, gate_rest=gate_rest)
    start = state if with_state else None
    leaves = [x] if length == 1 and not with_state else given_ones(log_a, x, phase, start)  # the first gate meets 0
    expected = definition(log_a, x, phase, start)
    expected_grads = flat(gradients(expected, leaves))
    for mode in MODES:
        h = linear_scan(log_a, x, phase, start, mode=mode)
        assert h.shape == x.shape and relative_error(h, expected) < 1e-10, mode
        assert relative_error(flat(gradients(h, leaves)), expected_grads) < 1e-8, mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 70])
def test_each_gradient_by_itself(mode, kind, length):
    """One vector of all gradients could hide a wrong small one."""
    inputs = example(length, kind, gates=(-1e-6, -0.01, -0.5, -3.0))
    leaves = given_ones(*inputs)
    expected = gradients(definition(*inputs), leaves)
    for ours, theirs in zip(gradients(linear_scan(*inputs, mode=mode), leaves), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-8


@pytest.mark.parametrize("mode", MODES)
def test_the_first_token_without_a_state_has_no_gate(mode):
    log_a, x, phase, _ = example(1, "complex gates")
    grads = gradients(linear_scan(log_a, x, phase, mode=mode), [log_a, phase])
    assert all(grad.abs().max() < 1e-15 for grad in grads)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40), batch=st.integers(1, 3), rest=st.lists(st.integers(1, 4), max_size=3),
    kind=st.sampled_from(list(KINDS)), shared=st.lists(st.booleans(), min_size=6, max_size=6),
    with_state=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(length, batch, rest, kind, shared, with_state, seed):
    """Any axes after the first two, each of which log_a, phase or both may share."""
    log_a, x, phase, state = example(length, kind, batch, rest, seed=seed)

    def share(z, axes):
        for axis, one in enumerate(axes[: len(rest)], 2):
            z = z.narrow(axis, 0, 1) if one else z
        return z

    log_a, phase = share(log_a, shared[:3]), None if phase is None else share(phase, shared[3:])
    inputs = (log_a, x, phase, state if with_state else None)
    expected = definition(*inputs)
    for mode in MODES:
        h = linear_scan(*inputs, mode=mode)
        assert h.shape == x.shape and h.dtype == expected.dtype and relative_error(h, expected) < 1e-10
        assert relative_error(gradients(h, [x])[0], gradients(expected, [x])[0]) < 1e-8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gate_rest", [(2,), (1,)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_gradcheck_and_gradgradcheck(mode, gate_rest, kind, length):
    inputs = example(length, kind, batch=1, rest=(2,), gate_rest=gate_rest, gates=(-1e-5, -0.1, -1.0), turns=(1.0,))
    leaves = given_ones(*inputs)

    def run(log_a, x, *others):
        return linear_scan(log_a, x, *(others if inputs[2] is not None else (None, *others)), mode=mode)

    assert torch.autograd.gradcheck(run, leaves) and torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_alone_and_may_be_strided(mode, kind):
    inputs = each(Tensor.detach, *example(20, kind))
    before = each(Tensor.clone, *inputs)
    strided = each(lambda z: z.transpose(0, -1).contiguous().transpose(0, -1), *inputs)
    assert not strided[1].is_contiguous()
    assert relative_error(linear_scan(*strided, mode=mode), linear_scan(*inputs, mode=mode)) < 1e-14
    for axis in (0, -1):
        expanded = each(lambda z: z.narrow(axis, 0, 1).expand_as(z), *inputs)
        copied = each(Tensor.contiguous, *expanded)
        assert relative_error(linear_scan(*expanded, mode=mode), linear_scan(*copied, mode=mode)) < 1e-14
    assert all(torch.equal(z, old) for z, old in zip(given_ones(*inputs), given_ones(*before)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["complex inputs", "all complex"])
def test_conjugated_inputs(mode, kind):
    """`conj()` is only a mark on a tensor, and some operations do not accept marked ones."""
    log_a, x, phase, state = example(20, kind)
    h = linear_scan(log_a, x.conj(), phase, state.conj(), mode=mode)
    assert relative_error(h, definition(log_a, x.conj(), phase, state.conj())) < 1e-10
    imaginary = linear_scan(log_a, x.conj().imag, phase, mode=mode)  # marked as negative
    assert relative_error(imaginary, definition(log_a, x.conj().imag, phase)) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_later_tokens_do_not_reach_back(mode):
    inputs = example(100, "complex gates", turns=(1.0,))
    changed = [torch.cat([z[:, :60], -torch.rand_like(z[:, 60:])], 1) for z in inputs[:3]]
    early, other = (linear_scan(*z, inputs[3], mode=mode) for z in (inputs[:3], changed))
    assert relative_error(other[:, :60], early[:, :60]) < 1e-14 < 1e-3 < relative_error(other[:, 60:], early[:, 60:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_two_pieces_at_every_split(mode, kind):
    inputs = example(40, kind)
    log_a, x, phase, start = inputs
    whole = definition(*inputs)
    for k in range(1, 40):
        first, rest = (each(lambda z: z[:, part], log_a, x, phase) for part in (slice(k), slice(k, None)))
        early = linear_scan(*first, start, mode=mode)
        late = linear_scan(*rest, early[:, -1], mode=mode)
        assert relative_error(torch.cat([early, late], 1), whole) < 1e-10, k


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_pieces(mode, kind):
    inputs = example(300, kind)
    log_a, x, phase, start = inputs
    pieces, state = [], start
    for i, j in ((0, 1), (1, 130), (130, 132), (132, 300)):
        pieces.append(linear_scan(*each(lambda z: z[:, i:j], log_a, x, phase), state, mode=mode))
        state = pieces[-1][:, -1]
    out, expected, leaves = torch.cat(pieces, 1), definition(*inputs), given_ones(*inputs)
    assert relative_error(out, expected) < 1e-10
    for ours, theirs in zip(gradients(out, leaves), gradients(expected, leaves)):
        assert relative_error(ours, theirs) < 1e-8


# special cases


@pytest.mark.parametrize("mode", MODES)
def test_a_gate_of_one_is_a_running_sum(mode):
    x = torch.randn(2, 200, 3, dtype=torch.float64)
    assert relative_error(linear_scan(torch.zeros_like(x), x, mode=mode), x.cumsum(1)) < 1e-13


@pytest.mark.parametrize("mode", MODES)
def test_fixed_gates_are_a_convolution(mode):
    """Linear recurrent units and S4D: with the same gate at every token, a convolution with its powers, by FFT."""
    x = torch.randn(2, 300, 3, dtype=torch.float64)
    log_a, phase = torch.tensor([-1e-3, -0.05, -0.7]).double(), torch.tensor([0.01, 1.0, -3.0]).double()
    powers = torch.exp(torch.outer(torch.arange(300), torch.complex(log_a, phase)))
    by_fft = torch.fft.ifft(torch.fft.fft(powers, 600, dim=0) * torch.fft.fft(x, 600, dim=1), dim=1)[:, :300]
    assert relative_error(linear_scan(log_a.expand(2, 300, 3), x, phase.expand(2, 300, 3), mode=mode), by_fft) < 1e-10


# numerics


UNIFORM = torch.rand(4096, 4, generator=torch.Generator().manual_seed(5))
LONG = (0.0, -1e-7, -1e-6, -1e-5, -1e-4, -1e-3, -0.1, -50.0)
LONG_GATES = {str(gate): torch.full_like(UNIFORM, gate) for gate in LONG} | {
    "resets": torch.where(UNIFORM < 0.01, -50.0, -1e-6),
    "rare resets": torch.where(UNIFORM < 0.002, -50.0, -1e-4 * UNIFORM),
    "log-uniform": -(10.0 ** (8.7 * UNIFORM - 7)),
    "everyday": -torch.nn.functional.softplus(4 * UNIFORM - 6),
}
LONG_PHASES = {
    "real": None,
    "random": 3 * torch.randn(4096, 4, generator=torch.Generator().manual_seed(6)),
    "large": 1000 * torch.randn(4096, 4, generator=torch.Generator().manual_seed(7)),
    "constant": torch.tensor([0.0, 0.01, 0.3, -2.0]).expand(4096, 4),
}


def long_example(turns, length=4096, kinds=tuple(LONG_GATES)):
    """log_a, x and phase in float32, a row for each kind of gate, once with any x and once with positive ones."""
    log_a = torch.stack([LONG_GATES[kind][:length] for kind in kinds]).repeat(2, 1, 1)
    x = torch.randn(len(kinds), length, 4, generator=torch.Generator().manual_seed(8))
    phase = None if LONG_PHASES[turns] is None else LONG_PHASES[turns][:length].expand_as(log_a)
    return log_a, torch.cat([x, x.abs()]), phase  # where x is positive, nothing averages out


@pytest.mark.parametrize("turns", LONG_PHASES)
@pytest.mark.parametrize("complex_inputs", [False, True])
def test_float32_over_4096_tokens(turns, complex_inputs):
    log_a, x, phase = long_example(turns)
    x = torch.complex(x, x.flip(1)) if complex_inputs else x
    exact = definition(*each(lambda z: z.to(torch.promote_types(z.dtype, torch.float64)), log_a, x, phase))
    for mode in MODES:
        h = linear_scan(log_a, x, phase, mode=mode)
        assert h.dtype == (torch.float32 if turns == "real" and not complex_inputs else torch.complex64)
        for kind, out, ref in zip([*LONG_GATES] * 2, h, exact):
            assert relative_error(out, ref) < 1e-5, (mode, kind)


def float32_gradient_errors(mode, *inputs):
    """Of the gradient of each input, the error in each row."""
    wide, narrow = ([z.to(dtype).requires_grad_() for z in inputs] for dtype in (torch.float64, torch.float32))
    pairs = zip(gradients(linear_scan(*narrow, mode=mode), narrow), gradients(definition(*wide), wide))
    return [[relative_error(out, ref) for out, ref in zip(*pair)] for pair in pairs]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("turns", LONG_PHASES)
def test_float32_gradients(mode, turns):
    found = float32_gradient_errors(mode, *given_ones(*long_example(turns, 1024)))
    for name, errors in zip(("log_a", "x", "phase"), found):
        for kind, error in zip([*LONG_GATES] * 2, errors):
            if (name, kind) != ("phase", "-50.0"):  # see the next test
                assert error < 1e-5, (name, kind)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gate", [-3.0, -10.0, -50.0])
def test_float32_phase_gradients_where_most_is_forgotten(mode, gate):
    """There they are small beside all others, and a form that adds large terms of opposite sign loses them."""
    x, phase = torch.randn(2, 1024, 4), torch.randn(2, 1024, 4)
    assert max(float32_gradient_errors(mode, torch.full_like(x, gate), x, phase)[2]) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates_stay_finite(mode, kind, dtype):
    inputs = example(130, kind, gates=(0.0, -1e-6, -1.0, -50.0, -5000.0, -1e30, -torch.inf), dtype=dtype)
    h = linear_scan(*inputs, mode=mode)
    assert h.isfinite().all() and all(grad.isfinite().all() for grad in gradients(h, given_ones(*inputs)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_of_zero_separates_documents(mode, kind):
    log_a, x, phase, state = example(150, kind, gates=(-1e-6, -0.3))
    edges = [0, 1, 64, 100, 150]
    gates = log_a.detach().clone()
    gates[:, edges[:-1]] = -torch.inf
    packed = linear_scan(gates, x, phase, state, mode=mode)
    alone = [definition(*each(lambda z: z[:, i:j], log_a, x, phase)) for i, j in zip(edges, edges[1:])]
    assert relative_error(packed, torch.cat(alone, 1)) < 1e-10
    grads = gradients(packed, [x, state])
    assert relative_error(grads[0], gradients(torch.cat(alone, 1), [x])[0]) < 1e-8 and not grads[1].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_rounds_only_the_result(mode, dtype, bound):
    for kind in ("real", "complex gates"):
        inputs = each(Tensor.detach, *example(300, kind, gates=(-1e-3, -0.01, -0.5), turns=(1.0,), dtype=dtype))
        h = linear_scan(*inputs, mode=mode)
        exact = definition(*each(Tensor.double, *inputs))
        assert h.dtype == (dtype if kind == "real" else torch.complex64)
        assert relative_error(h, exact) < (bound if kind == "real" else 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_types_of_results(mode):
    types = (torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
    for of_x in types:
        for of_gates in types[:3]:
            for of_phase in (None, *types[:3]):
                for of_state in (None, *types):
                    h = linear_scan(*each(lambda dtype: torch.zeros(1, 2, dtype=dtype), of_gates, of_x, of_phase),
                                    *each(lambda dtype: torch.zeros(1, dtype=dtype), of_state), mode=mode)
                    turning = of_phase is not None or of_x.is_complex or of_state is not None and of_state.is_complex
                    wide = torch.promote_types(of_x, torch.float32).to_complex()
                    assert h.dtype == (wide if turning else of_x), (of_x, of_gates, of_phase, of_state)


@pytest.mark.parametrize("mode", MODES)
def test_gates_may_be_wider_than_values(mode):
    inputs = example(200, "complex gates", gates=(-1e-6, -0.01), dtype=torch.float32)
    log_a, x, phase, state = (z.detach() for z in inputs)
    h = linear_scan(log_a, x.bfloat16(), phase, state, mode=mode)
    assert relative_error(h, definition(log_a.double(), x.bfloat16().double(), phase.double(), state.double())) < 1e-5
    in_double = linear_scan(log_a.double(), x, phase.double(), mode=mode)
    exact = definition(log_a.double(), x.double(), phase.double())
    assert in_double.dtype == torch.complex64 and relative_error(in_double, exact) < 5e-8  # rounded once, at the end
    from_double = linear_scan(log_a, x, phase, state.double(), mode=mode)
    assert relative_error(from_double, definition(*each(Tensor.double, log_a, x, phase, state))) < 5e-8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_narrow(mode, kind):
    inputs = example(65, kind, dtype=torch.float32)
    plain = linear_scan(*inputs, mode=mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = linear_scan(*inputs, mode=mode)
        grads = gradients(h, given_ones(*inputs))
    assert h.dtype == plain.dtype and torch.equal(h, plain)
    assert all(torch.equal(one, other) for one, other in zip(grads, gradients(plain, given_ones(*inputs))))


# the parts


def test_split_gate_keeps_what_exp_rounds_away():
    log_a = -torch.logspace(-7, 2, 200)
    unit, residual = split_gate(log_a)
    exact = log_a.double().exp()
    assert set(unit.tolist()) == {0.0, 1.0} and relative_error(unit.double() + residual.double(), exact) < 1e-8
    for near_one in (log_a > -0.5, log_a > -1e-5):
        assert relative_error(residual[near_one], log_a[near_one].double().expm1()) < 1e-7
    assert relative_error(log_a[log_a > -1e-5].exp() - 1, log_a[log_a > -1e-5].double().expm1()) > 1e-3  # the usual way
    assert [z.tolist() for z in split_gate(torch.tensor([0.0, -torch.inf]))] == [[1.0, 0.0], [0.0, 0.0]]


def test_gradient_of_split_gate_is_that_of_exp():
    log_a = torch.tensor([0.0, -1e-6, -0.4999, -0.5, -0.5001, -3.0, -1e30, -torch.inf]).double().requires_grad_()
    grad, = torch.autograd.grad(sum(split_gate(log_a)).sum(), log_a)
    assert relative_error(grad, log_a.exp()) < 1e-15


def test_recurrence_does_not_drift():
    log_a, update = torch.full((4096,), -1e-6), torch.rand(4096)
    exact, by_product = torch.zeros(()).double(), torch.zeros(())
    *_, by_split = recurrence(log_a, update, torch.zeros(()), dim=0)
    for gate, new in zip(log_a, update):
        by_product, exact = gate.exp() * by_product + new, gate.double().exp() * exact + new.double()
    assert relative_error(by_split, exact) < 1e-6 and relative_error(by_product, exact) > 1e-5
    state, new = torch.randn(3, dtype=torch.complex128), torch.randn(3, dtype=torch.complex128)
    log_a = torch.full((3,), -0.3, dtype=torch.float64)
    assert relative_error(recurrence_step(state, *split_gate(log_a), new), log_a.exp() * state + new) < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cumulative_rotation_is_a_running_product(dtype):
    phase = torch.randn(2, 4096, 3).to(dtype)
    rotation, step = cumulative_rotation(phase), torch.exp(1j * phase.double())
    wide, bound = (torch.complex128, 1e-11) if dtype == torch.float64 else (torch.complex64, 1e-7)
    assert rotation.dtype == wide and relative_error(rotation, step.cumprod(1)) < bound


def test_cumulative_rotation_sums_angles_in_float64():
    phase = torch.full((1, 4096, 1), 2.1)
    exact = torch.polar(torch.ones(4096).double(), phase[0, :, 0].double() * torch.arange(1, 4097))
    assert relative_error(cumulative_rotation(phase)[0, :, 0], exact) < 1e-7
    assert relative_error(torch.polar(torch.ones(4096), phase[0, :, 0].cumsum(0)), exact) > 1e-5  # the usual way


def test_polar_gate():
    log_a, phase = torch.tensor([[0.0, -0.3, -torch.inf], [0.0, 2.0, 1.0]], dtype=torch.float64)
    exact = torch.tensor([1.0, 0.7408182206817179, 0.0], dtype=torch.float64)
    assert relative_error(polar_gate(log_a), exact) < 1e-15
    turned = exact * torch.exp(1j * phase)
    assert relative_error(polar_gate(log_a, phase), turned) < 1e-15
    assert relative_error(polar_gate(log_a, phase, conjugate=True), turned.conj()) < 1e-15
    assert polar_gate(log_a.float()).dtype == torch.float32
    assert polar_gate(log_a.float(), phase.float()).dtype == torch.complex64


# what it costs


@pytest.mark.parametrize("turning", [False, True])
def test_time_and_memory_against_a_plain_loop(turning):
    """Forward and backward at (4, 2048, 256), float32 or complex64: not slower than the loop, and in little memory."""
    shape = (4, 2048, 256)
    leaves = [-torch.rand(shape), torch.randn(shape, dtype=torch.complex64 if turning else torch.float32)]
    leaves = [z.requires_grad_() for z in leaves + [torch.randn(shape)] * turning]
    best = {definition: float("inf"), linear_scan: float("inf")}

    def run(scan):
        h = scan(*leaves)
        torch.autograd.grad(h, leaves, torch.ones_like(h))

    for _ in range(4):  # in turns, so that a busy moment of the machine hits both
        for scan in best:
            start = time.perf_counter()
            run(scan)
            best[scan] = min(best[scan], time.perf_counter() - start)
    assert best[linear_scan] < best[definition]
    inputs, output = sum(z.nbytes for z in leaves), leaves[1].nbytes
    assert peak_bytes(lambda: run(linear_scan)) + inputs <= 2.5 * (inputs + output)


# bad input


def arguments():
    log_a, x, phase, state = (z.detach() for z in example(6, "complex gates", dtype=torch.float32))
    return {"log_a": log_a, "x": x, "phase": phase, "initial_state": state}


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("x", lambda z: z[0, 0, 0], r"x has shape \(4,\): it must be \(batch, len\)"),
        ("x", lambda z: z[..., 0], r"initial_state has shape \(2, 3, 4\): it must be \(batch = 2, axis2 = 3\)"),
        ("log_a", lambda z: z[..., :2],
         r"log_a has shape \(2, 6, 3, 2\): it must be \(batch = 2, len = 6, axis2 = 3 or 1, axis3 = 4 or 1\)"),
        ("log_a", lambda z: z[:, :1], r"log_a has shape \(2, 1, 3, 4\)"),
        ("log_a", lambda z: z[:1], r"log_a has shape \(1, 6, 3, 4\)"),
        ("phase", lambda z: z[..., 0], r"phase has shape \(2, 6, 3\)"),
        ("phase", lambda z: z[:, :5], r"phase has shape \(2, 5, 3, 4\)"),
        ("initial_state", lambda z: z[:, :1],
         r"initial_state has shape \(2, 1, 4\): it must be \(batch = 2, axis2 = 3, axis3 = 4\)"),
        ("initial_state", lambda z: z[None], r"initial_state has shape \(1, 2, 3, 4\)"),
        ("x", lambda z: z.long(), "x is torch.int64: it must be a tensor of floating-point"),
        ("x", lambda z: z.numpy(), "x is ndarray: it must be a tensor"),
        ("log_a", lambda z: z.to(torch.complex64), "log_a is torch.complex64: it must be a tensor of real"),
        ("phase", lambda z: z.to(torch.complex64), "phase is torch.complex64: it must be a tensor of real"),
        ("phase", lambda z: 0.5, "phase is float"),
        ("log_a", lambda z: z.int(), "log_a is torch.int32"),
        ("initial_state", lambda z: z.bool(), "initial_state is torch.bool"),
        ("log_a", lambda z: z + 50.5, r"log_a reaches 50.5: it is the log of a decay and must be at most 0"),
    ],
)
def test_bad_tensors(name, change, message):
    wrong = arguments()
    wrong[name] = change(wrong[name])
    with pytest.raises(ValueError, match=message):
        linear_scan(**wrong)


@pytest.mark.parametrize(
    "option, message",
    [({"mode": "scan"}, "mode is 'scan': it must be 'sequential' or 'parallel'"), ({"mode": None}, "mode is None"),
     ({"backend": "cuda"}, "backend is 'cuda': it must be 'naive', 'triton' or 'auto'")],
)  # fmt: skip
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(**arguments(), **option)


def test_triton_that_cannot_run_says_so():
    with pytest.raises(RuntimeError, match="backend='triton': mode='sequential' has no Triton kernel; use"):
        linear_scan(**arguments(), mode="sequential", backend="triton")
    double = {name: z.to(torch.promote_types(z.dtype, torch.float64)) for name, z in arguments().items()}
    with pytest.raises(RuntimeError, match="kernel scan computes in float32, but an argument is torch.float64"):
        linear_scan(**double, backend="triton")
    assert torch.equal(linear_scan(**arguments(), backend="naive"), linear_scan(**arguments()))


def test_empty_sequence():
    empty = {name: z[:, :0] if name != "initial_state" else z for name, z in arguments().items()}
    with pytest.raises(ValueError, match="x has len = 0: it must hold at least one token"):
        linear_scan(**empty)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_in_a_batch_or_a_channel_is_fine(mode):
    log_a, x, phase, state = arguments().values()
    assert linear_scan(log_a[:0], x[:0], phase[:0], state[:0], mode=mode).shape == (0, 6, 3, 4)
    assert linear_scan(log_a[..., :0], x[..., :0], phase[..., :0], mode=mode).shape == (2, 6, 3, 0)
