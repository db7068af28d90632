"""What every test runs under: no network, one thread, a fixed seed, Triton's interpreter where there is no GPU."""

import importlib.util
import os

# Read when these libraries are first imported, so they are set before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("repeatable", derandomize=True)  # the same examples in every run
hypothesis.settings.load_profile("repeatable")

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # importing torch has not imported triton
    if importlib.util.find_spec("triton"):  # there is none for macOS
        from llamba_ref.kernels.device import scan_as_tree

        scan_as_tree()

torch.set_num_threads(1)


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
