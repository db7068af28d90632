"""What bench.kernels counts, measures and says, at tiny sizes in Triton's interpreter; stand-ins play the peers that
need a GPU."""

import json
import os
import pickle
import subprocess
import sys
import types
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
import bench.common
from bench import kernels
from bench.device import short_name
from bench.kernels import GOALS, LARGE, OPERATIONS, Limits, Operation, Peer, Work, measure, verdict
from llamba_ref.conventions import relative_error
from llamba_ref.scan import linear_scan
from llamba_ref.ssd import ssd, ssd_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = Limits(1e9, {"float32": 1e10, "tf32": 2e10, "float16": 4e10, "bfloat16": 4e10})
HEADS = {"heads": 2, "headdim": 16, "state": 16, "groups": 2}
TINY = {
    "linear_scan": {"batch": 2, "length": 20, "width": 3},
    "linear_scan complex": {"batch": 2, "length": 20, "width": 3},
    "gateloop": {"batch": 1, "length": 20, **HEADS},
    "ssd": {"batch": 1, "length": 20, **HEADS},
    "ssd_step": {"batch": 2, **HEADS},
    "causal_conv": {"batch": 2, "length": 9, "channels": 8},
    "causal_conv_step": {"batch": 2, "channels": 8},
    "matrix_distance": {"batch": 1, "length": 20, "keys": 1, **HEADS},
}


def count(name, sizes, size, backward):
    return OPERATIONS[name].count(**sizes, size=size, backward=backward)


# counting, by hand


@pytest.mark.parametrize("name, forward, both", [
    ("linear_scan", 2 * 20 * 3 * (2 + 4 + 2), 2 * 20 * 3 * (2 + 4 + 2 + 2 + 2 + 4 + 2 + 4)),
    ("gateloop", 20 * 2 * (16 * 2 * 4 + 16 * 4), 20 * 2 * (16 * 2 * 4 + 16 * 4 + 2 * (16 * 2 * 3 + 16 * 4) + 16 * 2)),
    ("ssd", 20 * (32 * 2 * 2 + 2 * 4 + 32 * 2 * 2),
     20 * (32 * 2 * 2 + 2 * 4 + 32 * 2 * 2 + 2 * (32 * 2 + 2 * 4 + 32 * 2 * 2) + 32 * 2)),
    ("causal_conv", 2 * (2 * 9 * 8 * 2 + 8 * 5 + 2 * 8 * 4), 2 * (2 * 9 * 8 * 5 + 8 * 5 * 3 + 2 * 8 * 4)),
    ("matrix_distance", 20 * (3 * 16 * 2 + 32 * 2 * 2 + 2 * 4),
     20 * (2 * (3 * 16 * 2 + 32 * 2 * 2 + 2 * 4) + 32 * 2 * 2 + 2 * 4)),
])  # fmt: skip
def test_bytes(name, forward, both):
    assert count(name, TINY[name], 2, False).bytes == forward and count(name, TINY[name], 2, True).bytes == both


