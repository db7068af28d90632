"""Llamba: one function however a sequence is cut or padded, official names and sizes, students from teachers."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import RELEASED, llama_config, llamba_config, one_line
from torch.utils._pytree import tree_leaves

from llamba_ref import llamba
from llamba_ref.conventions import relative_error
from llamba_ref.discrete import OPEN_GATE, DiscreteMamba2
from llamba_ref.llama import Attention, Llama, Rope
from llamba_ref.llamba import (
    LLAMBA_SIZES,
    AttentionConfig,
    Llamba,
    LlambaConfig,
    MixedHeads,
    attention_need,
    keep_heads,
    some_heads,
)
from llamba_ref.mamba2 import MambaState
from llamba_ref.mohawk import distill
from llamba_ref.rotation import RotaryMamba2
from llamba_ref.start import start_from_teacher
from llamba_ref.training import FreshBatches, Stage

VOCAB = 53  # not a multiple of 8
LLAMA_3 = Rope(5e5, 8.0, 1.0, 4.0, 16)


def shaken(model, by=0.2):
    """The model with its mixers moved away from their start: filters and gates that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixer" in name or isinstance(model, DiscreteMamba2):
                parameter.add_(by * torch.randn_like(parameter))
    return model


def make_teacher(**changes):
    """A small Llama with grouped queries, heads whose widths do not add up to the model's, and Llama 3's positions."""
    sizes = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=3, rope=LLAMA_3,
                 rms_norm_eps=1e-6)
    teacher = Llama(llama_config(**sizes | changes))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher


HEADS = ((0, 1), (2, 0), (2, 2), (2, 3))  # heads of some layers: one, and three that share keys and values unevenly


def make(keep_attention=(), dtype=torch.float64, chunk_size=128, **changes):
    """A shaken student."""
    return shaken(
        Llamba.from_teacher(make_teacher(**changes).to(dtype), keep_attention, **RELEASED, d_state=5,
                            chunk_size=chunk_size)
    )


def same(out, ref, dtype=torch.float64):
    return relative_error(out, ref) < (1e-10 if dtype == torch.float64 else 1e-5)


def read_split(model, ids, k):
    """Logits when the first k tokens are read by prefill (none: by step alone), the rest by step."""
    if k:
        logits, state = model.prefill(ids[:, :k])
        pieces = [logits]
    else:
        pieces, state = [], model.init_state(len(ids))
    for t in range(k, ids.shape[1]):
        logits, state = model.step(ids[:, t], state)
        pieces.append(logits[:, None])
    return torch.cat(pieces, 1)


# Prefill and step


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 9, pytest.param(33, marks=pytest.mark.slow)])
@pytest.mark.parametrize("keep", [(), (1,), (0, 2), HEADS])
def test_prefill_and_step_are_forward_at_every_split(keep, length):
    for chunk_size in (1, 4, 128):
        for dtype in (torch.float64, torch.float32) if chunk_size == 4 else (torch.float64,):
            model, ids = make(keep, dtype, chunk_size), torch.randint(VOCAB, (2, length))
            with torch.no_grad():
                whole = model(ids)
                for k in range(length + 1):
                    assert same(read_split(model, ids, k), whole, dtype), (k, chunk_size, dtype)


@pytest.mark.parametrize("keep", [(), (1,), HEADS])
def test_chunked_prefill_is_forward(keep):
    model, ids = make(keep, chunk_size=4), torch.randint(VOCAB, (2, 23))
    with torch.no_grad():
        whole, whole_state = model.prefill(ids)
        assert same(whole, model(ids))
        for sizes in ([1] * 23, [2] * 11 + [1], [3, 1, 2, 17], [4, 4, 4, 11], [22, 1], [1, 22]):
            pieces, state = [], None
            for piece in ids.split(sizes, 1):
                logits, state = model.prefill(piece, state=state)
                pieces.append(logits)
            assert same(torch.cat(pieces, 1), whole), sizes
            assert all(same(a, b) for a, b in zip(tree_leaves(state), tree_leaves(whole_state)) if a is not None), sizes


@pytest.mark.parametrize("keep", [(1,), HEADS])
def test_gradients_through_steps_are_those_of_forward(keep):
    model, ids = make(keep), torch.randint(VOCAB, (2, 7))
    weights, w = list(model.parameters()), torch.randn(2, 7, VOCAB).double()
    whole = torch.autograd.grad((model(ids) * w).sum(), weights)
    for k in (0, 2, 5):
        for ours, theirs in zip(torch.autograd.grad((read_split(model, ids, k) * w).sum(), weights), whole):
            assert relative_error(ours, theirs) < 1e-9


@pytest.mark.parametrize("keep", [(1,), HEADS])
def test_a_state_can_be_used_twice(keep):
    model, ids = make(keep), torch.randint(VOCAB, (1, 6))
    _, state = model.prefill(ids)
    before = [t.clone() for t in tree_leaves(state) if t is not None]
    first, _ = model.step(torch.tensor([1]), state)
    model.step(torch.tensor([2]), state)
    assert torch.equal(model.step(torch.tensor([1]), state)[0], first)
    assert all(torch.equal(a, b) for a, b in zip(before, [t for t in tree_leaves(state) if t is not None], strict=True))


