"""State space duality on a GPU: kernels against the loop in float64, in Triton's interpreter where there is no GPU."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor

from llamba_ref.conventions import relative_error
from llamba_ref.llamba import DiscreteMamba2
from llamba_ref.mamba2 import Mamba2, MambaState
from llamba_ref.ssd import ssd, ssd_step

pytest.importorskip("triton")

from llamba_ref.kernels import scan as scan_kernels
from llamba_ref.kernels import ssd as kernels
from llamba_ref.kernels.launch import GPUS, INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = 1e-5 if DEVICE == "cuda" else 2e-6
ROUNDED = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # the interpreter multiplies in float32 and cuts bfloat16 off
HALF = dict.fromkeys(ROUNDED, 1e-2) if DEVICE == "cuda" else ROUNDED
GATES = (0.0, -1e-6, -0.01, -0.3, -1.0, -50.0)
NAMES = (
    "y",
    "state",
    "gradient of x",
    "gradient of log_a",
    "gradient of B",
    "gradient of C",
    "gradient of initial_state",
)
pretends = pytest.mark.skipif(DEVICE == "cuda", reason="pretends to have a GPU that is not there")


@pytest.fixture(autouse=True)
def wide_blocks(monkeypatch):
    """The interpreter takes its time for every program: let the scan between the chunks, which has tests of its own,
    be few."""
    if DEVICE == "cpu":
        monkeypatch.setattr(scan_kernels, "_block", lambda turning: 1024)


def normal(*shape, dtype=torch.float32, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def example(length, batch=1, heads=1, groups=1, headdim=16, state=16, gates=GATES, dtype=torch.float32):
    """x, log_a, B, C and a state; each gate is drawn from `gates`."""
    drawn = torch.randint(len(gates), (batch, length, heads), generator=torch.Generator().manual_seed(0))
    keys = (batch, length, groups, state)
    return (
        normal(batch, length, heads, headdim, dtype=dtype),
        torch.tensor(gates)[drawn].to(DEVICE),
        normal(*keys, dtype=dtype, seed=1),
        normal(*keys, dtype=dtype, seed=2),
        normal(batch, heads, headdim, state, seed=3),
    )


def double(tensors):
    return [z.detach().double() for z in tensors]


def run(inputs, grads, **options):
    """y and the last state, and the gradients of all inputs from gradients of both."""
    leaves = [z.detach().requires_grad_() for z in inputs]
    out = ssd(*leaves[:4], initial_state=leaves[4], return_state=True, **options)
    return [z.detach() for z in out] + list(torch.autograd.grad(out, leaves, grads))


def cotangents(inputs):
    """Fixed random gradients of both outputs."""
    return [normal(*inputs[0].shape, dtype=inputs[0].dtype, seed=4), normal(*inputs[4].shape, seed=5)]


def assert_exact(inputs, bound=CLOSE, mode="recurrent"):
    """Every output and every gradient by itself: one vector of all could hide a wrong small one."""
    grads = cotangents(inputs)
    out, exact = run(inputs, grads, backend="triton"), run(double(inputs), double(grads), mode=mode, backend="naive")
    assert out[0].dtype == inputs[0].dtype and out[1].dtype == torch.float32
    for name, one, ref in zip(NAMES, out, exact):
        assert one.isfinite().all() and relative_error(one, ref) < bound, name


# the sequence


@pytest.mark.parametrize(
    "length, batch, heads, groups, headdim, state",
    [
        (1, 2, 1, 1, 16, 16),
        (2, 1, 4, 2, 16, 16),
        (3, 1, 4, 1, 20, 24),
        (31, 1, 2, 2, 16, 16),
        (32, 1, 3, 3, 16, 16),
        (33, 1, 1, 1, 16, 40),
        (63, 2, 1, 1, 16, 16),
        (64, 1, 4, 1, 16, 16),
        (65, 1, 4, 2, 16, 16),
        (130, 1, 2, 1, 16, 16),
        (34, 1, 1, 1, 48, 16),
        (33, 1, 1, 1, 64, 64),
    ],
)
def test_outputs_and_gradients(length, batch, heads, groups, headdim, state):
    assert_exact(example(length, batch, heads, groups, headdim, state))


def test_extreme_gates(monkeypatch):
    """A row for each, and one with all of them: no row may hide in another. With a T4's tiles, 40 tokens are two
    chunks."""
    monkeypatch.setattr(kernels, "gpu_of", lambda device: GPUS["T4"])
    gates = (0.0, -1e-6, -50.0, -5000.0, -torch.inf)
    x, log_a, B, C, start = example(40, 6, gates=gates)
    log_a[:5] = torch.tensor(gates, device=DEVICE)[:, None, None]
    inputs = (x, log_a, B, C, start)
    grads = cotangents(inputs)
    out, exact = (
        run(inputs, grads, backend="triton"),
        run(double(inputs), double(grads), mode="recurrent", backend="naive"),
    )
    for name, one, ref in zip(NAMES, out, exact):
        assert one.isfinite().all()
        for row, gate in enumerate((*gates, "mixed")):
            assert relative_error(one[row], ref[row]) < CLOSE, (name, gate)


def test_a_thousand_tokens_that_hardly_fade():
    x, log_a, B, C, start = example(1000, gates=(-1e-6,))
    assert_exact([x.abs(), log_a, B.abs(), C.abs(), start.abs()], mode="chunked")  # nothing averages out


def test_a_gate_of_zero_separates_documents():
    x, log_a, B, C, start = example(70, gates=(-1e-6, -0.3))
    edges = (0, 5, 64, 70)
    log_a[:, edges[:-1]] = -torch.inf
    packed = ssd(x, log_a, B, C, initial_state=start, backend="triton")
    alone = [ssd(*(z[:, i:j].double() for z in (x, log_a, B, C)), mode="recurrent") for i, j in zip(edges, edges[1:])]
    assert relative_error(packed, torch.cat(alone, 1)) < CLOSE


def test_a_sequence_in_pieces():
    *inputs, start = example(70)
    whole, last = ssd(*double(inputs), initial_state=start.double(), return_state=True, mode="recurrent")
    pieces, state = [], start
    for i, j in ((0, 1), (1, 66), (66, 70)):
        y, state = ssd(*(z[:, i:j] for z in inputs), initial_state=state, return_state=True, backend="triton")
        pieces.append(y)
    assert relative_error(torch.cat(pieces, 1), whole) < CLOSE and relative_error(state, last) < CLOSE


@pytest.mark.parametrize("used", ["y", "state", "y, from no state"])
def test_one_output_and_some_gradients(used):
    """Only x and B, or only log_a and C, want a gradient; the other output has none."""
    *inputs, start = example(35, gates=(-0.01, -0.3))
    start = None if "no state" in used else start
    wanted = (0, 2) if used == "state" else (1, 3)

    def gradients(values, state, **options):
        leaves = [z.requires_grad_(i in wanted) for i, z in enumerate(values)]
        out = ssd(*leaves, initial_state=state, return_state=True, **options)[used == "state"]
        weight = normal(*out.shape, seed=6).to(out.dtype)
        return torch.autograd.grad((out * weight).sum(), [leaves[i] for i in wanted], allow_unused=True)

    out = gradients([z.detach() for z in inputs], start, backend="triton")
    exact = gradients(double(inputs), None if start is None else start.double(), mode="recurrent")
    for one, ref in zip(out, exact):
        assert relative_error(one, ref) < CLOSE


def test_the_last_state_does_not_depend_on_queries():
    *inputs, start = example(3)
    inputs[3].requires_grad_()
    last = ssd(*inputs, initial_state=start, return_state=True, backend="triton")[1]
    assert not torch.autograd.grad(last.sum(), inputs[3])[0].any()


# layouts


def test_slices_of_a_projection():
    """x, B and C as `SSDMixer.convolve` makes them are read where they are, and a sum sends back an expanded
    gradient."""
    batch, length, heads, groups, headdim, state = 2, 5, 2, 1, 16, 24
    _, log_a, *_ = example(length, batch, heads)
    wide = normal(batch, length, heads * headdim + 2 * groups * state, seed=7)

    def run_on(wide, log_a, **options):
        leaf = wide.detach().requires_grad_()
        x, B, C = leaf.split([heads * headdim, groups * state, groups * state], dim=-1)
        x, B, C = (
            x.reshape(batch, length, heads, headdim),
            B.reshape(batch, length, groups, state),
            C.reshape(batch, length, groups, state),
        )
        y = ssd(x, log_a, B, C, **options)
        y.sum().backward()
        return (x, B, C), y, leaf.grad

    slices, *out = run_on(wide, log_a, backend="triton")
    for z in slices:
        rows, apart = kernels.rows_of(z)
        assert not z.is_contiguous() and rows.data_ptr() == z.data_ptr() and apart == wide.shape[-1]
    _, *exact = run_on(wide.double(), log_a.double(), mode="recurrent")
    assert all(relative_error(one, ref) < CLOSE for one, ref in zip(out, exact))


def transposed(z, i, j):
    """The same numbers, with two axes exchanged in memory."""
    return z.transpose(i, j).contiguous().transpose(i, j)


def test_other_layouts():
    inputs = example(5, 2, 2, 2, 16, 20)
    odd = [transposed(z, *axes) for z, axes in zip(inputs, ((0, 1), (1, 2), (2, 3), (1, 2), (2, 3)))]
    grads = cotangents(inputs)
    plain, other = (
        run(inputs, grads, backend="triton"),
        run(odd, [transposed(z, 1, 2) for z in grads], backend="triton"),
    )
    assert not any(z.is_contiguous() for z in odd)
    for name, one, ref in zip(NAMES, other, plain):
        assert torch.equal(one, ref), name
    x, log_a, B, C, start = inputs
    shared = [
        x[:, :1].expand(x.shape),
        log_a[:1, :, :1].expand(log_a.shape),
        B[:1, :1].expand(B.shape),
        C[:1].expand(C.shape),
    ]
    kept = [z.clone() for z in shared]
    out = ssd(*shared, initial_state=start[:1].expand(start.shape), backend="triton")
    assert torch.equal(out, ssd(*kept, initial_state=start[:1].repeat(2, 1, 1, 1), backend="triton"))
    assert all(torch.equal(z, old) for z, old in zip(shared, kept))


# types and GPUs


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype):
    assert_exact(example(34, 1, 2, 1, gates=(-0.01, -0.3, -1.0), dtype=dtype), HALF[dtype])


def test_narrow_gates_and_states_are_widened():
    x, log_a, B, C, start = example(34, gates=(-0.01, -0.3), dtype=torch.bfloat16)
    inputs = (x, log_a.bfloat16(), B, C, start.bfloat16())
    y, last = ssd(*inputs[:4], initial_state=inputs[4], return_state=True, backend="triton")
    exact = ssd(*double(inputs[:4]), initial_state=inputs[4].double(), return_state=True, mode="recurrent")
    assert y.dtype == torch.bfloat16 and relative_error(y, exact[0]) < HALF[torch.bfloat16]
    assert last.dtype == torch.float32 and relative_error(last, exact[1]) < (CLOSE if DEVICE == "cpu" else 1e-2)


def test_autocast_does_not_narrow():
    *inputs, start = example(5)
    plain = ssd(*inputs, initial_state=start, backend="triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(ssd(*inputs, initial_state=start, backend="triton"), plain)


@pytest.fixture
def precision():
    """Set how float32 matrices are multiplied, for this test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def bundles(monkeypatch):
    """Pretend to have a GPU; the list that comes back fills with the sizes of the bundles that are launched."""
    seen, launch = [], kernels.launch

    def launch_and_look(kernel, *arguments, **constants):
        if "TOGETHER" in constants:
            seen.append(constants["TOGETHER"])
        launch(kernel, *arguments, **constants)

    def pretend(gpu):
        monkeypatch.setattr(kernels, "gpu_of", lambda device: gpu)
        return seen

    monkeypatch.setattr(kernels, "launch", launch_and_look)
    return pretend


