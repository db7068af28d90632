"""The short convolution: PyTorch's conv1d, with a window that goes on where another call stopped."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llamba_ref.conv import causal_conv, causal_conv_step
from llamba_ref.conventions import relative_error
from llamba_ref.operators import peak_bytes


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_convolution_is_conv1d_and_goes_on(first, second, width, bias):
    x, weight = torch.randn(2, first + second, 3).double(), torch.randn(3, 1, width).double()
    b = torch.randn(3).double() if bias else None
    reference = F.conv1d(F.pad(x.mT, (width - 1, 0)), weight, b, groups=3).mT
    y, window = causal_conv(x[:, :first], weight, b)
    rest, window = causal_conv(x[:, first:], weight, b, window)
    assert relative_error(torch.cat([y, rest], 1), reference) < 1e-14
    assert torch.equal(window, F.pad(x.mT, (width, 0))[..., -width:])
    assert window.untyped_storage().nbytes() == window.nbytes


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 6), st.sampled_from(["identity", "silu"]))
@settings(max_examples=40, deadline=None)
def test_any_cut_gives_the_whole_forward_and_gradient(lengths, width, activation):
    """Also pieces shorter than the filter, and a window in front of the first."""
    leaves = [
        torch.randn(shape).double().requires_grad_()
        for shape in ((2, sum(lengths), 3), (3, 1, width), (3,), (2, 3, width))
    ]
    x, weight, bias, window = leaves
    both = torch.cat([window.mT, x], 1)
    whole = F.conv1d(both.mT[..., 1:], weight, bias, groups=3).mT
    whole = F.silu(whole) if activation == "silu" else whole
    pieces, last = [], window
    for piece in x.split(lengths, 1):
        y, last = causal_conv(piece, weight, bias, last, activation=activation)
        pieces.append(y)
    assert relative_error(torch.cat(pieces, 1), whole) < 1e-14 and torch.equal(last, both[:, -width:].mT)
    weights = torch.randn_like(whole), torch.randn_like(last)
    grads = [torch.autograd.grad((y * weights[0]).sum() + (end * weights[1]).sum(), leaves)
             for y, end in ((torch.cat(pieces, 1), last), (whole, both[:, -width:].mT))]
    for ours, theirs in zip(*grads):
        assert relative_error(ours, theirs) < 1e-13


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_place_are_the_whole(length, dtype):
    x, weight, bias = torch.randn(2, length, 3, dtype=dtype), torch.randn(3, 1, 4), torch.randn(3)
    window = torch.zeros(2, 3, 4, dtype=dtype)
    place = window.data_ptr()
    steps = torch.stack([causal_conv_step(x_t, weight, bias, window) for x_t in x.unbind(1)], 1)
    whole, last = causal_conv(x, weight, bias)
    assert (
        steps.dtype == dtype and torch.equal(steps, whole) and torch.equal(window, last) and window.data_ptr() == place
    )


def test_a_window_that_was_passed_in_is_not_changed():
    x, weight, window = torch.randn(2, 5, 3), torch.randn(3, 1, 4), torch.randn(2, 3, 4)
    kept = window.clone()
    causal_conv(x, weight, None, window)
    assert torch.equal(window, kept)


def test_gradcheck():
    inputs = [torch.randn(shape).double().requires_grad_() for shape in ((1, 5, 2), (2, 1, 3), (2,), (1, 2, 3))]
    assert torch.autograd.gradcheck(lambda *z: causal_conv(*z, activation="silu"), inputs)


def test_half_precision_keeps_its_type_and_computes_in_that_of_the_weights():
    x, weight, bias = torch.randn(2, 50, 3).bfloat16(), torch.randn(3, 1, 4), torch.randn(3)
    y, window = causal_conv(x, weight, bias)
    assert y.dtype == window.dtype == torch.bfloat16
    assert relative_error(y, causal_conv(x.double(), weight.double(), bias.double())[0]) < 4e-3


def test_the_window_does_not_keep_the_input_alive():
    """A prompt of 10,000 tokens leaves 4: the memory of what is returned is that of output and window."""
    x, weight = torch.randn(1, 10_000, 8), torch.randn(8, 1, 4)
    kept = []
    peak = peak_bytes(lambda: kept.append(causal_conv(x, weight, None)[1]))
    assert kept[0].untyped_storage().nbytes() == 4 * 8 * 4 and peak < 5 * x.nbytes