@pytest.mark.parametrize("lost", ["conv", "ssm"])
def test_these_tests_notice_a_lost_state(lost):
    model, ids = make(), torch.randint(VOCAB, (1, 9))
    _, state = model.prefill(ids[:, :5])
    broken = [layer._replace(**{lost: torch.zeros_like(getattr(layer, lost))}) for layer in state]
    assert relative_error(model.step(ids[:, 5], broken)[0], model.step(ids[:, 5], state)[0]) > 1e-3


# Padding


@pytest.mark.parametrize("keep", [(), (1,), (0, 1, 2), HEADS])
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_padding_changes_nothing(keep, kind):
    model = make(keep, chunk_size=4)
    for length in (1, 2, 3, 5, 11):
        mask = torch.ones(3, 11, dtype=torch.long)
        pads = 11 - length
        for row in (0, 2):
            places = {"left": range(pads), "right": range(length, 11), "holes": torch.randperm(11)[:pads].tolist()}[
                kind
            ]
            mask[row, list(places)] = 0
        ids, after = torch.randint(VOCAB, (3, 11)), torch.randint(VOCAB, (3,))
        with torch.no_grad():
            logits, state = model.prefill(ids, mask)
            forward = model(ids, mask)
            stepped, _ = model.step(after, state)
            for row in range(3):
                tokens = mask[row].bool()
                alone, alone_state = model.prefill(ids[row : row + 1, tokens])
                assert same(logits[row, tokens], alone[0]) and same(forward[row, tokens], alone[0])
                assert same(stepped[row], model.step(after[row : row + 1], alone_state)[0][0])
                for layer, other in zip(state, alone_state):
                    if isinstance(layer, MambaState):
                        assert all(same(a[row], b[0]) for a, b in zip(layer, other))


def test_window_holds_zeros_where_there_was_padding():
    for bias in (False, True):
        mixer = shaken(DiscreteMamba2(12, 3, 2, 2, bias=bias).double(), 1.0)
        u = torch.randn(2, 7, 12).double()
        _, state = mixer(u, mixer.init_state(2), padding=torch.tensor([6, 4]))
        zeros = (state.conv == 0).all(1)
        assert zeros.tolist() == [[True, True, True, False], [True, False, False, False]]
        assert state.ssm.abs().sum() > 0


def test_masked_tokens_do_not_matter():
    model, ids = make((1,)), torch.randint(VOCAB, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    other = ids.clone()
    other[0, :4] = (other[0, :4] + 1) % VOCAB
    assert torch.equal(model(ids, mask)[0, 4:], model(other, mask)[0, 4:])
    assert not torch.equal(model(ids)[0, 4:], model(other)[0, 4:])


def test_gradients_through_padding():
    model = make((1,))
    ids, w = torch.randint(VOCAB, (1, 9)), torch.randn(4, VOCAB).double()
    mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1]])
    weights = list(model.parameters())
    padded = torch.autograd.grad((model(ids, mask)[0, 5:] * w).sum(), weights)
    alone = torch.autograd.grad((model(ids[:, 5:])[0] * w).sum(), weights)
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(padded, alone))


# The mixer


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_mixer_is_its_matrix_and_its_steps(groups, bias, activation):
    mixer = shaken(DiscreteMamba2(16, 3, 4, groups, chunk_size=4, activation=activation, bias=bias).double(), 0.5)
    u = torch.randn(2, 9, 16).double()
    projected, _ = mixer.project(u, None)
    x, z = projected.x, projected.z
    heads = torch.einsum("bhts,bshp->bthp", mixer.matrix(u), x).flatten(2)
    gate = F.silu(z) if bias else F.silu(z + mixer.z_bias)
    y = mixer(u)
    assert relative_error(mixer.out_proj(heads * gate), y) < 1e-12
    state = mixer.init_state(2)
    for t in range(9):
        y_t, state = mixer.step(u[:, t], state)
        assert relative_error(y_t, y[:, t]) < 1e-12


def test_mixer_against_its_definition_in_a_loop():
    """Only PyTorch's own conv1d and softplus, one token at a time; the equations of the paper."""
    mixer = shaken(DiscreteMamba2(8, 3, 2, 2).double(), 0.5)
    u = torch.randn(1, 6, 8).double()
    xBC, z, A_log = F.linear(u, mixer.in_proj.weight).split([8 + 12, 8, 2], -1)
    xBC = F.conv1d(F.pad(xBC.mT, (3, 0)), *mixer.conv1d(), groups=xBC.shape[-1]).mT
    x, B, C = xBC[0, :, :8].view(6, 2, 4), xBC[0, :, 8:14].view(6, 2, 3), xBC[0, :, 14:].view(6, 2, 3)
    S, rows = torch.zeros(2, 4, 3).double(), []
    for t in range(6):
        a = torch.exp(-F.softplus(A_log[0, t]))
        S = a[:, None, None] * S + x[t][:, :, None] * B[t][:, None]
        y = (S @ C[t][:, :, None])[..., 0] + mixer.D[:, None] * x[t]
        rows.append(mixer.out_proj.weight @ (y.flatten() * F.silu(z[0, t] + mixer.z_bias)))
    assert relative_error(mixer(u)[0], torch.stack(rows)) < 1e-13