def test_bytes_of_complex_numbers_and_of_one_token():
    assert count("linear_scan complex", TINY["linear_scan complex"], 8, False).bytes == 120 * (8 + 4 + 4 + 8)
    assert count("linear_scan complex", TINY["linear_scan complex"], 8, True).bytes == 120 * (
        24 + 8 + 8 + 4 + 4 + 8 + 4 + 4
    )
    assert count("ssd_step", TINY["ssd_step"], 2, False).bytes == 2 * (
        2 * 2 * 16 * 16 * 4 + 2 * 32 * 2 + 2 * 4 + 2 * 32 * 2
    )
    assert count("causal_conv_step", TINY["causal_conv_step"], 2, False).bytes == 2 * (
        2 * 8 * 4 * 2 + 2 * 2 * 8 + 8 * 5
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_bytes_are_those_of_the_inputs_and_outputs(name):
    """Forward, an operation reads what `make` makes and writes its outputs; k and v of fewer heads and the one D are
    counted as they are."""
    operation, sizes = OPERATIONS[name], TINY[name]
    inputs = operation.make(**sizes, dtype=torch.complex64 if "complex" in name else torch.bfloat16, device="cpu")
    read = sum(z.nbytes for key, z in inputs.items() if key != "D")
    written = {
        "linear_scan": "x",
        "linear_scan complex": "x",
        "gateloop": "v",
        "ssd": "x",
        "ssd_step": "x_t state",
        "causal_conv": "x",
        "causal_conv_step": "x_t window",
        "matrix_distance": "",
    }[name].split()
    window = 2 * 2 * 4 * 8 if name == "causal_conv" else 0
    assert (
        count(name, sizes, 8 if "complex" in name else 2, False).bytes
        == read + sum(inputs[key].nbytes for key in written) + window
    )


def test_operations_of_matrix_products():
    for name in (
        "gateloop",
        "ssd",
    ):  # for a token and head a product of 16 x 16 into the state, one out of it; backward five more
        assert count(name, TINY[name], 2, False).flops == 20 * 2 * 2 * (2 * 16 * 16)
        assert count(name, TINY[name], 2, True).flops == 20 * 2 * 7 * (2 * 16 * 16)
    entries = 2 * (20 * 21 // 2)
    assert count("matrix_distance", TINY["matrix_distance"], 2, False).flops == entries * 2 * (16 + 16)
    assert count("matrix_distance", TINY["matrix_distance"], 2, True).flops == entries * 2 * (2 * (16 + 16) + 2 * 16)
    assert all(
        count(name, TINY[name], 2, False).flops == 0
        for name in ("linear_scan", "ssd_step", "causal_conv", "causal_conv_step")
    )


def test_the_least_time_is_the_longer_one():
    assert (
        LIMITS.seconds(Work(2 * 10**9, 10**10), torch.bfloat16) == 2
        and LIMITS.seconds(Work(10**9, 8 * 10**10), torch.bfloat16) == 2
    )
    assert LIMITS.seconds(Work(1, 4 * 10**10), torch.float32) == 2  # tf32
    assert LIMITS._replace(matmul={"float32": 1e10}).seconds(Work(1, 4 * 10**10), torch.float32) == 4  # a T4 has none
    assert LIMITS.seconds(Work(10**9, 0), torch.complex64) == 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_cases(name):
    """Sizes that `make` accepts, on tensors without numbers, of at most 65536 tokens; the last is the longest."""
    cases = list(OPERATIONS[name].cases())
    assert {model for model, _, _ in cases} == {"demo", "1B", "8B"}
    for _, sizes, half in cases:
        assert sizes["batch"] * sizes.get("length", 1) <= 65536
        made = OPERATIONS[name].make(**sizes, dtype=torch.bfloat16 if half else torch.float32, device="meta")
        assert all(z.device.type == "meta" for z in made.values()) and set(OPERATIONS[name].wanted) <= set(made)
    sizes = {model: sizes for model, sizes, _ in cases}
    if name == "ssd":
        assert (sizes["1B"]["heads"], sizes["1B"]["headdim"], sizes["8B"]["headdim"]) == (32, 64, 128)
    if name == "causal_conv":
        assert (sizes["1B"]["channels"], sizes["8B"]["channels"]) == (2048 + 4096, 4096 + 4096)


# the measuring core


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("backward", [False, True])
def test_measure(name, backward):
    """Ours through the public function with backend="triton", naive beside it, at a tiny size."""
    if backward and not OPERATIONS[name].wanted:
        return  # one token has no backward pass
    sizes = TINY[name] | ({"heads": 1, "groups": 1} if "heads" in TINY[name] else {})
    dtype = torch.complex64 if "complex" in name else torch.float32
    row = measure(name, "tiny", sizes, dtype, backward, LIMITS, DEVICE, budget=0.0)
    assert row["reason"] is None, row["reason"]
    assert row["pass"] == ("forward + backward" if backward else "forward")
    assert row["seconds"] > 0 and row["peak_bytes"] > 0 and row["bytes_per_second"] == row["bytes"] / row["seconds"]
    assert 0 < row["fraction"] and row["fraction"] == pytest.approx(
        max(row["bytes"] / 1e9, row["flops"] / 2e10) / row["seconds"]
    )
    naive = row["peers"]["naive"]
    assert (
        naive["reason"] is None
        and naive["ratio"] == naive["seconds"] / row["seconds"]
        and max(naive["errors"].values()) < 1e-4
    )
    assert set(naive["errors"]) >= set(OPERATIONS[name].wanted if backward else ["output 0"])
    for peer, found in row["peers"].items():  # those that are not here, or need a GPU
        assert found["reason"] is not None or found["ratio"] > 0, peer
    assert json.loads(json.dumps(row)) == row and OPERATIONS[name].peers.keys() | {"naive"} == row["peers"].keys()
    assert row["operation"] in kernels.line(row) and all(peer in kernels.line(row) for peer in row["peers"])


def naive_scan_with(peers, monkeypatch):
    """The scan, ours played by naive, with other peers."""
    scan = OPERATIONS["linear_scan"]
    monkeypatch.setitem(
        OPERATIONS, "toy", Operation(scan.make, scan.naive, scan.naive, scan.count, scan.cases, scan.wanted, peers)
    )


def same(**inputs):
    return tuple(inputs.values())


def test_a_peer_that_fails_or_disagrees_is_recorded_with_its_reason(monkeypatch):
    def fails(log_a, x):
        raise ValueError("no such shape\nand more")

    def is_missing(log_a, x):
        import a_package_that_is_not_there  # noqa: F401

    def takes_too_much(log_a, x):
        raise torch.OutOfMemoryError("tried to allocate")

    def fails_backward(log_a, x):
        return (linear_scan(log_a, x).detach(),)

    functions = {
        "fails": fails,
        "missing": is_missing,
        "large": takes_too_much,
        "differs": lambda log_a, x: (linear_scan(log_a, 1.1 * x),),
        "nan": lambda log_a, x: (linear_scan(log_a, x) * float("nan"),),
        "no gradient": fails_backward,
        "another shape": lambda log_a, x: (linear_scan(log_a, x)[:, :5],),
        "equal": lambda log_a, x: (linear_scan(log_a, x),),
    }
    naive_scan_with({name: Peer(function, same) for name, function in functions.items()}, monkeypatch)
    row = measure("toy", "tiny", TINY["linear_scan"], torch.float32, True, LIMITS, "cpu", budget=0.0)
    reasons = {name: peer["reason"] for name, peer in row["peers"].items()}
    assert (
        reasons["fails"] == "ValueError: no such shape"
        and reasons["missing"] == "not installed: a_package_that_is_not_there"
    )
    assert reasons["large"] == "out of memory" and reasons["equal"] is reasons["naive"] is None
    assert reasons["differs"].startswith("disagrees: relative error 1.0e-01 of ") and "nan" in reasons["nan"]
    assert reasons["no gradient"].startswith("RuntimeError: ") and reasons["another shape"].startswith(
        "ValueError: out has shape"
    )
    assert [name for name, peer in row["peers"].items() if "ratio" in peer] == ["naive", "equal"]
    assert row["peers"]["differs"]["errors"]["output 0"] == pytest.approx(0.1, rel=1e-3)  # is kept
    assert all(f"{name}: {reason}" in kernels.line(row) for name, reason in reasons.items() if reason)


def test_ours_that_fails_is_a_row_and_no_peer_is_forgotten(monkeypatch):
    naive_scan_with({"other": Peer(lambda log_a, x: (x,), same)}, monkeypatch)
    monkeypatch.setitem(OPERATIONS, "toy", OPERATIONS["toy"]._replace(run=lambda log_a, x: 1 / 0))
    row = measure("toy", "tiny", TINY["linear_scan"], torch.float32, False, LIMITS, "cpu", budget=0.0)
    assert row["reason"] == "ZeroDivisionError: division by zero" and set(row["peers"]) == {"naive", "other"}
    assert all(peer["reason"] == "not compared: ours failed" for peer in row["peers"].values()) and "seconds" not in row
    assert kernels.line(row).endswith("ZeroDivisionError: division by zero")


def test_inputs_too_large_for_the_card(monkeypatch):
    def too_large(**sizes):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setitem(OPERATIONS, "toy", OPERATIONS["ssd"]._replace(make=too_large))
    row = measure("toy", "tiny", TINY["ssd"], torch.float32, False, LIMITS, "cpu", budget=0.0)
    assert row["reason"] == "out of memory" and "out of memory" in kernels.line(row)


def test_an_operation_in_place_leaves_the_inputs_of_the_next_alone(monkeypatch):
    def in_place(log_a, x):
        h = linear_scan(log_a, x)
        x.zero_()
        return (h,)

    naive_scan_with(
        {"in place": Peer(in_place, same), "later": Peer(lambda log_a, x: (linear_scan(log_a, x),), same)}, monkeypatch
    )
    row = measure("toy", "tiny", TINY["linear_scan"], torch.float32, False, LIMITS, "cpu", budget=0.0)
    assert all(peer["reason"] is None for peer in row["peers"].values())


def test_what_a_peer_wants_is_made_before_the_clock_starts():
    made, calls = [], []
    peer = Peer(
        lambda a, b: calls.append(a.requires_grad) or (a * b,), lambda log_a, x: made.append(1) or (log_a.mT, x.mT)
    )
    scan = OPERATIONS["linear_scan"]
    inputs = scan.make(**TINY["linear_scan"], dtype=torch.float32, device="cpu")
    found = kernels.timed(scan, peer, inputs, True, "cpu", 1e-3)
    assert (
        len(made) == 1
        and len(calls) > 3
        and all(calls)
        and found["seconds"] > 0
        and found["peak_bytes"] >= 2 * inputs["x"].nbytes
    )


def test_repetitions_follow_from_the_budget():
    calls = []
    assert kernels.seconds(lambda: calls.append(1), "cpu", 1e-4) > 0 and len(calls) > 3
    few = []
    kernels.seconds(lambda: few.append(1), "cpu", 0.0)
    assert len(few) == 1


def test_limits():
    found = kernels.measure_limits("cpu", size=64, copied=2**16, budget=0.01)
    assert found.bandwidth > 1e6 and found.matmul.keys() >= {"float32", "float16"} and min(found.matmul.values()) > 1e6
    assert torch.get_float32_matmul_precision() == "highest"
    assert pickle.loads(pickle.dumps(found)) == found  # as it comes back from the process that measures it


def test_a_process_of_its_own():
    """Results and exceptions come back; a process that dies is an exception too. What is sent need not be imported
    there."""
    assert kernels.in_a_process(os.getpid) != os.getpid()
    with pytest.raises(FileNotFoundError, match="no_such_folder"):
        kernels.in_a_process(os.listdir, "no_such_folder")
    with pytest.raises(BrokenProcessPool):
        kernels.in_a_process(os._exit, 1)


def test_an_operation_whose_process_dies_is_a_row(monkeypatch, capsys):
    def dies(function, name, models, limits, kept, until):
        if name == "ssd":
            raise BrokenProcessPool("killed")

    monkeypatch.setattr(kernels, "in_a_process", dies)
    (row,) = sum(kernels.measure_all(LIMITS), [])
    assert (
        row["operation"] == "ssd"
        and row["reason"] == "BrokenProcessPool: killed"
        and "BrokenProcessPool" in capsys.readouterr().out
    )
    said = {one["goal"]: one["verdict"] for one in (verdict(goal, [row]) for goal in GOALS)}
    assert said["no kernel is slower than the quickest peer"] == "not reached: 1 rows failed, BrokenProcessPool: killed"


def test_rows_before_a_process_dies_are_kept(monkeypatch, capsys):
    """They are in the result, in their order, before the row that says why there are no more; later operations go
    on."""
    measured = []

    def measure(name, *others):
        measured.append(name)
        if name == "gateloop" and measured.count(name) == 3:
            raise BrokenProcessPool("killed")
        return a_row(name, reason=f"row {len(measured)}")

    monkeypatch.setattr(
        kernels, "OPERATIONS", {name: OPERATIONS[name] for name in ("linear_scan", "gateloop", "ssd_step")}
    )
    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels, "attempt_to_tidy", lambda: None)
    monkeypatch.setattr(kernels, "half_type", lambda: torch.float16)
    monkeypatch.setattr(kernels, "in_a_process", lambda function, *arguments: function(*arguments))
    before = torch.get_float32_matmul_precision()
    rows = sum(kernels.measure_all(LIMITS), [])
    torch.set_float32_matmul_precision(before)
    of_gateloop = [row for row in rows if row["operation"] == "gateloop"]
    assert [row["model"] for row in of_gateloop] == ["1B", "1B", "all"]
    assert of_gateloop[2]["reason"] == "BrokenProcessPool: killed" and "BrokenProcessPool" in capsys.readouterr().out
    dead = measured.index("gateloop") + 2  # none of what was measured but this one is lost
    assert [row["reason"] for row in rows if row["model"] != "all"] == [
        f"row {i + 1}" for i in range(len(measured)) if i != dead
    ]
    assert rows[-1]["operation"] == "ssd_step" and measured[-1] == "ssd_step"


# peers that need a GPU, played by stand-ins written from their documentation


def stand_in(monkeypatch, module, **functions):
    made = types.ModuleType(module)
    for name, function in functions.items():
        setattr(made, name, function)
    monkeypatch.setitem(sys.modules, module, made)


def agrees(name, peer, backward, **sizes):
    """The largest relative error of a peer against naive, outputs and gradients."""
    operation = OPERATIONS[name]
    inputs = operation.make(**{**TINY[name], **sizes}, dtype=torch.float32, device="cpu")
    ours, theirs = (
        kernels.results(operation, one, inputs, backward)
        for one in (kernels.as_peer(list(inputs), naive_of(name)), operation.peers[peer])
    )
    return max(relative_error(one, other) for one, other in zip(theirs, ours, strict=True))


def naive_of(name):
    """What the operation computes, without keywords that other functions have."""
    def conv_step(x_t, weight, bias, window):
        inputs = torch.cat([window, x_t.unsqueeze(-1)], -1)[..., 1:]
        return F.silu((inputs * weight.squeeze(1)).sum(-1) + bias), inputs

    def conv(x, weight, bias):
        return (F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight, bias, groups=x.shape[2])).mT,)

    known = {"ssd_step": lambda **inputs: ssd_step(**inputs), "causal_conv": conv, "causal_conv_step": conv_step}
    return known.get(name, OPERATIONS[name].naive)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backward", [False, True])
