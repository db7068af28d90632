"""Mamba-2: equal to transformers' model in logits, gradients and decoding, two layouts of checkpoints, gates that
break the textbook formula."""

import copy
import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import llama_config, mamba2_config, shaken

from llamba_ref.checkpoint import find_checkpoint
from llamba_ref.conventions import relative_error
from llamba_ref.convert import MAMBA2
from llamba_ref.data import load_tokenizer
from llamba_ref.decoder import Backbone, Decoder
from llamba_ref.gateloop import GATELOOP_MODES, gateloop, gateloop_matrix
from llamba_ref.llama import Llama
from llamba_ref.llamba import DiscreteMamba2
from llamba_ref.mamba2 import GatedRMSNorm, Mamba2, Mamba2Config, Mamba2LM, inverse_softplus
from llamba_ref.models import load_model
from llamba_ref.mohawk import LayerByLayer, match_matrix, match_output
from llamba_ref.ssd import ssd, ssd_matrix

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 50
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    num_hidden_layers=2,
    state_size=5,
    head_dim=4,
    expand=2,
    n_groups=1,
    chunk_size=16,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
CLOSE = 2e-6  # float32 against float32, both off the exact numbers by a few 1e-7


def make_theirs(**changes):
    """transformers' model with random weights."""
    sizes = SIZES | changes
    heads = sizes["expand"] * sizes["hidden_size"] // sizes["head_dim"]
    return shaken(transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, num_heads=heads)).eval())


def make(dtype=torch.float64, **changes):
    """Ours with random weights."""
    return shaken(Mamba2LM(mamba2_config(**dict(vocab_size=VOCAB, chunk_size=4) | changes))).to(dtype)


def make_mixer(d_model=8, d_state=3, headdim=4, dtype=torch.float64, **changes):
    return shaken(Mamba2(d_model, d_state, headdim, **changes)).to(dtype)


def ids_of(*shape):
    return torch.randint(VOCAB, shape)


@pytest.fixture
def folder(tmp_path):
    """A new directory at every call."""
    def new():
        path = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        return path
    return new


@pytest.fixture
def pair(folder):
    """transformers' model, and ours loaded from what it saves: (ours, theirs)."""
    def build(**changes):
        theirs, path = make_theirs(**changes), folder()
        theirs.save_pretrained(path)
        return Mamba2LM.from_pretrained(path), theirs
    return build


def in_their_words(model):
    """Our parameters under transformers' names."""
    return {MAMBA2.stored_as(name): parameter for name, parameter in model.named_parameters()}


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


def gradients(out, leaves):
    """Gradients of a fixed random weighting of `out`; None for a leaf that plays no part."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True, allow_unused=True)


def assert_same_gradients(ours, theirs, bound):
    """Each leaf by itself: one vector of all gradients could hide a wrong small one."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, b) < bound


# Logits


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 64, 256])
def test_logits_are_those_of_transformers(pair, groups, chunk_size):
    ours, theirs = pair(n_groups=groups, chunk_size=chunk_size)
    assert ours.config.chunk_size == chunk_size and ours.config.n_groups == groups
    for length in (1, 3, 16, 37, 130):
        ids = ids_of(2, length)
        with torch.no_grad():
            assert relative_error(ours(ids), theirs(ids).logits) < CLOSE, length


@pytest.mark.parametrize(
    "changes",
    [
        dict(head_dim=8),
        dict(head_dim=32),
        dict(head_dim=1, n_groups=8),
        dict(expand=1),
        dict(expand=3, head_dim=6, n_groups=2),
        dict(expand=4, head_dim=8, n_groups=4),
        dict(hidden_size=32, state_size=16, head_dim=8, n_groups=2),
        dict(state_size=1),
        dict(conv_kernel=1),
        dict(conv_kernel=2),
        dict(conv_kernel=7),
        dict(use_bias=True),
        dict(use_conv_bias=False),
        dict(use_bias=True, use_conv_bias=False, n_groups=2),
        dict(tie_word_embeddings=False),
        dict(layer_norm_epsilon=0.1),
        dict(num_hidden_layers=1),
        dict(num_hidden_layers=5),
        dict(time_step_limit=(0.01, 0.5)),
        dict(time_step_limit=(0.3, math.inf)),
        dict(use_bias=True, tie_word_embeddings=False, time_step_limit=(0.1, 0.5), n_groups=4),
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_logits_with_other_sizes_and_options(pair, changes):
    ours, theirs = pair(**changes)
    assert in_their_words(ours).keys() == dict(theirs.named_parameters()).keys()
    for length in (2, 37):
        ids = ids_of(2, length)
        with torch.no_grad():
            assert relative_error(ours(ids), theirs(ids).logits) < CLOSE, length


def test_a_limit_of_step_sizes_is_reached_on_both_sides(pair):
    ours, theirs = pair(time_step_limit=(0.1, 0.5))
    ids, seen = ids_of(2, 37), []
    for layer in ours.walk(ids):
        seen.append(layer.block.mixer.project(layer.mixer_input, None)[0].dt)
    dt = torch.cat(seen)
    low, high = (dt == 0.1).float().mean(), (dt == 0.5).float().mean()
    assert dt.min() == 0.1 and dt.max() == 0.5 and 0.05 < low < 0.6 and 0.05 < high < 0.6 and low + high < 0.9
    theirs.config.time_step_limit = (0.0, math.inf)
    for block in theirs.backbone.layers:
        block.mixer.time_step_limit = (0.0, math.inf)
    with torch.no_grad():
        assert relative_error(ours(ids), theirs(ids).logits) > 0.01


def test_these_tests_notice_a_change_of_any_parameter(pair):
    ours, theirs = pair(n_groups=2, use_bias=True, tie_word_embeddings=False)
    ids = ids_of(2, 37)
    with torch.no_grad():
        logits = theirs(ids).logits
        for name, parameter in ours.named_parameters():
            kept = parameter.clone()
            parameter.mul_(1.01)
            assert relative_error(ours(ids), logits) > 100 * CLOSE, name
            parameter.copy_(kept)
        assert relative_error(ours(ids), logits) < CLOSE


# Padding


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["left", "right"])
def test_padded_batches_are_those_of_transformers(pair, groups, kind):
    ours, theirs = pair(n_groups=groups, chunk_size=4)
    for length in (1, 2, 3, 5, 10):
        ids, mask = ids_of(3, 11), torch.ones(3, 11, dtype=torch.long)
        for row in (0, 2):
            mask[row, slice(11 - length) if kind == "left" else slice(length, 11)] = 0
        with torch.no_grad():
            logits, expected = ours(ids, mask), theirs(ids, attention_mask=mask).logits
            tokens = mask.bool()
            assert relative_error(logits[tokens], expected[tokens]) < CLOSE, length
            alone = torch.cat([theirs(ids[row : row + 1, tokens[row]]).logits[0] for row in range(3)])
            assert relative_error(logits[tokens], alone) < CLOSE, length


@pytest.mark.parametrize(
    "changes", [{}, dict(bias=True, n_groups=2), dict(conv_bias=False, dt_limit=(0.1, 0.5)), dict(d_conv=2)]
)
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_padding_changes_nothing(changes, kind):
    """Logits, the state and the step after it; with biases in the projections too, which transformers lets leak out of
    the padding."""
    model = make(**changes)
    for length in (1, 2, 3, 5, 10):
        mask = torch.ones(3, 11, dtype=torch.long)
        for row in (0, 2):
            places = {
                "left": range(11 - length),
                "right": range(length, 11),
                "holes": torch.randperm(11)[: 11 - length].tolist(),
            }
            mask[row, list(places[kind])] = 0
        ids, after = ids_of(3, 11), ids_of(3)
        with torch.no_grad():
            logits, state = model.prefill(ids, mask)
            forward, (stepped, _) = model(ids, mask), model.step(after, state)
            for row in range(3):
                tokens = mask[row].bool()
                alone, alone_state = model.prefill(ids[row : row + 1, tokens])
                assert (
                    relative_error(logits[row, tokens], alone[0]) < 1e-12
                    and relative_error(forward[row, tokens], alone[0]) < 1e-12
                )
                assert relative_error(stepped[row], model.step(after[row : row + 1], alone_state)[0][0]) < 1e-12
                for layer, other in zip(state, alone_state):
                    assert all(relative_error(a[row], b[0]) < 1e-12 for a, b in zip(layer, other))


def test_gradients_through_padding():
    model, ids = make(bias=True, n_groups=2), ids_of(1, 9)
    weights = list(model.parameters())
    padded = gradients(model(ids, torch.tensor([[0, 0, 1, 0, 1, 1, 1, 0, 1]]))[0, [2, 4, 5, 6, 8]], weights)
    assert_same_gradients(padded, gradients(model(ids[:, [2, 4, 5, 6, 8]])[0], weights), 1e-10)


# Decoding


@pytest.mark.parametrize(
    "changes", [{}, dict(n_groups=2, chunk_size=4), dict(use_bias=True, use_conv_bias=False), dict(conv_kernel=2)]
)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 13])
def test_prefill_and_step_are_those_of_transformers(pair, changes, k):
    ours, theirs = pair(**changes)
    ids = ids_of(2, 18)
    with torch.no_grad():
        out = theirs(ids[:, :k], use_cache=True)
        pieces = [out.logits]
        for t in range(k, 18):
            out = theirs(ids[:, t : t + 1], use_cache=True, cache_params=out.cache_params)
            pieces.append(out.logits)
        assert relative_error(read_split(ours, ids, k), torch.cat(pieces, 1)) < CLOSE


