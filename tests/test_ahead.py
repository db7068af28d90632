"""Every kernel, with every type that it offers, compiled ahead of time for a T4, an A100 and an H100: no GPU is needed
to see whether it fits."""

import pytest

from bench.resources import CALLS, jobs
from llamba_ref.kernels.launch import GPUS


def test_all_are_there(compiled):
    assert len(compiled) == len(list(jobs()))
    assert {(row["gpu"], row["call"]) for row in compiled} == {(gpu, call) for gpu in GPUS for call in CALLS}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("call", CALLS)
def test_fits(compiled, gpu, call):
    """Shared memory as on the smallest GPU of that kind (sm_86 and sm_120 have 99 KiB), next to no spills, a small
    stack."""
    shared = min(GPUS[gpu].shared, 99 * 1024)
    for row in (row for row in compiled if row["gpu"] == gpu and row["call"] == call):
        assert row["shared"] <= shared, row
        assert row["spills"] <= 64 and row["stack"] <= 128, row


def test_tensor_cores_multiply_where_there_are_some(compiled):
    """Half precision and tf32 on an A100 and an H100; float32 is exact, and Triton does not use those of a T4."""
    kernels = {row["kernel"] for row in compiled if row["tensor_cores"]}
    assert {
        "chunk_states_kernel",
        "chunk_output_kernel",
        "chunk_gradient_kernel",
        "distance_kernel",
        "row_kernel",
        "column_kernel",
    } <= kernels
    for row in compiled:
        if row["kernel"] in kernels:
            assert row["tensor_cores"] == (row["gpu"] != "T4" and row["dtype"] != "float32"), row
