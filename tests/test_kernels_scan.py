"""The scan's kernel against naive PyTorch in float64: every kind of number, every way to share a gate, lengths,
widths, gates at the edge, and sequences cut into parts; and the small functions that it is made of."""

import importlib.util
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from llamba_ref.conventions import relative_error  # noqa: E402
from llamba_ref.kernels import scan as kernels  # noqa: E402
from llamba_ref.kernels.launch import GPUS, launch  # noqa: E402
from llamba_ref.kernels.scan import (  # noqa: E402
    combine,
    combine_complex,
    cos_sin,
    expm1,
    last_row,
    scan_backward_op,
    scan_op,
    triton_scan,
)
from llamba_ref.scan import linear_scan  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="looks into Triton's interpreter")
KINDS = {
    "real": (False, False),
    "complex gates": (True, False),
    "complex inputs": (False, True),
    "all complex": (True, True),
}
GATES = (0.0, -1e-6, -50.0, -0.3, -1.0)
TURNS = (1e-3, 1.0, 1000.0)  # sizes of the phases


def example(
    length,
    kind="real",
    rest=(5,),
    log_rest=None,
    phase_rest=None,
    batch=2,
    gates=GATES,
    turns=TURNS,
    dtype=torch.float32,
):
    """log_a, x, phase (None unless gates turn) and a state that require gradients; each log_a is one of `gates`."""
    generator = torch.Generator().manual_seed(0)
    turning, complex_inputs = KINDS[kind]

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def drawn(numbers, shape):
        return torch.tensor(numbers)[torch.randint(len(numbers), shape, generator=generator)]

    def values(*shape):
        return torch.complex(normal(*shape), normal(*shape)) if complex_inputs else normal(*shape).to(dtype)

    of_log, of_phase = ((batch, length, *(rest if one is None else one)) for one in (log_rest, phase_rest))
    made = [
        drawn(gates, of_log),
        values(batch, length, *rest),
        drawn(turns, of_phase) * normal(*of_phase) if turning else None,
        values(batch, *rest),
    ]
    return [None if z is None else z.to(DEVICE).requires_grad_() for z in made]


def doubles(inputs):
    """The same numbers in double precision."""
    return [
        None if z is None else z.detach().to(torch.promote_types(z.dtype, torch.float64)).requires_grad_()
        for z in inputs
    ]


def gradients(out, inputs):
    """Gradients of a fixed random weighting of `out` with respect to every input that was given."""
    weight = torch.randn(
        out.shape,
        generator=torch.Generator().manual_seed(1),
        dtype=torch.complex128 if out.is_complex() else torch.float64,
    )
    loss = (out * weight.to(out)).sum()
    return torch.autograd.grad(loss.real if loss.is_complex() else loss, [z for z in inputs if z is not None])


def errors(*inputs):
    """Relative errors of the kernel's states and of each gradient."""
    wide = doubles(inputs)
    h, exact = linear_scan(*inputs, backend="triton"), linear_scan(*wide, backend="naive")
    assert h.shape == exact.shape and h.dtype == (torch.complex64 if exact.is_complex() else inputs[1].dtype)
    pairs = zip([h, *gradients(h, inputs)], [exact, *gradients(exact, wide)], strict=True)
    return [relative_error(ours, theirs) for ours, theirs in pairs]


# equal to naive


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 63, 64, 65, 130, 500])
def test_lengths(length, kind):
    *inputs, state = example(length, kind, gates=(-1e-6, -0.3, -1.0), batch=2 if length < 100 else 1)
    assert max(errors(*inputs, state)) < 1e-5
    if length in (1, 2, 33):
        assert max(errors(*inputs, None)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 5, 15, 16, 17, 33, 70])
def test_widths(width, kind):
    assert max(errors(*example(35, kind, (width,), batch=1))) < 1e-5


SHARED = [(3, 4, 2), (3, 4, 1), (3, 1, 1), (1, 1, 1), (1, 4, 2), (1, 1, 2), (3, 1, 2), (1, 4, 1)]


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("kind", ["real", "complex gates", "complex inputs"])
def test_a_gate_for_several_neighbours(kind, shared):
    """Sizes of 1 anywhere; the log and the phase of a gate may be shared along different axes."""
    assert max(errors(*example(9, kind, (3, 4, 2), shared, shared, batch=1))) < 1e-5
    if KINDS[kind][0]:
        assert max(errors(*example(9, kind, (3, 4, 2), shared, (3, 1, 1), batch=1))) < 1e-5