def test_inputs_of_mamba_chunk_scan_combined(monkeypatch, groups, backward):
    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None):
        assert chunk_size == 128 and dt.shape == x.shape[:3] and A.shape == x.shape[2:3] and (dt > 0).all()
        return ssd(x * dt.unsqueeze(-1), dt * A, B, C)

    stand_in(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    assert agrees("ssd", "mamba_ssm mamba_chunk_scan_combined", backward, groups=groups) < 1e-4


@pytest.mark.parametrize("groups", [1, 2])
def test_inputs_of_selective_state_update(monkeypatch, groups):
    def selective_state_update(state, x, dt, A, B, C, D=None):
        assert (
            dt.shape == x.shape and A.shape == state.shape[1:] and A.stride()[1:] == (0, 0) and dt.stride(-1) == 0
        )  # one number a head
        y, new = ssd_step(x * dt, (dt * A[..., 0])[..., 0], B, C, state)
        state.copy_(new)
        return y

    stand_in(monkeypatch, "mamba_ssm.ops.triton.selective_state_update", selective_state_update=selective_state_update)
    assert agrees("ssd_step", "mamba_ssm selective_state_update", False, groups=groups) < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["fla chunk_simple_gla", "fla fused_recurrent_simple_gla"])
@pytest.mark.parametrize("backward", [False, True])
def test_inputs_of_simple_gla(monkeypatch, name, backward, groups):
    def simple_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
        assert scale == 1.0 and q.shape == k.shape and q.shape[:3] == v.shape[:3] == g.shape
        return ssd(v, g, k, q, initial_state=None if initial_state is None else initial_state.mT), None

    stand_in(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=simple_gla, fused_recurrent_simple_gla=simple_gla)
    assert agrees("ssd", name, backward, groups=groups) < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_inputs_of_simple_gla_for_one_token(monkeypatch, groups):
    def fused_recurrent_simple_gla(q, k, v, g, scale, initial_state, output_final_state):
        assert output_final_state and initial_state.is_contiguous() and q.shape == k.shape
        y, state = ssd(v, g, k, q, initial_state=initial_state.mT, return_state=True)
        return y, state.mT

    stand_in(monkeypatch, "fla.ops.simple_gla", fused_recurrent_simple_gla=fused_recurrent_simple_gla)
    assert agrees("ssd_step", "fla fused_recurrent_simple_gla", False, groups=groups, headdim=8) < 1e-5


