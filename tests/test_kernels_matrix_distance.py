"""Stage 1 tile by tile: distances and every gradient against both matrices in float64, extreme gates and scores, and
what cannot run."""

import functools

import pytest
import torch
from small import RELEASED

from llamba_ref.conventions import relative_error
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.llamba import Llamba
from llamba_ref.mamba2 import Mamba2
from llamba_ref.mohawk import LayerByLayer, match_matrix, matrix_distance
from llamba_ref.operators import peak_bytes

pytest.importorskip("triton")

import llamba_ref.kernels.matrix_distance as kernels

GATES = {
    "weak": (-0.1, -0.3, -1.0),
    "strong": (-50.0,),
    "mixed": (0.0, -1e-6, -50.0, -0.3, -1.0, -5000.0, -torch.inf),
    "open": (-1e-6,),
    "shut": (-torch.inf,),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def example(
    length=70,
    batch=2,
    heads=4,
    kv_heads=2,
    groups=2,
    width=16,
    state=16,
    gates="weak",
    skip=True,
    sharp=1.0,
    dtype=torch.float32,
):
    """q, k, log_a, B, C and D (None without `skip`); scores are `sharp` squared times those of random numbers."""
    def normal(*shape):
        return torch.randn(shape, device=DEVICE)

    q, k = (sharp * normal(batch, length, n, width) for n in (heads, kv_heads))
    B, C = normal(batch, length, groups, state) / state, normal(batch, length, groups, state)
    log_a = torch.tensor(GATES[gates], device=DEVICE)[
        torch.randint(len(GATES[gates]), (batch, length, heads), device=DEVICE)
    ]
    return [q.to(dtype), k.to(dtype), log_a, B.to(dtype), C.to(dtype), normal(heads) if skip else None]


def run(inputs, backend, **options):
    """Distances, and the gradients of log_a, B, C and D for an upstream gradient that differs by head."""
    inputs = [None if z is None else z.detach().requires_grad_() for z in inputs]
    distance = matrix_distance(*inputs, backend=backend, **options)
    weight = torch.linspace(-1, 2, distance.numel(), dtype=distance.dtype, device=distance.device).view_as(distance)
    (distance * weight).sum().backward()
    assert inputs[0].grad is None and inputs[1].grad is None
    return [distance.detach(), *(z.grad for z in inputs[2:] if z is not None)]


def compare(inputs, tolerance=1e-5, **options):
    """Every result of the kernel against the matrices in float64."""
    ours = run(inputs, "triton", **options)
    theirs = run([None if z is None else z.double() for z in inputs], "naive", **options)
    for name, out, ref in zip(("distance", "log_a", "B", "C", "D"), ours, theirs, strict=False):
        assert relative_error(out, ref) < tolerance, name
    assert [z.dtype for z in ours] == [torch.float32, *(z.dtype for z in inputs[2:] if z is not None)]


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 130])
def test_against_the_matrices(length):
    compare(example(length))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("skip", [False, True])
def test_gates(gates, skip):
    compare(example(gates=gates, skip=skip))


@pytest.mark.parametrize("gates", ["open", "mixed"])
def test_many_tokens(gates):
    compare(example(500, batch=1, heads=1, kv_heads=1, groups=1, gates=gates))


@pytest.mark.parametrize("heads,kv_heads,groups", [(1, 1, 1), (4, 1, 4), (4, 4, 1), (6, 3, 2)])
def test_shared_keys(heads, kv_heads, groups):
    """Queries that share keys, heads that share B and C, each in its own way."""
    compare(example(heads=heads, kv_heads=kv_heads, groups=groups))


@pytest.mark.parametrize("width,state", [(17, 33), (128, 16), (24, 128), (100, 50)])
def test_widths(width, state):
    compare(example(66, batch=1, width=width, state=state))


@pytest.mark.parametrize("tile", [None, (16, 16), (16, 64)])
@pytest.mark.parametrize("length, edges", [(5, [0, 1, 2, 3, 4]), (70, [1, 64]), (130, [3, 4, 64, 100])])
def test_documents(length, edges, tile, monkeypatch):
    """Both matrices are block diagonal; whole tiles of a row lie in other documents."""
    if tile:
        monkeypatch.setattr(kernels, "_tiles", lambda q, B: (tile, 4))
    starts = torch.zeros(2, length, dtype=torch.bool, device=DEVICE)
    starts[:, edges[:2]] = True
    starts[0, edges] = True
    compare(example(length, heads=2, kv_heads=1, groups=1, gates="mixed"), starts=starts)


def test_saturated_softmax():
    inputs = example(sharp=5.0)
    scores = torch.einsum("bthd,bshd->bhts", inputs[0], inputs[1].repeat_interleave(2, 2)) / 4
    assert scores.abs().max() > 100
    compare(inputs)


