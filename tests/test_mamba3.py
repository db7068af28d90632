"""Mamba-3: every mode against the recurrence as the paper writes it, the complex state, the mixer and its state, the
language model, and the official kernel where it is installed."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import VOCAB, llama_config, one_line, shaken

from llamba_ref import mamba3
from llamba_ref.conventions import relative_error
from llamba_ref.data import Batches
from llamba_ref.llama import Llama
from llamba_ref.llamba import Llamba
from llamba_ref.mamba3 import (
    Mamba3,
    Mamba3Config,
    Mamba3LM,
    Mamba3State,
    trapezoid,
    trapezoid_matrix,
    trapezoid_step,
)
from llamba_ref.mohawk import LayerByLayer, distill, match_matrix
from llamba_ref.ssd import ssd
from llamba_ref.training import Stage

MODES = ["recurrent", "scan", "attention", "chunked"]
LENGTHS = [1, 2, 3, 63, 64, 65, 200]


def in_heads(z, heads):
    return z.repeat_interleave(heads // z.shape[-2], -2)


def loop(x, dt, log_a, lam, B, C, state, x_before, B_before):
    """The recurrence of the paper, token by token."""
    outputs, heads, a = [], x.shape[3], log_a.exp()
    B, C, B_before = (in_heads(z, heads) for z in (B, C, B_before))
    for t in range(x.shape[1]):
        beta, gamma = (1 - lam[:, t]) * dt[:, t] * a[:, t], lam[:, t] * dt[:, t]
        state = a[:, t, :, None, None] * state
        state = state + beta[..., None, None] * torch.einsum("brhp,brhn->bhpn", x_before, B_before)
        state = state + gamma[..., None, None] * torch.einsum("brhp,brhn->bhpn", x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,brhn->brhp", state, C[:, t]))
        x_before, B_before = x[:, t], B[:, t]
    return torch.stack(outputs, 1), state


def random_inputs(length, heads=2, groups=1, rank=1, headdim=3, state=4, batch=2, dtype=torch.float64):
    """x, dt, log_a, lam, B, C, and a state with the last token's values and keys."""
    def normal(*shape):
        return torch.randn(shape, dtype=dtype)
    dt = F.softplus(normal(batch, length, heads))
    return [normal(batch, length, rank, heads, headdim), dt, -dt * torch.rand_like(dt), torch.rand_like(dt),
            normal(batch, length, rank, groups, state), normal(batch, length, rank, groups, state),
            normal(batch, heads, headdim, state), normal(batch, rank, heads, headdim),
            normal(batch, rank, groups, state)]


def in_mode(mode, inputs, **options):
    *main, state, x_before, B_before = inputs
    return trapezoid(*main, mode=mode, initial_state=state, x_before=x_before, B_before=B_before, return_state=True,
                     **options)


def with_gradients(function, inputs):
    """Outputs, the state, and the gradients of all inputs for a fixed random weighting of both."""
    leaves = [z.clone().requires_grad_() for z in inputs]
    results, generator = function(leaves), torch.Generator().manual_seed(1)
    total = sum((z * torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.dtype)).sum() for z in results)
    return [z.detach() for z in results], torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_modes_equal_the_loop(mode, rank, length):
    inputs = random_inputs(length, heads=4, groups=2, rank=rank)
    results, gradients = with_gradients(lambda z: in_mode(mode, z), inputs)
    wanted, wanted_gradients = with_gradients(lambda z: loop(*z), inputs)
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(results, wanted, strict=True))
    assert all(relative_error(a, b) < 1e-8 for a, b in zip(gradients, wanted_gradients, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (3, 3), (6, 2)])
def test_heads_and_groups(mode, heads, groups):
    inputs = random_inputs(37, heads, groups, rank=2)
    y, state = in_mode(mode, inputs, chunk_size=16)
    for ours, theirs in zip((y, state), loop(*inputs), strict=True):
        assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("log_a", [0.0, -1e-6, -50.0, -math.inf, "mixed"])
