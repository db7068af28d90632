"""Keys that turn: GateLoop's phases, the teacher's positions, angles of long texts, the contract, files."""

from math import pi

import pytest
import torch
from small import llama_config, llamba_config, shaken

from llamba_ref.conventions import relative_error
from llamba_ref.discrete import DiscreteMamba2
from llamba_ref.gateloop import gateloop
from llamba_ref.llama import Llama, Rope, apply_rope, rope_frequencies
from llamba_ref.llamba import Llamba, LlambaConfig
from llamba_ref.mohawk import match_matrix
from llamba_ref.rotation import RotaryMamba2, rotate_pairs, running_angle

KINDS = ["fixed", "learned", "data"]
LLAMA_3 = Rope(500_000.0, 8.0, 1.0, 4.0, 64)


def make(rotation, groups=4, **sizes):
    """A shaken mixer in float64."""
    torch.manual_seed(0)
    sizes = dict(d_model=24, d_state=6, n_v_heads=4, n_qk_heads=groups, chunk_size=8, rope=LLAMA_3) | sizes
    return shaken(RotaryMamba2(rotation=rotation, **sizes).double())


def as_complex(z):
    return torch.complex(*z.chunk(2, -1))


def by_gateloop(mixer, u, mode):
    """The mixer with complex gates."""
    p, _ = DiscreteMamba2.project(mixer, u, None)
    shared = mixer.n_heads // mixer.n_groups
    turn = mixer.turns(u).expand(*p.B.shape[:3], -1)
    B, C, turn = (z.repeat_interleave(shared, 2) for z in (p.B, p.C, turn))
    y = gateloop(as_complex(C), as_complex(B).conj(), p.x, p.log_a[..., None].expand_as(turn), turn, mode=mode).real
    return mixer.gate_and_project(y, p.x, p.z)


@pytest.mark.parametrize("mode", ["recurrent", "scan", "attention", "chunked"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("rotation", KINDS)
def test_turned_keys_are_gateloops_phases(rotation, groups, mode):
    mixer, u = make(rotation, groups), torch.randn(2, 21, 24, dtype=torch.float64, requires_grad=True)
    ours, theirs = mixer(u), by_gateloop(mixer, u, mode)
    assert relative_error(ours, theirs) < 1e-12
    leaves = [u, *mixer.parameters()]
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(y.square().sum(), leaves)])
                 for y in (ours, theirs)]
    assert relative_error(*gradients) < 1e-11


def test_fixed_turns_are_rotary_positions():
    z, rope = torch.randn(2, 3, 50, 8, dtype=torch.float64), LLAMA_3  # (batch, heads, len, width)
    turn = rope_frequencies(rope, 8).expand(2, 50, 3, -1)
    turned = rotate_pairs(z.transpose(1, 2), running_angle(turn)).transpose(1, 2)
    positions = torch.arange(1, 51)[None]  # the first token has turned once: differences are what counts
    assert relative_error(turned, apply_rope(z, positions, rope_frequencies(rope, 8).double())) < 1e-5