def test_scale():
    compare(example(20), scale=2.5)
    compare(example(20), scale=0.0)  # a plain average


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 64)])
def test_other_tiles(tile, monkeypatch):
    """The tiles of other GPUs: owned rows that are more or fewer than those of a step."""
    monkeypatch.setattr(kernels, "_tiles", lambda q, B: (tile, 4))
    compare(example(75, batch=1, heads=2, kv_heads=1, gates="mixed"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    compare(example(dtype=dtype), tolerance=1e-2)


def test_types_may_differ():
    """The teacher in half precision, the student not; log_a and D as autocast may give them."""
    q, k, log_a, B, C, D = example(20)
    compare([q.bfloat16(), k.bfloat16(), log_a.bfloat16(), B, C, D.bfloat16()], tolerance=1e-2)
    compare([q.bfloat16(), k.bfloat16(), log_a, B, C, D])


def test_not_contiguous():
    def strange(z):
        return z if z.ndim == 1 else z.transpose(1, -1).contiguous().transpose(1, -1)

    inputs = example(40)
    others = [strange(z) for z in inputs]
    assert not any(z.is_contiguous() for z in others[:-1])
    for out, ref in zip(run(others, "triton"), run(inputs, "triton"), strict=True):
        assert torch.equal(out, ref)


def test_twice_the_same():
    inputs = example(70, batch=1, gates="mixed")
    assert all(torch.equal(*pair) for pair in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True))


@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_no_nan_on_the_target(backend):
    """A teacher that sees one token, and a student that is the identity: distance 0, gradient 0."""
    q, k, log_a, B, C, _ = example(1)
    inputs = [q, k, log_a, torch.zeros_like(B), C, torch.ones(4, device=DEVICE)]
    distance, *gradients = run(inputs, backend)
    assert (distance == 0).all() and all((grad == 0).all() for grad in gradients)


def test_nothing_is_let_through_a_shut_gate():
    """Gates that are zero in float32 have no gradient, not the rounding error of one; nor has the first, which fades
    nothing."""
    inputs = example(60, gates="mixed")
    _, log_a, *_ = run(inputs, "triton")
    assert (log_a[inputs[2] < -104] == 0).all() and (log_a[:, 0] == 0).all() and log_a.isfinite().all()


def test_operations_are_registered_well():
    q, k, log_a, B, C, D = example(20, batch=1, heads=2, kv_heads=1, groups=1)
    student = [z.requires_grad_() for z in (log_a, B, C, D)]
    torch.library.opcheck(kernels.matrix_distance_op, (q, k, *student, 0.25))
    inputs = [z.detach() for z in (q, k, *student)]
    distance, lse = kernels.matrix_distance_op(*inputs, 0.25)
    torch.library.opcheck(
        kernels.matrix_distance_backward_op, (torch.ones_like(distance), distance, lse, *inputs, 0.25)
    )


def test_compiles_whole():
    inputs = [z.requires_grad_() for z in example(20)]
    compiled = torch.compile(functools.partial(matrix_distance, backend="triton"), fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, functools.partial(matrix_distance, backend="triton")):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.sum(), inputs[2:])])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# --- memory

def test_memory_grows_with_the_length():
    peaks = {
        backend: [peak_bytes(lambda: run(example(length, 1, 1, 1, 1), backend)) for length in (256, 512)]
        for backend in ("naive", "triton")
    }
    assert peaks["naive"][1] > 3.7 * peaks["naive"][0]
    assert peaks["triton"][1] < 2.1 * peaks["triton"][0] and peaks["triton"][1] < 0.2 * peaks["naive"][1]


# --- in stage 1

def models(mixer=None, **sizes):
    """A teacher whose heads are 16 wide, and its student."""
    teacher = Llama(LlamaConfig(vocab_size=40, hidden_size=64, intermediate_size=40, num_hidden_layers=2,
                                num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                                tie_word_embeddings=True)).to(DEVICE)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    student = Llamba.from_teacher(teacher, d_state=16, chunk_size=8, **RELEASED).to(DEVICE)
    for block in student.backbone.layers if mixer else ():
        block.mixer = mixer(64, **sizes).to(DEVICE)
    return teacher, student