@pytest.mark.parametrize("k", [1, 2, 4, 11])
def test_a_prompt_in_two_pieces_is_read_as_by_transformers(pair, k):
    ours, theirs = pair(n_groups=2, chunk_size=4)
    ids = ids_of(2, 18)
    with torch.no_grad():
        first, state = ours.prefill(ids[:, :k])
        second, _ = ours.prefill(ids[:, k:], state=state)
        before = theirs(ids[:, :k], use_cache=True)
        after = theirs(ids[:, k:], use_cache=True, cache_params=before.cache_params)
        assert relative_error(torch.cat([first, second], 1), torch.cat([before.logits, after.logits], 1)) < CLOSE


def test_greedy_generation_is_that_of_transformers(pair):
    for changes in ({}, dict(n_groups=4, tie_word_embeddings=False)):
        ours, theirs = pair(**changes)
        for length in (1, 3, 6):
            ids = ids_of(2, length)
            out = ours.generate(ids, 20)
            assert torch.equal(out, theirs.generate(ids, max_new_tokens=20, do_sample=False))
            assert len(out[:, length:].unique()) > 5  # not one token over and over


def test_greedy_generation_of_a_padded_batch_is_that_of_transformers(pair):
    ours, theirs = pair()
    ids, mask = ids_of(3, 6), torch.tensor([[0, 0, 0, 0, 0, 1], [1] * 6, [0, 0, 1, 1, 1, 1]])
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(ids, 12, attention_mask=mask), expected)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 9, 33])
@pytest.mark.parametrize(
    "changes", [{}, dict(n_groups=4, bias=True, conv_bias=False), dict(d_conv=2, dt_limit=(0.1, 0.5)), dict(d_conv=1)]
)
def test_prefill_and_step_are_forward_at_every_split(changes, length):
    for chunk_size in (1, 4, 256) if length < 10 else (4,):
        model, ids = make(chunk_size=chunk_size, **changes), ids_of(2, length)
        with torch.no_grad():
            whole = model(ids)
            for k in range(length + 1):
                assert relative_error(read_split(model, ids, k), whole) < 1e-12, (k, chunk_size)


def test_chunked_prefill_is_forward():
    model, ids = make(n_groups=2), ids_of(2, 23)
    with torch.no_grad():
        whole, whole_state = model.prefill(ids)
        assert relative_error(whole, model(ids)) < 1e-12
        for sizes in ([1] * 23, [2] * 11 + [1], [3, 1, 2, 17], [4, 4, 4, 11], [22, 1], [1, 22]):
            pieces, state = [], None
            for piece in ids.split(sizes, 1):
                logits, state = model.prefill(piece, state=state)
                pieces.append(logits)
            assert relative_error(torch.cat(pieces, 1), whole) < 1e-12, sizes
            for ours, theirs in zip(state, whole_state):
                assert all(relative_error(a, b) < 1e-12 for a, b in zip(ours, theirs)), sizes


def test_gradients_through_steps_are_those_of_forward():
    model, ids = make(n_groups=2, dt_limit=(0.1, 0.5)), ids_of(2, 7)
    weights = list(model.parameters())
    whole = gradients(model(ids), weights)
    for k in (0, 2, 5):
        assert_same_gradients(gradients(read_split(model, ids, k), weights), whole, 1e-10)


def test_a_state_can_be_used_twice_and_does_not_grow():
    model, ids = make(torch.float32), ids_of(1, 600)
    _, short = model.prefill(ids[:, :1])
    _, long = model.prefill(ids)
    before = [[z.clone() for z in layer] for layer in long]
    first, stepped = model.step(torch.tensor([1]), long)
    model.step(torch.tensor([2]), long)
    assert torch.equal(model.step(torch.tensor([1]), long)[0], first)
    assert all(torch.equal(a, b) for old, new in zip(before, long) for a, b in zip(old, new))
    kept = [sum(z.untyped_storage().nbytes() for layer in state for z in layer) for state in (short, long, stepped)]
    assert kept == [2 * 4 * (8 * 4 * 5 + (32 + 2 * 5) * 4)] * 3


@pytest.mark.parametrize("lost", ["conv", "ssm"])
def test_these_tests_notice_a_lost_state(lost):
    model, ids = make(), ids_of(1, 9)
    _, state = model.prefill(ids[:, :5])
    broken = [layer._replace(**{lost: torch.zeros_like(getattr(layer, lost))}) for layer in state]
    assert relative_error(model.step(ids[:, 5], broken)[0], model.step(ids[:, 5], state)[0]) > 1e-3


# Gradients, matrices, equations


@pytest.mark.parametrize("changes", [{}, dict(use_bias=True, tie_word_embeddings=False, time_step_limit=(0.1, 0.5))])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_gradient_of_every_parameter_is_that_of_transformers(pair, groups, changes):
    ours, theirs = pair(n_groups=groups, **changes)
    ids, w, mine, other = (
        ids_of(2, 37),
        torch.randn(2, 37, VOCAB),
        in_their_words(ours),
        dict(theirs.named_parameters()),
    )
    assert mine.keys() == other.keys() and len(mine) == (25 if changes else 20)
    (ours(ids) * w).sum().backward()
    (theirs(ids).logits * w).sum().backward()
    for name in other:
        assert other[name].grad.any() and relative_error(mine[name].grad, other[name].grad) < 1e-5, name


