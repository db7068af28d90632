"""The convolution's kernels against the naive path in float64, outputs and every gradient, and against the mistakes
that they could make."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from llamba_ref.conv import causal_conv, causal_conv_step
from llamba_ref.conventions import relative_error
from llamba_ref.kernels.conv import conv_backward_op, conv_op, conv_step_op
from llamba_ref.mamba2 import Mamba2

NAMES = ("x", "weight", "bias", "window", "starts")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def example(length, width=4, channels=35, batch=2, bias=True, window=True, dtype=torch.float32, device=DEVICE):
    """x as a slice of something wider, weight, bias and window; None for what is left out."""
    shapes = {
        "x": (batch, length, channels + 9),
        "weight": (channels, 1, width),
        "bias": (channels,),
        "window": (batch, channels, width),
    }
    drawn = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
    drawn["x"] = drawn["x"][..., 3 : 3 + channels]
    return {name: z if given else None for (name, z), given in zip(drawn.items(), (True, True, bias, window))}


def run(inputs, backend, dtype=None, **options):
    """Output, new window, and the gradients of a fixed weighting of both, by name."""
    leaves = {
        name: (z.to(dtype or z.dtype) if name == "x" or dtype else z).detach().requires_grad_()
        for name, z in inputs.items()
        if z is not None and name != "starts"
    }
    arguments = leaves | {"starts": inputs.get("starts")}
    y, last = causal_conv(*(arguments.get(name) for name in NAMES), backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.device, z.dtype) for z in (y, last)]
    total = (y * weights[0]).sum() + (last * weights[1]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"y": y, "last": last} | {f"d{name}": g for name, g in zip(leaves, gradients)}


def assert_equal_to_naive(inputs, limit, **options):
    wide = run(inputs, "naive", torch.float64, **options)
    narrow = run(inputs, "triton", **options)
    assert wide.keys() == narrow.keys()
    for name in wide:
        assert narrow[name].dtype == inputs["x"].dtype and narrow[name].shape == wide[name].shape
        assert relative_error(narrow[name], wide[name]) < limit, name
    return narrow


# Forward and gradients


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("bias, window", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("length", [1, 3, 65])
def test_equals_naive(length, bias, window, activation):
    """Shorter than the filter in a last block of channels that is nearly empty, and over an edge between tiles."""
    assert_equal_to_naive(
        example(length, channels=35 if length < 60 else 5, batch=1 if length < 60 else 2, bias=bias, window=window),
        1e-5,
        activation=activation,
    )


BORDERS = {"everywhere": range(33), "in the first tile": [0, 1, 2], "at its end": [31, 32], "in one row": [2, 5]}


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("borders", BORDERS)
def test_documents(borders, window, activation):
    """No tap reaches over a border, nor does a gradient."""
    inputs = example(33, channels=5, window=window)
    starts = torch.zeros(2, 33, dtype=torch.bool, device=DEVICE)
    starts[: 1 if borders == "in one row" else 2, list(BORDERS[borders])] = True
    assert_equal_to_naive(inputs | {"starts": starts}, 1e-5, activation=activation)


@pytest.mark.parametrize("width, length", [(1, 5), (2, 70), (8, 70)])
def test_documents_at_other_widths(width, length):
    starts = torch.rand(2, length, device=DEVICE) < 0.2
    assert_equal_to_naive(example(length, width, channels=3) | {"starts": starts}, 1e-5, activation="silu")


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("length", [2, 33])
def test_widths(width, length):
    assert_equal_to_naive(example(length, width, channels=7), 1e-5, activation="silu")


@pytest.mark.parametrize("length, channels", [(63, 1), (64, 65), (130, 3)])
def test_lengths_and_channels(length, channels):
    assert_equal_to_naive(example(length, channels=channels, batch=1), 1e-5, activation="silu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_half_precision(dtype, activation):
    assert_equal_to_naive(example(70, channels=20, dtype=dtype), 1e-2, activation=activation)


def test_filters_of_another_type_than_the_input():
    """Training in mixed precision: every gradient has the type of what it belongs to."""
    inputs = example(9, channels=5)
    narrow = run(inputs | {"x": inputs["x"].bfloat16()}, "triton", activation="silu")
    wide = run(inputs, "naive", torch.float64, activation="silu")
    assert {name: z.dtype for name, z in narrow.items()} == {
        "y": torch.bfloat16,
        "last": torch.bfloat16,
        "dx": torch.bfloat16,
        "dweight": torch.float32,
        "dbias": torch.float32,
        "dwindow": torch.float32,
    }
    assert all(relative_error(narrow[name], wide[name]) < 1e-2 for name in wide)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
def test_silu_far_out(scale):
    """Where exp(-y) overflows or the gradient is nearly 0 or 1 nothing turns into a NaN."""
    inputs = example(20, channels=5)
    assert_equal_to_naive(
        inputs | {"x": inputs["x"] * scale, "window": inputs["window"] * scale}, 1e-5, activation="silu"
    )


def strided(kind):
    inputs = example(11, channels=5)
    x, window = inputs["x"], inputs["window"]
    if kind == "transposed":  # channels are not neighbours
        x = x.mT.contiguous().mT
    elif kind == "every second token":
        x = torch.randn(2, 22, 5, device=DEVICE)[:, ::2]
    elif kind == "batch in the middle":
        x = torch.randn(11, 2, 5, device=DEVICE).transpose(0, 1)
    elif kind == "expanded":
        x = x[:1].expand(2, -1, -1)
    else:
        window = window.mT.contiguous().mT
    return inputs | {"x": x, "window": window}


@pytest.mark.parametrize(
    "kind", ["transposed", "every second token", "batch in the middle", "expanded", "window by tokens"]
)
def test_strides(kind):
    inputs = strided(kind)
    before = inputs["x"].clone()
    assert_equal_to_naive(inputs, 1e-5, activation="silu")
    assert torch.equal(inputs["x"], before)


def test_a_slice_is_not_copied(monkeypatch):
    """The kernels get the memory of the projection itself."""
    seen = []
    monkeypatch.setattr(
        "llamba_ref.kernels.conv.launch", lambda kernel, grid, x, *rest, **constants: seen.append(x.data_ptr())
    )
    inputs = example(6)
    conv_op(*inputs.values(), True)
    assert seen == [inputs["x"].data_ptr()]


def test_gradient_of_a_sum_has_no_strides():
    inputs = example(10, channels=5)
    leaves = [z.detach().requires_grad_() for z in inputs.values()]
    wide = [z.detach().double().requires_grad_() for z in inputs.values()]
    ours = torch.autograd.grad(causal_conv(*leaves, activation="silu", backend="triton")[0].sum(), leaves)
    theirs = torch.autograd.grad(causal_conv(*wide, activation="silu")[0].sum(), wide)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs))


def test_the_same_bits_every_time():
    inputs = example(70, width=2, channels=5)
    first, second = (run(inputs, "triton", activation="silu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_later_tokens_and_other_rows_do_not_reach_in():
    inputs = example(40, channels=5)
    y, _ = causal_conv(*inputs.values(), backend="triton")
    changed = inputs["x"].clone()
    changed[:, 20:], changed[1] = torch.nan, torch.nan
    other, _ = causal_conv(changed, *list(inputs.values())[1:], backend="triton")
    assert torch.equal(other[0, :20], y[0, :20]) and other[0, 20:].isnan().all() and other[1].isnan().all()


# The window


def test_every_split():
    """The window is carried: pieces of any length join to the whole, outputs and gradients."""
    inputs = example(6, width=3, channels=3, batch=1)
    x, *rest = (z.detach().requires_grad_() for z in inputs.values())
    wide = [z.detach().double().requires_grad_() for z in inputs.values()]
    whole, end = causal_conv(*wide, activation="silu")
    weight = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weight).sum(), wide)
    for k in range(1, 6):
        first, window = causal_conv(x[:, :k], *rest, activation="silu", backend="triton")
        second, window = causal_conv(x[:, k:], *rest[:2], window, activation="silu", backend="triton")
        y = torch.cat([first, second], 1)
        assert relative_error(y, whole) < 1e-5 and torch.equal(window, end.float())
        for ours, theirs in zip(torch.autograd.grad((y * weight.float()).sum(), (x, *rest)), expected):
            assert relative_error(ours, theirs) < 1e-5


def test_the_new_window_is_small():
    for length in (1, 3, 50):
        _, window = causal_conv(*example(length).values(), backend="triton")
        assert window.untyped_storage().nbytes() == window.nbytes


@pytest.mark.parametrize("backend", ["naive", "triton"])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_steps_equal_forward(backend, width, activation, bias):
    inputs = example(2 * width + 1, width, channels=130, bias=bias)
    wide = [z if z is None else z.double() for z in inputs.values()]
    whole, end = causal_conv(*wide, activation=activation)
    window = inputs["window"].clone()
    y = torch.stack(
        [
            causal_conv_step(x_t, inputs["weight"], inputs["bias"], window, activation=activation, backend=backend)
            for x_t in inputs["x"].unbind(1)
        ],
        1,
    )
    assert relative_error(y, whole) < 1e-6 and torch.equal(window, end.float())


@pytest.mark.parametrize("backend", ["naive", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_step_in_half_precision(backend, dtype):
    inputs = example(1, channels=9, dtype=dtype)
    window, x_t = inputs["window"].clone(), inputs["x"][:, 0]
    y = causal_conv_step(x_t, inputs["weight"], inputs["bias"], window, activation="silu", backend=backend)
    whole, end = causal_conv(*(z.double() for z in inputs.values()), activation="silu")
    assert y.dtype == dtype and relative_error(y, whole[:, 0]) < 1e-2 and torch.equal(window, end.to(dtype))


@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_step_works_in_place(backend):
    """Also in a window that is part of something larger: what lies beside it is left alone, and so is the input."""
    inputs = example(1, channels=5)
    state = torch.zeros(2, 3, 4, 7, device=DEVICE)
    window = state[:, 1].mT[:, 1:6]  # (2, 5, 4), channels are neighbours
    window.copy_(inputs["window"])
    before, x_t = window.clone(), inputs["x"][:, 0]
    kept = x_t.clone()
    causal_conv_step(x_t, inputs["weight"], inputs["bias"], window, backend=backend)
    assert torch.equal(window, torch.cat([before[..., 1:], x_t[..., None]], -1)) and torch.equal(x_t, kept)
    assert state.count_nonzero() == window.count_nonzero()


# Registration


@pytest.mark.parametrize("bias, window", [(True, True), (False, False)])
def test_opcheck(bias, window):
    inputs = [
        z if z is None else z.detach().requires_grad_()
        for z in example(5, width=2, channels=3, batch=1, bias=bias, window=window).values()
    ]
    torch.library.opcheck(conv_op, (*inputs, True))
    torch.library.opcheck(
        conv_backward_op, (torch.randn(1, 5, 3, device=DEVICE), *(z if z is None else z.detach() for z in inputs), True)
    )


def test_opcheck_of_the_step():
    for bias in (False, True):
        inputs = example(1, channels=3, bias=bias)
        torch.library.opcheck(conv_step_op, (inputs["x"][:, 0], *list(inputs.values())[1:], True))


def test_compiles():
    inputs = example(6, width=2, channels=3, batch=1)
    leaves = [z.detach().requires_grad_() for z in inputs.values()]

    def both(*inputs):
        y, window = causal_conv(*inputs, activation="silu", backend="triton")
        return y.square().sum() + window.sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(function(*leaves), leaves) for function in (compiled, both))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_step_compiles():
    inputs = example(1, channels=3)
    windows = [inputs["window"].clone() for _ in range(2)]
    step = lambda x_t, window: causal_conv_step(
        x_t, inputs["weight"], inputs["bias"], window, activation="silu", backend="triton"
    )
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours, theirs = (function(inputs["x"][:, 0], window) for function, window in zip((compiled, step), windows))
    assert torch.equal(ours, theirs) and torch.equal(*windows)


# The way there


def test_the_mixer_passes_its_activation(monkeypatch):
    seen = []

    def spy(*inputs, activation):
        seen.append(activation)
        return causal_conv(*inputs, activation=activation)

    monkeypatch.setattr("llamba_ref.mamba2.causal_conv", spy)
    mixer, u = Mamba2(8, d_state=4, headdim=4), torch.randn(1, 5, 8)
    x, _ = mixer.project(u, None)
    xBC = mixer.in_proj(u)[..., mixer.d_inner : mixer.d_inner + mixer.conv1d.out_channels]
    expected = F.silu(F.conv1d(F.pad(xBC.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=xBC.shape[-1]).mT)
    assert seen == ["silu"] and relative_error(x.x.flatten(2), expected[..., : mixer.d_inner]) < 1e-6


def test_auto_is_naive_on_a_cpu(monkeypatch):
    def refuse(*arguments, **constants):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr("llamba_ref.kernels.conv.launch", refuse)
    inputs = example(5, device="cpu")
    y, _ = causal_conv(*inputs.values(), activation="silu")
    assert torch.equal(y, F.silu(causal_conv(*inputs.values())[0]))
    causal_conv_step(inputs["x"][:, 0], *list(inputs.values())[1:])
    with pytest.raises(AssertionError, match="a kernel was launched"):
        causal_conv(*inputs.values(), backend="triton")


def test_what_cannot_run_says_why(monkeypatch):
    inputs = example(5, width=9)
    with pytest.raises(
        RuntimeError, match="kernel conv needs widths of 1 to 8, here width = 9; use backend='naive' or 'auto'"
    ):
        causal_conv(*inputs.values(), backend="triton")
    assert causal_conv(*inputs.values())[0].shape == (2, 5, 35)
    wide = [z.double() for z in example(5).values()]
    with pytest.raises(RuntimeError, match="kernel conv computes in float32, but an argument is torch.float64"):
        causal_conv(*wide, backend="triton")
    with pytest.raises(RuntimeError, match="computes in float32"):
        causal_conv_step(wide[0][:, 0], *wide[1:], backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="kernel conv needs a CUDA tensor, this one is on cpu"):
        causal_conv(*example(5, device="cpu").values(), backend="triton")


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(2, 35)}, r"x has shape \(2, 35\): it must be \(batch, len, channels\)"),
    ({"x": torch.zeros(2, 0, 35)}, "x has len = 0: it must hold at least one token"),
    ({"x": torch.zeros(2, 5, 35, dtype=torch.int64)},
     "x is torch.int64: it must be a tensor of real floating-point numbers"),
    ({"weight": torch.zeros(34, 1, 4)}, r"weight has shape \(34, 1, 4\): it must be \(channels = 35, 1, width\)"),
    ({"weight": torch.zeros(35, 2, 4)}, r"weight has shape \(35, 2, 4\): it must be \(channels = 35, 1, width\)"),
    ({"bias": torch.zeros(1)}, r"bias has shape \(1,\): it must be \(channels = 35\)"),
    ({"window": torch.zeros(2, 35, 3)},
     r"window has shape \(2, 35, 3\): it must be \(batch = 2, channels = 35, width = 4\)"),
    ({"activation": "relu"}, "activation is 'relu': it must be 'identity' or 'silu'"),
    ({"backend": "cuda"}, "backend is 'cuda': it must be 'naive', 'triton' or 'auto'"),
])  # fmt: skip
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv(**(example(5, device="cpu") | change))


def test_wrong_arguments_of_the_step():
    x, weight, bias, window = example(1, device="cpu").values()
    with pytest.raises(ValueError, match=r"x_t has shape \(2, 1, 35\): it must be \(batch, channels\)"):
        causal_conv_step(x, weight, bias, window)
    with pytest.raises(ValueError, match="window is torch.float64: it must be torch.float32, like x_t"):
        causal_conv_step(x[:, 0], weight, bias, window.double())
    with pytest.raises(ValueError, match="window is expanded, its rows share memory"):
        causal_conv_step(x[:, 0], weight, bias, window[:1].expand(2, -1, -1))
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        causal_conv_step(x[:, 0], weight, bias, window, activation="gelu")
    before = window.clone()
    with pytest.raises(RuntimeError, match="keeps nothing for a gradient: call it under torch.no_grad()"):
        causal_conv_step(x[:, 0], weight.requires_grad_(), bias, window)
    assert torch.equal(window, before)
    with torch.no_grad():
        causal_conv_step(x[:, 0], weight, bias, window)
    assert not torch.equal(window, before)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    "length, width, channels", [(1, 4, 6144), (513, 4, 6144), (4096, 4, 100), (700, 8, 333), (65, 1, 64)]
)
@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("given", [False, True])
def test_on_a_gpu(dtype, limit, length, width, channels, activation, given):
    inputs = example(length, width, channels, bias=given, window=given, dtype=dtype)
    first = assert_equal_to_naive(inputs, limit, activation=activation)
    again = run(inputs, "auto", activation=activation)
    assert all(torch.equal(first[name], again[name]) for name in first)  # deterministic, and "auto" is the kernel
    window = torch.zeros(2, channels, width, device="cuda", dtype=dtype)
    whole, _ = causal_conv(inputs["x"].double(), inputs["weight"].double(), None, activation=activation)
    steps = [
        causal_conv_step(x_t, inputs["weight"], None, window, activation=activation)
        for x_t in inputs["x"][:, :20].unbind(1)
    ]
    assert relative_error(torch.stack(steps, 1), whole[:, :20]) < limit


@pytest.mark.gpu
def test_step_in_a_cuda_graph():
    """The window stays where it is, so a recorded step can be replayed."""
    inputs = example(8, channels=300)
    x_t, window = inputs["x"][:, 0].clone(), inputs["window"].clone()
    causal_conv_step(x_t, inputs["weight"], inputs["bias"], window.clone(), activation="silu")  # compile it first
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_t = causal_conv_step(x_t, inputs["weight"], inputs["bias"], window, activation="silu")
    window.copy_(inputs["window"])
    rows = []
    for column in inputs["x"].unbind(1):
        x_t.copy_(column)
        graph.replay()
        rows.append(y_t.clone())
    whole, end = causal_conv(*(z.double() for z in inputs.values()), activation="silu")
    assert relative_error(torch.stack(rows, 1), whole) < 1e-5 and torch.equal(window, end.float())