def test_official_start():
    mixer = DiscreteMamba2(32, 8, 4, 4).double()
    mixer.reset_parameters()
    assert abs(F.silu(torch.tensor(OPEN_GATE, dtype=torch.float64)).item() - 1) < 1e-12
    assert torch.equal(mixer.z_bias, torch.full((32,), OPEN_GATE, dtype=torch.float64))
    assert (
        torch.equal(mixer.conv1d.weight, torch.tensor([0.0, 0, 0, 1]).double().expand(96, 1, 4))
        and not mixer.conv1d.bias.any()
    )
    assert torch.equal(mixer.D, torch.ones(4).double())
    assert (
        not mixer.in_proj.weight[96:128].any()
        and mixer.in_proj.weight[:96].abs().min() > 0
        and mixer.in_proj.weight[128:].abs().min() > 0
    )
    u = torch.randn(2, 10, 32).double()
    values = (u @ mixer.in_proj.weight[:32].T).unflatten(-1, (4, 8))
    heads = torch.einsum("bhts,bshp->bthp", mixer.matrix(u), values).flatten(2)
    assert relative_error(mixer.out_proj(heads), mixer(u)) < 1e-12
    with_bias = DiscreteMamba2(32, 8, 4, 4, bias=True).double()
    with_bias.reset_parameters()
    assert with_bias.z_bias is None and (with_bias.in_proj.bias[96:128] == OPEN_GATE).all()


def test_gradients_reach_every_parameter_of_the_model():
    model = make((1,))
    model(torch.randint(VOCAB, (2, 9))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_gradients_of_the_matrix_reach_keys_queries_decays_and_skip_only():
    mixer = shaken(DiscreteMamba2(16, 3, 4, 2).double())
    mixer.matrix(torch.randn(2, 9, 16).double()).square().sum().backward()
    rows = mixer.in_proj.weight.grad.abs().sum(1) > 0
    assert not rows[:16].any() and rows[16:28].all() and not rows[28:44].any() and rows[44:].all()
    filters = mixer.conv1d.weight.grad.abs().sum((1, 2)) > 0
    assert not filters[:16].any() and filters[16:].all()
    assert not mixer.conv1d.bias.grad[:16].any() and mixer.conv1d.bias.grad[16:].all() and mixer.D.grad.all()
    assert mixer.z_bias.grad is None and mixer.out_proj.weight.grad is None


def test_extreme_decays_are_finite():
    """alpha = -120 (never forget) and 120 (forget at once), where dividing by a step size would overflow."""
    mixer = DiscreteMamba2(16, 3, 4, 4)
    u = torch.randn(1, 40, 16)
    with torch.no_grad():
        mixer.in_proj.weight[-4:] = 0
        mixer.in_proj.weight[-4:, 0] = 120
        u[..., 0] = u[..., 0].sign()
    u.requires_grad_()
    y = mixer(u)
    y.square().sum().backward()
    assert y.isfinite().all() and u.grad.isfinite().all() and mixer.in_proj.weight.grad.isfinite().all()


# Names, sizes, files

MIXER = [
    "mixer.in_proj.weight",
    "mixer.z_bias",
    "mixer.conv1d.weight",
    "mixer.conv1d.bias",
    "mixer.D",
    "mixer.out_proj.weight",
]
REST = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
]
OFFICIAL_1B = {
    "architectures": ["LlambaLMHeadModel"],
    "transformers_version": "4.45.0",
    "torch_dtype": "float32",
    "model_type": "llamba",
    "vocab_size": 128256,
    "d_model": 2048,
    "n_layer": 16,
    "tie_embeddings": True,
    "pad_vocab_size_multiple": 8,
    "lm_head_bias": False,
    "lm_head_prenorm": "rms",
    "resid_dropout": 0.0,
    "norm_epsilon": 1e-05,
    "mlp_cfg": {"intermediate_size": 8192, "bias": False, "act_fn": "silu"},
    "ssm_cfg": {
        "d_state": 64,
        "n_v_heads": 32,
        "n_qk_heads": 32,
        "expand": 1,
        "chunk_size": 128,
        "activation": "identity",
        "bias": False,
    },
}


def official_names(layers, tied):
    names = {f"backbone.layers.{i}.{name}" for i in range(layers) for name in MIXER + REST}
    return (
        names
        | {"backbone.embedding.weight", "backbone.final_layernorm.weight"}
        | (set() if tied else {"lm_head.weight"})
    )


@pytest.mark.parametrize("name", LLAMBA_SIZES)
def test_official_names_and_counts(name):
    config = LLAMBA_SIZES[name]
    with torch.device("meta"):
        model = Llamba(config)
    assert set(model.state_dict()) == official_names(config.n_layer, config.tie_embeddings)
    d, heads, width = config.d_model, config.ssm_cfg.n_v_heads, config.mlp_cfg.intermediate_size
    channels = d + 2 * heads * 64
    mixer = d * (channels + d + heads) + d + 5 * channels + heads + d * d
    count = config.n_layer * (mixer + 3 * d * width + 2 * d) + d + 128256 * d * (1 if config.tie_embeddings else 2)
    assert sum(p.numel() for p in model.parameters()) == count
    assert count == {"llamba-1b": 1_405_159_936, "llamba-3b": 3_568_082_592, "llamba-8b": 8_841_204_736}[name]


def test_official_config_is_read():
    assert LlambaConfig.from_dict(OFFICIAL_1B) == LLAMBA_SIZES["llamba-1b"]
    more = OFFICIAL_1B["ssm_cfg"] | {"layer_idx": 3, "d_conv": 4, "conv_bias": True}
    assert LlambaConfig.from_dict(OFFICIAL_1B | {"ssm_cfg": more}) == LLAMBA_SIZES["llamba-1b"]