def test_extreme_gates(mode, log_a):
    inputs = random_inputs(65, rank=2)
    if log_a == "mixed":
        choice = torch.tensor([0.0, -1e-6, -50.0, -math.inf], dtype=torch.float64)
        inputs[2] = choice[torch.randint(4, inputs[2].shape)]
    else:
        inputs[2] = torch.full_like(inputs[2], log_a)
    results, gradients = with_gradients(lambda z: in_mode(mode, z), inputs)
    wanted, wanted_gradients = with_gradients(lambda z: loop(*z), inputs)
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(results, wanted, strict=True))
    for a, b in zip(gradients, wanted_gradients, strict=True):
        assert torch.isfinite(a).all() and (relative_error(a, b) < 1e-8 if b.any() else not a.any())


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_extreme_weights(lam):
    inputs = random_inputs(40)
    inputs[3] = torch.full_like(inputs[3], lam)
    for mode in MODES:
        assert relative_error(in_mode(mode, inputs)[0], loop(*inputs)[0]) < 1e-10


def test_lambda_one_is_mamba2():
    x, dt, log_a, lam, B, C, state, *_ = random_inputs(65, heads=4, groups=2)
    y = trapezoid(x, dt, log_a, torch.ones_like(lam), B, C, initial_state=state)
    assert relative_error(y[:, :, 0], ssd(x[:, :, 0] * dt[..., None], log_a, B[:, :, 0], C[:, :, 0],
                                          initial_state=state)) < 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, 2])
def test_float32_stays_near_float64(mode, rank):
    inputs = random_inputs(4096 if mode != "attention" else 1024, rank=rank, batch=1)
    inputs[1] = 10 ** (torch.rand_like(inputs[1]) * 6 - 4)  # steps from 0.0001 to 100 side by side
    inputs[2] = -(10 ** (torch.rand_like(inputs[2]) * 5 - 5))
    y, state = in_mode(mode, [z.float() for z in inputs])
    assert y.dtype == state.dtype == torch.float32
    for ours, exact in zip((y, state), loop(*[z.float().double() for z in inputs]), strict=True):
        assert relative_error(ours.double(), exact) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_half_precision(mode):
    inputs = random_inputs(64, rank=2)
    exact = loop(*inputs)[0]
    narrow = [z.bfloat16() if i in (0, 4, 5, 7, 8) else z.float() for i, z in enumerate(inputs)]
    y, state = in_mode(mode, narrow)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32 and relative_error(y.double(), exact) < 0.03


def test_no_token_sees_a_later_one():
    """Bit for bit: the steps of later tokens are not even looked at."""
    inputs = random_inputs(40, rank=2)
    y = in_mode("recurrent", inputs)[0]
    changed = [torch.cat([z[:, :20], torch.rand_like(z[:, 20:]) * 100], 1) if i not in (2, 6, 7, 8) else z
               for i, z in enumerate(inputs)]
    assert torch.equal(in_mode("recurrent", changed)[0][:, :20], y[:, :20])


@pytest.mark.parametrize("rank", [1, 3])
def test_a_text_in_pieces(rank):
    inputs = random_inputs(50, heads=4, groups=2, rank=rank)
    *main, state, x_before, B_before = inputs
    whole, last = in_mode("chunked", inputs)
    outputs, begin = [], 0
    for end in (7, 8, 30):
        piece = [z[:, begin:end] for z in main]
        y, state = trapezoid(*piece, initial_state=state, x_before=x_before, B_before=B_before, return_state=True)
        x_before, B_before, begin = piece[0][:, -1], piece[4][:, -1], end
        outputs.append(y)
    for t in range(30, 50):
        now = [z[:, t] for z in main]
        y, state = trapezoid_step(*now, state, x_before, B_before)
        x_before, B_before = now[0], now[4]
        outputs.append(y[:, None])
    assert relative_error(torch.cat(outputs, 1), whole) < 1e-10 and relative_error(state, last) < 1e-10


@pytest.mark.parametrize(("rank", "length"), [(1, 1), (1, 65), (3, 20)])
def test_matrix_equals_forward(rank, length):
    x, dt, log_a, lam, B, C, *_ = random_inputs(length, heads=4, groups=2, rank=rank)
    D = torch.randn(4, dtype=torch.float64)
    T = trapezoid_matrix(dt, log_a, lam, B, C, D)
    assert T.shape == (2, 4, rank, rank, length, length)
    y = torch.einsum("bhjits,bsihp->btjhp", T, x)
    assert relative_error(y, trapezoid(x, dt, log_a, lam, B, C) + D[:, None] * x) < 1e-10


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 40), rank=st.integers(1, 4), groups=st.integers(1, 2), shared=st.integers(1, 3),
       chunk_size=st.integers(1, 50), mode=st.sampled_from(MODES))
