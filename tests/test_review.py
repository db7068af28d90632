"""Faults that an independent reading found."""

import re
import shutil

import pytest

from llamba_ref.checkpoint import find_checkpoint
from llamba_ref.models import load_model


def test_a_damaged_config_is_named_once(tmp_path):
    shutil.copytree(find_checkpoint("tiny"), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}[^:]*: not a valid JSON") as error:
        load_model(tmp_path / "model")
    assert str(error.value).count("config.json") == 1