def test_configs_make_the_round_trip_through_json():
    for config in (*LLAMBA_SIZES.values(), make((0, 2)).config, replace(LLAMBA_SIZES["llamba-1b"], lm_head_bias=True)):
        assert LlambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(LLAMBA_SIZES["llamba-1b"].to_dict()) <= set(OFFICIAL_1B)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba2"}, "only 'llamba'"),
        ({"ssm_cfg": {"d_state": 64, "dt_min": 0.001}}, "ssm_cfg: unknown entry dt_min"),
        ({"ssm_cfg": {"d_conv": 3}}, "d_conv is 3: only 4"),
        ({"d_modle": 3}, "unknown entry d_modle"),
        ({"ssm_cfg": {"conv_bias": False}}, "conv_bias is False: only True"),
        ({"ssm_cfg": {"d_state": "64"}}, "d_state is '64'"),
        ({"ssm_cfg": None}, "ssm_cfg is None"),
        ({"mlp_cfg": {"intermediate_size": 10, "act_fn": "gelu"}}, "mlp_cfg: act_fn is 'gelu': it must be 'silu'"),
        ({"mlp_cfg": {}}, "mlp_cfg: missing entry intermediate_size"),
        ({"d_model": 0}, "d_model is 0"),
        ({"attn_cfg": {"layers": [16], "n_heads": 32, "n_kv_heads": 8, "head_dim": 64}}, "layers are 0 to 15"),
        ({"attn_cfg": {"layers": [1], "n_heads": 32, "n_kv_heads": 8}}, "attn_cfg: missing entry head_dim"),
        (
            {"attn_cfg": {"layers": [1], "n_heads": 32, "n_kv_heads": 8, "head_dim": 64, "rope": {"base": 1}}},
            "rope: unknown entry base",
        ),
    ],
)
def test_a_bad_config_is_named(change, message):
    with pytest.raises(ValueError, match="some/where.*" + message):
        LlambaConfig.from_dict(OFFICIAL_1B | change, "some/where")


def test_a_config_with_a_size_missing_is_named():
    for name in ("vocab_size", "d_model", "n_layer", "ssm_cfg", "mlp_cfg"):
        with pytest.raises(ValueError, match=f"missing entry {name}"):
            LlambaConfig.from_dict({k: v for k, v in OFFICIAL_1B.items() if k != name})


@pytest.mark.parametrize("keep, tied", [((), False), ((), True), ((1,), False), (HEADS, False)])
def test_save_and_load(tmp_path, keep, tied):
    model, ids = make(keep, torch.float32, tie_word_embeddings=tied), torch.randint(VOCAB, (2, 7))
    model.save_pretrained(tmp_path / "model")
    loaded = Llamba.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and torch.equal(loaded(ids), model(ids))
    assert (
        Llamba.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).backbone.embedding.weight.dtype
        == torch.bfloat16
    )
    with pytest.raises(FileExistsError):
        model.save_pretrained(tmp_path / "model")


@pytest.fixture
def files(tmp_path):
    """Write a checkpoint as the official code does: pytorch_model.bin and config.json."""
    def write(weights, config):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    return write


def test_official_pytorch_file_is_loaded(files):
    config = llamba_config(vocab_size=VOCAB, tie_embeddings=True)
    model = shaken(Llamba(config))
    assert model.backbone.embedding.weight.shape[0] == 56
    official = config.to_dict() | {"vocab_size": 56, "resid_dropout": 0.0, "architectures": ["LlambaLMHeadModel"]}
    weights = dict(model.state_dict())
    assert set(weights) == official_names(2, tied=True)
    loaded, ids = Llamba.from_pretrained(files(weights, official)), torch.randint(VOCAB, (2, 7))
    assert loaded.vocab_size == 56 and torch.equal(loaded(ids)[..., :VOCAB], model(ids))
    twice = weights | {"lm_head.weight": weights["backbone.embedding.weight"].clone()}
    assert torch.equal(Llamba.from_pretrained(files(twice, official))(ids), loaded(ids))


def test_loading_is_strict(files):
    model = Llamba(llamba_config(vocab_size=VOCAB))
    good, config = dict(model.state_dict()), model.config.to_dict()
    z_bias = "backbone.layers.1.mixer.z_bias"
    with pytest.raises(ValueError, match=f"1 missing .{z_bias}"):
        Llamba.from_pretrained(files({k: v for k, v in good.items() if k != z_bias}, config))
    with pytest.raises(ValueError, match="1 unexpected .backbone.layers.0.mixer.dt_bias"):
        Llamba.from_pretrained(files(good | {"backbone.layers.0.mixer.dt_bias": torch.zeros(4)}, config))
    with pytest.raises(ValueError, match=r"mixer.D has shape \(5,\) instead of \(4,\)"):
        Llamba.from_pretrained(files(good | {"backbone.layers.0.mixer.D": torch.zeros(5)}, config))
    with pytest.raises(ValueError, match="lm_head.weight"):
        Llamba.from_pretrained(files({k: v for k, v in good.items() if k != "lm_head.weight"}, config))
    with pytest.raises(ValueError, match="lm_head.weight is not backbone.embedding.weight"):
        Llamba.from_pretrained(files(good, config | {"tie_embeddings": True}))
    with pytest.raises(ValueError, match="model_type is 'llama': only 'llamba'"):
        Llamba.from_pretrained(files(good, make_teacher().config.to_dict()))
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Llamba.from_pretrained("./nowhere")


