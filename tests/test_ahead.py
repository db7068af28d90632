"""Every kernel, with every type that it offers, compiled ahead of time for a T4, an A100 and an H100, and for two newer
cards: no GPU is needed to see whether it fits. What `python -m bench.resources` compiled is looked at in every run of
the tests, and compiled again in a long one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bench.common import short
from bench.resources import BLACKWELL, CALLS, code, jobs, launches_of
from llamba_ref.conventions import load_result
from llamba_ref.kernels.launch import GPUS

SAVED = {"resources": GPUS.values(), "resources_blackwell": BLACKWELL}
CARDS = {gpu.name: gpu for gpus in SAVED.values() for gpu in gpus}
COMPILE = """
import json
from bench.resources import compile_job, jobs
print(json.dumps([compile_job(job) for job in jobs() if {wanted}]))
"""
SOME = "job.gpu.name == 'T4' and job.dtype == 'bfloat16' and job.index == 0"  # what such a card cannot compute with


@pytest.fixture(scope="module")
def rows():
    """All programs, as they were compiled."""
    return [row for name in SAVED for row in load_result(name)["rows"]]


@pytest.mark.parametrize("name", SAVED)
def test_saved_rows_are_of_these_programs(name):
    """The kernels' source is the one that was compiled, and every launch is of the same program: constants, types,
    warps, stages, what is divisible by 16. Where this fails, run `python -m bench.resources`."""
    saved = load_result(name)
    assert saved["code"] == code()
    programs = [(job.gpu.name, job.call, job.dtype,
                 short(launches_of(job.gpu, job.call, job.dtype)[job.index].program(job.gpu)))
                for job in jobs(SAVED[name])]
    assert [(row["gpu"], row["call"], row["dtype"], row["program"]) for row in saved["rows"]] == programs


@pytest.mark.parametrize("gpu", CARDS)
@pytest.mark.parametrize("call", CALLS)
def test_fits(rows, gpu, call):
    """Shared memory as on the smallest GPU of that kind (sm_86 and sm_120 have 99 KiB; a B200 is alone in its kind),
    next to no spills, a small stack. Tiles were chosen for the three that chapters look at."""
    shared = CARDS[gpu].shared if gpu == "B200" else min(CARDS[gpu].shared, 99 * 1024)
    spills, stack = (64, 128) if gpu in GPUS else (256, 128)
    own = [row for row in rows if row["gpu"] == gpu and row["call"] == call]
    assert own
    for row in own:
        assert row["shared"] <= shared, row
        assert row["spills"] <= spills and row["stack"] <= stack, row


def test_tensor_cores_multiply_where_there_are_some(rows):
    """Half precision and tf32; float32 is exact, and Triton does not use those of a T4."""
    kernels = {row["kernel"] for row in rows if row["tensor_cores"]}
    assert {
        "chunk_states_kernel",
        "chunk_output_kernel",
        "chunk_gradient_kernel",
        "distance_kernel",
        "row_kernel",
        "column_kernel",
    } <= kernels
    for row in rows:
        if row["kernel"] in kernels:
            assert row["tensor_cores"] == (row["gpu"] != "T4" and row["dtype"] != "float32"), row


@pytest.mark.parametrize("wanted", [SOME, pytest.param("True", marks=pytest.mark.slow)], ids=["some", "all"])
def test_compiled_again_programs_are_the_same(wanted, tmp_path):
    """From scratch, in a process that does not interpret. Another Triton may need other registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", COMPILE.format(wanted=wanted)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in json.loads(done.stdout)]
    saved = load_result("resources")
    assert len(rows) == (len(saved["rows"]) if wanted == "True" else 6)
    if triton.__version__ == saved["versions"]["triton"]:
        assert all(row in saved["rows"] for row in rows)
