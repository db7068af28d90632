"""A start from the teacher: what is exact is exact, what is fitted is the least-squares answer, sizes of all kinds."""

import pytest
import torch
from small import llama_config, one_line, shaken

from llamba_ref.conventions import relative_error
from llamba_ref.data import load_documents, pack, split_documents
from llamba_ref.discrete import DiscreteMamba2
from llamba_ref.evaluate import evaluate
from llamba_ref.llama import Attention, Llama, Rope
from llamba_ref.llamba import Llamba
from llamba_ref.models import load_model
from llamba_ref.rotation import RotaryMamba2
from llamba_ref.start import (
    best_factors,
    fit_head,
    keys_and_queries,
    matching_pairs,
    own_texts,
    start_from_teacher,
    start_mixer,
    write_rows,
)


def pair(kind=RotaryMamba2, d_state=8, d_model=32, head_dim=8, kv_heads=4, bias=False, rope=Rope(), **changes):
    """An attention and a mixer to replace it, in float64."""
    torch.manual_seed(0)
    attention = shaken(Attention(d_model, 4, kv_heads, head_dim, rope, bias)).double()
    sizes = dict(n_v_heads=4, n_qk_heads=4, chunk_size=8, bias=True) | ({"rope": rope} if kind is RotaryMamba2 else {})
    return attention, kind(d_model, d_state, **sizes | changes).double()


def scores_of(mixer, u):
    """C_t . B_s of a mixer, (batch, heads, len, len)."""
    _, B, C, _ = mixer.matrix_factors(u)
    return C.transpose(1, 2) @ B.transpose(1, 2).mT


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rope", [Rope(), Rope(500_000.0, 8.0, 1.0, 4.0, 64), Rope(factor=2.0, linear=True)])
def test_scores_but_those_of_the_free_pair_are_the_teachers(rope, bias, kv_heads):
    attention, mixer = pair(rope=rope, bias=bias, kv_heads=kv_heads)
    u = torch.randn(2, 19, 32, dtype=torch.float64)
    with torch.no_grad():
        B, C = keys_and_queries(mixer, attention)
        write_rows(mixer, torch.zeros(4, 8, 33).double(), B, C)
        q, k = (z.transpose(1, 2) for z in attention.queries_and_keys(u))
        kept = torch.tensor([1, 1, 1, 0] * 2)  # the slowest pair is channels 3 and 7
        expected = (q * kept) @ k.repeat_interleave(4 // kv_heads, 1).mT / 8**0.5
    assert relative_error(scores_of(mixer, u), expected) < 1e-6  # rotary frequencies are float32


@pytest.mark.parametrize("d_state", [9, 12])
def test_with_room_for_the_constant_keys_that_stand_still_keep_every_score(d_state):
    attention, mixer = pair(DiscreteMamba2, d_state)
    u = torch.randn(2, 19, 32, dtype=torch.float64)
    with torch.no_grad():
        B, C = keys_and_queries(mixer, attention)
        write_rows(mixer, torch.zeros(4, 8, 33).double(), B, C)
        q, k = ((u @ z.weight.T).unflatten(-1, (4, 8)).transpose(1, 2) for z in (attention.q_proj, attention.k_proj))
    assert relative_error(scores_of(mixer, u), q @ k.mT / 8**0.5) < 1e-12


@pytest.mark.parametrize("head_dim", [8, 4, 16])
@pytest.mark.parametrize("kind", [DiscreteMamba2, RotaryMamba2])
def test_values_and_outputs_survive(kind, head_dim):
    """The mixer applies its matrices to the teacher's values; where its heads are narrower, to the nearest ones."""
    attention, mixer = pair(kind, head_dim=head_dim, bias=True)
    u = torch.randn(2, 19, 32, dtype=torch.float64)
    with torch.no_grad():
        start_mixer(mixer, attention, u)
        v = attention.project(u, 0, None)[2]
        ours = mixer(u)
        expected = attention.o_proj((mixer.matrix(u) @ v).transpose(1, 2).flatten(2))
    error = relative_error(ours, expected)
    assert error < 1e-7 if head_dim <= 8 else 1e-7 < error < 0.9  # the open gate is 1 in float32


@pytest.mark.parametrize("width", [1, 2])
def test_fit_head_finds_the_weights_of_a_matrix_that_has_some(width):
    torch.manual_seed(0)
    x, B, C = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 50, 5), (2, 3, 50, width), (2, 3, 50, width)))
    place, weights = torch.arange(50), torch.tensor([0.5, -2.0, 1.0, 0.25], dtype=torch.float64)
    fades = (0.9 ** (place[:, None] - place).clamp(min=0).double()).tril()
    matrix = fades * torch.einsum("i,bitn,bisn->bts", weights[:3], C, B) + weights[3] * torch.eye(50)
    decay, found, error = fit_head(matrix, x, B, C, torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64))
    assert decay == 0.9 and relative_error(found, weights) < 1e-5 and error < 1e-5