# Students


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keep", [(), (2,), (0, 2)])
def test_a_student_is_its_teacher_but_for_the_mixers(tied, keep):
    teacher = make_teacher(tie_word_embeddings=tied)
    student = Llamba.from_teacher(teacher, keep, **RELEASED, d_state=5)
    theirs, ours = teacher.state_dict(), student.state_dict()
    copied = [name for name in ours if ".mixer." not in name or int(name.split(".")[2]) in keep]
    assert set(copied) == {name for name in theirs if ".mixer." not in name or int(name.split(".")[2]) in keep}
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].data_ptr() != theirs[name].data_ptr() for name in copied
    )
    kinds = [Attention if i in keep else DiscreteMamba2 for i in range(3)]
    assert [type(block.mixer) for block in student.backbone.layers] == kinds
    assert student.backbone.layers[0].input_layernorm.eps == 1e-6
    assert all(block.mixer.n_heads == block.mixer.n_groups == 4 and block.mixer.d_inner == 24
               for block in student.backbone.layers if isinstance(block.mixer, DiscreteMamba2))


def mixers_of(model):
    return [block.mixer for block in model.backbone.layers]


def test_the_need_for_attention_is_what_the_divergence_falls_by():
    teacher, ids = make_teacher().double(), torch.randint(VOCAB, (2, 20))
    student = shaken(Llamba.from_teacher(teacher, [1], **RELEASED, d_state=5))
    before, mixers = student(ids), mixers_of(student)

    def divergence(kept):
        model = copy.deepcopy(student)
        for index in kept:
            model.backbone.layers[index].mixer = teacher.backbone.layers[index].mixer
        p, q = teacher(ids).softmax(-1), model(ids).softmax(-1)
        return (p * (p / q).log()).sum(-1).mean()

    need = attention_need(teacher, student, ids)
    wanted = torch.stack([divergence([]) - divergence([0]), torch.tensor(0.0), divergence([]) - divergence([2])])
    torch.testing.assert_close(need, wanted, rtol=0, atol=1e-12)
    assert need[0].abs() > 1e-6
    assert mixers_of(student) == mixers and torch.equal(student(ids), before)  # as it was


def test_need_leaves_the_student_as_it_was_when_something_fails():
    teacher = make_teacher()
    student = Llamba.from_teacher(teacher, **RELEASED, d_state=5)
    mixers, attention = mixers_of(student), teacher.backbone.layers[1].mixer
    attention.forward = lambda *_, **__: 1 / 0
    teacher.forward = lambda ids: torch.zeros(*ids.shape, VOCAB, dtype=torch.float64)
    with pytest.raises(ZeroDivisionError):
        attention_need(teacher, student, torch.randint(VOCAB, (1, 6)))
    assert mixers_of(student) == mixers


@pytest.mark.parametrize("count", range(4))
def test_the_layers_that_need_attention_most_keep_it(count):
    teacher, ids = shaken(make_teacher()), torch.randint(VOCAB, (2, 20))
    student = Llamba.from_teacher(teacher, f"auto:{count}", texts=ids, d_state=8)
    pure = Llamba.from_teacher(teacher, texts=ids, d_state=8)
    kept = attention_need(teacher, pure, ids).topk(count).indices.tolist()
    kinds = [Attention if index in kept else RotaryMamba2 for index in range(3)]
    assert [type(mixer) for mixer in mixers_of(student)] == kinds
    expected = Llamba.from_teacher(teacher, kept, texts=ids, d_state=8).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("word", ["auto", "auto:", "auto:-1", "auto:4", "auto:1.5", "all", "0", "heads:13", "heads"])
def test_words_that_keep_no_attention(word):
    message = (f"keep_attention is {word!r}: it must be layers, or (layer, head) pairs, or 'auto:K' with K up to 3, or "
               "'heads:K' with K up to 12")
    with pytest.raises(ValueError, match=re.escape(message)) as err:
        Llamba.from_teacher(make_teacher(), word)
    one_line(err)


def test_some_heads_add_up_to_attention():
    for changes in ({}, {"attention_bias": True}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4}):
        attention = make_teacher(**changes).double().backbone.layers[0].mixer
        u = torch.randn(2, 9, attention.q_proj.in_features, dtype=torch.float64)
        bias = 0 if attention.o_proj.bias is None else attention.o_proj.bias
        for parts in ([[0, 1, 2, 3]], [[1], [0, 2, 3]], [[0, 1], [2, 3]], [[1, 3], [0, 2]], [[0], [1], [2], [3]]):
            pieces = [some_heads(attention, heads) for heads in parts]
            assert same(sum(piece(u) for piece in pieces) + bias, attention(u)), (changes, parts)
            for heads, piece in zip(parts, pieces):
                assert same(piece.matrix(u), attention.matrix(u)[:, heads])
    assert some_heads(attention, [0, 1]).n_kv_heads == 2
    assert some_heads(make_teacher(num_key_value_heads=1).backbone.layers[0].mixer, [0, 1, 3]).n_kv_heads == 1


