"""What kernels share: launches that are written down, types for the compiler, GPUs, how matrices are multiplied, and
what is refused."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

import llamba_ref.kernels  # noqa: E402
from llamba_ref.kernels.ahead import POINTERS, Launch, compile_for, recording, scan_as_tree  # noqa: E402
from llamba_ref.kernels.launch import (  # noqa: E402
    GPUS,
    INTERPRETED,
    as_operation,
    gpu_of,
    launch,
    load_rows,
    precision_of,
    set_gradient,
    store_rows,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="about a process that interprets kernels"
)


@triton.jit
def add(x_ptr, y_ptr, out_ptr, size, shift, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    """x + y + shift, where y may be missing."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < size, other=0.0)
    if y_ptr is not None:
        x += tl.load(y_ptr + i, i < size, other=0.0)
    tl.store(out_ptr + i, (x + shift) * (2 if TWICE else 1), i < size)


def call(x, y, out, size=5, shift=1, num_warps=4):
    launch(add, (2,), x, y, out, size, shift, num_warps=num_warps, TWICE=False, BLOCK=16)


# launches


def test_a_launch_runs():
    x = torch.arange(20.0, device=DEVICE)
    out = torch.zeros_like(x)
    call(x, x, out, 20, 3)
    assert torch.equal(out, 2 * x + 3)
    call(x, None, out, 5, 0)
    assert torch.equal(out, torch.where(x < 5, x, 2 * x + 3))


def test_recording_writes_down_what_would_run_and_runs_nothing():
    x, out = torch.ones(20), torch.zeros(20)
    with recording(GPUS["T4"]) as launches:
        call(x, None, out, num_warps=8)
        call(out, x, x, 6)
    assert not out.any() and x.all() and len(launches) == 2
    first, second = launches
    assert first.kernel is add and first.grid == (2,) and first.num_warps == 8 and second.num_warps == 4
    assert list(first.arguments) == [
        "x_ptr",
        "y_ptr",
        "out_ptr",
        "size",
        "shift",
        "BLOCK",
        "TWICE",
    ]  # as in the signature
    assert first.arguments["x_ptr"] is x and first.arguments["y_ptr"] is None and first.arguments["out_ptr"] is out
    assert first.arguments["size"] == 5 and second.arguments["size"] == 6 and first.arguments["BLOCK"] == 16
    assert first.constants == {"BLOCK", "TWICE"}
    call(x.to(DEVICE), None, there := out.to(DEVICE))  # afterwards launches run again
    assert there.any() and len(launches) == 2


def test_recording_works_on_tensors_without_numbers():
    with recording(GPUS["H100"]) as launches:
        call(torch.empty(2**40, device="meta"), None, torch.empty(2**40, device="meta"))
    assert launches[0].arguments["x_ptr"].device.type == "meta"


def test_recording_does_not_nest_and_ends_with_an_error():
    with recording(GPUS["T4"]):
        with pytest.raises(RuntimeError, match="recording is already going on"):
            with recording(GPUS["A100"]):
                pass
        assert gpu_of(torch.device("cpu")) is GPUS["T4"]  # the outer one goes on
    with pytest.raises(ZeroDivisionError):
        with recording(GPUS["T4"]):
            1 / 0  # noqa: B018
    with recording(GPUS["H100"]) as launches:
        assert gpu_of(torch.device("meta")) is GPUS["H100"] and launches == []


# what the compiler is told


def a_launch(**arguments):
    return Launch(
        add, (1,), {"x_ptr": torch.empty(4), "y_ptr": None, **arguments, "BLOCK": 16}, frozenset({"BLOCK"}), 4, 1
    )


def test_signature():
    types, values, attributes = a_launch(size=5, many=2**31, most=2**31 - 1, sixteen=48, large=2**32).signature()
    assert types == {
        "x_ptr": "*fp32",
        "y_ptr": "constexpr",
        "size": "i32",
        "many": "i64",
        "most": "i32",
        "sixteen": "i32",
        "large": "i64",
        "BLOCK": "constexpr",
    }
    assert values == {(1,): None, (7,): 16}
    assert set(attributes) == {(0,), (3,), (5,), (6,)}  # the pointer, 2**31, 48, 2**32
    assert all(value == [["tt.divisibility", 16]] for value in attributes.values())


@pytest.mark.parametrize(
    "dtype, name",
    [(torch.float32, "*fp32"), (torch.float16, "*fp16"), (torch.bfloat16, "*bf16"), (torch.float64, "*fp64")],
)
def test_pointer_types(dtype, name):
    assert a_launch(z=torch.empty(1, dtype=dtype)).signature()[0]["z"] == name == POINTERS[dtype]