def test_gradcheck_of_a_mixer():
    mixer = make_mixer(4, 2, 2, n_groups=2, chunk_size=3)
    names, weights = zip(*mixer.named_parameters())

    def run(u, *weights):
        return torch.func.functional_call(mixer, dict(zip(names, weights)), u)

    assert torch.autograd.gradcheck(run, (torch.randn(1, 5, 4).double().requires_grad_(), *weights))


def by_matrix(mixer, u):
    """What the mixer does, with its matrix in the place of the recurrence."""
    p, _ = mixer.project(u, None)
    heads = torch.einsum("bhts,bshp->bthp", mixer.matrix(u), p.x).flatten(2)
    return mixer.out_proj(mixer.norm(heads, p.z))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("changes", [{}, dict(bias=True, dt_limit=(0.1, 0.5)), dict(conv_bias=False, d_conv=2)])
def test_a_mixer_is_its_matrix_and_its_steps(groups, changes):
    mixer = make_mixer(16, n_groups=groups, chunk_size=4, **changes)
    u = torch.randn(2, 19, 16).double().requires_grad_()
    assert mixer.matrix(u).shape == (2, 8, 19, 19) and torch.equal(mixer.matrix(u), mixer.matrix(u).tril())
    y, other = mixer(u), by_matrix(mixer, u)
    assert relative_error(other, y) < 1e-12
    leaves = (u, *mixer.parameters())
    assert_same_gradients(gradients(other, leaves), gradients(y, leaves), 1e-10)
    state = mixer.init_state(2)
    for t in range(19):
        y_t, state = mixer.step(u[:, t], state)
        assert relative_error(y_t, y[:, t]) < 1e-12


