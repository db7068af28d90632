"""What every chapter leans on: errors measured right, measurements found."""

import json

import pytest
import torch

from llamba_ref import conventions
from llamba_ref.conventions import load_result, relative_error


# relative error


def test_relative_error_by_hand():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    assert relative_error(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [1.0]])) == 0.0
    assert relative_error(torch.tensor([0.0, 0.25]), torch.zeros(2)) == 0.25  # nothing to compare with: the gap itself
    assert relative_error(torch.tensor(1 + 1j), torch.tensor(1.0)) == 1.0
    assert relative_error(torch.tensor(1.0), torch.tensor(1 + 0.0j) / 2) == 1.0


def test_relative_error_is_computed_in_float64():
    one = torch.ones(10, dtype=torch.float64)
    assert relative_error(one + 1e-12, one) == pytest.approx(1e-12, rel=1e-3)
    assert relative_error(one.float(), one + 1e-12) == pytest.approx(1e-12, rel=1e-3)
    assert relative_error(one.bfloat16() * 1e30, one * 1e30) < 2**-8  # its square overflows in float32
    assert relative_error(one.to(torch.complex64), one + 1e-12j) == pytest.approx(1e-12, rel=1e-3)


def test_relative_error_of_what_is_not_finite():
    for bad in (torch.nan, torch.inf):
        assert not relative_error(torch.tensor([1.0, bad]), torch.ones(2)) < 1e30


def test_relative_error_does_not_broadcast():
    with pytest.raises(ValueError, match=r"out has shape \(3,\), ref has \(1, 3\): they must be the same"):
        relative_error(torch.ones(3), torch.ones(1, 3))


def test_relative_error_needs_no_detach():
    leaf = torch.ones(2, requires_grad=True)
    assert relative_error(2 * leaf, leaf) == 1.0


# saved results


def test_load_result(monkeypatch, tmp_path):
    monkeypatch.setattr(conventions, "files", lambda package: tmp_path / package)
    (tmp_path / "llamba_ref" / "assets" / "results").mkdir(parents=True)
    (tmp_path / "llamba_ref" / "assets" / "results" / "speed.json").write_text(json.dumps({"rows": [1, 2]}))
    assert load_result("speed") == {"rows": [1, 2]}
    with pytest.raises(FileNotFoundError, match="^no saved result 'nothing': run python -m bench.nothing$"):
        load_result("nothing")