def test_the_gradient_of_a_shared_gate_is_the_sum_over_its_neighbours():
    log_a, x, phase, state = example(40, "complex gates", (2, 6), (2, 1), (2, 1), gates=(-0.01, -0.5), turns=(1.0,))
    shared = gradients(linear_scan(log_a, x, phase, state, backend="triton"), [log_a, phase])
    copied = [z.detach().expand(*z.shape[:-1], 6).contiguous().requires_grad_() for z in (log_a, phase)]
    own = gradients(linear_scan(copied[0], x, copied[1], state, backend="triton"), copied)
    for ours, theirs in zip(shared, own):
        assert ours.shape[-1] == 1 and relative_error(ours, theirs.sum(-1, keepdim=True)) < 1e-6


def test_shared_gates_are_not_copied(monkeypatch):
    seen = []
    monkeypatch.setattr(
        kernels, "scan_op", lambda x, log_a, phase, start: seen.append((x.shape, log_a.shape)) or torch.empty_like(x)
    )
    for shared in ((3, 4, 1), (3, 1, 1), (1, 1, 1), (3, 4, 2)):
        log_a, x, _, state = example(7, "real", (3, 4, 2), shared)
        linear_scan(log_a, x, None, state, backend="triton")
    assert [gates[-1] for _, gates in seen] == [12, 3, 1, 24] and all(x[-1] == 24 for x, _ in seen)
    linear_scan(*example(7, "complex inputs", (3, 4), (3, 4)), backend="triton")
    assert seen[-1][0][-1] == 24 and seen[-1][1][-1] == 12  # real and imaginary part are neighbours


def test_one_axis():
    assert max(errors(*example(70, "all complex", ()))) < 1e-5
    assert max(errors(*example(70, "real", ()))) < 1e-5


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 40), batch=st.integers(1, 2), rest=st.lists(st.integers(1, 3), max_size=3),
    kind=st.sampled_from(list(KINDS)),
    shared=st.lists(st.booleans(), min_size=6, max_size=6), with_state=st.booleans(),
)  # fmt: skip
def test_any_shape(length, batch, rest, kind, shared, with_state):
    of_log, of_phase = ([1 if one else size for size, one in zip(rest, part)] for part in (shared[:3], shared[3:]))
    log_a, x, phase, state = example(length, kind, rest, of_log, of_phase, batch, gates=(-1e-6, -0.3, -1.0))
    assert max(errors(log_a, x, phase, state if with_state else None)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 6, 3), (2, 6, 0)])
def test_nothing_in_a_batch_or_a_channel_is_fine(kind, shape):
    inputs = example(6, kind, shape[2:], batch=shape[0])
    h = linear_scan(*inputs, backend="triton")
    assert h.shape == shape and all(
        z.numel() == grad.numel() for z, grad in zip((z for z in inputs if z is not None), gradients(h, inputs))
    )


# gates and phases at the edge


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_gates(kind):
    inputs = example(130, kind, gates=(0.0, -1e-6, -1.0, -50.0, -5000.0, -1e30, -torch.inf))
    assert max(errors(*inputs)) < 1e-5  # false for nan


@pytest.mark.parametrize("gate", [0.0, -1e-6, -50.0, -5000.0, -torch.inf])
@pytest.mark.parametrize("kind", ["real", "complex gates"])
def test_one_gate_for_all(kind, gate):
    """Where nearly everything is forgotten, gradients of gates are zero or tiny."""
    inputs = example(70, kind, gates=(gate,), turns=(1.0,))
    found = errors(*inputs)
    assert max(found[:1] + found[2:3]) < 1e-5 and all(error < 1e-5 for error in found)


def test_a_gate_of_zero_separates_documents():
    log_a, x, phase, state = (z.detach() for z in example(150, "complex gates", gates=(-1e-6, -0.3)))
    edges = [0, 1, 64, 100, 150]
    gates = log_a.clone()
    gates[:, edges[:-1]] = -torch.inf
    packed = linear_scan(gates, x, phase, state, backend="triton")
    alone = [linear_scan(log_a[:, i:j], x[:, i:j], phase[:, i:j], backend="triton") for i, j in zip(edges, edges[1:])]
    assert relative_error(packed, torch.cat(alone, 1)) < 1e-6