def equations(mixer, u, head_width, dt_limit):
    """Equation by equation, one token of one sequence at a time, with nothing of the package but its weights."""
    length, width, taps = u.shape[1], mixer.out_proj.weight.shape[1], mixer.conv1d.weight.shape[-1]
    heads, channels = width // head_width, mixer.conv1d.weight.shape[0]
    groups, keys = mixer.n_groups, (channels - width) // 2 // mixer.n_groups
    rows = []
    for row in u:
        z, xBC, dt = F.linear(row, mixer.in_proj.weight, mixer.in_proj.bias).split([width, channels, heads], -1)
        S = [torch.zeros(head_width, keys, dtype=u.dtype) for _ in range(heads)]
        for t in range(length):
            conv = sum(mixer.conv1d.weight[:, 0, -1 - k] * xBC[t - k] for k in range(min(taps, t + 1)))
            conv = F.silu(conv if mixer.conv1d.bias is None else conv + mixer.conv1d.bias)
            x, B, C = conv.split([width, groups * keys, groups * keys])
            y = []
            for h in range(heads):
                x_h, (B_h, C_h) = (
                    x[h * head_width :][:head_width],
                    (m[h * groups // heads * keys :][:keys] for m in (B, C)),
                )
                step = torch.log1p(torch.exp(dt[t, h] + mixer.dt_bias[h])).clamp(*dt_limit)
                S[h] = torch.exp(-torch.exp(mixer.A_log[h]) * step) * S[h] + step * torch.outer(x_h, B_h)
                y.append(S[h] @ C_h + mixer.D[h] * x_h)
            gated = (torch.cat(y) * F.silu(z[t])).view(groups, -1)
            normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            rows.append(F.linear(normed.flatten() * mixer.norm.weight, mixer.out_proj.weight, mixer.out_proj.bias))
    return torch.stack(rows).view(u.shape)


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 12), batch=st.integers(1, 2), groups=st.integers(1, 3), ratio=st.integers(1, 2),
    headdim=st.integers(1, 3), d_state=st.integers(1, 4), expand=st.integers(1, 2), d_conv=st.integers(1, 5),
    chunk_size=st.integers(1, 13),
    bias=st.booleans(), conv_bias=st.booleans(), limited=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_a_mixer_against_its_equations(
    length, batch, groups, ratio, headdim, d_state, expand, d_conv, chunk_size, bias, conv_bias, limited, seed
):
    torch.manual_seed(seed)
    d_model, dt_limit = groups * ratio * headdim, (0.1, 0.5) if limited else (0.0, math.inf)
    mixer = make_mixer(
        d_model,
        d_state,
        headdim,
        n_groups=groups,
        expand=expand,
        d_conv=d_conv,
        chunk_size=chunk_size,
        bias=bias,
        conv_bias=conv_bias,
        dt_limit=dt_limit,
    )
    u = torch.randn(batch, length, d_model).double().requires_grad_()
    y, expected = mixer(u), equations(mixer, u, headdim, dt_limit)
    assert relative_error(y, expected) < 1e-12
    leaves = (u, *mixer.parameters())
    flat = [
        torch.cat([torch.zeros(1) if g is None else g.flatten() for g in gradients(out, leaves)])
        for out in (y, expected)
    ]
    assert relative_error(*flat) < 1e-9


@pytest.mark.parametrize(
    "mixer",
    [
        lambda: make_mixer(16),
        lambda: make_mixer(16, n_groups=2),
        lambda: make_mixer(16, n_groups=4, bias=True, dt_limit=(0.1, 0.5)),
        lambda: shaken(DiscreteMamba2(16, 3, 4, 4)).double(),
        lambda: shaken(DiscreteMamba2(16, 3, 4, 2, activation="silu")).double(),
    ],
    ids=["mamba2", "mamba2 in groups", "mamba2 with limits", "llamba", "llamba in groups"],
)
def test_one_layer_in_three_vocabularies(mixer):
    """B and C of a state space model are keys and queries of attention, a step size times x is a value, exp(dt A) is a
    gate."""
    mixer = mixer()
    u = torch.randn(2, 19, 16).double().requires_grad_()
    p, _ = mixer.project(u, None)
    leaves = (u, *mixer.parameters())
    expected = ssd(p.written, p.log_a, p.B, p.C, mode="recurrent")
    expected_grads = gradients(expected, leaves)
    k, q = (m.repeat_interleave(p.x.shape[2] // m.shape[2], dim=2) for m in (p.B, p.C))
    if p.dt is not None:
        assert (
            relative_error(p.log_a, -p.dt * mixer.A_log.exp()) < 1e-14
            and relative_error(p.written, p.dt[..., None] * p.x) < 1e-14
        )
    outs = [ssd(p.written, p.log_a, p.B, p.C, mode=mode, chunk_size=4) for mode in ("attention", "chunked")]
    outs += [gateloop(q, k, p.written, p.log_a[..., None], mode=mode, chunk_size=4) for mode in GATELOOP_MODES]
    for out in outs:
        assert relative_error(out, expected) < 1e-12
        assert_same_gradients(gradients(out, leaves), expected_grads, 1e-10)
    assert relative_error(gateloop_matrix(q, k, p.log_a[..., None]), ssd_matrix(p.log_a, p.B, p.C)) < 1e-12


# The original layout

SSM = {"layer": "Mamba2", "d_state": 5, "headdim": 4, "ngroups": 2}
OFFICIAL = {
    "d_model": 16,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": VOCAB,
    "ssm_cfg": SSM,
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
MIXER = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight")


def as_official(theirs):
    """The weights of transformers' model as the original code stores them; a tied head is stored as well."""
    weights = {
        name.replace("backbone.embeddings.", "backbone.embedding."): tensor.clone()
        for name, tensor in theirs.state_dict().items()
    }
    layers = [
        f"backbone.layers.{i}.{name}"
        for i in range(2)
        for name in ("norm.weight", *(f"mixer.{part}" for part in MIXER))
    ]
    assert {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight", *layers} <= weights.keys()
    return weights


def write(path, config, weights, file="pytorch_model.bin"):
    (path / "config.json").write_text(json.dumps(config))
    (torch.save if file.endswith(".bin") else save_file)(weights, path / file)
    return path


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_original_layout(folder, file, tied, groups):
    theirs = make_theirs(vocab_size=64, n_groups=groups, tie_word_embeddings=tied)
    weights, ids = as_official(theirs), ids_of(2, 37)
    assert (
        weights["lm_head.weight"].shape == (64, 16)
        and torch.equal(weights["lm_head.weight"], weights["backbone.embedding.weight"]) == tied
    )
    config = OFFICIAL | {"ssm_cfg": SSM | {"ngroups": groups}, "tie_embeddings": tied}
    ours = Mamba2LM.from_pretrained(write(folder(), config, weights, file))
    assert ours.config == Mamba2Config(vocab_size=VOCAB, d_model=16, n_layer=2, d_state=5, headdim=4, n_groups=groups,
                                       tie_embeddings=tied, pad_vocab_size_multiple=16)
    with torch.no_grad():
        assert ours(ids).shape == (2, 37, VOCAB)
        assert relative_error(ours(ids), theirs(ids).logits[..., :VOCAB]) < CLOSE
    if tied:  # the copy of the embedding need not be there
        del weights["lm_head.weight"]
        assert torch.equal(Mamba2LM.from_pretrained(write(folder(), config, weights, file))(ids), ours(ids))


def test_the_command_line_loads_both_layouts(folder):
    theirs, tokenizer = make_theirs(vocab_size=1024, n_groups=2), load_tokenizer(find_checkpoint("tiny"))
    original, transformed = folder(), folder()
    write(original, OFFICIAL | {"vocab_size": 1024}, as_official(theirs))
    theirs.save_pretrained(transformed)
    for path in (original, transformed):
        tokenizer.save_pretrained(path)
        model, _ = load_model(str(path))
        ids = torch.randint(1024, (1, 9))
        assert isinstance(model, Mamba2LM) and relative_error(model(ids), theirs(ids).logits) < CLOSE


def test_defaults_of_the_original_layout(folder):
    theirs = make_theirs(vocab_size=56, hidden_size=32, state_size=128, head_dim=64, chunk_size=256)
    config, ids = {"d_model": 32, "n_layer": 2, "vocab_size": VOCAB, "ssm_cfg": {"layer": "Mamba2"}}, ids_of(1, 300)
    ours = Mamba2LM.from_pretrained(write(folder(), config, as_official(theirs)))
    assert ours.config == Mamba2Config(vocab_size=VOCAB, d_model=32, n_layer=2, d_state=128, headdim=64, n_groups=1,
                                       expand=2, d_conv=4, chunk_size=256, dt_limit=(0.0, math.inf), bias=False,
                                       conv_bias=True, norm_epsilon=1e-5, tie_embeddings=True,
                                       pad_vocab_size_multiple=8)
    with torch.no_grad():
        assert relative_error(ours(ids), theirs(ids).logits[..., :VOCAB]) < CLOSE


def test_everything_that_the_original_layout_can_say(folder):
    theirs = make_theirs(
        vocab_size=64,
        expand=4,
        conv_kernel=3,
        chunk_size=7,
        head_dim=8,
        n_groups=2,
        time_step_limit=(0.1, 0.5),
        use_bias=True,
        use_conv_bias=False,
    )
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    ssm = SSM | {
        "expand": 4,
        "d_conv": 3,
        "chunk_size": 7,
        "headdim": 8,
        "dt_limit": [0.1, 0.5],
        "bias": True,
        "conv_bias": False,
    }
    idle = {
        "rmsnorm": True,
        "norm_before_gate": False,
        "D_has_hdim": False,
        "d_ssm": None,
        "use_mem_eff_path": True,
        "conv_init": None,
        "A_init_range": [1, 16],
        "dt_min": 0.001,
        "dt_max": 0.1,
        "dt_init_floor": 1e-4,
    }
    ours, ids = Mamba2LM.from_pretrained(write(folder(), OFFICIAL | {"ssm_cfg": ssm | idle}, weights)), ids_of(2, 37)
    with torch.no_grad():
        assert relative_error(ours(ids), theirs(ids).logits[..., :VOCAB]) < CLOSE


def test_rows_that_pad_the_vocabulary_are_never_seen(folder):
    weights = as_official(make_theirs(vocab_size=64, n_groups=2, tie_word_embeddings=False))
    hidden = weights["backbone.norm_f.weight"].sign()
    weights["lm_head.weight"][VOCAB:] = 100 * hidden  # were they seen, some of them would be chosen
    ours = Mamba2LM.from_pretrained(write(folder(), OFFICIAL | {"tie_embeddings": False}, weights))
    assert ours.vocab_size == VOCAB and ours.lm_head.out_features == 64
    assert ours.generate(ids_of(2, 4), 20, temperature=5.0, generator=torch.Generator().manual_seed(0)).max() < VOCAB
    with pytest.raises(ValueError, match=rf"ids must be in .0, {VOCAB}"):
        ours(torch.full((1, 2), VOCAB))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_types_of_stored_weights(folder, stored):
    weights = {name: tensor.to(stored) for name, tensor in as_official(make_theirs(vocab_size=64, n_groups=2)).items()}
    path = write(folder(), OFFICIAL, weights)
    wide, narrow = Mamba2LM.from_pretrained(path), Mamba2LM.from_pretrained(path, dtype=None)
    assert {p.dtype for p in wide.parameters()} == {torch.float32} and {p.dtype for p in narrow.parameters()} == {
        stored
    }
    assert torch.equal(wide.backbone.embedding.weight, weights["backbone.embedding.weight"].float())


def test_published_sizes():
    """state-spaces/mamba2-130m: every tensor counted by hand."""
    config = OFFICIAL | {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
    with torch.device("meta"):
        model = Mamba2LM(Mamba2Config.from_dict(config))
    layer = 768 * (2 * 1536 + 2 * 128 + 24) + 5 * (1536 + 2 * 128) + 3 * 24 + 1536 + 1536 * 768 + 768
    assert sum(p.numel() for p in model.parameters()) == 24 * layer + 768 + 50288 * 768 == 128_989_632


CODESTRAL = {  # mistralai/Mamba-Codestral-7B-v0.1, written by transformers 4.44
    "_name_or_path": "codestral",
    "architectures": ["Mamba2ForCausalLM"],
    "bos_token_id": 0,
    "chunk_size": 256,
    "conv_kernel": 4,
    "eos_token_id": 0,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.1,
    "intermediate_size": 8192,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 8,
    "norm_before_gate": True,
    "num_heads": 128,
    "num_hidden_layers": 64,
    "pad_token_id": 0,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_limit": [0.0, math.inf],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "time_step_scale": 1.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 32768,
}
OLDER = {name: value for name, value in CODESTRAL.items()
         if name not in ("intermediate_size", "time_step_init_scheme", "time_step_scale", "architectures")}
NVIDIA = {
    "d_model": 4096,
    "d_intermediate": 0,
    "n_layer": 56,
    "vocab_size": 256000,
    "rms_norm": True,
    "residual_in_fp32": False,
    "fused_add_norm": False,
    "pad_vocab_size_multiple": 128,
    "tie_embeddings": False,
    "ssm_cfg": {
        "layer": "Mamba2",
        "d_state": 128,
        "d_conv": 4,
        "expand": 2,
        "headdim": 64,
        "ngroups": 8,
        "chunk_size": 128,
        "rmsnorm": True,
        "norm_before_gate": False,
        "use_mem_eff_path": False,
    },
}


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            CODESTRAL,
            Mamba2Config(
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
                vocab_size=32768,
                d_model=4096,
                n_layer=64,
                n_groups=8,
                tie_embeddings=False,
            ),
        ),
        (
            OLDER,
            Mamba2Config(
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
                vocab_size=32768,
                d_model=4096,
                n_layer=64,
                n_groups=8,
                tie_embeddings=False,
            ),
        ),
        (
            NVIDIA,
            Mamba2Config(
                vocab_size=256000,
                d_model=4096,
                n_layer=56,
                n_groups=8,
                chunk_size=128,
                tie_embeddings=False,
                pad_vocab_size_multiple=128,
            ),
        ),
    ],
    ids=["Codestral", "transformers 4.44", "original with groups"],
)
def test_published_configs_are_read(config, expected):
    """norm_before_gate of transformers' early files means nothing: transformers never read it."""
    assert Mamba2Config.from_dict(json.loads(json.dumps(config))) == expected


# Saving


@pytest.mark.parametrize("changes", [
    {}, dict(tie_embeddings=False, n_groups=4), dict(bias=True, conv_bias=False, d_conv=3),
    dict(dt_limit=(0.1, 0.5), chunk_size=7, norm_epsilon=1e-3),
])
def test_saving_and_loading_is_exact(folder, changes):
    model, path, ids = make(torch.float32, **changes), folder() / "new", ids_of(2, 21)
    model.save_pretrained(path)
    loaded = Mamba2LM.from_pretrained(path)
    assert loaded.config == model.config and torch.equal(loaded(ids), model(ids))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert Mamba2LM.from_pretrained(path, dtype=torch.bfloat16).backbone.embedding.weight.dtype == torch.bfloat16
    with pytest.raises(FileExistsError):
        model.save_pretrained(path)


@pytest.mark.parametrize("changes", [
    {}, dict(tie_embeddings=False, n_groups=4), dict(bias=True, conv_bias=False, d_conv=3),
    dict(dt_limit=(0.1, 0.5), chunk_size=7, norm_epsilon=1e-3),
    dict(pad_vocab_size_multiple=16), dict(pad_vocab_size_multiple=16, tie_embeddings=False),
])
def test_transformers_loads_what_is_saved(folder, changes):
    model, path, ids = make(torch.float32, **changes), folder() / "new", ids_of(2, 21)
    model.save_pretrained(path)
    theirs, found = transformers.Mamba2ForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), found
    assert theirs.config.vocab_size == VOCAB and theirs.config.num_heads == 8
    with torch.no_grad():
        assert relative_error(model(ids), theirs.eval()(ids).logits) < CLOSE


@pytest.mark.parametrize("tied", [True, False])
def test_from_the_original_layout_to_transformers(folder, tied):
    weights = as_official(make_theirs(vocab_size=64, n_groups=2, tie_word_embeddings=tied))
    ours, path, ids = (
        Mamba2LM.from_pretrained(write(folder(), OFFICIAL | {"tie_embeddings": tied}, weights)),
        folder() / "new",
        ids_of(2, 21),
    )
    ours.save_pretrained(path)
    assert load_file(path / "model.safetensors")["backbone.embeddings.weight"].shape == (VOCAB, 16)
    theirs, found = transformers.Mamba2ForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), found
    again = Mamba2LM.from_pretrained(path)
    assert again.config == replace(
        ours.config, pad_vocab_size_multiple=1
    ) and again.backbone.embedding.weight.shape == (VOCAB, 16)
    with torch.no_grad():
        assert (
            relative_error(again(ids), ours(ids)) < 1e-6
            and relative_error(theirs.eval()(ids).logits, ours(ids)) < CLOSE
        )


# Strictness

THEIRS = {
    "model_type": "mamba2",
    "num_heads": 8,
    "hidden_act": "silu",
    "conv_kernel": 4,
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
    **{name: value for name, value in SIZES.items() if not name.endswith("_token_id")},
}


@pytest.mark.parametrize("change, message", [
    ({"d_ffn": 3}, "unknown entry d_ffn"),
    ({"model_type": "llamba"}, "model_type is 'llamba'"),
    ({"ssm_cfg": None}, "model_type is None"),
    ({"ssm_cfg": SSM | {"d_inner": 3, "act": "relu"}}, "unknown entry ssm_cfg.act, ssm_cfg.d_inner"),
    ({"ssm_cfg": {"d_state": 5}}, "missing entry ssm_cfg.layer"),
    ({"ssm_cfg": {}}, "missing entry ssm_cfg.layer"),
    ({"ssm_cfg": SSM | {"layer": "Mamba1"}}, "ssm_cfg.layer is 'Mamba1': only 'Mamba2'"),
    ({"ssm_cfg": SSM | {"norm_before_gate": True}}, "ssm_cfg.norm_before_gate is True: only False"),
    ({"ssm_cfg": SSM | {"rmsnorm": False}}, "ssm_cfg.rmsnorm is False: only True"),
    ({"ssm_cfg": SSM | {"D_has_hdim": True}}, "ssm_cfg.D_has_hdim is True: only False"),
    ({"ssm_cfg": SSM | {"d_ssm": 16}}, "ssm_cfg.d_ssm is 16: only None"),
    ({"ssm_cfg": SSM | {"dt_limit": [0.1]}}, r"dt_limit is \(0.1,\): it must be tuple"),
    ({"ssm_cfg": SSM | {"dt_limit": [0.1, 0.2, 0.3]}}, "dt_limit is .*: it must be tuple"),
    ({"ssm_cfg": SSM | {"dt_limit": 0.1}}, "dt_limit is 0.1: it must be tuple"),
    ({"ssm_cfg": SSM | {"dt_limit": ["a", "b"]}}, "dt_limit is .*: it must be tuple"),
    ({"ssm_cfg": SSM | {"d_state": "5"}}, "d_state is '5'"),
    ({"ssm_cfg": SSM | {"headdim": 0}}, "headdim is 0"),
    ({"d_intermediate": 100}, "d_intermediate is 100: only 0"),
    ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]: only \[\]"),
    ({"attn_cfg": {"num_heads": 4}}, "attn_cfg is .*: only {}"),
    ({"rms_norm": False}, "rms_norm is False: only True"),
    ({"n_layer": 0}, "n_layer is 0"),
])
def test_a_bad_config_in_the_original_layout_is_named(change, message):
    Mamba2Config.from_dict(OFFICIAL)
    with pytest.raises(ValueError, match="some/where: .*" + message):
        Mamba2Config.from_dict(OFFICIAL | change, "some/where")