def test_kept_heads_are_the_teachers_and_the_others_the_mixers():
    teacher = make_teacher().double()
    attention, u = teacher.backbone.layers[0].mixer, torch.randn(2, 9, 24, dtype=torch.float64)
    mixer = shaken(DiscreteMamba2(24, 5, n_v_heads=4, n_qk_heads=4).double())
    weight = mixer.out_proj.weight.clone()
    mixed = keep_heads(mixer, attention, [3, 1])
    assert torch.equal(mixer.out_proj.weight, weight)  # as it was
    silent = copy.deepcopy(mixer)
    with torch.no_grad():
        silent.out_proj.weight.unflatten(1, (4, 6))[:, [1, 3]] = 0
    assert same(mixed(u), silent(u) + some_heads(attention, [1, 3])(u))
    matrix = mixed.matrix(u)
    assert same(matrix[:, [1, 3]], attention.matrix(u)[:, [1, 3]])  # of a product with fewer columns
    assert torch.equal(matrix[:, [0, 2]], mixer.matrix(u)[:, [0, 2]])


@pytest.mark.parametrize("start", ["teacher", "published"])
def test_a_student_keeps_the_heads_it_is_told_to(start):
    teacher = shaken(make_teacher())
    ids = torch.randint(VOCAB, (2, 12))
    keep = [1, *HEADS]  # all of layer 1
    watched = {"texts": ids} if start == "teacher" else {}
    student = Llamba.from_teacher(teacher, keep, start=start, d_state=8, **watched)
    assert [type(mixer) for mixer in mixers_of(student)] == [MixedHeads, Attention, MixedHeads]
    assert [mixers_of(student)[i].heads for i in (0, 2)] == [[1], [0, 2, 3]]
    for index, heads in ((0, [1]), (2, [0, 2, 3])):
        theirs = some_heads(teacher.backbone.layers[index].mixer, heads).state_dict()
        ours = mixers_of(student)[index].attention.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert (mixers_of(student)[index].recurrent.out_proj.weight.unflatten(1, (4, 6))[:, heads] == 0).all()
    everything = [(layer, head) for layer in range(3) for head in range(4)]
    whole = Llamba.from_teacher(teacher, everything, start=start)
    assert torch.equal(whole(ids), teacher(ids))
    assert whole.config == Llamba.from_teacher(teacher, range(3), start=start).config


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_the_heads_that_need_attention_most_keep_it(count):
    teacher, ids = shaken(make_teacher()).double(), torch.randint(VOCAB, (2, 12))
    pure = Llamba.from_teacher(teacher, texts=ids, d_state=8)
    need = attention_need(teacher, pure, ids, heads=True)
    assert need.shape == (3, 4)

    def divergence(model):
        p, q = teacher(ids).softmax(-1), model(ids).softmax(-1)
        return (p * (p / q).log()).sum(-1).mean()

    for layer, head in ((0, 0), (1, 3), (2, 2)):
        one = Llamba.from_teacher(teacher, [(layer, head)], texts=ids, d_state=8)
        torch.testing.assert_close(need[layer, head], divergence(pure) - divergence(one), rtol=1e-7, atol=1e-10)
    chosen = [divmod(place, 4) for place in need.flatten().topk(count).indices.tolist()]
    student = Llamba.from_teacher(teacher, f"heads:{count}", texts=ids, d_state=8)
    expected = Llamba.from_teacher(teacher, chosen, texts=ids, d_state=8)
    assert student.config == expected.config
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in student.state_dict().items())


def test_stage_1_leaves_kept_heads_alone():
    teacher = shaken(make_teacher())
    student, ids = Llamba.from_teacher(teacher, HEADS, **RELEASED, d_state=8), torch.randint(VOCAB, (2, 12))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    data, stages = FreshBatches(lambda step, generator: ids), [Stage("orientation", 3, 1e-2)]
    distill(teacher, student, data, stages, progress=False)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert any(".recurrent." in name for name in changed) and not any(".attention." in name for name in changed)


def test_a_hybrid_can_be_started_again():
    teacher, ids = shaken(make_teacher()), torch.randint(VOCAB, (2, 12))
    student = Llamba.from_teacher(teacher, HEADS, texts=ids, d_state=8)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    start_from_teacher(student, teacher, ids)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_bad_heads():
    mixer, attention = DiscreteMamba2(24, 5, n_v_heads=4, n_qk_heads=4), make_teacher().backbone.layers[0].mixer
    for heads in ([], [1, 1], [4], [-1]):
        with pytest.raises(ValueError, match=re.escape(f"heads is {heads}, of 4 heads of attention and 4 of the")):
            keep_heads(mixer, attention, heads)
    with pytest.raises(ValueError, match="of 4 heads of attention and 8 of the mixer"):
        keep_heads(DiscreteMamba2(24, 5, n_v_heads=8, n_qk_heads=8), attention, [0])
    config = Llamba.from_teacher(make_teacher(), HEADS, **RELEASED).config
    with pytest.raises(ValueError, match="of 4 heads of attention and 2 of the mixer"):
        Llamba(replace(config, ssm_cfg=replace(config.ssm_cfg, n_v_heads=2, n_qk_heads=2)))
    hybrid = Llamba.from_teacher(make_teacher(), HEADS, **RELEASED)
    with pytest.raises(ValueError, match="layer 0 of the student has a MixedHeads: its heads cannot be ranked"):
        attention_need(make_teacher(), hybrid, torch.zeros(1, 4, dtype=torch.long), heads=True)