def test_fit_head_is_the_least_squares_answer():
    """No other weights do better, for the decay that it chose and for the others."""
    torch.manual_seed(0)
    matrix = torch.randn(1, 30, 30).double().softmax(-1).tril()
    x, B, C = (torch.randn(*shape).double() for shape in ((1, 30, 4), (1, 3, 30, 2), (1, 3, 30, 2)))
    decays, place, errors = torch.tensor([0.3, 0.8, 0.95]).double(), torch.arange(30), []
    for decay in decays:
        fades = (decay ** (place[:, None] - place).clamp(min=0)).tril()
        scores = fades * torch.einsum("bitn,bisn->bits", C, B)
        parts = torch.cat([scores, torch.eye(30).double()[None, None]], 1) @ x[:, None]
        solution = torch.linalg.lstsq(parts.flatten(2)[0].T, (matrix @ x).flatten()).solution
        errors.append(((parts[0] * solution[:, None, None]).sum(0) - matrix[0] @ x[0]).norm() / (matrix @ x).norm())
    decay, _, error = fit_head(matrix, x, B, C, decays)
    assert decay == decays[torch.stack(errors).argmin()] and abs(error / min(errors) - 1) < 1e-5


def test_best_factors():
    torch.manual_seed(0)
    for rows, columns in ((30, 20), (5, 20), (20, 5), (5, 5)):  # also fewer rows or columns than the width
        left, right = torch.randn(3, rows, 8).double(), torch.randn(3, 8, columns).double()
        sizes = torch.linalg.svdvals(left @ right)
        for width in (1, 5, 7, 8, 11):
            a, b = best_factors(left, right, width)
            assert a.shape == (3, rows, width) and b.shape == (3, width, columns)
            lost = (a @ b - left @ right).norm(dim=(1, 2))  # of 20 singular values 8 are not zero
            assert ((lost - sizes[:, width:].norm(dim=1)).abs() / sizes.norm(dim=1)).max() < 1e-13


@pytest.mark.parametrize("half", [1, 2, 3, 4, 16, 32])
@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 8, 32, 64])
def test_matching_pairs_have_neighbouring_frequencies(half, wanted):
    pairs = matching_pairs(half, wanted)
    found = [(ours, theirs) for ours, theirs in enumerate(pairs.tolist()) if theirs < half]
    assert len(found) == min(half, wanted) == len({theirs for _, theirs in found})
    for ours, theirs in found:  # exponents of the two frequencies: half a step of the coarser row apart at most
        assert abs(ours / wanted - theirs / half) <= 0.5 / min(half, wanted) + 1e-9


def test_key_and_query_of_a_pair_have_the_same_size():
    attention, mixer = pair()
    start_mixer(mixer, attention, torch.randn(2, 40, 32, dtype=torch.float64))
    rows = torch.cat([mixer.in_proj.weight, mixer.in_proj.bias[:, None]], 1)[32:96].unflatten(0, (2, 4, 2, 4))
    B, C = rows.square().sum((-1, 2)).sqrt()
    assert B.min() > 0 and relative_error(B, C) < 1e-6