@pytest.mark.parametrize("change, message", [
    ({"d_ffn": 3}, "unknown entry d_ffn"),
    ({"d_model": 16}, "unknown entry d_model"),
    ({"model_type": "mamba"}, "model_type is 'mamba': it must be 'llama' or 'mamba2'"),
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu'"),
    ({"num_heads": 7}, r"num_heads is 7: num_heads \* head_dim must be expand \* hidden_size"),
    ({"num_heads": None}, "num_heads is None"),
    ({"head_dim": 8}, "num_heads is 8"),
    ({"time_step_limit": [0.1]}, "time_step_limit is .*: it must be tuple.float, float., at least 0"),
    ({"time_step_limit": [0.0, {"__int__": "3"}]}, "time_step_limit is .*: it must be tuple"),
    ({"time_step_limit": None}, "time_step_limit is None: it must be tuple"),
    ({"hidden_size": 0, "num_heads": 1}, "num_heads is 1"), ({"hidden_size": "16"}, "hidden_size is '16'"),
    ({"layer_norm_epsilon": "1e-05"}, "layer_norm_epsilon is '1e-05': it must be a positive number"),
])
def test_a_bad_config_of_transformers_is_named(change, message):
    Mamba2Config.from_dict(THEIRS)
    with pytest.raises(ValueError, match="some/where: .*" + message):
        Mamba2Config.from_dict(THEIRS | change, "some/where")


