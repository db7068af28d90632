"""The GPU of a Mac has no float64: nothing that trains or writes may ask it for one. A CPU plays it, and where there is
a Mac its numbers are compared with those of the CPU."""

import pytest
import torch
from small import llama_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamba_ref import operators
from llamba_ref.decoder import Backbone, Decoder
from llamba_ref.delta import RWKV7, GatedDeltaNet
from llamba_ref.gateloop import GateLoop
from llamba_ref.llama import Llama
from llamba_ref.llamba import Llamba, student_config
from llamba_ref.mamba2 import Mamba2
from llamba_ref.mamba3 import Mamba3
from llamba_ref.mohawk import OBJECTIVES
from llamba_ref.scan import linear_scan

MAC = torch.backends.mps.is_available()
SIZES = llama_config(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
MIXERS = {"gateloop": lambda: GateLoop(32, 4, 2), "mamba2": lambda: Mamba2(32, d_state=8, headdim=8, chunk_size=8),
          "mamba3": lambda: Mamba3(32, d_state=8, headdim=8, chunk_size=8),
          "delta": lambda: GatedDeltaNet(32, 4, 8, chunk_size=8), "rwkv7": lambda: RWKV7(32, 4, chunk_size=8)}


class NoDoubles(TorchDispatchMode):
    """Refuses what that GPU refuses, on this machine's device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for z in tree_leaves(out):
            if isinstance(z, torch.Tensor) and z.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{operation}: the MPS framework doesn't support float64")
        return out


@pytest.fixture
def no_doubles(monkeypatch):
    """This machine's CPU plays a device without float64."""
    monkeypatch.setattr(operators, "WITHOUT_DOUBLES", ("mps", "cpu"))
    with NoDoubles():
        yield


def test_the_stand_in_refuses_doubles(no_doubles):
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3).double()


def test_sums_are_wide_where_there_is_something_wider():
    assert operators.sum_dtype(torch.zeros(1)) == torch.float64
    assert operators.sum_dtype(torch.zeros(1, device="meta")) == torch.float64


@pytest.mark.parametrize("turning", [False, True])
def test_scans(no_doubles, turning):
    log_a, phase, x = -torch.rand(2, 50, 3), torch.randn(2, 50, 3) if turning else None, torch.randn(2, 50, 3)
    log_a.requires_grad_()
    h = linear_scan(log_a, x, phase)
    h.abs().sum().backward()
    state, gates = torch.zeros(2, 3), operators.polar_gate(log_a.detach(), phase)
    for t in range(50):
        state = gates[:, t] * state + x[:, t]
        assert torch.allclose(h[:, t], state, atol=1e-5)
    assert operators.cumulative_rotation(x).dtype == torch.complex64


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_learns_and_writes(no_doubles, mixer):
    model = Decoder(Backbone([MIXERS[mixer]() for _ in range(2)], 97, 32, 48), tie_embeddings=True)
    ids = torch.randint(97, (2, 20))
    model(ids).logsumexp(-1).mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.generate(ids, 3).shape == (2, 23)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rotation", ["none", "fixed", "data"])
def test_every_stage(no_doubles, objective, rotation):
    config = student_config(SIZES, d_state=8, chunk_size=8, rotation=rotation, bias=True)
    teacher, student = Llama(SIZES), Llamba(config)
    losses = OBJECTIVES[objective](teacher, student)(torch.randint(97, (2, 20)), lambda loss: loss.backward())
    assert losses.dtype == torch.float32 and losses.isfinite().all()


@pytest.mark.skipif(not MAC, reason="needs a Mac")
def test_the_numbers_of_the_cpu():
    """In float32, to what a sum in float32 can hold."""
    torch.manual_seed(0)
    model = Llamba(student_config(SIZES, d_state=8, chunk_size=8, rotation="fixed", bias=True)).eval()
    ids = torch.randint(97, (2, 200))
    with torch.no_grad():
        exact, found = model(ids), model.to("mps")(ids.to("mps")).cpu()
    assert (found - exact).norm() / exact.norm() < 1e-4