def test_any_shape(length, rank, groups, shared, chunk_size, mode):
    inputs = random_inputs(length, groups * shared, groups, rank)
    for ours, theirs in zip(in_mode(mode, inputs, chunk_size=chunk_size), loop(*inputs), strict=True):
        assert relative_error(ours, theirs) < 1e-10


def test_gradcheck():
    inputs = [z.requires_grad_() for z in random_inputs(4, rank=2, headdim=2, state=2, batch=1)]
    assert torch.autograd.gradcheck(lambda *z: in_mode("chunked", z, chunk_size=3), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z | {"x": z["x"][:, :, 0]}, "x has shape"),
        (lambda z: z | {"dt": z["dt"][:, :3]}, "dt has shape"),
        (lambda z: z | {"lam": z["lam"].int()}, "lam is torch.int32"),
        (lambda z: z | {"log_a": -z["log_a"]}, "log_a reaches"),
        (lambda z: z | {"B": z["B"].float()}, "B is torch.float32"),
        (lambda z: z | {"C": z["C"][..., :2]}, "C has shape"),
        (lambda z: z | {"mode": "fast"}, "mode is 'fast'"),
        (lambda z: z | {"chunk_size": 0}, "chunk_size is 0"),
        (lambda z: z | {"B_before": z["B"]}, "B_before has shape"),
        (lambda z: z | {"initial_state": z["x"]}, "initial_state has shape"),
        (lambda z: {name: part[:, :0] for name, part in z.items()}, "len = 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    names = ("x", "dt", "log_a", "lam", "B", "C")
    good = dict(zip(names, random_inputs(5, heads=3, rank=2)))
    with pytest.raises(ValueError, match=message) as error:
        trapezoid(**change(good))
    one_line(error)


# The mixer


def make(rank=1, dtype=torch.float64, **changes):
    mixer = Mamba3(**dict(d_model=8, d_state=8, headdim=4, rank=rank, n_groups=2, chunk_size=16) | changes)
    return shaken(mixer).to(dtype)


KINDS = pytest.mark.parametrize("mixer", [{}, {"rank": 3}, {"rope_fraction": 1.0, "n_groups": 1}], ids=str)


def by_complex_state(mixer, u):
    """The mixer with a complex state, whose pairs of channels are turned at each step, and keys that stand still."""
    heads, turned = mixer.n_heads, mixer.turning
    z, x, B, C, dt, rate, lam, turn = mixer.in_proj(u).split(mixer.sizes, -1)
    z, x = (part.unflatten(-1, (heads, -1)) for part in (z, x))
    dt, lam = F.softplus(dt + mixer.dt_bias), lam.sigmoid()
    a = torch.exp(-F.softplus(rate).clamp(min=1e-4) * dt)
    keys = []
    for part, norm, bias in ((B, mixer.B_norm, mixer.B_bias), (C, mixer.C_norm, mixer.C_bias)):
        part = in_heads(norm(part.unflatten(-1, (mixer.rank, mixer.n_groups, -1))), heads) + bias
        keys.append(torch.complex(*part.chunk(2, -1)))
    B, C = keys
    theta = F.pad(math.pi * turn.tanh(), (0, mixer.d_state // 2 - turned))
    gates = torch.polar(a[..., None].expand(*a.shape, theta.shape[-1]), dt[..., None] * theta[:, :, None])
    spread = [torch.ones(1, heads, x.shape[-1]).double() if w is None else w
              for w in (mixer.rank_x, mixer.rank_z, mixer.rank_y)]
    values = x[:, :, None] * spread[0]
    S, outputs, update = 0, [], None
    for t in range(u.shape[1]):
        gate = gates[:, t, :, None]
        new = torch.einsum("brhp,brhn->bhpn", values[:, t].to(B.dtype), B[:, t].conj())
        old = 0 if update is None else ((1 - lam[:, t]) * dt[:, t])[..., None, None] * update
        S = gate * (S + old) + (lam[:, t] * dt[:, t])[..., None, None] * new
        update = new
        outputs.append(torch.einsum("bhpn,brhn->brhp", S, C[:, t]).real)
    y = torch.stack(outputs, 1) + mixer.D[:, None] * values
    y = (y * F.silu(z[:, :, None] * spread[1]) * spread[2]).sum(2)
    return mixer.out_proj(y.flatten(-2))


@KINDS
@pytest.mark.parametrize("mode", MODES)
def test_mixer_has_a_complex_state(mixer, mode):
    mixer = make(**mixer, mode=mode)
    parameters = [p for p in mixer.parameters()]
    u = torch.randn(2, 33, 8, dtype=torch.float64)
    weight = torch.randn_like(u)
    results = [mixer(u), by_complex_state(mixer, u)]
    assert relative_error(*results) < 1e-10
    for ours, theirs in zip(*(torch.autograd.grad((y * weight).sum(), parameters) for y in results), strict=True):
        assert relative_error(ours, theirs) < 1e-8


@KINDS
@pytest.mark.parametrize("split", [0, 1, 20, 33])
def test_step_equals_forward(mixer, split):
    mixer = make(**mixer)
    u = torch.randn(2, 34, 8, dtype=torch.float64)
    whole, last = mixer(u, mixer.init_state(2))
    assert relative_error(whole, mixer(u)) < 1e-12
    state, pieces = mixer.init_state(2), []
    if split:
        y, state = mixer(u[:, :split], state)
        pieces.append(y)
    kept = Mamba3State(*(z.clone() for z in state))
    for u_t in u[:, split:].unbind(1):
        y, new = mixer.step(u_t, state)
        pieces.append(y[:, None])
        if u_t is u[:, split]:
            assert all(torch.equal(a, b) for a, b in zip(state, kept))
        state = new
    assert relative_error(torch.cat(pieces, 1), whole) < 1e-10
    for ours, theirs in zip(state, last, strict=True):
        assert ours.shape == theirs.shape and relative_error(ours, theirs) < 1e-10


@KINDS
def test_padding_is_as_good_as_absent(mixer):
    mixer = make(**mixer)
    u, pads = torch.randn(2, 20, 8, dtype=torch.float64), torch.tensor([3, 7])
    padded = torch.randn(2, 27, 8, dtype=torch.float64)
    for row, count in enumerate(pads):
        padded[row, count : count + 20] = u[row]
    y, state = mixer(padded[:, :23], mixer.init_state(2), padding=torch.tensor([3, 3]))
    alone, last = mixer(padded[:, 3:23], mixer.init_state(2))
    assert relative_error(y[:, 3:], alone) < 1e-12
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(state, last, strict=True))
    y = mixer(padded, padding=pads)
    assert relative_error(y[1, 7:], mixer(u)[1]) < 1e-12


@KINDS
def test_documents_in_a_row_are_documents_apart(mixer):
    mixer = make(**mixer)
    u, starts = torch.randn(1, 40, 8, dtype=torch.float64), torch.zeros(1, 40, dtype=torch.bool)
    cuts = [0, 1, 14, 15, 40]
    starts[0, cuts[:-1]] = True
    apart = torch.cat([mixer(u[:, begin:end]) for begin, end in zip(cuts, cuts[1:])], 1)
    assert relative_error(mixer(u, starts=starts), apart) < 1e-10
    state = mixer(u, mixer.init_state(1))[1]
    assert relative_error(mixer(u, state, starts=starts)[0], apart) < 1e-10
    T = mixer.matrices(u, starts=starts)
    assert not T[..., 14:, :14].any() and not T[..., 1:, :1].any()
    blocks = mixer.matrices(u[:, 15:])
    assert relative_error(T[..., 15:, 15:], blocks) < 1e-10


@KINDS
def test_bfloat16_and_autocast(mixer):
    mixer, u = make(**mixer).float(), torch.randn(2, 20, 8)
    exact = mixer(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mixer(u, mixer.init_state(2))
        y_t, last = mixer.step(u[:, 0], state)
        T = mixer.matrices(u)
    assert relative_error(y.float(), exact) < 0.05 and state.ssm.dtype == state.angle.dtype == torch.float32
    assert y.dtype == y_t.dtype == T.dtype == torch.bfloat16 and last.ssm.dtype == torch.float32
    mixer = mixer.bfloat16()
    y, state = mixer(u.bfloat16(), mixer.init_state(2))
    assert y.dtype == mixer.matrices(u.bfloat16()).dtype == torch.bfloat16 and state.ssm.dtype == torch.float32
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@KINDS
@torch.no_grad()
def test_documents_behind_padding(mixer):
    mixer = make(**mixer)
    u, starts = torch.randn(2, 40, 8, dtype=torch.float64), torch.zeros(2, 40, dtype=torch.bool)
    starts[0, [5, 20]] = True  # the first lies in the padding
    y = mixer(u, padding=torch.tensor([9, 0]), starts=starts)
    apart = torch.cat([mixer(u[:1, 9:20]), mixer(u[:1, 20:])], 1)
    assert relative_error(y[:1, 9:], apart) < 1e-10 and relative_error(y[1:], mixer(u[1:])) < 1e-10


def test_values_and_keys_of_the_token_before_come_together():
    inputs = torch.randn(2, 5, 1, 2, 3), torch.ones(2, 5, 2), -torch.ones(2, 5, 2), torch.ones(2, 5, 2)
    keys = torch.randn(2, 5, 1, 1, 4)
    for more in ({"x_before": torch.randn(2, 1, 2, 3)}, {"B_before": torch.randn(2, 1, 1, 4)}):
        with pytest.raises(ValueError, match="x_before and B_before must be given together") as error:
            trapezoid(*inputs, keys, keys, **more)
        one_line(error)


def test_matrix_of_the_mixer():
    mixer = make()
    u = torch.randn(2, 21, 8, dtype=torch.float64)
    p = mixer.project(u, None)
    y = torch.einsum("bhts,bshp->bthp", mixer.matrix(u), p.x)
    y = mixer.out_proj((y * F.silu(p.z)).flatten(-2))
    assert relative_error(y, mixer(u)) < 1e-10
    with pytest.raises(ValueError, match="rank is 3.*matrices"):
        make(rank=3).matrix(u)


def test_one_rank_is_the_sum_of_ssds():
    mixer = make(rank=3)
    u = torch.randn(2, 21, 8, dtype=torch.float64)
    p = mixer.project(u, None)
    x = mixer.spread(p.x, mixer.rank_x)
    alone = [sum(trapezoid(x[:, :, i : i + 1], p.dt, p.log_a, p.lam, p.B[:, :, i : i + 1], p.C[:, :, j : j + 1])
                 for i in range(3)) for j in range(3)]
    y = trapezoid(x, p.dt, p.log_a, p.lam, p.B, p.C)
    assert relative_error(torch.cat(alone, 2), y) < 1e-10


def test_every_parameter_gets_a_gradient():
    for rank in (1, 2):
        mixer = make(rank=rank)
        mixer(torch.randn(2, 9, 8, dtype=torch.float64)).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [(dict(d_model=0), "d_model is 0"), (dict(rank=0), "rank is 0"), (dict(headdim=3), "headdim is 3"),
     (dict(n_groups=3), "n_groups is 3"), (dict(d_state=7), "d_state is 7"), (dict(d_state=2), "d_state is 2"),
     (dict(rope_fraction=0.3), "rope_fraction is 0.3"), (dict(mode="fast"), "mode is 'fast'"),
     (dict(chunk_size=0), "chunk_size is 0")])
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ValueError, match=message) as error:
        Mamba3(**dict(d_model=8, d_state=8, headdim=4) | sizes)
    one_line(error)


# The language model


def language_model(**changes):
    sizes = dict(vocab_size=VOCAB, d_model=16, n_layer=2, d_state=8, headdim=4, chunk_size=16, tie_embeddings=False)
    return shaken(Mamba3LM(Mamba3Config(**sizes | changes))).double()


MODELS = pytest.mark.parametrize("sizes", [{}, {"rank": 2, "intermediate_size": 24}], ids=str)


@MODELS
def test_prefill_and_steps_equal_forward(sizes):
    model, ids = language_model(**sizes), torch.randint(VOCAB, (2, 30))
    logits = model(ids)
    read, state = model.prefill(ids[:, :17])
    pieces = [read]
    for t in range(17, 30):
        out, state = model.step(ids[:, t], state)
        pieces.append(out[:, None])
    assert relative_error(torch.cat(pieces, 1), logits) < 1e-10
    assert relative_error(model.read(ids, piece=7)[0], logits[:, -1]) < 1e-10


@MODELS
def test_masks_and_generation(sizes):
    model, ids = language_model(**sizes), torch.randint(VOCAB, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert relative_error(model(ids, attention_mask=mask)[0, 5:], model(ids[:1, 5:])[0]) < 1e-10
    written = model.generate(ids, 6)
    assert torch.equal(written[:, -1], model(written[:, :-1])[:, -1].argmax(-1))


@MODELS
def test_files(sizes, tmp_path):
    model, ids = language_model(**sizes).float(), torch.randint(VOCAB, (2, 12))
    model.save_pretrained(tmp_path / "model")
    loaded = Mamba3LM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids), model(ids)) and repr(loaded.config) == repr(model.config)


