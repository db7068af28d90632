"""Faults that an independent reading found."""

import re
import shutil

import pytest
import torch
from shapes import checker, jaxtyped

from llamba_ref.checkpoint import find_checkpoint
from llamba_ref.models import load_model


def test_a_damaged_config_is_named_once(tmp_path):
    shutil.copytree(find_checkpoint("tiny"), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}[^:]*: not a valid JSON") as error:
        load_model(tmp_path / "model")
    assert str(error.value).count("config.json") == 1


def test_a_gate_a_head_that_turns_every_key_is_what_the_kernels_signature_says():
    """The package's checker leaves the kernels out: Triton reads their source."""
    pytest.importorskip("triton")
    from llamba_ref.kernels.gateloop import triton_gateloop

    function = jaxtyped(triton_gateloop, typechecker=checker)
    q, k, phase = torch.randn(3, 1, 5, 2, 16).unbind()
    y, state = function(q, k, torch.randn(1, 5, 2, 16), -torch.rand(1, 5, 2, 1), phase, None)
    assert y.shape == (1, 5, 2, 16) and state.shape == (1, 2, 16, 16)