def test_a_one_is_a_constant():
    """As Triton's own launcher has it: a dimension of 1 makes another program."""
    types, values, _ = a_launch(heads=1, sharing=2).signature()
    assert types["heads"] == "constexpr" and values[(2,)] == 1 and types["sharing"] == "i32"


def test_zero_and_negative_numbers():
    types, _, attributes = a_launch(zero=0, less=-16, least=-(2**31) + 1, below=-(2**31)).signature()
    assert [types[name] for name in ("zero", "less", "least", "below")] == ["i32", "i32", "i32", "i64"]
    assert {(2,), (3,), (5,)} <= set(attributes) and (4,) not in attributes


def test_a_number_among_the_constants_is_no_argument():
    types, values, attributes = a_launch(size=16)._replace(constants=frozenset({"BLOCK", "size"})).signature()
    assert types["size"] == "constexpr" and values[(2,)] == 16 and (2,) not in attributes


# GPUs


def test_data_sheets():
    assert {name: gpu.capability for name, gpu in GPUS.items()} == {"T4": 75, "A100": 80, "H100": 90}
    for gpu in GPUS.values():
        assert (
            gpu.float32 < gpu.half
            and 40 <= gpu.multiprocessors <= 132
            and 64 * 1024 <= gpu.shared < 228 * 1024
            and 3e11 < gpu.bandwidth < 4e12
        )


def test_without_a_gpu_the_interpreter():
    assert gpu_of(torch.device("cpu")) is INTERPRETED and gpu_of(torch.device("meta")) is INTERPRETED


@pytest.mark.parametrize(
    "name, known",
    [("NVIDIA A100-SXM4-80GB", "A100"), ("Tesla T4", "T4"), ("NVIDIA H100 PCIe", "H100"), ("NVIDIA L4", None)],
)
def test_a_gpu_that_is_there(monkeypatch, name, known):
    class Properties:
        major, minor, multi_processor_count = 8, 6, 58
        shared_memory_per_block, shared_memory_per_block_optin = 48 * 1024, 99 * 1024

    Properties.name = name
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpu = gpu_of(torch.device("cuda"))
    assert (gpu.name, gpu.capability, gpu.multiprocessors, gpu.shared) == (name, 86, 58, 99 * 1024)
    del Properties.shared_memory_per_block_optin  # as with AMD's cards
    assert gpu_of(torch.device("cuda")).shared == 48 * 1024
    assert gpu is not INTERPRETED and (known is None or gpu.bandwidth == GPUS[known].bandwidth)


@pytest.mark.gpu
def test_gpu_the_device():
    gpu = gpu_of(torch.device("cuda"))
    assert gpu.name == torch.cuda.get_device_name() and gpu.capability == sum(
        x * y for x, y in zip(torch.cuda.get_device_capability(), (10, 1))
    )


# how matrices are multiplied