def test_what_is_missing_in_a_config_is_named():
    for config, names in (
        (OFFICIAL, ("d_model", "n_layer", "vocab_size")),
        (THEIRS, THEIRS.keys() - {"model_type", "hidden_act"} - {f"{kind}_token_id" for kind in ("bos", "eos", "pad")}),
    ):
        for name in names:
            with pytest.raises(ValueError, match=f"some/where: missing entry {name};"):
                Mamba2Config.from_dict({k: v for k, v in config.items() if k != name}, "some/where")
    for nonsense in ({}, {"ssm_cfg": 3}):
        with pytest.raises(ValueError, match="some/where: model_type is"):
            Mamba2Config.from_dict(nonsense, "some/where")


@pytest.mark.parametrize("change, message", [
    ({"headdim": 5}, r"headdim is 5: it must divide the inner width expand \* d_model = 32"),
    ({"ngroups": 3}, "n_groups is 3: it must divide the number of heads, 8"),
    ({"dt_limit": [-1, 1]}, r"ssm_cfg.dt_limit is \(-1.0, 1.0\): it must be tuple\[float, float\], at least 0"),
    ({"dt_limit": [0.5, 0.1]}, r"dt_limit is \(0.5, 0.1\)"),
])
def test_sizes_that_do_not_fit_are_named_with_the_checkpoint(folder, change, message):
    path = write(folder(), OFFICIAL | {"ssm_cfg": SSM | change}, {"0": torch.ones(1), "1": torch.ones(1)})
    with pytest.raises(ValueError, match=re.escape(str(path / "config.json")) + ": " + message):
        Mamba2LM.from_pretrained(path)


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_loading_is_strict(folder, layout):
    theirs = make_theirs(vocab_size=64, n_groups=2, tie_word_embeddings=False)
    if layout == "original":
        good, config, tie, embedding = as_official(theirs), OFFICIAL, "tie_embeddings", "backbone.embedding.weight"
    else:
        good = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
        config, tie, embedding = (
            THEIRS | {"vocab_size": 64, "n_groups": 2},
            "tie_word_embeddings",
            "backbone.embeddings.weight",
        )

    def load(weights, **changes):
        return Mamba2LM.from_pretrained(write(folder(), config | {tie: False} | changes, weights))

    load(good)
    for name in ("backbone.layers.1.mixer.dt_bias", "backbone.layers.0.mixer.norm.weight", "lm_head.weight"):
        with pytest.raises(ValueError, match=rf"1 missing .{name}"):
            load({k: v for k, v in good.items() if k != name})
    for name, ours in (
        ("backbone.norm_f.weight", "backbone.final_layernorm.weight"),
        (embedding, "backbone.embedding.weight"),
        ("backbone.layers.0.norm.weight", "backbone.layers.0.input_layernorm.weight"),
    ):
        with pytest.raises(ValueError, match=rf"1 missing .({name}|{ours})"):
            load({k: v for k, v in good.items() if k != name})
    for name in ("backbone.layers.0.mixer.z_bias", "backbone.layers.2.mixer.D", "backbone.layers.0.mixer.in_proj.bias"):
        with pytest.raises(ValueError, match=rf"1 unexpected .{name}"):
            load(good | {name: torch.zeros(4)})
    for name in ("backbone.layers.0.mixer.A_log", "backbone.layers.1.mixer.D", "backbone.layers.1.mixer.norm.weight"):
        shape = tuple(good[name].shape)
        with pytest.raises(
            ValueError, match=rf"{name} has shape \({shape[0] + 1},\) instead of {re.escape(str(shape))}"
        ):
            load(good | {name: torch.zeros(shape[0] + 1)})
    with pytest.raises(ValueError, match=r"embeddings?.weight has shape \(50, 16\) instead of \(64, 16\)"):
        load(good | {embedding: good[embedding][:50].clone()})
    with pytest.raises(ValueError, match="lm_head.weight is not backbone.embeddings?.weight"):
        load(good, **{tie: True})
    load(good | {"lm_head.weight": good[embedding].clone()}, **{tie: True})


@pytest.mark.parametrize(
    "twice, as_well",
    [
        ("backbone.norm_f.weight", "backbone.final_layernorm.weight"),
        ("backbone.layers.1.norm.weight", "backbone.layers.1.input_layernorm.weight"),
    ],
)
def test_a_weight_stored_under_two_names_is_no_checkpoint(folder, twice, as_well):
    weights = as_official(make_theirs(vocab_size=64, n_groups=2))
    with pytest.raises(ValueError, match=f"{twice}|{as_well}"):
        Mamba2LM.from_pretrained(write(folder(), OFFICIAL, weights | {as_well: weights[twice] + 1}))


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(d_model=10, headdim=3), r"headdim is 3: it must divide the inner width expand \* d_model = 20"),
        (dict(d_model=8, headdim=4, n_groups=3), "n_groups is 3: it must divide the number of heads, 4"),
        (dict(d_model=8, headdim=4, n_groups=8), "n_groups is 8"),
        *(
            (dict(d_model=8, headdim=4) | {name: 0}, f"{name} is 0: it must be an integer of at least 1")
            for name in ("d_model", "d_state", "headdim", "n_groups", "expand", "d_conv", "chunk_size")
        ),
        (dict(d_model=8, headdim=4, d_state=2.5), "d_state is 2.5"),
        (dict(d_model=8, headdim=4, expand=True), "expand is True"),
        (
            dict(d_model=8, headdim=4, dt_limit=(-0.1, 1)),
            r"dt_limit is \(-0.1, 1\): it must be \(low, high\) with 0 <= low <= high",
        ),
        (dict(d_model=8, headdim=4, dt_limit=(1, 0.5)), r"dt_limit is \(1, 0.5\)"),
        (dict(d_model=8, headdim=4, dt_limit=(math.nan, 1)), r"dt_limit is \(nan, 1\)"),
    ],
)
def test_bad_sizes_of_a_mixer(sizes, message):
    with pytest.raises(ValueError, match=message):
        Mamba2(**sizes)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "d_model",
        "n_layer",
        "d_state",
        "headdim",
        "n_groups",
        "expand",
        "d_conv",
        "chunk_size",
        "pad_vocab_size_multiple",
    ],
)
def test_bad_sizes_of_a_config(name):
    for wrong in (0, -1, 1.5, "2", None, True):
        with pytest.raises(ValueError, match=f"{name} is {wrong!r}"):
            mamba2_config(**{name: wrong})


