"""What every operator leans on: checks that name the mistake, paths chosen, memory counted right."""

import inspect
from typing import Literal

import jaxtyping
import pytest
import torch
from jaxtyping import Float, Inexact
from shapes import check_package
from torch import Tensor

from llamba_ref.conventions import relative_error
from llamba_ref.operators import (
    Backend,
    check_option,
    check_sizes,
    check_tensors,
    checked,
    choose_backend,
    find_kernel,
    is_token,
    peak_bytes,
    polar_gate,
    wide_dtype,
    wrong_widths,
)
from llamba_ref.scan import linear_scan

MIB = 2**20


def mebibytes(count):
    """A new tensor of `count` MiB."""
    return torch.ones(count, MIB // 4)


# checks


def test_check_tensors_returns_the_sizes():
    q, one, none = torch.zeros(2, 8, 4, 3), torch.zeros(2, 8, 4, 1), torch.zeros(2, 8, 4, 0)
    axes, shared = "batch len heads key", "batch len heads #key"
    expected = {"batch": 2, "len": 8, "heads": 4, "key": 3}
    assert check_tensors({"q": (q, axes)}) == check_tensors({"q": (q, axes), "log_a": (q, shared)}) == expected
    assert check_tensors({"q": (q, axes), "log_a": (one, shared), "k": (q, axes)}) == expected
    assert check_tensors({"q": (none, axes)}) == expected | {"key": 0}
    assert check_tensors({"scalar": (torch.zeros(()), "")}) == {}


def test_an_axis_that_may_be_1_decides_nothing():
    """Were its 1 taken for the size, the next tensor would be blamed."""
    one, q = torch.zeros(2, 8, 1), torch.zeros(2, 8, 3)
    inputs = {"log_a": (one, "batch len #key"), "q": (q, "batch len key")}
    assert check_tensors(inputs) == {"batch": 2, "len": 8, "key": 3}


def test_axes_that_may_be_many_and_axes_of_a_fixed_size():
    x, weight = torch.zeros(2, 8, 4, 3), torch.zeros(4, 1, 5)
    for log_a in (x, x[..., :1], x[:, :, :1]):
        inputs = {"x": (x, "batch len *rest"), "log_a": (log_a, "batch len *#rest"), "h": (x[:, 0], "batch *rest")}
        assert check_tensors(inputs) == {"batch": 2, "len": 8, "axis2": 4, "axis3": 3}
    assert check_tensors({"x": (x[..., 0, 0], "batch len *rest")}) == {"batch": 2, "len": 8}
    wanted = r"\(batch = 2, len = 8, axis2 = 4 or 1, axis3 = 3 or 1\)"
    for wrong in (x[..., 0], x[..., :2], x[None]):
        with pytest.raises(ValueError, match=f"log_a has shape .*: it must be {wanted}$"):
            check_tensors({"x": (x, "batch len *rest"), "log_a": (wrong, "batch len *#rest")})
    assert check_tensors({"weight": (weight, "channels 1 width")}) == {"channels": 4, "1": 1, "width": 5}
    with pytest.raises(ValueError, match=r"weight has shape \(4, 5, 1\): it must be \(channels, 1, width\)"):
        check_tensors({"weight": (weight.mT, "channels 1 width")})


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 4, 3, 1), (2, 8, 4, 2), (1, 8, 4, 3), (2, 8, 1, 3), ()])
def test_a_wrong_shape_is_named_with_what_was_wanted(shape):
    q = torch.zeros(2, 8, 4, 3)
    with pytest.raises(ValueError) as error:
        check_tensors({"q": (q, "batch len heads key"), "phase": (torch.zeros(shape), "batch len heads #key")})
    assert str(error.value) == f"phase has shape {shape}: it must be (batch = 2, len = 8, heads = 4, key = 3 or 1)"


@pytest.mark.parametrize("name", ["log_a", "log_a_t", "phase", "phase_t"])
def test_only_what_may_be_complex_may_be_complex(name):
    z = torch.zeros(2, 3, dtype=torch.complex64)
    assert check_tensors({"x": (z, "batch len")}, complex_too={"x"}) == {"batch": 2, "len": 3}
    wanted = "it must be a tensor of real floating-point numbers"
    with pytest.raises(ValueError, match=f"^{name} is torch.complex64: {wanted}$"):
        check_tensors({name: (z, "batch len")}, complex_too={"x"})
    with pytest.raises(ValueError, match=f"^x is torch.complex64: {wanted}$"):
        check_tensors({"x": (z, "batch len")})