LONG_GATES = (0.0, -1e-7, -1e-6, -1e-5, -1e-4, -1e-3, -0.1, -50.0)


@pytest.mark.parametrize("turning", [False, True])
def test_4096_tokens_channel_by_channel(turning):
    """A constant gate in each channel, with large random phases in one half of them, constant ones in the other; x is
    positive."""
    log_a = torch.tensor(LONG_GATES).repeat(2).expand(1, 4096, 16).contiguous()
    constant = torch.tensor([0.0, 0.01, 0.3, -2.0, 2.1, 3.1, 1e-4, 1e3]).expand(1, 4096, 8)
    phase = torch.cat([1000 * torch.randn(1, 4096, 8), constant], -1) if turning else None
    inputs = [None if z is None else z.to(DEVICE).requires_grad_() for z in (log_a, torch.rand(1, 4096, 16), phase)]
    wide = doubles(inputs)
    h, exact = linear_scan(*inputs, backend="triton"), linear_scan(*wide, backend="naive")
    pairs = list(zip([h, *gradients(h, inputs)], [exact, *gradients(exact, wide)]))
    for name, (ours, theirs) in zip(("h", "log_a", "x", "phase"), pairs):
        for channel, gate in enumerate(LONG_GATES * 2):
            if name != "phase" or gate > -50:  # e^-50 of a gradient is left there
                assert relative_error(ours[..., channel], theirs[..., channel]) < 1e-5, (name, gate, channel)


@pytest.mark.parametrize("gate", [-3.0, -10.0, -50.0])
def test_phase_gradients_where_most_is_forgotten(gate):
    inputs = example(70, "complex gates", gates=(gate,), turns=(1.0,))
    assert errors(*inputs)[3] < 1e-5


# several parts of a sequence


def cut(monkeypatch, multiprocessors):
    monkeypatch.setattr(kernels, "gpu_of", lambda device: GPUS["A100"]._replace(multiprocessors=multiprocessors))


@pytest.mark.parametrize(
    "kind, length, parts",
    [("real", 1100, 2), ("real", 1601, 3), ("real", 2561, 5), ("complex inputs", 1100, 2), ("all complex", 1601, 3)],
)
def test_a_sequence_in_parts(monkeypatch, kind, length, parts):
    """Each part starts from zero, and a scan over their ends tells what enters them. Gates near 1, so that all of it
    matters."""
    inputs = example(length, kind, (1,), batch=1, gates=(-1e-6, -1e-4, -1e-3))
    cut(monkeypatch, parts)
    assert kernels._parts(inputs[1]) == parts
    assert max(errors(*inputs)) < 1e-5