@pytest.mark.parametrize("name", ["fla chunk_hgrn", "fla fused_recurrent_hgrn"])
def test_inputs_of_hgrn(monkeypatch, name):
    def hgrn(x, g, initial_state=None, output_final_state=False):
        return linear_scan(g, x), None

    stand_in(monkeypatch, "fla.ops.hgrn", chunk_hgrn=hgrn, fused_recurrent_hgrn=hgrn)
    assert agrees("linear_scan", name, True) < 1e-6


def test_inputs_of_gla(monkeypatch):
    def chunk_gla(q, k, v, g, scale=None):
        assert scale == 1.0
        return OPERATIONS["gateloop"].naive(q, k, v, g)[0], None

    stand_in(monkeypatch, "fla.ops.gla", chunk_gla=chunk_gla)
    assert agrees("gateloop", "fla chunk_gla", True) < 1e-6


@pytest.mark.parametrize("backward", [False, True])
def test_inputs_of_the_convolutions(monkeypatch, backward):
    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        assert activation == "silu" and x.stride(1) == 1 and weight.ndim == 2  # channels last
        return F.silu(F.conv1d(F.pad(x, (3, 0)), weight.unsqueeze(1), bias, groups=x.shape[1]))

    def causal_conv1d(x, weight=None, bias=None, activation=None):
        return causal_conv1d_fn(x.mT, weight, bias, activation).mT, None

    def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
        assert activation == "silu" and conv_state.shape == (*x.shape, 4)
        y, new = naive_of("causal_conv_step")(x, weight.unsqueeze(1), bias, conv_state)
        conv_state.copy_(new)
        return y

    stand_in(monkeypatch, "causal_conv1d", causal_conv1d_fn=causal_conv1d_fn, causal_conv1d_update=causal_conv1d_update)
    stand_in(monkeypatch, "fla.modules.causal_conv1d", causal_conv1d=causal_conv1d)
    for peer in ("causal_conv1d causal_conv1d_fn", "fla causal_conv1d"):
        assert agrees("causal_conv", peer, backward) < 1e-5
    if not backward:
        assert agrees("causal_conv_step", "causal_conv1d causal_conv1d_update", False) < 1e-6


