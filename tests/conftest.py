"""What every test runs under: no network, one thread, a fixed seed, Triton's interpreter where there is no GPU."""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Read when these libraries are first imported, so they are set before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch
from shapes import check_package

hypothesis.settings.register_profile("repeatable", derandomize=True)  # the same examples in every run
hypothesis.settings.load_profile("repeatable")

PACKAGE = Path(__file__).parent.parent / "llamba_ref"  # its kernels are left out: Triton reads their source
check_package(*(f"llamba_ref.{path.stem}" for path in PACKAGE.glob("[a-z]*.py")))

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # importing torch has not imported triton

if not importlib.util.find_spec("triton"):  # there is none for macOS
    collect_ignore_glob = ["test_kernels_*.py", "test_ahead.py", "test_bench_kernels.py"]
elif not GPU:
    from llamba_ref.kernels.device import scan_as_tree

    scan_as_tree()

torch.set_num_threads(1)
logging.getLogger("torch.__trace").propagate = False  # torch.compile's traces would fill pytest's report, slowly


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` where there is none; look at compiled kernels last, when the compiler has had its time."""
    items.sort(key=of_compiler)
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def of_compiler(item) -> bool:
    return item.path.name == "test_ahead.py"


COMPILE = "import json, bench.resources\nif __name__ == '__main__': print(json.dumps(bench.resources.compile_all(processes=1)))"
compiler = pytest.StashKey[tuple[subprocess.Popen, Path]]()


def pytest_collection_finish(session):
    """If their tests are wanted, compile all kernels from scratch, beside the other tests, in a process that does not interpret."""
    if any(of_compiler(item) for item in session.items) and not session.config.option.collectonly:
        folder = tempfile.mkdtemp()
        script = Path(folder, "compile_kernels.py")  # a file, because its pool starts it anew
        script.write_text(COMPILE)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": folder, "PYTHONPATH": str(session.config.rootpath)}
        with open(Path(folder, "rows.json"), "w") as rows, open(Path(folder, "errors.txt"), "w") as errors:
            process = subprocess.Popen([sys.executable, script], env=environment, stdout=rows, stderr=errors)
        session.config.stash[compiler] = process, Path(folder)


def pytest_sessionfinish(session):
    """Leave nothing behind, also when the tests stopped early."""
    if compiler in session.config.stash:
        process, folder = session.config.stash[compiler]
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def compiled(pytestconfig):
    """All programs of `bench.resources`, compiled."""
    process, folder = pytestconfig.stash[compiler]
    assert process.wait() == 0, (folder / "errors.txt").read_text()
    return json.loads((folder / "rows.json").read_text())


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers, in any order and alone."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def site():
    """The address of the built site, for the tests marked `browser`."""
    from docs.browser import served

    with served() as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    """Chromium, for the tests marked `browser`."""
    from docs.browser import chromium

    with chromium() as program:
        yield program