def test_every_part_has_tokens(monkeypatch):
    """Whatever the length: no part is empty, and they are as many as asked for where that can be."""
    for length in range(1, 40_000, 37):
        for multiprocessors in (1, 3, 132):
            cut(monkeypatch, multiprocessors)
            parts = kernels._parts(torch.empty(1, length, 8, device="meta"))
            segment = triton.cdiv(length, parts)
            assert 1 <= parts <= max(1, length // 512) and (parts - 1) * segment < length <= parts * segment
    cut(monkeypatch, 100)
    assert (
        kernels._parts(torch.empty(1, 65536, 64, device="meta")) == 100
    )  # two programs a part, two programs a multiprocessor
    assert kernels._parts(torch.empty(64, 65536, 2048, device="meta")) == 1


# types, strides, marks


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("kind", ["real", "complex gates"])
def test_half_precision_rounds_only_the_results(kind, dtype, bound):
    inputs = example(130, kind, gates=(-1e-3, -0.01, -0.5), turns=(1.0,), dtype=dtype)
    found = errors(*inputs)
    assert found[0] < (bound / 2 if kind == "real" else 1e-5) and max(found) < bound


def test_gates_in_half_precision():
    log_a, x, phase, state = example(65, "complex gates", gates=(-0.01, -0.5), turns=(1.0,))
    assert (
        max(errors(log_a.detach().bfloat16().requires_grad_(), x, phase.detach().bfloat16().requires_grad_(), state))
        < 2**-7
    )


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_may_be_strided_and_are_left_alone(kind):
    inputs = [None if z is None else z.detach() for z in example(20, kind, (3, 4))]
    before = [None if z is None else z.clone() for z in inputs]
    plain = linear_scan(*inputs, backend="triton")
    strided = [None if z is None else z.transpose(0, -1).contiguous().transpose(0, -1) for z in inputs]
    assert not strided[1].is_contiguous() and torch.equal(linear_scan(*strided, backend="triton"), plain)
    for axis in (0, -1):
        expanded = [None if z is None else z.narrow(axis, 0, 1).expand_as(z) for z in inputs]
        copied = [None if z is None else z.contiguous() for z in expanded]
        assert torch.equal(linear_scan(*expanded, backend="triton"), linear_scan(*copied, backend="triton"))
    assert all(z is None or torch.equal(z, old) for z, old in zip(inputs, before))


def test_a_gradient_may_be_strided():
    log_a, x, _, state = example(20, rest=(4,))
    h = linear_scan(log_a, x, None, state, backend="triton")
    grad = torch.randn(4, 20, 2, device=DEVICE).transpose(0, 2)
    ours = torch.autograd.grad(h, x, grad, retain_graph=True)[0]
    assert not grad.is_contiguous() and torch.equal(
        ours, torch.autograd.grad(h, x, grad.contiguous(), retain_graph=True)[0]
    )
    expanded = torch.ones((), device=DEVICE).expand(2, 20, 4)
    assert torch.equal(torch.autograd.grad(h, x, expanded, retain_graph=True)[0], torch.autograd.grad(h.sum(), x)[0])


@pytest.mark.parametrize("kind", ["complex inputs", "all complex"])
def test_conjugated_inputs(kind):
    log_a, x, phase, state = (None if z is None else z.detach() for z in example(20, kind))
    marked = linear_scan(log_a, x.conj(), phase, state.conj(), backend="triton")
    assert x.conj().is_conj() and torch.equal(
        marked, linear_scan(log_a, x.conj_physical(), phase, state.conj_physical(), backend="triton")
    )
    assert x.conj().imag.is_neg() and torch.equal(
        linear_scan(log_a, x.conj().imag, backend="triton"), linear_scan(log_a, -x.imag, backend="triton")
    )
    leaf = x.clone().requires_grad_()
    exact = x.to(torch.complex128).requires_grad_()
    wide = (z if z is None else z.double() for z in (log_a, phase))
    log_wide, phase_wide = wide
    pairs = [
        (linear_scan(log_a, leaf.conj(), phase, backend="triton"), leaf),
        (linear_scan(log_wide, exact.conj(), phase_wide), exact),
    ]
    ours, theirs = (gradients(h, [z])[0] for h, z in pairs)
    assert relative_error(ours, theirs) < 1e-5


def test_autocast_does_not_narrow():
    inputs = example(65, "complex gates")
    plain = linear_scan(*inputs, backend="triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(linear_scan(*inputs, backend="triton"), plain)


def test_the_same_bits_every_time():
    inputs = example(130, "all complex")
    first, second = (linear_scan(*inputs, backend="triton") for _ in range(2))
    assert torch.equal(first, second) and all(
        torch.equal(*pair) for pair in zip(gradients(first, inputs), gradients(second, inputs))
    )


# as operators of PyTorch


def op_inputs(kind, dtype=torch.float32):
    log_a, x, phase, state = example(6, kind, (4,), (2,), (2,), dtype=dtype)
    state = state.detach().to(torch.complex64 if state.is_complex() else torch.float32).requires_grad_()
    return x, log_a, phase, state


@pytest.mark.parametrize("kind, dtype", [("real", torch.bfloat16), ("all complex", torch.float32)])
def test_opcheck(kind, dtype):
    x, log_a, phase, state = op_inputs(kind, dtype)
    torch.library.opcheck(scan_op, (x, log_a, phase, state))
    grad, log_a, phase, state = (None if z is None else z.detach() for z in (x, log_a, phase, state))
    torch.library.opcheck(scan_backward_op, (grad, grad, log_a, phase, state))


def both_ways(function, leaves):
    h = function(*leaves)
    return [h, *gradients(h, leaves)]


def test_torch_compile():
    def run(log_a, x, state):
        return 2 * linear_scan(log_a.expand_as(x), torch.sin(x), None, state, backend="triton")

    log_a, x, _, state = example(20, log_rest=(1,))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(both_ways(compiled, [log_a, x, state]), both_ways(run, [log_a, x, state]), strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_torch_compile_complex():
    log_a, x, phase, state = example(20, "all complex")

    def run(x, state, log_a, phase):
        return 2 * triton_scan(x, state, log_a, phase)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [x, state, log_a, phase]
    for ours, theirs in zip(both_ways(compiled, leaves), both_ways(run, leaves), strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_there_is_no_second_derivative():
    """An error, not a wrong number: naive has one."""
    log_a, x, _, _ = example(6)
    grads = torch.autograd.grad(linear_scan(log_a, x, backend="triton").sum(), (log_a, x), create_graph=True)
    with pytest.raises(RuntimeError, match="llamba_ref.scan_backward"):
        grads[0].sum().backward()


# which path is taken


def test_auto_is_naive_on_a_cpu(monkeypatch):
    def fail(*arguments):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(kernels, "triton_scan", fail)
    inputs = [None if z is None else z.cpu() for z in example(6)]
    assert torch.equal(linear_scan(*inputs), linear_scan(*inputs, backend="naive"))
    with pytest.raises(AssertionError, match="the kernel was called"):
        linear_scan(*example(6), backend="triton")


@pytest.mark.parametrize(
    "place, kind", [(0, "real"), (1, "real"), (2, "complex gates"), (3, "real"), (1, "all complex"), (3, "all complex")]
)
def test_double_precision_is_refused(place, kind):
    inputs = example(6, kind)
    inputs[place] = inputs[place].detach().to(torch.promote_types(inputs[place].dtype, torch.float64))
    message = (f"backend='triton': kernel scan computes in float32, but an argument is {inputs[place].dtype}; "
               "use backend='naive' or 'auto'")
    with pytest.raises(RuntimeError, match=message):
        linear_scan(*inputs, backend="triton")
    assert torch.equal(linear_scan(*inputs), linear_scan(*inputs, backend="naive"))


def test_what_has_no_kernel_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="backend='triton': mode='sequential' has no Triton kernel; use"):
        linear_scan(*example(6), mode="sequential", backend="triton")
    inputs = [None if z is None else z.cpu() for z in example(6)]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="backend='triton': kernel scan needs a CUDA tensor, this one is on cpu"):
        linear_scan(*inputs, backend="triton")


def test_wrong_arguments_are_named_before_the_kernel():
    log_a, x, _, state = (None if z is None else z.detach() for z in example(6))
    with pytest.raises(ValueError, match="log_a reaches 0.5"):
        linear_scan(log_a * 0 + 0.5, x, backend="triton")
    with pytest.raises(ValueError, match=r"initial_state has shape \(2, 4\): it must be \(batch = 2, axis2 = 5\)"):
        linear_scan(log_a, x, None, state[:, :4], backend="triton")
    with pytest.raises(ValueError, match="x has len = 0"):
        linear_scan(log_a[:, :0], x[:, :0], backend="triton")


# what it is made of


def numbers(rows):
    """Gates' r in [-1, 0], and states; a row a step, in float64."""
    return [(-torch.rand(rows, dtype=torch.float64), *torch.randn(2, rows, dtype=torch.float64)) for _ in range(3)]


def test_combine_is_associative():
    """In exact arithmetic, hence to rounding in float64; and it is a step h -> (1 + r) h + x after another."""
    for function, size in ((combine, 2), (combine_complex, 3)):
        first, second, third = (one[:size] for one in numbers(1000))
        left = function.fn(*function.fn(*first, *second), *third)
        right = function.fn(*first, *function.fn(*second, *third))
        assert len(left) == size and all(relative_error(one, other) < 1e-14 for one, other in zip(left, right))
        h = torch.randn(1000, dtype=torch.float64)
        for i in range(1, size):
            by_steps = h
            for step in (first, second, third):
                by_steps = (1 + step[0]) * by_steps + step[i]
            assert relative_error((1 + left[0]) * h + left[i], by_steps) < 1e-14


def test_combine_keeps_gates_near_one():
    """Gates are 1 + r in float32: r of two steps of -1e-9 is -2e-9, where a product of gates would be 1."""
    r = torch.full((1,), -1e-9)
    assert relative_error(combine.fn(r, r, r, r)[0], torch.tensor([-2e-9])) < 1e-6


@triton.jit
def forgetful(r1, x1, r2, x2):
    """Wrong: r is that of the last step alone. Right states from left to right, where r1 is never used."""
    return r2, x1 + (r2 * x1 + x2)


@triton.jit
def scan_tiles(
    r_ptr,
    x_ptr,
    out_ptr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    axis: tl.constexpr,
    reverse: tl.constexpr,
    right: tl.constexpr,
):
    """One tile, scanned along one axis with the right combine or the wrong one."""
    place = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    if right:
        _, x = tl.associative_scan((tl.load(r_ptr + place), tl.load(x_ptr + place)), axis, combine, reverse=reverse)
    else:
        _, x = tl.associative_scan((tl.load(r_ptr + place), tl.load(x_ptr + place)), axis, forgetful, reverse=reverse)
    tl.store(out_ptr + place, x)


def scan_tile(r, x, axis, reverse=False, right=True):
    out = torch.empty_like(x)
    launch(scan_tiles, (1,), r, x, out, rows=x.shape[0], columns=x.shape[1], axis=axis, reverse=reverse, right=right)
    return out


def by_loop(r, x, axis, reverse):
    """The states of a tile in float64."""
    r, x = ((z.double().movedim(axis, 0).flip(0) if reverse else z.double().movedim(axis, 0)) for z in (r, x))
    states, h = [], torch.zeros_like(x[0])
    for r_t, x_t in zip(r, x):
        h = (1 + r_t) * h + x_t
        states.append(h)
    h = torch.stack(states)
    return (h.flip(0) if reverse else h).movedim(0, axis)


@pytest.fixture
def from_left_to_right(monkeypatch):
    """Triton's own scan in the interpreter, from a fresh copy of its module."""
    spec = importlib.util.spec_from_file_location("triton.runtime.fresh_interpreter", interpreter.__file__)
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, fresh)  # dataclasses look there
    spec.loader.exec_module(fresh)
    original = fresh.ScanOps.generic_scan
    return lambda: monkeypatch.setattr(interpreter.ScanOps, "generic_scan", original)


@interpreted
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(8, 4), (1, 16), (16, 1), (2, 2)])
def test_the_tree_equals_the_scan_from_left_to_right(from_left_to_right, shape, axis, reverse):
    r, x = -torch.rand(shape), torch.randn(shape)
    tree = scan_tile(r, x, axis, reverse)
    from_left_to_right()
    plain = scan_tile(r, x, axis, reverse)
    assert relative_error(tree, plain) < 1e-6 and relative_error(tree, by_loop(r, x, axis, reverse)) < 1e-6