@pytest.mark.parametrize(
    "heads, groups, multiprocessors, together", [(4, 1, 1, 4), (4, 1, 2, 2), (4, 1, 3, 1), (6, 2, 4, 1), (6, 2, 1, 3)]
)
def test_bundles_of_heads(heads, groups, multiprocessors, together, bundles):
    """Few bundles where there is enough to do for all multiprocessors, more where not; partial sums are added up."""
    x, log_a, B, C, start = example(33, 1, heads, groups)
    grads = cotangents((x, log_a, B, C, start))
    exact = run(double((x, log_a, B, C, start)), double(grads), mode="recurrent")[2:]
    seen = bundles(INTERPRETED._replace(multiprocessors=multiprocessors))
    out = kernels.ssd_backward(*grads, x, log_a, B, C, start)
    assert seen == [together]
    for name, one, ref in zip(NAMES[2:], out, exact):
        assert one.shape == ref.shape and relative_error(one, ref) < CLOSE, name


@pytest.mark.parametrize("dtype", ROUNDED)
def test_partial_sums_of_half_precision_are_not_rounded(dtype, bundles):
    """Bundles of one head for a group of four: their sum is rounded, no summand is."""
    inputs = example(33, 1, 4, 1, gates=(-0.01, -0.3), dtype=dtype)
    grads = cotangents(inputs)
    exact = run(double(inputs), double(grads), mode="recurrent")[2:]
    seen = bundles(GPUS["T4"])
    out = kernels.ssd_backward(*grads, *inputs)
    assert seen == [1] and [z.dtype for z in out] == [z.dtype for z in inputs]
    for one, ref in zip(out[2:4], exact[2:4]):
        assert relative_error(one, ref) < 1.1 * relative_error(ref.to(dtype), ref)