def test_a_wrong_word_is_told_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(llamba, "start_from_teacher", lambda *_: 1 / 0)
    for word in ("auto:4", "heads:13", "most"):
        with pytest.raises(ValueError, match="keep_attention is"):
            Llamba.from_teacher(make_teacher(), word)


def test_need_of_any_mixer_and_random_numbers_left_alone():
    teacher, student = make_teacher(), Llamba.from_teacher(make_teacher(), HEADS, **RELEASED)
    need = attention_need(teacher, student, torch.randint(VOCAB, (2, 9)))
    assert need[[0, 2]].abs().min() > 0  # of layers that keep some heads, too
    pure, state = Llamba.from_teacher(teacher, **RELEASED), torch.random.get_rng_state()
    attention_need(teacher, pure, torch.zeros(1, 4, dtype=torch.long), heads=True)
    assert torch.equal(state, torch.random.get_rng_state())


def test_need_cannot_be_asked_of_a_random_start_or_another_depth():
    with pytest.raises(ValueError, match="start is 'published': keep_attention='auto:1' needs one from the teacher"):
        Llamba.from_teacher(make_teacher(), "auto:1", start="published")
    with pytest.raises(ValueError, match="student has 3 layers, teacher 2"):
        attention_need(make_teacher(num_hidden_layers=2), make_teacher(), torch.zeros(1, 4, dtype=torch.long))