@pytest.mark.parametrize("bad, kind", [
    (torch.zeros(2, 3).long(), "torch.int64"), (torch.zeros(2, 3).bool(), "torch.bool"),
    (torch.zeros(2, 3).numpy(), "ndarray"), (None, "NoneType"), ([[0.0]], "list"), (1.0, "float"),
])
def test_what_is_no_tensor_of_numbers_is_named(bad, kind):
    for complex_too, wanted in (((), "real floating-point"), ({"x"}, "floating-point")):
        with pytest.raises(ValueError, match=f"^x is {kind}: it must be a tensor of {wanted} numbers$"):
            check_tensors({"x": (bad, "batch len")}, complex_too=complex_too)


def test_positive_logs_and_empty_sequences():
    zero = torch.zeros(2, 3)
    assert check_tensors({"log_a": (zero, "batch len"), "x": (zero + 1, "batch len")})
    with pytest.raises(ValueError, match="^log_a_t reaches 0.5: it is the log of a decay and must be at most 0$"):
        check_tensors({"x": (zero, "batch len"), "log_a_t": (torch.tensor([[-1.0, 0.5, 0.0]] * 2), "batch len")})
    with pytest.raises(ValueError, match="^x has len = 0: it must hold at least one token$"):
        check_tensors({"x": (zero[:, :0], "batch len"), "log_a": (zero[:, :0], "batch len")})


def test_check_sizes():
    check_sizes()
    check_sizes(heads=1, width=10**12)
    for bad in (0, -3, 1.0, "4", None, True, torch.tensor(3)):
        with pytest.raises(ValueError) as error:
            check_sizes(heads=2, width=bad)
        assert str(error.value) == f"width is {bad!r}: it must be an integer of at least 1"


# operators that keep their signature


@checked(same="q k start", groups="heads")
def product(
    q: Inexact[Tensor, "batch len heads key"],
    log_a: Float[Tensor, "batch len #heads #key"],
    k: Inexact[Tensor, "batch len groups key"],
    *,
    start: Float[Tensor, "batch key"] | None = None,  # a comment that documentation shows
    mode: Literal["fast", "exact"] = "fast",
    size: int = 64,
    backend: Backend = "auto",
) -> Tensor:
    """Says what it does."""
    return q @ k.mT if mode == "fast" else q.sum(-1)


def inputs(**change):
    q, log_a, k = torch.ones(2, 8, 4, 3), -torch.ones(2, 8, 4, 3), torch.ones(2, 8, 2, 3)
    return {"q": q, "log_a": log_a, "k": k, "start": torch.zeros(2, 3), **change}


def test_a_checked_operator_computes():
    given = inputs()
    assert product(**given).shape == product(given["q"], given["log_a"], given["k"]).shape == (2, 8, 4, 2)
    for change in (dict(start=None), dict(log_a=-torch.ones(2, 8, 1, 1)), dict(mode="exact", size=1, backend="naive"),
                   dict(q=given["q"].to(torch.complex64), k=given["k"].to(torch.complex64))):
        assert product(**inputs(**change)) is not None


