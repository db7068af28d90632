"""Every kernel, with every type that it offers, compiled ahead of time for a T4, an A100 and an H100: no GPU is needed to see whether it fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.resources import CALLS, jobs
from llamba_ref.kernels.device import GPUS

ROOT = Path(__file__).parents[1]
SCRIPT = "import json; from bench.resources import compile_all\nif __name__ == '__main__': print(json.dumps(compile_all()))"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """All programs, compiled in processes that do not interpret, from scratch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = tmp_path_factory.mktemp("script") / "compile.py"
    script.write_text(SCRIPT)
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_all_are_there(rows):
    assert len(rows) == len(list(jobs()))
    assert {(row["gpu"], row["call"]) for row in rows} == {(gpu, call) for gpu in GPUS for call in CALLS}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("call", CALLS)
def test_fits(rows, gpu, call):
    """Shared memory as on the smallest GPU of that kind (sm_86 and sm_120 have 99 KiB), next to no spills, a small stack."""
    shared = min(GPUS[gpu].shared, 99 * 1024)
    for row in (row for row in rows if row["gpu"] == gpu and row["call"] == call):
        assert row["shared"] <= shared, row
        assert row["spills"] <= 64 and row["stack"] <= 128, row