# Start values


def test_the_official_start():
    """A uniform in [-16, -1], step sizes log-uniform in [0.001, 0.1]: no quantile of 1024 heads is far off."""
    mixer = Mamba2(16, 2, headdim=1, expand=64)
    A, dt, quantiles = -mixer.A_log.exp(), F.softplus(mixer.dt_bias), (torch.arange(1024) + 0.5) / 1024
    assert A.min() >= -16 * (1 + 1e-6) and A.max() <= -1 * (1 - 1e-6)
    assert dt.min() >= 0.001 * (1 - 1e-5) and dt.max() <= 0.1 * (1 + 1e-5)
    assert ((-A.sort(descending=True).values - 1) / 15 - quantiles).abs().max() < 0.06
    assert ((dt.sort().values / 0.001).log() / math.log(100) - quantiles).abs().max() < 0.06
    assert torch.equal(mixer.D, torch.ones(1024)) and torch.equal(mixer.norm.weight, torch.ones(1024))


@pytest.mark.parametrize("layers", [1, 2, 9])
def test_the_last_projections_start_smaller_the_more_layers_there_are(layers):
    model = Mamba2LM(mamba2_config(d_model=32, n_layer=layers, headdim=8))
    for block in model.backbone.layers:
        for name, width, scale in (("out_proj", 64, math.sqrt(layers)), ("in_proj", 32, 1.0)):
            weight = (
                getattr(block.mixer, name).weight * scale * math.sqrt(width)
            )  # as PyTorch starts it: uniform in [-1, 1]
            assert 0.98 < weight.abs().max() <= 1 + 1e-6 and abs(weight.std() - 1 / math.sqrt(3)) < 0.03
    assert abs(model.backbone.embedding.weight.std() - 0.02) < 0.002
    assert all((norm == 1).all() for name, norm in model.named_parameters() if "norm" in name)