@pytest.mark.parametrize("change, message", [
    (dict(q=torch.ones(2, 8, 4)), r"q has shape \(2, 8, 4\): it must be \(batch, len, heads, key\)"),
    (dict(log_a=-torch.ones(2, 8, 2, 3)),
     r"log_a has shape \(2, 8, 2, 3\): it must be \(batch = 2, len = 8, heads = 4 or 1, key = 3 or 1\)"),
    (dict(k=torch.ones(2, 8, 2, 1)), r"k has shape \(2, 8, 2, 1\): it must be \(batch = 2, len = 8, groups, key = 3\)"),
    (dict(k=torch.ones(2, 8, 3, 3)), "k has groups = 3: it must be a divisor of heads = 4"),
    (dict(k=torch.ones(2, 8, 0, 3)), "k has groups = 0: it must be a divisor of heads = 4"),
    (dict(k=torch.ones(2, 8, 2, 3).double()), "k is torch.float64: it must have the precision of q, torch.float32"),
    (dict(k=torch.ones(2, 8, 2, 3).half()), "k is torch.float16: it must have the precision of q, torch.float32"),
    (dict(start=torch.zeros(2, 3).double()), "start is torch.float64: it must have the precision of q, torch.float32"),
    (dict(q=None), "q is NoneType: it must be a tensor of floating-point numbers"),
    (dict(log_a=torch.ones(2, 8, 4, 3) * 1j), "log_a is torch.complex64: it must be a tensor of real floating-point"),
    (dict(log_a=torch.ones(2, 8, 1, 1)), "log_a reaches 1: it is the log of a decay and must be at most 0"),
    (dict(start=torch.zeros(3)), r"start has shape \(3,\): it must be \(batch = 2, key = 3\)"),
    (dict(mode="slow"), "mode is 'slow': it must be 'fast' or 'exact'"),
    (dict(mode=None), "mode is None: it must be 'fast' or 'exact'"),
    (dict(size=0), "size is 0: it must be an integer of at least 1"),
    (dict(size=1.5), "size is 1.5: it must be an integer of at least 1"),
    (dict(backend="cuda"), "backend is 'cuda': it must be 'naive', 'triton' or 'auto'"),
])  # fmt: skip
def test_a_checked_operator_names_the_mistake(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        product(**inputs(**change))


def test_calls_that_python_refuses():
    for arguments, options in (((), {}), ((torch.ones(2, 8, 4, 3),), {}), ((), inputs(other=1))):
        with pytest.raises(TypeError, match="missing|unexpected|other"):
            product(*arguments, **options)


def test_a_checked_operator_can_be_read():
    assert product.__name__ == "product" and product.__doc__ == "Says what it does."
    assert "a comment that documentation shows" in inspect.getsource(product)
    assert list(inspect.signature(product).parameters) == ["q", "log_a", "k", "start", "mode", "size", "backend"]


def test_autocast_is_off_inside():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(**inputs()).dtype == torch.float32


def test_a_checked_operator_compiles_into_one_graph():
    """And values are not looked at: a positive log_a goes through."""
    compiled = torch.compile(product, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**inputs()), product(**inputs()))
    compiled(**inputs(log_a=torch.ones(2, 8, 4, 3)))
    with pytest.raises(Exception, match="it must be"):
        compiled(**inputs(k=torch.ones(2, 8, 3, 3)))


def test_many_operators_compile():
    """Each has a code of its own: one code may only be recompiled a few times."""
    def scaled_by(a):
        @checked()
        def scaled(x: Float[Tensor, "len"]) -> Tensor:
            return a * x

        return scaled

    for a in range(20):
        compiled = torch.compile(scaled_by(a), fullgraph=True, backend="eager")
        assert compiled(torch.ones(2)).tolist() == [a, a]


def test_check_option():
    check_option("mode", "a", ("a", "b"))
    with pytest.raises(ValueError, match="^mode is 'd': it must be 'a', 'b' or 'c'$"):
        check_option("mode", "d", ("a", "b", "c"))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32, torch.complex64])
def test_wide_dtype(narrow):
    x = torch.zeros(1, dtype=narrow)
    assert wide_dtype(x) == wide_dtype(x, None, x) == wide_dtype() == torch.float32
    for wide in (torch.float64, torch.complex128):
        assert wide_dtype(x, None, torch.zeros(1, dtype=wide)) == torch.float64


# backends


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("interpreting", [False, True])
def test_choose_backend(monkeypatch, interpreting):
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreting)))
    here, there = torch.zeros(1), torch.zeros(1).as_subclass(OnGPU)
    for tensor in (here, there):
        assert choose_backend("naive", tensor, kernel="scan") == "naive"
        assert choose_backend("auto", tensor) == "naive"
        assert choose_backend("auto", tensor, kernel="scan", obstacle="keys too narrow") == "naive"
        assert choose_backend("auto", tensor, tensor.double(), kernel="scan") == "naive"
    assert choose_backend("auto", here, kernel="scan") == "naive"
    for backend in ("auto", "triton"):
        assert choose_backend(backend, there, None, kernel="scan") == "triton"
    if interpreting:
        assert choose_backend("triton", here, kernel="scan") == "triton"
    else:
        reason = "kernel scan needs a CUDA tensor, this one is on cpu"
        with pytest.raises(RuntimeError, match=f"^backend='triton': {reason}; use backend='naive' or 'auto'$"):
            choose_backend("triton", here, kernel="scan")