@pytest.mark.parametrize("kind, d_state", [
    (DiscreteMamba2, 8), (RotaryMamba2, 8), (RotaryMamba2, 4), (RotaryMamba2, 2)])
def test_the_reported_errors_are_those_of_the_outputs(kind, d_state):
    """Also where the constant turns. And small scores, which make attention nearly uniform, give decays near 1."""
    attention, mixer = pair(kind, d_state)
    with torch.no_grad():
        attention.q_proj.weight.mul_(0.05)
        attention.k_proj.weight.unflatten(0, (4, 2, 4))[:, 0].mul_(3)  # a pair's two channels have different sizes
        u = torch.randn(4, 64, 32, dtype=torch.float64)
        errors = start_mixer(mixer, attention, u)
        x = mixer.project(u, None)[0].x.transpose(1, 2)
        target = attention.matrix(u) @ x
        gap = mixer.matrix(u) @ x - target
        found = (gap.square().sum((0, 2, 3)) / target.square().sum((0, 2, 3))).sqrt()
    assert relative_error(errors, found.float()) < 1e-5
    if d_state == 8:
        assert torch.sigmoid(-mixer.in_proj.bias[-4:]).min() > 0.9 and errors.max() < 0.9


def test_own_texts_are_the_same_each_time():
    teacher = shaken(Llama(llama_config()))
    texts = own_texts(teacher, 3, 10)
    torch.manual_seed(5)
    assert texts.shape == (3, 10) and torch.equal(texts, own_texts(teacher, 3, 10))