def test_student_of_mohawk():
    """Nothing has to be changed: a mixer with as many heads as the teacher has a matrix for stage 1."""
    torch.manual_seed(0)
    teacher = Llama(llama_config(num_attention_heads=4, head_dim=4))
    student = Llamba.from_teacher(teacher, start="published", rotation="none", d_state=8)
    for block in student.backbone.layers:
        block.mixer = Mamba3(16, 8, headdim=4, expand=1)
    ids = torch.randint(VOCAB, (4, 20))
    objective = LayerByLayer(teacher, student, match_matrix)
    first = objective(ids, lambda loss: loss.backward())
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    for _ in range(30):
        optimizer.step()
        optimizer.zero_grad()
        last = objective(ids, lambda loss: loss.backward())
    assert (last < first).all()
    before = copy.deepcopy(student.state_dict())
    data = Batches(torch.randint(VOCAB, (8, 20)), 4, 0)
    stages = [Stage(name, 1, 1e-3) for name in ("orientation", "alignment", "distillation")]
    records = distill(teacher, student, data, stages, progress=False)
    assert len(records) == 3 and all(math.isfinite(record["loss"]) for record in records)
    assert not torch.equal(before["backbone.layers.0.mixer.in_proj.weight"],
                           student.state_dict()["backbone.layers.0.mixer.in_proj.weight"].cpu())