@pytest.mark.parametrize("kind", [torch.Tensor, OnGPU])
def test_triton_that_cannot_run_says_why(monkeypatch, kind):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tensor = torch.zeros(1).as_subclass(kind)
    for arguments, reason in (
        ({}, "this operation has no Triton kernel"),
        ({"kernel": "scan", "obstacle": "keys too narrow"}, "keys too narrow"),
    ):
        with pytest.raises(RuntimeError, match=f"^backend='triton': {reason}; use backend='naive' or 'auto'$"):
            choose_backend("triton", tensor, **arguments)
    for wide in (torch.float64, torch.complex128):
        with pytest.raises(RuntimeError, match=f"kernel scan computes in float32, but an argument is {wide}"):
            choose_backend("triton", tensor, None, tensor.to(wide), kernel="scan")
    with pytest.raises(ValueError, match="^backend is 'Triton': it must be 'naive', 'triton' or 'auto'$"):
        choose_backend("Triton", tensor, kernel="scan")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="kernel scan needs the package triton, which is not installed"):
        choose_backend("triton", tensor, kernel="scan")


def test_find_kernel(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(2)
    assert find_kernel("scan.triton_scan", "auto", x) is None and find_kernel("scan.triton_scan", "naive", x) is None
    assert find_kernel("scan.triton_scan", "triton", x[:0]) is None  # nothing to launch
    with pytest.raises(RuntimeError, match="^backend='triton': too narrow; use"):
        find_kernel("scan.triton_scan", "triton", x, obstacle="too narrow")
    with pytest.raises(RuntimeError, match="kernel scan computes in float32, but an argument is torch.float64"):
        find_kernel("scan.triton_scan", "triton", x, x.double())
    triton_scan = find_kernel("scan.triton_scan", "triton", x, None)
    assert triton_scan.__module__ == "llamba_ref.kernels.scan" and triton_scan.__name__ == "triton_scan"


def test_wrong_widths():
    assert wrong_widths("ssd", 16, headdim=16, state=4096) is None
    assert wrong_widths("ssd", 16, headdim=1, state=3) == (
        "kernel ssd needs widths of at least 16, here headdim = 1 and state = 3")
    assert wrong_widths("conv", 1, 8, width=8) is None
    assert wrong_widths("conv", 1, 8, width=9) == "kernel conv needs widths of 1 to 8, here width = 9"


# gates and padding


def test_polar_gate():
    log_a, phase = -torch.rand(2, 5, 3, dtype=torch.float64), 4 * torch.randn(2, 5, 1, dtype=torch.float64)
    expected = torch.exp(torch.complex(log_a, phase.expand_as(log_a)))
    assert relative_error(polar_gate(log_a, phase), expected) < 1e-15
    assert torch.equal(polar_gate(log_a, phase, conjugate=True), polar_gate(log_a, phase).conj())
    assert torch.equal(polar_gate(log_a), log_a.exp())


def test_is_token():
    assert is_token(torch.tensor([2, 0, 3]), 3).tolist() == [[False, False, True], [True] * 3, [False] * 3]


# memory


def test_peak_counts_what_is_alive_at_one_time():
    def two_at_a_time():
        x = mebibytes(1)
        for _ in range(5):
            x = x + 1  # the new one is made before the old one goes

    def all_five():
        kept = [mebibytes(1) for _ in range(5)]
        return len(kept)

    assert peak_bytes(two_at_a_time) == 2 * MIB and peak_bytes(all_five) == 5 * MIB
    assert peak_bytes(lambda: None) == 0


def test_peak_is_not_what_is_left():
    def function():
        mebibytes(3).sum()
        return mebibytes(1)

    assert 3 * MIB <= peak_bytes(function) < 3 * MIB + 100


def test_what_was_there_before_is_not_counted():
    x = mebibytes(4)
    assert peak_bytes(lambda: x.add_(1)) == peak_bytes(lambda: x.view(-1)[10:].mul_(2)) == peak_bytes(x.t) == 0
    assert peak_bytes(lambda: x * 2) == 4 * MIB
    freed = [mebibytes(2)]
    assert peak_bytes(lambda: (freed.pop(), mebibytes(1))) == MIB  # nor taken off when it goes


def test_one_memory_is_counted_once():
    def views():
        x = mebibytes(2)
        return x, x.t(), x[:1], x.view(-1), x.expand(3, -1, -1), x.detach(), x.split(1), x.add_(1)

    assert peak_bytes(views) == 2 * MIB
    assert peak_bytes(lambda: torch.ones(1).expand(MIB)) == 4  # an expanded tensor takes no more than what it repeats
    assert peak_bytes(lambda: mebibytes(2).unbind(0)) == 2 * MIB


def test_memory_at_an_address_that_was_used_before_is_counted():
    def function():
        for _ in range(50):
            torch.ones(1)
        return [mebibytes(1) for _ in range(5)]

    assert peak_bytes(function) == 5 * MIB


def test_part_of_a_tensor_keeps_all_of_it():
    def part():
        kept = mebibytes(4)[:1]
        return kept + mebibytes(1)

    assert peak_bytes(part) == 6 * MIB
    assert peak_bytes(lambda: (mebibytes(4)[:1].clone(), mebibytes(1))) == 5 * MIB


def test_peak_of_a_backward_pass():
    x = mebibytes(1).requires_grad_()

    def chain(steps, backward):
        y = x
        for _ in range(steps):
            y = y.sin()
        if backward:
            torch.autograd.grad(y, x, torch.ones_like(y))

    forward, both = ([peak_bytes(lambda: chain(steps, backward)) for steps in (4, 8)] for backward in (False, True))
    assert forward == [4 * MIB, 8 * MIB]  # y of every step is kept for the gradient
    assert both[1] - both[0] == 4 * MIB and both[1] > forward[1]
    with torch.no_grad():
        assert peak_bytes(lambda: chain(8, False)) == 2 * MIB
    leaf = mebibytes(1).requires_grad_()
    assert peak_bytes(lambda: leaf.sum().backward()) >= MIB and leaf.grad is not None


def test_peak_of_a_function_that_fails():
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)
    assert peak_bytes(lambda: mebibytes(1)) == MIB  # and the next one is counted as ever