@pretends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["T4", "A100"])
def test_tiles_of_other_gpus(name, dtype, monkeypatch):
    """Other chunks, other blocks, half factors on tensor cores: the same numbers."""
    gpu = GPUS[name]
    monkeypatch.setattr(kernels, "gpu_of", lambda device: gpu)
    inputs = example(130 if (name, dtype) == ("A100", torch.float16) else 66, gates=(-0.01, -0.3, -1.0), dtype=dtype)
    assert_exact(inputs, CLOSE if dtype == torch.float32 else ROUNDED[dtype] if name == "T4" else 1e-3)


def test_choice_of_tiles():
    _, a100, h100 = GPUS.values()
    for dtype in (torch.float32, *ROUNDED):
        for backward in (False, True):
            tiles = {gpu.name: kernels.tiles_for(dtype, gpu, backward) for gpu in (*GPUS.values(), INTERPRETED)}
            assert tiles["T4"] == kernels.tiles_for(torch.float32, a100, backward) and tiles["A100"] == tiles["H100"]
            assert all(16 <= size and size & (size - 1) == 0 for found in tiles.values() for size in found[:3])
            assert tiles["interpreter"] == kernels.tiles_for(torch.float32, a100, backward)
    chunks = {
        (dtype, backward): kernels.tiles_for(dtype, h100, backward).chunk
        for dtype in (torch.float32, *ROUNDED)
        for backward in (False, True)
    }
    assert list(chunks.values()) == [64, 32, 128, 64, 128, 64]


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_tf32_does_not_change_the_tiles(allowed, precision):
    exact = [kernels.tiles_for(torch.float32, gpu, backward) for gpu in GPUS.values() for backward in (False, True)]
    precision(allowed)
    assert exact == [
        kernels.tiles_for(torch.float32, gpu, backward) for gpu in GPUS.values() for backward in (False, True)
    ]


