"""What every test runs under: no network, one thread, a fixed seed, Triton's interpreter where there is no GPU."""

import importlib.util
import logging
import os
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
    """Skip what is marked `gpu` where there is none."""
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