def test_with_everything_kept_the_logits_are_the_teachers():
    teacher, ids = make_teacher(), torch.randint(VOCAB, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    student = Llamba.from_teacher(teacher, range(3))
    assert torch.equal(student(ids), teacher(ids)) and torch.equal(student(ids, mask), teacher(ids, mask))
    assert torch.equal(student.generate(ids, 5), teacher.generate(ids, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_student_keeps_type_and_device(dtype):
    student = Llamba.from_teacher(make_teacher().to(dtype), (1,))
    assert {p.dtype for p in student.parameters()} == {dtype} and {p.device.type for p in student.parameters()} == {
        "cpu"
    }
    with torch.device("meta"):
        teacher = Llama(make_teacher().config).to(dtype)
    student = Llamba.from_teacher(teacher, start="published")
    assert {(p.dtype, p.device.type) for p in student.parameters()} == {(dtype, "meta")}
    with pytest.raises(ValueError, match="start is 'teacher': this teacher is on the meta device"):
        Llamba.from_teacher(teacher)


def test_matrices_pair_with_those_of_a_teacher_with_grouped_queries():
    teacher = make_teacher()
    student = Llamba.from_teacher(teacher)
    for layer in teacher.walk(torch.randint(VOCAB, (2, 9))):
        block = student.backbone.layers[layer.index]
        assert block.mixer.matrix(block.input_layernorm(layer.input)).shape == layer.matrix().shape == (2, 4, 9, 9)


def test_bfloat16_runs_and_keeps_its_state_in_float32():
    model, ids = make((1,), torch.bfloat16), torch.randint(VOCAB, (2, 9))
    logits, state = model.prefill(ids)
    stepped, state = model.step(ids[:, 0], state)
    assert logits.dtype == stepped.dtype == torch.bfloat16 and logits.isfinite().all()
    assert state[0].ssm.dtype == torch.float32 and state[0].conv.dtype == torch.bfloat16
    assert model.init_state(2)[0].ssm.dtype == torch.float32
    assert relative_error(read_split(model, ids, 4).float(), model(ids).float()) < 0.05
    loss = model(ids).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_runs():
    model, ids = make((1,), torch.float32), torch.randint(VOCAB, (2, 9))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = read_split(model, ids, 4)
        whole = model(ids)
    assert relative_error(narrow.float(), whole.float()) < 0.05 and relative_error(whole.float(), model(ids)) < 0.05


# Generation and state


@pytest.mark.parametrize("keep", [(), (1,), HEADS])
def test_greedy_generation(keep):
    model, ids = make(keep), torch.randint(VOCAB, (2, 3))
    out = model.generate(ids, 6)
    assert out.shape == (2, 9) and torch.equal(out, model.generate(ids, 6))
    for t in range(3, 9):
        assert torch.equal(model(out[:, :t])[:, -1].argmax(-1), out[:, t])


@pytest.mark.parametrize("keep", [(), (1,), HEADS])
def test_a_padded_batch_generates_what_single_prompts_do(keep):
    model = make(keep)
    prompts = [torch.randint(VOCAB, (length,)) for length in (1, 3, 8)]
    for left in (True, False):
        ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            place = slice(8 - len(prompt), 8) if left else slice(len(prompt))
            ids[row, place], mask[row, place] = prompt, 1
        together = model.generate(ids, 6, attention_mask=mask)[:, 8:]
        for row, prompt in enumerate(prompts):
            assert torch.equal(together[row], model.generate(prompt[None], 6)[0, len(prompt) :])


def test_rows_that_pad_the_vocabulary_are_never_seen():
    model = Llamba(llamba_config(vocab_size=VOCAB, n_layer=1, lm_head_bias=True))
    with torch.no_grad():
        model.lm_head.bias[VOCAB:] = 100.0  # were they seen, they would be chosen
    ids = torch.randint(VOCAB, (2, 4))
    assert model(ids).shape == (2, 4, VOCAB) and model.vocab_size == VOCAB and model.lm_head.out_features == 56
    assert model.generate(ids, 20, temperature=5.0, generator=torch.Generator().manual_seed(0)).max() < VOCAB
    with pytest.raises(ValueError, match=f"ids must be in .0, {VOCAB}"):
        model(torch.full((1, 2), VOCAB))


def test_the_state_does_not_grow():
    model, teacher = make(dtype=torch.float32), make_teacher()

    def kept_alive(state):
        return sum(t.untyped_storage().nbytes() for layer in state for t in layer if t is not None)

    def size(length):
        with torch.no_grad():
            ids = torch.randint(VOCAB, (1, length))
            logits, state = model.prefill(ids)
            return kept_alive(state), kept_alive(model.step(ids[:, 0], state)[1]), kept_alive(teacher.prefill(ids)[1])

    (one, stepped, cache), (many, stepped_many, cache_many) = size(1), size(700)
    assert one == many == stepped == stepped_many == 3 * 4 * (4 * 6 * 5 + (24 + 2 * 4 * 5) * 4)
    assert cache_many == 700 * cache


# Bad input


@pytest.mark.parametrize("sizes, message", [
    (dict(d_model=10, n_v_heads=4, n_qk_heads=4), "n_v_heads is 4: it must divide .* 10"),
    (dict(d_model=12, n_v_heads=4, n_qk_heads=3), "n_qk_heads is 3: it must divide n_v_heads = 4"),
    (dict(d_model=12, n_v_heads=4, n_qk_heads=0), "n_qk_heads is 0"),
    (dict(d_model=12, n_v_heads=4, n_qk_heads=4, chunk_size=0), "chunk_size is 0"),
    (dict(d_model=12, n_v_heads=4, n_qk_heads=4, d_state=2.5), "d_state is 2.5"),
    (dict(d_model=12, n_v_heads=4, n_qk_heads=4, activation="relu"), "activation is 'relu'"),
])
def test_bad_sizes_of_a_mixer(sizes, message):
    with pytest.raises(ValueError, match=message):
        DiscreteMamba2(**sizes)


def test_bad_teachers():
    with pytest.raises(ValueError, match=r"keep_attention is \[1, 3\]: layers are 0 to 2"):
        Llamba.from_teacher(make_teacher(), [1, 3])
    for wrong in ([-1], [(3, 0)], [(0, 4)], [(0, -1)]):
        with pytest.raises(ValueError, match=re.escape(f"keep_attention is {wrong}: layers are 0 to 2, heads 0 to 3")):
            Llamba.from_teacher(make_teacher(), wrong)
    for wrong in ([1.5], [(0, 1, 2)], [(0,)], [None], [(0, 0.5)]):
        with pytest.raises(ValueError, match=re.escape(f"keep_attention is {wrong}: it must hold layers, or pairs")):
            Llamba.from_teacher(make_teacher(), wrong)
    first, *others = [Llamba.from_teacher(make_teacher(), one, **RELEASED).config for one in ([1], [np.int64(1)], {1})]
    assert others == [first, first]
    assert Llamba.from_teacher(make_teacher(), [[0, 1]], **RELEASED).config.kept == [(0, 1)]  # as JSON has a pair
    with pytest.raises(ValueError, match="num_attention_heads is 5: it must divide hidden_size, 24"):
        Llamba.from_teacher(make_teacher(num_attention_heads=5, num_key_value_heads=5))
    with pytest.raises(ValueError, match="teacher is a Linear"):
        Llamba.from_teacher(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="d_state is 0"):
        Llamba.from_teacher(make_teacher(), d_state=0)
    with pytest.raises(ValueError, match="start is 'random': it must be 'teacher' or 'published'"):
        Llamba.from_teacher(make_teacher(), start="random")
    with pytest.raises(ValueError, match="rotation is 'some': it must be 'none', 'fixed', 'learned' or 'data'"):
        Llamba.from_teacher(make_teacher(), rotation="some")
    with pytest.raises(ValueError, match="d_state is 5: it must be even, rotations need pairs"):
        Llamba.from_teacher(make_teacher(), d_state=5)


def test_bad_input_of_a_model():
    model = make()
    for ids, message in (
        (torch.zeros(2, 0, dtype=torch.long), "at least one token"),
        (torch.zeros(3, dtype=torch.long), r"\(batch, len\)"),
        (torch.zeros(1, 2), "dtype"),
        (torch.full((1, 2), -1), "ids must be in"),
    ):
        for call in (model, model.prefill, lambda ids: model.generate(ids, 2)):
            with pytest.raises(ValueError, match=message):
                call(ids)
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="row without a token"):
        model(ids, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask and state"):
        model.prefill(ids, torch.ones(1, 3, dtype=torch.long), model.init_state(1))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="attn_cfg: layers"):
        replace(model.config, attn_cfg=AttentionConfig((7,), 4, 2, 8))
    for layers, heads in (((0,), (4,)), ((0, 1), (1,)), ((0, 0), (1, 1)), ((), (1,))):
        message = f"heads is {list(heads)}: it must hold one of 4 heads for each of {len(layers)} layers, none twice"
        with pytest.raises(ValueError, match=re.escape(message)):
            AttentionConfig(layers, 4, 2, 8, heads=heads)