def stage_1(teacher, student, input_ids, backend):
    """Losses and gradients of a step."""
    student.zero_grad()
    objective = LayerByLayer(teacher, student, functools.partial(match_matrix, backend=backend))
    losses = objective(input_ids, lambda loss: loss.backward())
    return {"losses": losses} | {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mixer", [None, functools.partial(Mamba2, d_state=16, headdim=32, n_groups=2)])
def test_a_step_of_stage_1(mixer):
    teacher, student = models(mixer)
    input_ids = torch.randint(40, (2, 33), device=DEVICE)
    ours, theirs = (
        stage_1(teacher, student, input_ids, "triton"),
        stage_1(teacher.double(), student.double(), input_ids, "naive"),
    )
    assert ours.keys() == theirs.keys() and len(ours) > 8
    for name in ours:
        assert relative_error(ours[name], theirs[name]) < 1e-5, name
    assert all(p.grad is None for p in teacher.parameters())


def test_half_precision_in_stage_1():
    teacher, student = models()
    input_ids = torch.randint(40, (2, 33), device=DEVICE)
    theirs = stage_1(teacher, student, input_ids, "naive")
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = stage_1(teacher, student, input_ids, "triton")
    assert relative_error(ours["losses"], theirs["losses"]) < 1e-2


class Other(Mamba2):
    """A mixer with a matrix of its own."""

    def matrix(self, u):
        return 2 * super().matrix(u)


@pytest.mark.parametrize("mixer,sizes,message", [
    (Other, {"d_state": 16, "headdim": 32}, "an SSDMixer with Attention, but Other has a matrix of its own"),
    (Mamba2, {"d_state": 16, "headdim": 16}, "the student has 8 heads, the teacher 4"),
    (Mamba2, {"d_state": 8, "headdim": 32}, "widths of 16 to 128, here state = 8"),
])  # fmt: skip
def test_pairs_that_need_their_matrices(mixer, sizes, message):
    teacher, student = models(mixer, **sizes)
    block, layer = student.backbone.layers[0], next(iter(teacher.walk(torch.randint(40, (1, 9), device=DEVICE))))
    with pytest.raises(RuntimeError, match=f"backend='triton': .*{message}"):
        match_matrix(block, layer, backend="triton")
    if "heads" not in message:
        assert match_matrix(block, layer).isfinite()


# --- what is refused

def test_auto_is_naive_on_a_cpu():
    inputs = [None if z is None else z.cpu() for z in example(20)]
    assert torch.equal(matrix_distance(*inputs), matrix_distance(*inputs, backend="naive"))


@pytest.mark.parametrize("change,message", [
    ({"width": 8}, "kernel matrix_distance needs widths of 16 to 128, here width = 8"),
    ({"state": 8}, "here state = 8; use backend='naive' or 'auto'"),
    ({"state": 160}, "here state = 160"),
    ({"dtype": torch.float64}, "kernel matrix_distance computes in float32, but an argument is torch.float64"),
])  # fmt: skip
def test_what_cannot_run_says_so(change, message):
    inputs = example(9, **change)
    with pytest.raises(RuntimeError, match=f"backend='triton': .*{message}"):
        matrix_distance(*inputs, backend="triton")
    assert matrix_distance(*inputs).isfinite().all()


def without(place):
    return lambda inputs: [z[:, 1:] if i == place else z for i, z in enumerate(inputs)]


@pytest.mark.parametrize("backend", ["naive", "triton"])
@pytest.mark.parametrize("change,message", [
    (without(1), r"k has shape \(2, 8, 2, 16\): it must be \(batch = 2, len = 9, kv_heads, width = 16\)"),
    (without(2), r"log_a has shape \(2, 8, 4\): it must be \(batch = 2, len = 9, heads = 4\)"),
    (without(4), r"C has shape \(2, 8, 2, 16\): it must be \(batch = 2, len = 9, groups = 2, state = 16\)"),
    (lambda z: [*z[:5], z[5][1:]], r"D has shape \(3,\): it must be \(heads = 4\)"),
    (lambda z: [z[0], z[1][:, :, [0, 0, 0]], *z[2:]], "k has kv_heads = 3: it must be a divisor of heads = 4"),
    (lambda z: [*z[:3], *(m[:, :, [0, 0, 0]] for m in z[3:5]), z[5]],
     "B has groups = 3: it must be a divisor of heads = 4"),
    (lambda z: [*z[:2], -z[2], *z[3:]], "log_a reaches 1: it is the log of a decay"),
    (lambda z: [z[0].long(), *z[1:]], "q is torch.int64: it must be a tensor of real floating-point numbers"),
    (lambda z: [*(m[:, :0] for m in z[:5]), z[5]], "q has len = 0: it must hold at least one token"),
])  # fmt: skip
def test_wrong_arguments(change, message, backend):
    with pytest.raises(ValueError, match=message):
        matrix_distance(*change(example(9)), backend=backend)


@pytest.mark.parametrize("scale", ["big", float("nan")])
def test_wrong_scale(scale):
    with pytest.raises(ValueError, match="scale is .*: it must be a finite number or None"):
        matrix_distance(*example(9), scale=scale)


# --- on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("width,state", [(64, 64), (128, 64), (128, 128), (17, 33)])
@pytest.mark.parametrize("gates", ["weak", "mixed"])
@pytest.mark.parametrize("dtype,precision,tolerance", [
    (torch.float32, "highest", 1e-5), (torch.float32, "high", 1e-3),
    (torch.float16, "highest", 1e-2), (torch.bfloat16, "highest", 1e-2),
])  # fmt: skip
def test_on_a_gpu(dtype, precision, tolerance, gates, width, state):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        compare(example(700, width=width, state=state, gates=gates, dtype=dtype), tolerance)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu():
    inputs = example(300)
    assert torch.equal(matrix_distance(*inputs), matrix_distance(*inputs, backend="triton"))