@pytest.fixture(params=["highest", "high", "medium"])
def matmul(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("gpu", [*GPUS.values(), INTERPRETED], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision(gpu, dtype, matmul):
    """Half precision from sm_80 on; float32 elsewhere, as tf32 only if asked for and the GPU has it."""
    found = precision_of(dtype, gpu)
    if dtype != torch.float32 and gpu.name in ("A100", "H100"):
        assert found == {"TYPE": {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype], "PRECISION": "ieee"}
    else:
        assert found == {
            "TYPE": tl.float32,
            "PRECISION": "tf32" if matmul != "highest" and gpu.name != "T4" else "ieee",
        }


# what a user imports


def test_a_user_of_a_kernel_imports_nothing_of_tritons_inside():
    """Kernels need torch and triton; what reaches into Triton (compiler, interpreter) is a module that only tests and
    bench import."""
    kernels = ["conv", "gateloop", "matrix_distance", "scan", "ssd"]
    code = (f"import sys, importlib\nfor name in {kernels}: importlib.import_module('llamba_ref.kernels.' + name)\n"
            "print(sorted(name for name in sys.modules if name.startswith('llamba_ref.kernels.')))")
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(loaded) == [f"llamba_ref.kernels.{name}" for name in sorted([*kernels, "launch"])]
    package = Path(llamba_ref.kernels.__file__).parent
    allowed = {
        "__future__",
        "collections.abc",
        "contextlib",
        "typing",
        "torch",
        "torch.library",
        "triton",
        "triton.language",
        "jaxtyping",
    }
    for path in {*package.glob("*.py")} - {package / "ahead.py"}:
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        wanted = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        wanted |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        assert {name for name in wanted if not name.startswith("llamba_ref.")} <= allowed, path.name


def test_kernels_share_one_way_to_load_rows():
    package = Path(llamba_ref.kernels.__file__).parent
    for name in ("load_rows", "store_rows", "register_autograd", "register_fake"):
        found = [
            path.name
            for path in package.glob("*.py")
            if f"def {name}(" in path.read_text() or f".{name}(" in path.read_text()
        ]
        assert found == ["launch.py"], name


# rows


@triton.jit
def copy_rows(x_ptr, y_ptr, first, length, stride, width, BL: tl.constexpr, BD: tl.constexpr):
    t, d = first + tl.arange(0, BL), tl.arange(0, BD)
    store_rows(y_ptr, t, width, t < length, d, width, load_rows(x_ptr, t, stride, (t > first) & (t < length), d, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_loaded_and_stored_under_their_masks(dtype):
    """Rows of a slice of a wider array; those that are not there are zeros, and nothing is written beside the array."""
    x = torch.randn(7, 9, device=DEVICE)[:, 2:7]
    y = torch.full((8, 5), 7.0, dtype=dtype, device=DEVICE)
    launch(copy_rows, (1,), x, y, 1, 7, x.stride(0), 5, BL=8, BD=8)
    assert torch.equal(y[2:7], x[2:].to(dtype)) and (y[1] == 0).all() and (y[0] == 7).all() and (y[7] == 7).all()


# operations


def test_gradients_of_an_operation():
    """Results are kept if wanted, inputs that are None get no gradient, numbers have none to begin with."""
    def scaled(x, shift, factor: float):
        return (factor * x + (0 if shift is None else shift)).exp()

    def backward(grad, y, x, shift, factor):
        return factor * grad * y, grad * y, None

    op = as_operation(
        "scaled_in_a_test",
        scaled,
        lambda x, shift, factor: torch.empty_like(x),
        schema="(Tensor x, Tensor? shift, float factor) -> Tensor",
    )
    set_gradient(op, backward, keep=True)
    x, shift = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    for given in ([x, shift], [x]):
        out = op(*(given if len(given) == 2 else (x, None)), 2.0)
        expected = torch.autograd.grad((2 * x + (shift if len(given) == 2 else 0)).exp().sum(), given)
        assert all(map(torch.equal, torch.autograd.grad(out.sum(), given), expected))
    torch.library.opcheck(op, (x, None, 2.0))


# compiling


@interpreted
def test_a_process_that_interprets_cannot_compile():
    with recording(GPUS["T4"]) as launches:
        call(torch.empty(4), None, torch.empty(4))
    with pytest.raises(
        RuntimeError,
        match="kernels of this process are interpreted: compile in one that was started without TRITON_INTERPRET",
    ):
        compile_for(GPUS["T4"], launches[0])


@interpreted
def test_the_faster_interpreter_prepares_its_language_once_a_launch(monkeypatch):
    """A kernel that calls two functions, in two programs: one preparation, and the functions of `tl` are as before
    afterwards."""
    from triton.runtime import interpreter

    prepared, before = [], tl.load
    patch = interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda kernel: prepared.append(kernel) or patch(kernel))
    x = torch.randn(4, 3)
    launch(copy_rows, (2,), x, torch.empty(4, 3), 0, 4, 3, 3, BL=4, BD=4)
    assert len(prepared) == 1 and tl.load is before


@interpreted
def test_scan_as_tree_may_be_called_again():
    from triton.runtime import interpreter

    before = interpreter.ScanOps.generic_scan
    scan_as_tree()
    assert interpreter.ScanOps.generic_scan is before  # tests/conftest.py has called it


def test_operations_of_a_notebook_leave_those_of_the_package_alone():
    """To register a name again destroys what had it: a chapter that defines the package's operations must not do
    that."""
    from llamba_ref.kernels.scan import scan_op

    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert (
        as_operation("twice_in_a_test", twice, torch.empty_like, schema="(Tensor x) -> Tensor")._qualname
        == "llamba_ref::twice_in_a_test"
    )
    twice.__module__ = "__main__"
    noted = as_operation("scan", twice, torch.empty_like, schema="(Tensor x) -> Tensor")
    assert noted._qualname == "notebook::scan" and torch.equal(noted(torch.ones(2)), torch.full((2,), 2.0))
    x = torch.ones(1, 4, 2)
    assert torch.equal(
        scan_op(x, torch.zeros_like(x), None, torch.zeros(1, 2)).cumsum(0)[0, :, 0].cpu(), torch.arange(1.0, 5.0)
    )