# what is said about it


def a_row(
    operation, fraction=0.9, ratios=(), moved=LARGE, reason=None, length=8192, peak=1, naive_peak=None, model="1B"
):
    peers = {f"peer {i}": {"reason": None, "ratio": ratio} for i, ratio in enumerate(ratios)} | {
        "absent": {"reason": "not installed: absent"}
    }
    if naive_peak:
        peers["naive"] = {"reason": None, "ratio": 3.0, "peak_bytes": naive_peak}
    measured = {} if reason else {"fraction": fraction, "bytes": moved, "peak_bytes": peak}
    return {
        "operation": operation,
        "model": model,
        "sizes": {"length": length},
        "dtype": "bfloat16",
        "pass": "forward",
        "reason": reason,
        "peers": peers,
        **measured,
    }


def said(index, *rows):
    found = verdict(GOALS[index], list(rows))
    return found["verdict"], found["worst"]


def test_verdict_on_peers():
    assert said(0, a_row("ssd", ratios=(1.5, 2.0)), a_row("ssd", ratios=(1.1, 1.0))) == ("reached", 1.0)
    assert said(0, a_row("ssd", ratios=(1.5, 2.0)), a_row("ssd", ratios=(3.0, 0.99))) == ("not reached", 0.99)
    assert said(0, a_row("ssd"), a_row("another", ratios=(0.5,))) == ("not measured", None)
    assert said(0, a_row("ssd", ratios=(2.0,)), a_row("ssd", reason="out of memory")) == ("reached", 2.0)
    assert said(0, a_row("ssd", ratios=(2.0,)), a_row("ssd", reason="ValueError: x")) == (
        "not reached: 1 rows failed, ValueError: x",
        2.0,
    )