@interpreted
def test_only_the_tree_notices_a_combine_that_is_not_associative(from_left_to_right):
    r, x = -torch.rand(16, 2), torch.randn(16, 2)
    exact = by_loop(r, x, 0, False)
    assert (
        relative_error(scan_tile(r, x, 0, right=True), exact)
        < 1e-6
        < 1e-2
        < relative_error(scan_tile(r, x, 0, right=False), exact)
    )
    from_left_to_right()
    assert relative_error(scan_tile(r, x, 0, right=False), exact) < 1e-6  # blind


def test_only_the_combines_of_the_scan_are_associative():
    """The check above can fail: each of these differs in one place."""
    first, second, third = (one[:2] for one in numbers(1000))
    wrong = [
        forgetful.fn,
        lambda r1, x1, r2, x2: (r1 + r2, x1 + (r2 * x1 + x2)),
        lambda r1, x1, r2, x2: (r1 + r2 + r1 * r2, r2 * x1 + x2),
        lambda r1, x1, r2, x2: (r1 + r2 + r1 * r2, x1 + (r1 * x1 + x2)),
    ]
    for function in wrong:
        left, right = function(*function(*first, *second), *third), function(*first, *function(*second, *third))
        assert max(relative_error(one, other) for one, other in zip(left, right)) > 1e-3