def test_the_same_again():
    """No sum depends on which program comes first."""
    inputs = example(34, 1, 2, 1)
    grads = cotangents(inputs)
    once, again = (run(inputs, grads, backend="triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, again))


# one step


def step_example(
    batch=2,
    heads=4,
    groups=2,
    headdim=16,
    state=16,
    gates=(0.0, -1e-6, -0.3, -50.0, -5000.0, -torch.inf),
    dtype=torch.float32,
):
    *inputs, start = example(1, batch, heads, groups, headdim, state, gates, dtype)
    return [*(z[:, 0] for z in inputs), start]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "heads, groups, headdim, state",
    [
        (1, 1, 16, 16),
        (4, 2, 16, 24),
        (4, 1, 20, 16),
        (3, 3, 1, 1),
        (2, 1, 3, 5),
        (2, 2, 64, 64),
        (1, 1, 40, 200),
        (1, 1, 1, 3000),
    ],
)
def test_step(heads, groups, headdim, state, in_place):
    """Any width: nothing is multiplied as a matrix. The old state stays as it is, or makes room for the new one."""
    *token, start = step_example(2, heads, groups, headdim, state)
    exact = ssd_step(*double(token), start.double())
    old, address = start.clone(), start.data_ptr()
    y_t, new = ssd_step(*token, start, in_place=in_place, backend="triton")
    assert y_t.dtype == new.dtype == torch.float32
    assert relative_error(y_t, exact[0]) < CLOSE and relative_error(new, exact[1]) < CLOSE
    if in_place:
        assert new is start and start.data_ptr() == address
    else:
        assert torch.equal(start, old) and new.data_ptr() != address


@pytest.mark.parametrize("gate", [0.0, -1e-6, -0.3, -50.0, -5000.0, -torch.inf])
def test_step_with_every_gate(gate):
    *token, start = step_example(gates=(gate,))
    y_t, new = ssd_step(*token, start, backend="triton")
    exact = ssd_step(*double(token), start.double())
    assert relative_error(y_t, exact[0]) < CLOSE and relative_error(new, exact[1]) < CLOSE
    if gate < -100:
        assert relative_error(new, token[0][..., None] * token[2].repeat_interleave(2, 1)[:, :, None]) < CLOSE


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_step_on_other_layouts(backend, in_place):
    """A state that is a view keeps its memory, and what lies around it is left alone."""
    *token, start = step_example(state=20)
    exact = ssd_step(*double(token), start.double())
    room = normal(2, 4, 24, 16, seed=8)
    room[:, :, 2:22] = start.mT
    before, view = room.clone(), room[:, :, 2:22].mT
    odd = [transposed(z, 0, 1) for z in token[:2]] + [transposed(z, 1, 2) for z in token[2:]]
    y_t, new = ssd_step(*odd, view, in_place=in_place, backend=backend)
    assert not any(z.is_contiguous() for z in (*odd, view))
    assert relative_error(y_t, exact[0]) < CLOSE and relative_error(new, exact[1]) < CLOSE
    if in_place:
        assert new is view and relative_error(room[:, :, 2:22].mT, exact[1]) < CLOSE
        room[:, :, 2:22] = before[:, :, 2:22]
    assert torch.equal(room, before)


def test_step_on_a_token_of_a_projection():
    """As `SSDMixer.step` cuts it out: rows far apart."""
    wide = normal(3, 5, 2 * 16 + 2 * 24)
    _, log_a, *_, start = example(5, 3, 2, 1, 16, 24)
    x, B, C = (z.unflatten(-1, (-1, width)) for z, width in zip(wide.split([32, 24, 24], -1), (16, 24, 24)))
    token = [z[:, 3] for z in (x, log_a, B, C)]
    out, exact = ssd_step(*token, start, backend="triton"), ssd_step(*double(token), start.double())
    assert all(relative_error(one, ref) < CLOSE for one, ref in zip(out, exact))


@pytest.mark.parametrize("dtype", ROUNDED)
def test_step_in_half_precision(dtype):
    """Only y is rounded; a narrow state is widened, but cannot be overwritten."""
    *token, start = step_example(gates=(-0.01, -0.3), dtype=dtype)
    exact = ssd_step(*double(token), start.double())
    for in_place in (False, True):
        y_t, new = ssd_step(*token, start.clone(), in_place=in_place, backend="triton")
        assert y_t.dtype == dtype and new.dtype == torch.float32
        assert relative_error(y_t, exact[0]) < ROUNDED[dtype] and relative_error(new, exact[1]) < CLOSE
    narrow = start.to(dtype)
    new = ssd_step(*token, narrow, backend="triton")[1]
    assert new.dtype == torch.float32 and relative_error(new, ssd_step(*double(token), narrow.double())[1]) < CLOSE
    for backend in ("naive", "auto", "triton"):
        with pytest.raises(ValueError, match=f"state is {dtype}: to be overwritten it must be torch.float32"):
            ssd_step(*token, narrow, in_place=True, backend=backend)
    with pytest.raises(ValueError, match="state is torch.float32: to be overwritten it must be torch.float64"):
        ssd_step(*double(token), start, in_place=True)


@pytest.mark.parametrize("in_place", [False, True])
def test_steps_are_the_sequence(in_place):
    *inputs, start = example(40, 1, 2, 1)
    exact, last = ssd(*double(inputs), initial_state=start.double(), return_state=True, mode="recurrent")
    whole = ssd(*inputs, initial_state=start, return_state=True, backend="triton")
    state, outputs = start.clone(), []
    for token in zip(*(z.unbind(1) for z in inputs)):
        y_t, state = ssd_step(*token, state, in_place=in_place, backend="triton")
        outputs.append(y_t)
    assert relative_error(torch.stack(outputs, 1), exact) < CLOSE and relative_error(state, last) < CLOSE
    assert relative_error(torch.stack(outputs, 1), whole[0]) < CLOSE and relative_error(state, whole[1]) < CLOSE


def test_steps_do_not_drift():
    """float32 rounds exp(gate) to a neighbour 3e-8 away; over 50 steps, 4096 numbers would all be off by 1.5e-6 in one
    direction."""
    gate = -16.5 * 2**-24
    *token, start = step_example(1, 1, 1, 64, 64, gates=(gate,))
    token[0].zero_()
    state = start.abs() + 1
    exact = state.double() * torch.tensor(50 * gate, dtype=torch.float64).exp().to(DEVICE)
    for _ in range(50):
        _, state = ssd_step(*token, state, backend="triton")
    assert abs((state / exact - 1).mean()) < 2e-7


def test_naive_step_in_place():
    *token, start = step_example()
    y_t, new = ssd_step(*token, start)
    state = start.clone()
    again, same = ssd_step(*token, state, in_place=True)
    assert same is state and torch.equal(state, new) and torch.equal(again, y_t)


@pytest.mark.parametrize("index", range(5))
def test_step_has_no_gradient_on_the_gpu(index):
    given = step_example(gates=(-0.3,))
    given[index].requires_grad_()
    with pytest.raises(
        RuntimeError, match="backend='triton': kernel ssd_step has no gradient; use backend='naive' or 'auto'"
    ):
        ssd_step(*given, backend="triton")
    y_t, new = ssd_step(*given)
    assert torch.autograd.grad(y_t.sum() + new.sum(), given[index])[0].any()
    with torch.no_grad():
        out = ssd_step(*given, backend="triton")
    assert all(relative_error(one, ref) < CLOSE and not one.requires_grad for one, ref in zip(out, (y_t, new)))


def test_a_gradient_through_an_overwritten_state():
    """Refused before anything is overwritten: never a wrong number."""
    for asked in range(5):
        inputs = [z.requires_grad_(i == asked) for i, z in enumerate(step_example(gates=(-0.3,)))]
        before = inputs[-1].clone()
        with pytest.raises(RuntimeError, match="^ssd_step overwrites the state and keeps nothing for a gradient"):
            ssd_step(*inputs, in_place=True)
        assert torch.equal(inputs[-1], before)
        with torch.no_grad():
            ssd_step(*inputs, in_place=True)


# PyTorch's view of it


def test_opcheck():
    """PyTorch's own list: schema, autograd, shapes without numbers, tracing with sizes that are not fixed."""
    x, log_a, B, C, start = example(1)
    grads = cotangents((x, log_a, B, C, start))
    torch.library.opcheck(kernels.ssd_op, [z.clone().requires_grad_() for z in (x, log_a, B, C, start)])
    torch.library.opcheck(kernels.ssd_backward_op, (*grads, x, log_a, B, C, start))
    *token, state = step_example()
    torch.library.opcheck(kernels.step_op, (*token, state))
    torch.library.opcheck(kernels.step_in_place_op, (*token, state))


def test_shapes_without_numbers_are_the_true_ones():
    """Even of half types in another layout: what the tracer believes is what comes out."""
    x, log_a, B, C, start = example(3, 1, 2, 2, dtype=torch.bfloat16)
    x, B, C = (transposed(z, 1, 3) for z in (x, B, C))
    forward, backward = (x, log_a, B, C, start), (*cotangents((x, log_a, B, C, start)), x, log_a, B, C, start)
    for op, arguments in (
        (kernels.ssd_op, forward),
        (kernels.ssd_backward_op, backward),
        (kernels.step_op, [*(z[:, 0] for z in forward[:4]), start]),
    ):
        with torch._subclasses.FakeTensorMode() as mode:
            believed = op(*(mode.from_tensor(z) for z in arguments))
        for one, fake in zip(op(*arguments), believed):
            assert (one.shape, one.dtype, one.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_compile_without_breaks():
    inputs = example(2)
    grads = cotangents(inputs)
    compiled = torch.compile(partial(ssd, return_state=True, backend="triton"), fullgraph=True, backend="aot_eager")
    leaves = [z.clone().requires_grad_() for z in inputs]
    out = compiled(*leaves[:4], initial_state=leaves[4])
    found = [*out, *torch.autograd.grad(out, leaves, grads)]
    assert all(torch.equal(one, ref) for one, ref in zip(found, run(inputs, grads, backend="triton")))


@pytest.mark.parametrize("in_place", [False, True])
def test_compile_a_step_without_breaks(in_place):
    *token, start = step_example()
    expected = ssd_step(*token, start, backend="triton")
    old = start.clone()
    compiled = torch.compile(
        partial(ssd_step, in_place=in_place, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    out = compiled(*token, start)
    assert all(torch.equal(one, ref) for one, ref in zip(out, expected))
    assert torch.equal(start, expected[1] if in_place else old)


# where it cannot run


@pytest.mark.parametrize(
    "change, options, message",
    [
        (dict(headdim=15), {}, "kernel ssd needs widths of at least 16, here headdim = 15; use"),
        (dict(state=8), {}, "kernel ssd needs widths of at least 16, here state = 8; use"),
        (dict(headdim=1, state=3), {}, "kernel ssd needs widths of at least 16, here headdim = 1 and state = 3; use"),
        (dict(dtype=torch.float64), {}, "kernel ssd computes in float32, but an argument is torch.float64"),
        ({}, dict(mode="recurrent"), "mode='recurrent' has no Triton kernel"),
        ({}, dict(mode="attention"), "mode='attention' has no Triton kernel"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(change, options, message):
    *inputs, _ = example(4, **change)
    with pytest.raises(RuntimeError, match=f"backend='triton': {message}"):
        ssd(*inputs, backend="triton", **options)
    assert torch.equal(ssd(*inputs, **options), ssd(*inputs, backend="naive", **options))


@pytest.mark.parametrize("name", ["log_a", "initial_state"])
def test_one_float64_is_enough(name):
    x, log_a, B, C, start = example(4)
    log_a, start = (log_a.double(), start) if name == "log_a" else (log_a, start.double())
    with pytest.raises(RuntimeError, match="kernel ssd computes in float32, but an argument is torch.float64"):
        ssd(x, log_a, B, C, initial_state=start, backend="triton")
    with pytest.raises(RuntimeError, match="kernel ssd computes in float32, but an argument is torch.float64"):
        ssd_step(x[:, 0], log_a[:, 0], B[:, 0], C[:, 0], start, backend="triton")


def test_a_cpu_that_does_not_interpret(monkeypatch):
    *inputs, start = (z.cpu() for z in example(4))
    token = [z[:, 0] for z in inputs]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend='triton': kernel ssd needs a CUDA tensor, this one is on cpu; use"):
        ssd(*inputs, backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton': kernel ssd needs a CUDA tensor, this one is on cpu; use"):
        ssd_step(*token, start, backend="triton")


def test_auto_is_naive_on_a_cpu(monkeypatch):
    def fail(*arguments):
        raise AssertionError("the kernel was called")

    for name in ("ssd_op", "triton_step"):
        monkeypatch.setattr(kernels, name, fail)
    *inputs, start = (z.cpu() for z in example(4))
    assert torch.equal(ssd(*inputs), ssd(*inputs, backend="naive"))
    token = [z[:, 0] for z in inputs]
    assert torch.equal(ssd_step(*token, start)[0], ssd_step(*token, start, backend="naive")[0])
    if DEVICE == "cpu":  # and this test would notice
        with pytest.raises(AssertionError, match="the kernel was called"):
            ssd(*inputs, backend="triton")
        with pytest.raises(AssertionError, match="the kernel was called"):
            ssd_step(*token, start, backend="triton")


@pytest.mark.parametrize("option", [{"chunk_size": 0}, {"mode": "scan"}])
def test_bad_options_come_first(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ssd(*example(2)[:4], backend="triton", **option)


def test_chunk_size_is_of_no_concern_to_the_kernel():
    *inputs, _ = example(5)
    assert torch.equal(*(ssd(*inputs, chunk_size=size, backend="triton") for size in (1, 64)))


# in a model


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mamba2(16, 16, 16, n_groups=1),
        lambda: DiscreteMamba2(32, 16, 2, 2),
        lambda: DiscreteMamba2(32, 16, 2, 1, activation="silu"),
    ],
    ids=["Mamba2", "DiscreteMamba2", "DiscreteMamba2 with shared keys"],
)
def test_mixers(make, monkeypatch):
    """Outputs, the state handed on, and the gradient of every parameter, from a state and without one."""
    mixer = make()
    with torch.no_grad():
        for parameter in mixer.parameters():  # no parameter at a special value
            parameter.add_(0.1 * torch.randn_like(parameter))
    mixer = mixer.to(DEVICE)
    exact = deepcopy(mixer).double()
    u = normal(1, 35, mixer.in_proj.in_features)
    conv, ssm = mixer.init_state(1)
    start = MambaState(normal(*conv.shape, seed=1), normal(*ssm.shape, seed=2))

    def everything(mixer, u, start):
        fresh = mixer(u)
        y, state = mixer(u, start)
        loss = (fresh * u).sum() + (y * u.flip(1)).sum() + state.ssm.square().sum()
        return [fresh, y, *state, *torch.autograd.grad(loss, list(mixer.parameters()))]

    monkeypatch.setattr("llamba_ref.mamba2.ssd", partial(ssd, backend="naive"))
    expected = everything(exact, u.double(), MambaState(*double(start)))
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return ssd(*arguments, backend="triton", **options)

    monkeypatch.setattr("llamba_ref.mamba2.ssd", counted)
    out = everything(mixer, u, start)
    assert len(calls) == 2
    names = ["y", "y from a state", "window", "state", *(name for name, _ in mixer.named_parameters())]
    for name, one, ref in zip(names, out, expected, strict=True):
        assert relative_error(one, ref) < 1e-5, name


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "heads, groups, headdim, state", [(8, 8, 64, 64), (8, 1, 64, 128), (4, 2, 128, 64), (6, 3, 80, 48)]
)
@pytest.mark.parametrize(
    "dtype, allowed, bound",
    [
        (torch.float32, "highest", 1e-5),
        (torch.float32, "high", 1e-3),
        (torch.float16, "highest", 1e-2),
        (torch.bfloat16, "highest", 1e-2),
    ],
)
def test_large_on_a_gpu(heads, groups, headdim, state, dtype, allowed, bound, precision):
    precision(allowed)
    for gates in ((-1e-6,), (-0.01, -0.3, -1.0), (0.0, -1e-4, -0.3, -50.0, -5000.0, -torch.inf)):
        assert_exact(example(2048, 2, heads, groups, headdim, state, gates, dtype), bound, mode="chunked")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *ROUNDED])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 127, 128, 129, 1000])
def test_lengths_on_a_gpu(length, dtype):
    assert_exact(example(length, 2, 4, 2, 20, 40, dtype=dtype), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu(monkeypatch):
    """Where the kernel can do what is asked for, and only there."""
    calls = []
    for name in ("ssd_op", "triton_step"):
        monkeypatch.setattr(
            kernels,
            name,
            lambda *arguments, real=getattr(kernels, name), name=name: calls.append(name) or real(*arguments),  # noqa: B008
        )
    *inputs, start = example(4)
    token = [z[:, 0] for z in inputs]
    ssd(*inputs)
    ssd_step(*token, start)
    assert calls == ["ssd_op", "triton_step"]
    ssd(*inputs, mode="recurrent")
    ssd(*double(inputs))
    ssd(*example(4, headdim=8)[:4])
    ssd_step(*token, start.clone().requires_grad_())
    assert len(calls) == 2


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph():
    """Captured once with a state that keeps its address, replayed for every token: the numbers of eager steps."""
    *inputs, start = example(20, 2, 8, 4, 64, 64, gates=(-1e-3, -0.3))
    tokens = list(zip(*(z.unbind(1) for z in inputs)))
    state, outputs = start.clone(), []
    for token in tokens:
        y_t, state = ssd_step(*token, state, backend="triton")
        outputs.append(y_t)
    fed, kept = [z.clone() for z in tokens[0]], start.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile before the capture
        ssd_step(*fed, kept.clone(), in_place=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_t, _ = ssd_step(*fed, kept, in_place=True)
    kept.copy_(start)
    for token, expected in zip(tokens, outputs):
        for place, new in zip(fed, token):
            place.copy_(new)
        graph.replay()
        assert torch.equal(y_t, expected)
    assert torch.equal(kept, state)