@pytest.mark.parametrize(
    "index, operations",
    [(1, ("linear_scan", "linear_scan complex")), (2, ("causal_conv", "causal_conv_step")), (3, ("ssd_step",))],
)
def test_verdict_on_bandwidth(index, operations):
    for operation in operations:
        assert said(index, a_row(operation, 0.95), a_row(operation, 0.8), a_row(operation, 0.1, moved=LARGE - 1)) == (
            "reached",
            0.8,
        )
        assert said(index, a_row(operation, 0.79), a_row(operation, 0.9)) == ("not reached", 0.79)
    assert said(index, a_row("ssd", 0.1)) == ("not measured", None)
    assert said(index, a_row(operations[0], 0.1, moved=1)) == ("not measured", None)


def test_verdict_on_memory():
    good, bad = a_row("matrix_distance", peak=4, naive_peak=100), a_row("matrix_distance", peak=5, naive_peak=100)
    assert said(4, good) == ("reached", 0.04) and said(4, good, bad) == ("not reached", 0.05)
    assert said(4, good, a_row("matrix_distance", peak=50, naive_peak=100, length=2048)) == ("reached", 0.04)
    assert said(4, a_row("matrix_distance", peak=4)) == ("not measured", None)  # naive did not fit


def test_summary_names_the_worst_row():
    text = kernels.summary(
        [verdict(goal, [a_row("ssd", ratios=(1.5,)), a_row("ssd", ratios=(0.75,), model="8B")]) for goal in GOALS]
    )
    assert text.splitlines()[0] == ("no kernel is slower than the quickest peer: not reached; worst of 2: 0.750 "
                                    "(ssd 8B {'length': 8192} bfloat16 forward)")
    assert text.splitlines()[1] == "the scan reaches 80% of the bandwidth: not measured" and len(
        text.splitlines()
    ) == len(GOALS)