# The exercises


CHAPTER = json.loads((Path(__file__).parent.parent / "nbs" / "28_mamba3.ipynb").read_text())["cells"]
PROSE = "".join("".join(cell["source"]) + "\n" for cell in CHAPTER if cell["cell_type"] == "markdown")
SOLUTIONS = re.findall(r"^```python\n(.*?)^```$", PROSE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", SOLUTIONS)
def test_solution_runs(code):
    """With what the chapter imports and defines; each ends in an assertion."""
    names = dict(vars(mamba3))
    for cell in CHAPTER:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.match(r"(from|import|def) ", source):
            exec(source, names)
    exec(code, names)
    assert "assert" in code and len(SOLUTIONS) == 2


# Against the official implementation


@pytest.mark.gpu
def test_official_kernel():
    """`mamba_ssm` turns neighbouring channels, we turn i and i + N/2: the same after a permutation."""
    theirs = pytest.importorskip("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined").mamba3_siso_combined
    torch.manual_seed(0)
    mixer = Mamba3(64, 32, headdim=32, n_groups=1).cuda()
    u = torch.randn(2, 256, 64, device="cuda")
    _, x, B, C, dt, rate, lam, turn = mixer.in_proj(u).split(mixer.sizes, -1)
    p = mixer.project(u, None)
    pairs = torch.arange(32, device="cuda").view(2, 16).T.flatten()
    keys = [norm(z)[:, :, None, pairs].bfloat16() for z, norm in ((B, mixer.B_norm), (C, mixer.C_norm))]
    y = theirs(Q=keys[1], K=keys[0], V=p.x.bfloat16(), ADT=p.log_a.mT.contiguous(), DT=p.dt.mT.contiguous(),
               Trap=lam.mT.contiguous().bfloat16(), Q_bias=mixer.C_bias[0][:, pairs], K_bias=mixer.B_bias[0][:, pairs],
               Angles=turn[:, :, None].expand(-1, -1, mixer.n_heads, -1).float().contiguous(), chunk_size=64)
    ours = trapezoid(p.x[:, :, None], p.dt, p.log_a, p.lam, p.B, p.C)[:, :, 0]
    assert relative_error(y.float(), ours) < 0.02