@pytest.mark.parametrize("length", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("rotation", KINDS)
def test_split_step_and_padding_change_nothing(rotation, length):
    mixer, u = make(rotation), torch.randn(2, length, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = mixer(u)
        for cut in {0, 1, length // 2, length}:
            state, pieces = mixer.init_state(2), []
            if cut:
                y, state = mixer(u[:, :cut], state)
                pieces.append(y)
            for u_t in u[:, cut:].unbind(1):
                y_t, state = mixer.step(u_t, state)
                pieces.append(y_t[:, None])
            assert relative_error(torch.cat(pieces, 1), whole) < 1e-12
        padded = torch.cat([torch.randn(2, 3, 24, dtype=torch.float64), u], 1)
        assert relative_error(mixer(padded, padding=torch.tensor([3, 3]))[:, 3:], whole) < 1e-12


def test_angles_of_a_long_text_keep_their_digits():
    turn = 2 * torch.rand(1, 300_000, 1, generator=torch.Generator().manual_seed(0))
    exact, angle, worst = turn.double().cumsum(1), None, 0.0
    for piece, expected in zip(turn.split(999, 1), exact.split(999, 1)):
        summed = running_angle(piece, angle)
        assert summed.dtype == torch.float32 and summed.abs().max() <= pi + 1e-6
        angle, worst = summed[:, -1], max(worst, (1 - (summed.double() - expected).cos()).max().item())
    assert worst < 1e-10  # 1 - cos(1e-5) is 5e-11


@pytest.mark.parametrize("rotation", KINDS)
def test_a_turning_matrix_is_what_the_mixer_multiplies_by(rotation):
    mixer, u = make(rotation), torch.randn(2, 13, 24, dtype=torch.float64)
    p, _ = mixer.project(u, None)
    heads = mixer.matrix(u) @ p.x.transpose(1, 2)
    y = mixer.out_proj(heads.transpose(1, 2).flatten(2) * torch.nn.functional.silu(p.z + mixer.z_bias))
    assert relative_error(y, mixer(u)) < 1e-12


@pytest.mark.parametrize("rotation", KINDS)
def test_half_precision_turns_in_float32(rotation):
    mixer = make(rotation).to(torch.bfloat16)
    u = torch.randn(1, 9, 24, dtype=torch.bfloat16)
    assert mixer.turns(u).dtype == torch.float32 and mixer.init_state(1).angle.dtype == torch.float32
    assert mixer(u).dtype == torch.bfloat16


@pytest.mark.parametrize("rotation", KINDS)
def test_files_and_generation(rotation, tmp_path):
    config = LlambaConfig.from_dict(llamba_config().to_dict() | {
        "rotary_cfg": {"rotation": rotation, "rope": {"theta": 500.0}},
        "ssm_cfg": {"d_state": 6, "n_v_heads": 4, "n_qk_heads": 4, "chunk_size": 16}})
    model = shaken(Llamba(config))
    model.save_pretrained(tmp_path / "model")
    again, ids = Llamba.from_pretrained(tmp_path / "model"), torch.randint(48, (2, 9))
    assert again.config == model.config and torch.equal(again(ids), model(ids))
    assert torch.equal(again.generate(ids, 5), model.generate(ids, 5))
    logits, state = model.prefill(ids)
    assert relative_error(model.step(ids[:, 0], state)[0], model(torch.cat([ids, ids[:, :1]], 1))[:, -1]) < 1e-5


def test_a_config_without_turning_says_nothing_about_it():
    assert "rotary_cfg" not in llamba_config().to_dict()
    with pytest.raises(ValueError, match="rotary_cfg: rotation is 'none'"):
        LlambaConfig.from_dict(llamba_config().to_dict() | {"rotary_cfg": {"rotation": "none"}})


def test_bad_sizes():
    with pytest.raises(ValueError, match="d_state is '6': it must be an integer of at least 1"):
        RotaryMamba2(24, "6", n_v_heads=4, n_qk_heads=4)
    with pytest.raises(ValueError, match="d_state is 5: it must be even"):
        RotaryMamba2(24, 5, n_v_heads=4, n_qk_heads=4)
    with pytest.raises(ValueError, match="rotation is 'none': it must be 'fixed', 'learned' or 'data'"):
        RotaryMamba2(24, 6, n_v_heads=4, n_qk_heads=4, rotation="none")


def test_stage_1_compares_turning_matrices():
    teacher = shaken(Llama(llama_config(hidden_size=32)))
    student = Llamba.from_teacher(teacher, start="published", d_state=8)
    ids = torch.randint(48, (2, 12))
    for layer in teacher.walk(ids):
        block = student.backbone.layers[layer.index]
        ours = block.mixer.matrix(block.input_layernorm(layer.input))
        expected = torch.linalg.matrix_norm(ours - layer.matrix()).mean()
        assert relative_error(match_matrix(block, layer), expected) < 1e-6
