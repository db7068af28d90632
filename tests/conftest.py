"""What every test runs under: no network, one thread, a fixed seed, Triton's interpreter where there is no GPU."""

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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
    from llamba_ref.kernels.ahead import interpret_faster, scan_as_tree

    scan_as_tree()
    interpret_faster()

torch.set_num_threads(1)
logging.getLogger("torch.__trace").propagate = False  # torch.compile's traces would fill pytest's report, slowly


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` where there is none; look at compiled kernels last, when the compiler has had its
    time."""
    items.sort(key=of_compiler)
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def of_compiler(item) -> bool:
    return item.path.name == "test_ahead.py"


COMPILE = """
import json, bench.resources
if __name__ == "__main__":  # the pool starts this file anew
    print(json.dumps(bench.resources.compile_all(processes=1)))
"""
compiler = pytest.StashKey[subprocess.Popen]()
compiler_folder = pytest.StashKey[Path]()


class Parallel:
    """What pytest-xdist asks the process that hands out tests to `-n` workers: it has the one compiler, they wait for
    it."""

    def pytest_configure_node(self, node):
        node.workerinput["compiler_folder"] = str(node.config.stash[compiler_folder])

    def pytest_xdist_node_collection_finished(self, node, ids):
        start_compiler(node.config, (Path(one.partition("::")[0]) for one in ids))


def pytest_configure(config):
    worker = getattr(config, "workerinput", None)
    config.stash[compiler_folder] = Path(worker["compiler_folder"] if worker else tempfile.mkdtemp())
    if config.pluginmanager.hasplugin("xdist") and not worker:
        config.pluginmanager.register(Parallel())


def pytest_collection_finish(session):
    if not hasattr(session.config, "workerinput") and not session.config.option.collectonly:
        start_compiler(session.config, (item.path for item in session.items))


def start_compiler(config, paths):
    """If its tests are wanted, compile all kernels from scratch, beside the other tests, in a process that does not
    interpret."""
    if compiler in config.stash or not any(path.name == "test_ahead.py" for path in paths):
        return
    folder = config.stash[compiler_folder]
    Path(folder, "compile_kernels.py").write_text(COMPILE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(config.rootpath)}
    command = '"$0" compile_kernels.py > rows.json 2> errors.txt; echo $? > code.part; mv code.part code'
    config.stash[compiler] = subprocess.Popen(  # a session of its own, to end shell, compiler and assembler together
        ["sh", "-c", command, sys.executable], cwd=folder, env=environment, start_new_session=True)


def pytest_unconfigure(config):
    """Leave nothing behind, also when the tests stopped early."""
    if compiler in config.stash and config.stash[compiler].poll() is None:
        os.killpg(config.stash[compiler].pid, signal.SIGKILL)
        config.stash[compiler].wait()
    if not hasattr(config, "workerinput"):
        shutil.rmtree(config.stash[compiler_folder], ignore_errors=True)


@pytest.fixture(scope="session")
def compiled(pytestconfig):
    """All programs of `bench.resources`, compiled."""
    folder = pytestconfig.stash[compiler_folder]
    while not Path(folder, "code").exists():
        time.sleep(0.1)
    assert Path(folder, "code").read_text() == "0\n", Path(folder, "errors.txt").read_text()
    return json.loads(Path(folder, "rows.json").read_text())


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