@pytest.mark.parametrize(
    "gpu, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("Tesla T4", "t4"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "geforce_rtx_4090"),
        ("NVIDIA T400", "t400"),
    ],
)
def test_short_names(gpu, name):
    assert short_name(gpu) == name


def test_the_command_from_end_to_end(monkeypatch, tmp_path, capsys):
    """With a card that is played: limits, rows, goals and versions are printed and saved."""
    monkeypatch.setattr(bench.common, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        kernels,
        "in_a_process",
        lambda function, *arguments: LIMITS if function is kernels.measure_limits else function(*arguments),
    )
    monkeypatch.setattr(kernels, "measure", lambda name, *others: a_row(name, reason="out of memory"))
    before = torch.get_float32_matmul_precision()
    kernels.main(models=tuple(kernels.MODELS))
    torch.set_float32_matmul_precision(before)
    saved = json.loads((tmp_path / "kernels_h100.json").read_text())
    assert (
        saved["limits"]["bandwidth"] == 1e9
        and saved["device"] == "NVIDIA H100 80GB HBM3"
        and len(saved["goals"]) == len(GOALS)
    )
    assert {"torch", "triton", "fla-core", "mamba-ssm", "causal-conv1d"} <= saved["versions"].keys() and saved[
        "versions"
    ]["triton"]
    passes = {name: 1 + bool(operation.wanted) for name, operation in OPERATIONS.items()}
    assert len(saved["rows"]) == sum(
        passes[name] * len(list(operation.cases())) for name, operation in OPERATIONS.items()
    )
    printed = capsys.readouterr().out
    assert "copy 1 GB/s" in printed and "written: bench/results/kernels_h100.json" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels"], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and done.stdout == ""
        and done.stderr == "bench.kernels needs a CUDA device: there is none here\n"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_gpu_a_small_case_of_everything(name):
    """As the command does it, at the tiny size, in half precision: ours agrees with naive, every installed peer runs
    and agrees."""
    dtype = torch.complex64 if "complex" in name else kernels.half_type()
    row = measure(
        name,
        "tiny",
        TINY[name] | {"length": 256} if "length" in TINY[name] else TINY[name],
        dtype,
        bool(OPERATIONS[name].wanted),
        LIMITS,
        "cuda",
        0.01,
    )
    reasons = [row["reason"], *(peer["reason"] for peer in row["peers"].values())]
    assert all(reason is None or reason.startswith("not installed") for reason in reasons), row