# the checker that all tests run under

FALSEHOOD = """
from __future__ import annotations
from typing import NamedTuple
from jaxtyping import Float
from torch import Tensor

class Pair(NamedTuple):
    one: Float[Tensor, "batch len"]
    other: Float[Tensor, "batch"]

def first(x: Float[Tensor, "batch len"]) -> Float[Tensor, "batch"]:
    return x.sum() if x.shape[0] == 3 else x[:, 0]

class Door:
    def refuse(self, x: Float[Tensor, "batch len"]) -> Float[Tensor, "batch len"]:
        if x.ndim != 2:
            raise ValueError("x: my own message")
        return x

    def through(self, x: Float[Tensor, "batch len"]):
        return x
"""


def test_an_annotation_that_is_false_is_found(tmp_path, monkeypatch):
    (tmp_path / "falsehood.py").write_text(FALSEHOOD)
    monkeypatch.syspath_prepend(tmp_path)
    with check_package("falsehood"):
        import falsehood
    assert falsehood.first(torch.zeros(2, 4)).shape == (2,)
    with pytest.raises(jaxtyping.TypeCheckError, match="return value of falsehood.first"):
        falsehood.first(torch.zeros(3, 4))
    for wrong in (torch.zeros(2, 4).long(), torch.zeros(2, 4, 1)):
        with pytest.raises(jaxtyping.TypeCheckError, match="falsehood.first"):
            falsehood.first(wrong)
    with pytest.raises(ValueError, match="my own message"):
        falsehood.Door().refuse(torch.zeros(2))
    with pytest.raises(jaxtyping.TypeCheckError, match="falsehood.Door.refuse"):
        falsehood.Door().refuse(torch.zeros(2, 2).long())
    with pytest.raises(jaxtyping.TypeCheckError, match="falsehood.Door.through"):  # says nothing about its result
        falsehood.Door().through(torch.zeros(2))
    with pytest.raises(jaxtyping.TypeCheckError):
        falsehood.Pair(torch.zeros(2, 3), torch.zeros(3))


def test_the_package_is_checked():
    with pytest.raises(jaxtyping.TypeCheckError, match="llamba_ref.operators.is_token"):
        is_token(torch.tensor([[2], [0]]), 3)
    log_a, x = -torch.ones(2, 8, 1), torch.ones(2, 8, 3)
    assert linear_scan(log_a, x).shape == (2, 8, 3)  # a last size of 1 is what the signature says
    gate = inspect.signature(linear_scan).parameters["log_a"].annotation
    assert gate.replace("'", '"') == 'Float[Tensor, "batch len *#rest"]'