@pytest.mark.parametrize("rotation", ["none", "fixed", "learned", "data"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_teacher_can_be_started_from(rotation, dtype):
    """Biases, grouped queries, heads wider than their share, a hybrid; the same student whatever the random state."""
    changes = dict(attention_bias=True, head_dim=16, num_hidden_layers=3)
    teacher, ids = shaken(Llama(llama_config(**changes))).to(dtype), torch.randint(48, (2, 16))
    students = [Llamba.from_teacher(teacher, [1], rotation=rotation, texts=ids, d_state=8) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters()))
    assert students[0](ids).isfinite().all() and {p.dtype for p in students[0].parameters()} == {dtype}
    assert torch.equal(students[0].backbone.layers[1].mixer(ids.new_ones(1, 3, 16).to(dtype)),
                       teacher.backbone.layers[1].mixer(ids.new_ones(1, 3, 16).to(dtype)))


@pytest.mark.parametrize("rotation", ["none", "fixed"])
def test_a_head_that_is_silent(rotation):
    """Such as a pruned one: values of zero, which every matrix maps to zero."""
    teacher, ids = shaken(Llama(llama_config())), torch.randint(48, (2, 16))
    for block in teacher.backbone.layers:
        block.mixer.v_proj.weight.data[:8] = 0  # read by the first two of four heads
    student = Llamba.from_teacher(teacher, rotation=rotation, texts=ids, d_state=8)
    for errors in start_from_teacher(student, teacher, ids):
        assert errors[:2].eq(0).all() and errors[2:].min() > 0
    assert student(ids).isfinite().all()


@pytest.mark.parametrize("rotation", ["none", "fixed"])
def test_training_reaches_all_of_a_state_wider_than_the_keys_of_the_teacher(rotation):
    """Keys and queries of channels for which the teacher has nothing: their product is zero, not both of them."""
    teacher = shaken(Llama(llama_config()))
    wide = 3 * teacher.config.head_dim
    torch.manual_seed(0)
    student = Llamba.from_teacher(teacher, rotation=rotation, d_state=wide)
    ids = torch.randint(teacher.vocab_size, (2, 12))
    logits = student(ids)
    logits.square().mean().backward()
    for block in student.backbone.layers:
        mixer = block.mixer
        rows = slice(mixer.d_inner, mixer.d_inner + mixer.n_heads * wide)
        queries = slice(rows.stop, rows.stop + mixer.n_heads * wide)
        weight, grad = mixer.in_proj.weight, mixer.in_proj.weight.grad
        half = wide // 2 if rotation == "fixed" else wide
        constant = torch.arange(wide).repeat(mixer.n_heads) % half == half - 1  # only biases
        silent = ~weight[queries].any(1) & ~constant
        assert silent.sum() >= mixer.n_heads * (wide - teacher.config.head_dim - 2)
        assert weight[rows].any(1)[silent].all() and grad[queries][silent].any(1).all()
        with torch.no_grad():
            weight[rows] *= ~silent[:, None]
            mixer.in_proj.bias[rows] *= ~silent
    assert torch.equal(student(ids), logits)


def test_bad_texts():
    teacher = shaken(Llama(llama_config()))
    for texts, problem in ((torch.zeros(2, 0).long(), r"has shape \(2, 0\)"),
                           (torch.ones(9).long(), r"has shape \(9,\)"), (torch.ones(2, 9), "has dtype torch.float32"),
                           (torch.full((2, 9), 48), "holds id 48")):
        with pytest.raises(ValueError, match=f"^texts {problem}: ") as error:
            Llamba.from_teacher(teacher, texts=texts, d_state=8)
        one_line(error)


def test_texts_that_are_not_needed():
    with pytest.raises(ValueError, match="^texts were given, and start is 'published'") as error:
        Llamba.from_teacher(Llama(llama_config()), start="published", texts=torch.zeros(2, 9).long(), d_state=8)
    one_line(error)


def test_nothing_to_start():
    """A student that keeps all attention needs no texts, and no numbers of its teacher's."""
    with torch.device("meta"):
        teacher = Llama(llama_config())
    assert Llamba.from_teacher(teacher, [0, 1], d_state=8).device.type == "meta"


def test_mixers_that_cannot_be_started():
    attention, _ = pair()
    without = RotaryMamba2(32, 8, n_v_heads=4, n_qk_heads=4)
    for wrong in (without, RotaryMamba2(32, 8, n_v_heads=4, n_qk_heads=2, bias=True),
                  RotaryMamba2(32, 8, n_v_heads=8, n_qk_heads=8, bias=True)):
        with pytest.raises(ValueError, match="all three must be the same, and the mixer must have biases"):
            start_mixer(wrong, attention.float(), torch.randn(1, 5, 32))
    with pytest.raises(ValueError, match="the mixer's activation is 'silu': it must be 'identity'"):
        start_mixer(pair(activation="silu")[1], attention.double(), torch.randn(1, 5, 32).double())
    teacher, deeper = (Llama(llama_config(num_hidden_layers=layers)) for layers in (2, 3))
    with pytest.raises(ValueError, match="student has 2 layers, teacher 3: they must be the same"):
        start_from_teacher(Llamba.from_teacher(teacher, start="published", d_state=8), deeper)


def test_the_tiny_student_is_near_its_teacher_before_any_training():
    """The claim of the chapter: under 1.6 times the teacher's perplexity, and better than all trivial answers."""
    torch.set_num_threads(1)
    teacher, tokenizer = load_model("tiny")
    blocks = pack(split_documents(load_documents("austen"))[1], tokenizer, 256, max_blocks=8)
    expected = evaluate(teacher, blocks).perplexity
    for rotation in ("none", "fixed"):
        student = Llamba.from_teacher(teacher, rotation=rotation, d_state=32, chunk_size=32)
        assert 1 < evaluate(student, blocks).perplexity / expected < 1.6
    for block in student.backbone.layers:
        block.mixer.out_proj.weight.data.zero_()
    assert evaluate(student, blocks).perplexity / expected > 4


def test_errors_are_reported_for_new_mixers_alone():
    teacher = shaken(Llama(llama_config(num_hidden_layers=3)))
    student = Llamba.from_teacher(teacher, [0], d_state=8)
    errors = start_from_teacher(student, teacher, torch.randint(48, (2, 12)))
    assert len(errors) == 2 and all(e.shape == (4,) and 0 <= e.min() and e.max() <= 1.001 for e in errors)