def test_a_seed_gives_the_same_model_and_a_reset_gives_another():
    config, models = mamba2_config(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(Mamba2LM(config).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not any(
        torch.equal(models[0][name], models[2][name]) for name in models[0] if not name.endswith((".D", "norm.weight"))
    )
    mixer = make_mixer()
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    mixer.reset_parameters()
    assert not any(torch.equal(before[name], p) for name, p in mixer.named_parameters())
    assert (
        (mixer.D == 1).all() and (mixer.norm.weight == 1).all() and F.softplus(mixer.dt_bias).max() <= 0.1 * (1 + 1e-5)
    )


def test_the_inverse_of_softplus():
    y = torch.logspace(-8, 3, 2000, dtype=torch.float64)
    exact = inverse_softplus(y)
    assert relative_error(torch.log1p(torch.exp(-exact.abs())) + exact.clamp(min=0), y) < 1e-14
    assert ((torch.log1p(torch.exp(-exact.abs())) + exact.clamp(min=0)) / y - 1).abs().max() < 1e-13
    narrow = y.float()
    assert (
        inverse_softplus(narrow) - inverse_softplus(narrow.double())
    ).abs().max() < 4e-5  # half a unit in the last place of 1000
    assert (F.softplus(inverse_softplus(narrow).double()) / narrow.double() - 1).abs().max() < 2e-6
    written_out = torch.log(torch.exp(narrow) - 1)
    assert written_out.isinf()[0] and written_out.isinf()[-1]


# The norm


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_the_norm_is_its_formula_in_every_group(groups, eps):
    norm = shaken(GatedRMSNorm(12, groups, eps)).double()
    y, z = (torch.randn(2, 5, 12).double().requires_grad_() for _ in range(2))
    parts = []
    for part, gate, weight in zip(*(t.chunk(groups, -1) for t in (y, z, norm.weight))):
        gated = part * gate / (1 + torch.exp(-gate))
        parts.append(weight * gated / ((gated**2).sum(-1, keepdim=True) / gated.shape[-1] + eps).sqrt())
    out, expected = norm(y, z), torch.cat(parts, -1)
    assert relative_error(out, expected) < 1e-14
    leaves = (y, z, norm.weight)
    assert_same_gradients(gradients(out, leaves), gradients(expected, leaves), 1e-12)


def test_the_gate_comes_before_the_norm():
    """So a gate that grows as a whole changes nothing; after the norm it would."""
    norm = GatedRMSNorm(12, 2, eps=0.0).double()
    y, z = torch.randn(3, 12).double(), 40 + torch.rand(3, 12).double()  # silu(z) = z up to 1e-17
    factors = torch.tensor([2.0, 5.0]).double().repeat_interleave(6)
    assert relative_error(norm(y, z * factors), norm(y, z)) < 1e-15
    assert relative_error(norm(y * factors, z), norm(y, z)) < 1e-15
    assert relative_error(norm(y, z * torch.linspace(1, 2, 12)), norm(y, z)) > 0.05


def test_the_norm_computes_in_float32():
    norm, y, z = GatedRMSNorm(64, 2), 1e3 * torch.randn(8, 64).to(torch.float16), torch.randn(8, 64).to(torch.float16)
    out = norm.half()(y, z)
    assert (
        out.dtype == torch.float16 and relative_error(out, norm.double()(y.double(), z.double())) < 2**-11
    )  # squares reach 1e6, float16 65504


# Extreme gates


def extreme(length, dtype=torch.float32):
    """x, dt, A, B, C: step sizes of 0, from 1e-4 to 30, and from 37 to 50; A from -100 to almost 0. A decay reaches
    exp(-5000)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    u = torch.rand(1, length, 4, generator=generator)
    dt = torch.where(u < 0.25, torch.zeros(()), torch.where(u < 0.75, 10 ** (11 * (u - 0.25) - 4), 50 * u))
    inputs = (
        normal(1, length, 4, 4),
        dt,
        -torch.tensor([100.0, 16.0, 1.0, 1e-6]),
        normal(1, length, 2, 3),
        normal(1, length, 2, 3),
    )
    return [z.to(dtype).requires_grad_() for z in inputs]


def run_extreme(x, dt, A, B, C, **options):
    return ssd(x * dt[..., None], dt * A, B, C, return_state=True, **options)


def definition(x, dt, A, B, C):
    """The recurrence, token by token."""
    B, C = (m.repeat_interleave(2, dim=2) for m in (B, C))
    decays, written = (dt * A).exp(), x * dt[..., None]
    state, outputs = torch.zeros(1, 4, 4, 3, dtype=x.dtype), []
    for w_t, a_t, B_t, C_t in zip(written.unbind(1), decays.unbind(1), B.unbind(1), C.unbind(1)):
        state = a_t[..., None, None] * state + w_t[..., :, None] * B_t[..., None, :]
        outputs.append((state * C_t[..., None, :]).sum(-1))
    return torch.stack(outputs, 1), state


def textbook(x, dt, A, B, C):
    """exp of differences of running sums, masked after exp: the formula that gives NaN."""
    B, C = (m.repeat_interleave(2, dim=2) for m in (B, C))
    g = (dt * A).cumsum(1)
    decay = (g[:, :, None] - g[:, None]).movedim(-1, 1).exp().tril()
    return torch.einsum("bhts,bthn,bshn,bshp->bthp", decay, C, B, x * dt[..., None])


@pytest.mark.parametrize(
    "length, mode, chunk_size",
    [
        (4096, "chunked", 64),
        (4096, "chunked", 256),
        (512, "chunked", 256),
        (512, "attention", 64),
        (512, "recurrent", 64),
    ],
)
def test_extreme_gates(length, mode, chunk_size):
    narrow, wide = extreme(length), extreme(length, torch.float64)
    ours, exact = run_extreme(*narrow, mode=mode, chunk_size=chunk_size), definition(*wide)
    assert (narrow[1] * narrow[2]).min() < -4900 and (narrow[1] == 0).float().mean() > 0.2
    for out, expected in zip(ours, exact):
        assert out.isfinite().all() and relative_error(out, expected) < 2e-6
    grads = [
        gradients(torch.cat([z.flatten() for z in outs]), leaves) for outs, leaves in ((ours, narrow), (exact, wide))
    ]
    for ours, expected in zip(*grads):
        assert ours.isfinite().all() and relative_error(ours, expected) < 5e-6
    for head in range(4):  # each A by itself: they differ in size
        assert relative_error(grads[0][2][head], grads[1][2][head]) < 1e-5


def test_the_textbook_formula_has_no_gradient_there():
    """The well-known NaN of Mamba-2: the same input, one chunk of it, right in the forward pass, and float64 does not
    help."""
    for dtype in (torch.float32, torch.float64):
        inputs = [z if z.ndim == 1 else z[:, :64] for z in extreme(4096, dtype)]
        leaves = [z.detach().requires_grad_() for z in inputs]
        y = textbook(*leaves)
        assert y.isfinite().all()
        bad = gradients(y, leaves)
        assert bad[1].isnan().any() and bad[2].isnan().any()
        good = gradients(run_extreme(*leaves)[0], leaves)
        assert all(z.isfinite().all() for z in good)
    assert relative_error(y, run_extreme(*leaves)[0]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dt_bias, A", [(50.0, 100.0), (50.0, 1e-8), (-200.0, 100.0), (0.0, 1e4)])
def test_extreme_parameters_of_a_mixer(dtype, dt_bias, A):
    mixer = make_mixer(16, n_groups=2, chunk_size=64, dtype=dtype)
    with torch.no_grad():
        mixer.dt_bias.fill_(dt_bias)
        mixer.A_log.fill_(math.log(A))
    u = torch.randn(1, 4096, 16).to(dtype).requires_grad_()
    y, state = mixer(u, mixer.init_state(1))
    y.square().sum().backward()
    assert y.isfinite().all() and state.ssm.isfinite().all() and u.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())
    with torch.no_grad():
        exact = copy.deepcopy(mixer).double()(u.double())
    assert relative_error(y, exact) < (1e-5 if dtype == torch.float32 else 0.05)


# In the Decoder


def test_walk_gives_the_matrix_of_every_layer():
    model, ids = make(n_groups=2), ids_of(2, 9)
    layers = list(model.walk(ids))
    assert len(layers) == 2 and relative_error(model.head(layers[-1].output), model(ids)) < 1e-14
    for layer in layers:
        mixer = layer.block.mixer
        assert layer.matrix().shape == (2, 8, 9, 9)
        p, _ = mixer.project(layer.mixer_input, None)
        heads = torch.einsum("bhts,bshp->bthp", layer.matrix(), p.x).flatten(2)
        assert relative_error(mixer.out_proj(mixer.norm(heads, p.z)), layer.mixer_output) < 1e-12
        assert relative_error(layer.input + layer.mixer_output, layer.output) < 1e-15


@pytest.mark.parametrize("match", [match_matrix, match_output])
def test_mohawk_can_teach_it(match):
    """A Llama with four heads and a Decoder of Mamba-2 mixers with as many: the loss of every layer goes down."""
    teacher = shaken(Llama(llama_config(vocab_size=VOCAB, head_dim=4, tie_word_embeddings=True)))
    student = Decoder(
        Backbone([Mamba2(16, 6, 8, n_groups=4, chunk_size=8) for _ in range(2)], VOCAB, 16, 24), tie_embeddings=True
    )
    objective, optimizer, ids = (
        LayerByLayer(teacher, student, match),
        torch.optim.Adam(student.parameters(), 0.01),
        ids_of(4, 12),
    )
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(objective(ids, lambda loss: loss.backward()))
        optimizer.step()
    assert objective.parts == ["layer 0", "layer 1"] and (losses[-1] < 0.8 * losses[0]).all()
    for block in student.backbone.layers:
        assert all(getattr(block.mixer, name).grad.any() for name in ("A_log", "dt_bias", "D"))


def test_bfloat16_runs_and_keeps_its_state_in_float32():
    model, ids = make(torch.bfloat16, n_groups=2), ids_of(2, 20)
    logits, state = model.prefill(ids)
    stepped, state = model.step(ids[:, 0], state)
    assert logits.dtype == stepped.dtype == torch.bfloat16 and logits.isfinite().all() and stepped.isfinite().all()
    assert {layer.ssm.dtype for layer in (*state, *model.init_state(2))} == {torch.float32} and state[
        0
    ].conv.dtype == torch.bfloat16
    exact = copy.deepcopy(model).double()(ids)
    assert relative_error(model(ids), exact) < 0.03 and relative_error(read_split(model, ids, 4), exact) < 0.03
    model(ids).float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_step_sizes_and_decays_are_float32_in_bfloat16():
    mixer, u = make_mixer(16, n_groups=2, dtype=torch.bfloat16), torch.randn(2, 20, 16).bfloat16()
    p, _ = mixer.project(u, None)
    exact = F.softplus(mixer.in_proj(u)[..., -8:].double() + mixer.dt_bias.double())
    assert p.dt.dtype == p.log_a.dtype == torch.float32 and p.written.dtype == p.z.dtype == torch.bfloat16
    assert relative_error(p.dt, exact) < 1e-6 and relative_error(p.log_a, -exact * mixer.A_log.double().exp()) < 1e-6


def test_autocast_runs():
    model, ids = make(torch.float32), ids_of(2, 9)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, whole = read_split(model, ids, 4), model(ids)
    assert relative_error(narrow, model(ids)) < 0.03 and relative_error(whole, model(ids)) < 0.03


def test_float64_stays_float64():
    """Not one step in float32: against the model in float32 the difference is that of float32."""
    model, ids = make(n_groups=2), ids_of(2, 20)
    narrow = copy.deepcopy(model).float()
    logits, state = model.prefill(ids)
    assert logits.dtype == torch.float64 and {z.dtype for layer in state for z in layer} == {torch.float64}
    assert 1e-8 < relative_error(narrow(ids), logits) < CLOSE