@triton.jit
def small_functions(x_ptr, angle_ptr, expm1_ptr, cos_ptr, sin_ptr, size, BLOCK: tl.constexpr):
    """expm1 of float32, cos_sin of float64, number by number."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(expm1_ptr + i, expm1(tl.load(x_ptr + i, i < size, other=0.0)), i < size)
    c, s = cos_sin(tl.load(angle_ptr + i, i < size, other=0.0))
    tl.store(cos_ptr + i, c, i < size)
    tl.store(sin_ptr + i, s, i < size)


def run_small_functions(x, angle):
    x, angle = x.to(DEVICE), angle.to(DEVICE)
    outs = [torch.empty_like(x) for _ in range(3)]
    launch(small_functions, (triton.cdiv(len(x), 1024),), x, angle, *outs, len(x), BLOCK=1024)
    return [out.cpu().double() for out in outs]


def test_expm1_keeps_its_digits():
    """Every number by itself, from -100 to -1e-30, on both sides of the seam, and at the edges."""
    x = torch.cat(
        [-torch.logspace(-30, 2, 20_000), torch.linspace(-100, 0, 20_000), -0.5 + 1e-4 * torch.linspace(-1, 1, 2001)]
    )
    ours, exact = run_small_functions(x, torch.zeros_like(x).double())[0], x.double().expm1()
    apart = (ours - exact).abs() / exact.abs().clamp(min=1e-300)
    assert apart[exact != 0].max() < 5e-7 and not ours[exact == 0].any()
    near = x[(x > -1e-4) & (x < 0)].double()
    assert relative_error(near.float().exp().double() - 1, near.expm1()) > 1e-5  # the usual way
    edges = torch.tensor([0.0, -0.0, -5000.0, -1e30, -torch.inf])
    assert run_small_functions(edges, torch.zeros(5).double())[0].tolist() == [0.0, 0.0, -1.0, -1.0, -1.0]


def test_unit_of_large_angles():
    """Angles that have gone round 160,000 times: float32 would be off by a tenth of a radian."""
    angle = torch.cat(
        [
            torch.linspace(-10, 10, 5001).double(),
            1e6 * torch.randn(20_000).double(),
            torch.pi * torch.arange(-50, 50).double() / 2,
        ]
    )
    _, c, s = run_small_functions(torch.zeros(len(angle)), angle)
    assert (c - angle.cos()).abs().max() < 5e-7 and (s - angle.sin()).abs().max() < 5e-7
    assert (angle.float().cos().double() - angle.cos()).abs().max() > 1e-3  # the usual way


@triton.jit
def last_rows(x_ptr, out_ptr, BL: tl.constexpr, BD: tl.constexpr):
    """The last row of a tile, then the first."""
    d = tl.arange(0, BD)[None, :]
    x = tl.load(x_ptr + tl.arange(0, BL)[:, None] * BD + d)
    tl.store(out_ptr + d, last_row(x, BL, False))
    tl.store(out_ptr + BD + d, last_row(x, BL, True))


def test_last_row():
    x = torch.randn(8, 4, device=DEVICE)
    out = torch.empty(2, 4, device=DEVICE)
    launch(last_rows, (1,), x, out, BL=8, BD=4)
    assert torch.equal(out, x[[-1, 0]])


# where there is a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length, width", [(1, 2048), (2047, 70), (8192, 2048), (16384, 16)])
def test_gpu(kind, length, width):
    """Sizes that fill the device, and one long sequence that is cut into many parts."""
    found = errors(*example(length, kind, (width,), batch=1, gates=(-1e-6, -1e-3, -0.3, -50.0)))
    assert max(found) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bound", [(torch.float16, 1e-2), (torch.bfloat16, 1e-2)])
def test_gpu_half_precision(dtype, bound):
    assert max(errors(*example(4097, "real", (513,), gates=(-1e-3, -0.01, -0.5), dtype=dtype))) < bound


@pytest.mark.gpu
def test_gpu_auto_is_the_kernel(monkeypatch):
    inputs = example(100)
    assert torch.equal(linear_scan(*inputs), linear_scan(*inputs, backend="triton"))
    monkeypatch.setattr(kernels, "triton_scan", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        linear_scan(*inputs)


@pytest.mark.gpu
def test_gpu_rows_beyond_32_bits():
    """More than 2^31 numbers: offsets that are 32 bits wide would wrap."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    x = torch.randn(2, 65536, 2**14 + 256, device="cuda", dtype=torch.bfloat16)
    log_a = torch.full((2, 65536, 1), -0.1, device="cuda")
    h = linear_scan(log_a, x, backend="triton")
    exact = linear_scan(log_a[1:, -512:].double(), x[1:, -512:, -64:].double())
    assert relative_error(h[1:, -64:, -64:], exact[:, -64:]) < 1e-2
