"""GateLoop's chunked mode as kernels: outputs, states and every gradient against the naive path in float64."""

import pytest
import torch
from torch import Tensor

from llamba_ref.conventions import relative_error
from llamba_ref.gateloop import GateLoop, gateloop
from llamba_ref.kernels import gateloop as kernels
from llamba_ref.kernels import scan
from llamba_ref.kernels.gateloop import gateloop_op, triton_gateloop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "log_a", "phase", "initial_state")
MIXED = (0.0, -1e-6, -50.0, -0.3, -1.0)
TURNING, COMPLEX = ("phase", "phase and complex inputs"), ("complex inputs", "phase and complex inputs")


@pytest.fixture(autouse=True)
def wide_blocks(monkeypatch):
    """The interpreter takes as long for a wide block as for a narrow one: let the scan from chunk to chunk have few."""
    if DEVICE == "cpu":
        monkeypatch.setattr(scan, "_block", lambda turning: 512)


def example(
    length,
    kind="real",
    batch=1,
    heads=1,
    key=16,
    value=16,
    gates=MIXED,
    per_head=False,
    start=True,
    dtype=torch.float32,
    seed=0,
) -> dict:
    """Arguments of `gateloop`: log_a is drawn from `gates`, or between two of them; which inputs are complex depends
    on the kind."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, complex_too=False, dtype=torch.float32):
        z = torch.randn(*shape, generator=generator, dtype=torch.complex64 if complex_too else torch.float32)
        return (z if complex_too else z.to(dtype)).to(DEVICE)

    sizes = {"q": key, "k": key, "v": value}
    which = {"complex keys": "qk", "complex values": "v"}.get(kind, "qkv" if kind in COMPLEX else "")
    inputs = {
        name: normal(batch, length, heads, size, complex_too=name in which, dtype=dtype) for name, size in sizes.items()
    }
    shape = (batch, length, heads, 1 if per_head else key)
    inputs["log_a"] = torch.tensor(gates)[torch.randint(len(gates), shape, generator=generator)].to(DEVICE)
    if kind in TURNING:
        inputs["phase"] = 3 * normal(*shape)
    if start:
        inputs["initial_state"] = normal(
            batch, heads, key, value, complex_too=kind in (*TURNING, *COMPLEX, "complex state")
        )
    return inputs


def results(inputs: dict, backend: str, wide: bool, **options) -> dict[str, Tensor]:
    """Output, last state, and the gradients of a fixed random weighting of both."""
    leaves = {name: z.detach() for name, z in inputs.items()}
    if wide:
        leaves = {name: z.to(torch.complex128 if z.is_complex() else torch.float64) for name, z in leaves.items()}
    leaves = {name: z.requires_grad_() for name, z in leaves.items()}
    y, state = gateloop(**leaves, mode="chunked", return_state=True, backend=backend, **options)
    loss, generator = 0.0, torch.Generator().manual_seed(1)
    for out in (y, state):
        weight = torch.randn(
            out.shape, generator=generator, dtype=torch.complex128 if out.is_complex() else torch.float64
        ).to(DEVICE)
        loss = loss + (out.to(weight.dtype) * weight).sum().real
    return {"y": y.detach(), "state": state.detach()} | dict(
        zip(leaves, torch.autograd.grad(loss, list(leaves.values())))
    )


def check(inputs: dict, tolerance: float = 1e-5) -> None:
    """The kernels against the naive path in float64."""
    expected, found = results(inputs, "naive", wide=True), results(inputs, "triton", wide=False)
    assert found.keys() == expected.keys()
    for name, out in found.items():
        assert out.dtype.is_complex == expected[name].dtype.is_complex and out.isfinite().all(), name
        assert relative_error(out, expected[name]) < tolerance, name


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 130])
def test_lengths(length):
    check(example(length))


@pytest.mark.parametrize("length", [2, 17, 65])
def test_lengths_of_complex_gates(length):
    check(example(length, "phase"))


@pytest.mark.parametrize(
    "kind", ["phase", "complex inputs", "phase and complex inputs", "complex keys", "complex values", "complex state"]
)
def test_kinds(kind):
    check(example(20, kind))


@pytest.mark.parametrize("kind", ["real", "phase", "complex inputs"])
def test_one_gate_a_head(kind):
    check(example(20, kind, per_head=True))


@pytest.mark.parametrize("key, value", [(16, 20), (20, 16), (64, 16), (16, 64), (33, 47)])
def test_widths(key, value):
    check(example(20, key=key, value=value))


def test_a_width_that_is_no_power_of_two_with_complex_gates():
    check(example(18, "phase", key=19, value=17))


def test_batches_and_heads():
    check(example(65, batch=2, heads=2))
    check(example(3, "phase", batch=2, heads=2))


def test_without_a_start():
    check(example(20, start=False))
    check(example(10, "phase", start=False))


@pytest.mark.parametrize("kind", ["real", "phase"])
@pytest.mark.parametrize("gates", [(0.0,), (-1e-6,), (-30.0,), (-50.0, -1e-6), (-5000.0, -1e-6, -1e-6, -1e-3)], ids=str)
def test_gates(gates, kind):
    check(example(70 if kind == "real" else 33, kind, gates=gates))


def test_strong_gates_keep_their_gradient():
    """Every term of it fades by e^-20: next to the undecayed terms of the textbook identity it would be nothing but
    rounding."""
    inputs = example(40, "phase", gates=(-20.0,), start=False)
    inputs["phase"] *= 0.1
    check(inputs)


def test_gates_of_zero():
    """log_a = -inf forgets everything; its gradient is 0 up to the rounding of the others."""
    inputs = example(80, gates=(-torch.inf, -0.1, -1e-6))
    found = results(inputs, "triton", wide=False)
    finite = results(inputs | {"log_a": inputs["log_a"].clamp(min=-1e4)}, "naive", wide=True)
    for name, out in found.items():
        assert relative_error(out, finite[name]) < 1e-5, name
    assert found["log_a"][inputs["log_a"].isinf()].abs().max() < 1e-6 * found["log_a"].abs().max()


def test_several_chunks():
    check(example(200, gates=(-50.0, -1e-6, -1e-6, -1e-4)))


@pytest.mark.slow
@pytest.mark.parametrize("gates", [(-1e-6,), (-50.0, -1e-6, -1e-6, -1e-4)], ids=str)
def test_long(gates):
    check(example(4096, gates=gates))


@pytest.mark.parametrize("kind", ["real", "phase"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind, dtype):
    inputs = example(40, kind, dtype=dtype)
    check(inputs, 1e-2)
    y, state = gateloop(**inputs, mode="chunked", return_state=True, backend="triton")
    assert y.dtype == (dtype if kind == "real" else torch.complex64) and state.dtype == (
        torch.float32 if kind == "real" else torch.complex64
    )


def test_not_contiguous():
    inputs = example(17, batch=2, heads=2)
    turned = {name: z.transpose(0, -1).contiguous().transpose(0, -1) for name, z in inputs.items()}
    assert not any(z.is_contiguous() for z in turned.values())
    expected = results(inputs, "triton", wide=False)
    for name, out in results(turned, "triton", wide=False).items():
        assert torch.equal(out, expected[name]), name


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_through_one_output_alone(which):
    inputs = example(40, gates=(-1e-6, -0.1, -0.3))

    def gradients(backend, wide):
        leaves = [(z.double() if wide else z).requires_grad_() for z in inputs.values()]
        out = gateloop(**dict(zip(inputs, leaves)), mode="chunked", return_state=True, backend=backend)[which]
        return torch.autograd.grad(out.sum(), leaves[1:])

    for ours, theirs in zip(gradients("triton", False), gradients("naive", True)):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("queries", [1, 2, 4])
def test_operation(queries):
    """What torch asks of an operation; and several queries for one key are several calls with one."""
    def draw(*shape):
        return torch.randn(shape, device=DEVICE)

    q, k, v, log_a, start = (
        draw(1, 9, 2, queries, 16),
        draw(1, 9, 2, 16),
        draw(1, 9, 2, 16),
        -draw(1, 9, 2, 8).abs(),
        draw(1, 2, 16, 16),
    )
    y, state = gateloop_op(q, k, v, log_a, None, start)
    for r in range(queries):
        expected = gateloop(
            q[:, :, :, r].double(),
            k.double(),
            v.double(),
            log_a.double().repeat_interleave(2, -1),
            mode="chunked",
            initial_state=start.double(),
        )
        assert relative_error(y[:, :, :, r], expected) < 1e-5
    if queries < 4:
        inputs = [z.requires_grad_() for z in (q, k, v, log_a, torch.zeros_like(log_a), start)]
        torch.library.opcheck(gateloop_op, (*inputs[:4], inputs[4] if queries == 2 else None, start))


@pytest.mark.parametrize("turning", [False, True])
def test_compile(turning):
    inputs = [z.requires_grad_() for z in example(20).values()]

    def run(q, k, v, log_a, start):
        y, state = (
            gateloop_op(q.unsqueeze(3), k, v, log_a, log_a, start)
            if turning
            else triton_gateloop(q, k, v, log_a, None, start)
        )
        return y.square().sum() + state.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (compiled, run))):
        assert relative_error(ours, theirs) < 1e-6


def test_repeats_itself():
    inputs = example(20, "phase")
    first, second = (results(inputs, "triton", wide=False) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["real", "phase"])
def test_scan_mode_has_its_kernel(kind):
    inputs = example(20, kind)
    expected = gateloop(
        **{name: z.to(torch.promote_types(z.dtype, torch.float64)) for name, z in inputs.items()}, mode="scan"
    )
    assert relative_error(gateloop(**inputs, mode="scan", backend="triton"), expected) < 1e-5


@pytest.mark.parametrize("change, message", [
    ({"mode": "recurrent"}, "mode='recurrent' has no Triton kernel; use backend='naive' or 'auto'"),
    ({"mode": "attention"}, "mode='attention' has no Triton kernel"),
    ({"key": 8}, "kernel gateloop needs widths of at least 16, here key = 8; mode='scan' has a kernel for any width"),
    ({"value": 15}, "kernel gateloop needs widths of at least 16, here value = 15; mode='scan'"),
    ({"wide": True}, "kernel gateloop computes in float32, but an argument is torch.float64"),
    ({"mode": "scan", "wide": True}, "kernel scan computes in float32, but an argument is torch.float64"),
])  # fmt: skip
def test_what_cannot_run_says_why(change, message):
    mode, wide = change.pop("mode", "chunked"), change.pop("wide", False)
    inputs = example(5, **change)
    inputs = {name: z.double() if wide else z for name, z in inputs.items()}
    with pytest.raises(RuntimeError, match=f"backend='triton': {message}"):
        gateloop(**inputs, mode=mode, backend="triton")
    gateloop(**inputs, mode=mode, backend="auto")


@pytest.mark.skipif(DEVICE == "cuda", reason="on a CPU")
def test_auto_is_naive_on_a_cpu():
    inputs = example(20)
    ours = gateloop(**inputs, mode="chunked", backend="auto")
    assert torch.equal(ours, gateloop(**inputs, mode="chunked", backend="naive"))
    assert not torch.equal(ours, gateloop(**inputs, mode="chunked", backend="triton"))


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["real", "phase", "phase and complex inputs"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), ("tf32", 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 1e-2)]
)
def test_on_a_gpu(kind, dtype, tolerance):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        dtype = torch.float32 if dtype == "tf32" else dtype
        for length, sizes in (
            (65, {}),
            (1000, {"batch": 2, "heads": 3, "key": 64, "value": 64}),
            (300, {"key": 80, "value": 40}),
            (4096, {"key": 128, "value": 128}),
        ):
            check(example(length, kind, dtype=dtype, **sizes), tolerance)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("gates", ["real", "complex"])
def test_the_mixer_takes_the_kernels(gates):
    mixer, u = GateLoop(64, 2, 32, gates=gates).to(DEVICE), torch.randn(2, 100, 64, device=DEVICE)
    assert relative_error(mixer(u), mixer.cpu()(u.cpu()).to(DEVICE)) < 1e-5


def test_one_real_gate_a_head_is_state_space_duality(monkeypatch):
    """The SSD kernel computes it; with a phase or complex inputs it cannot."""
    for kind, faster in (("real", True), ("phase", False), ("complex inputs", False)):
        calls = []
        monkeypatch.setattr(kernels, "ssd_op", lambda *inputs: calls.append(1) or (inputs[0], inputs[-1]))
        gateloop(**example(20, kind, per_head=True), mode="chunked", backend="triton")
        assert bool(calls) == faster, kind
