"""MOHAWK: the losses, layer by layer, what each stage reads and writes, every kind of student, constant memory."""

import copy
import math
import weakref
from contextlib import nullcontext
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from small import RELEASED, HostReads
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llamba_ref import mohawk, training
from llamba_ref.conventions import relative_error
from llamba_ref.data import Batch
from llamba_ref.decoder import Backbone, Decoder, with_mixers
from llamba_ref.llama import Attention, Llama, LlamaConfig
from llamba_ref.llamba import DiscreteMamba2, Llamba
from llamba_ref.mohawk import (
    OBJECTIVES,
    EndToEnd,
    LayerByLayer,
    alignment_loss,
    comparable,
    distill,
    distillation_loss,
    match_matrix,
    match_output,
    orientation_loss,
)
from llamba_ref.operators import unchecked
from llamba_ref.plots import draw_matrices
from llamba_ref.training import Stage, reached

VOCAB, LENGTH, BATCH = 40, 20, 4
NAMES = ["orientation", "alignment", "distillation"]


def make_teacher(layers=3, heads=4, kv_heads=2, width=24, vocab=VOCAB, seed=0):
    """A small Llama with grouped queries whose weights are large enough that its layers do something."""
    torch.manual_seed(seed)
    teacher = Llama(LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=40, num_hidden_layers=layers,
                                num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width // heads,
                                tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher


def pair(keep_attention=(), dtype=torch.float32, **sizes):
    """A teacher and its student."""
    teacher = make_teacher(**sizes)
    torch.manual_seed(1)
    return teacher.to(dtype), Llamba.from_teacher(
        teacher, keep_attention, d_state=6, chunk_size=8, **RELEASED
    ).to(dtype)


def rows(batch=BATCH, length=LENGTH, seed=3):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


class Data:
    """The same batch again and again, or new ones."""

    def __init__(self, new=False):
        self.new, self.step = new, 0

    def next(self):
        self.step += self.new
        return rows(seed=3 + self.step)

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def cpu():
    return Accelerator(cpu=True)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(teacher, student, stages, data=None, **options):
    return distill(teacher, student, data or Data(), stages, accelerator=cpu(), progress=False, **options)


# --- the losses

def test_orientation_loss_by_loops():
    student, teacher = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    total = 0.0
    for b in range(2):
        for h in range(3):
            total += math.sqrt(
                sum((student[b, h, t, s].item() - teacher[b, h, t, s].item()) ** 2 for t in range(5) for s in range(5))
            )
    assert abs(orientation_loss(student, teacher).item() - total / 6) < 1e-6 * total


def test_alignment_loss_by_loops():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    total = 0.0
    for b in range(2):
        for t in range(3):
            total += math.sqrt(sum((student[b, t, c].item() - teacher[b, t, c].item()) ** 2 for c in range(5)))
    assert abs(alignment_loss(student, teacher).item() - total / 6) < 1e-6 * total


def test_distillation_loss_by_loops():
    student, teacher = 3 * torch.randn(2, 3, 5), 3 * torch.randn(2, 3, 5)
    total = 0.0
    for b in range(2):
        for t in range(3):
            p, q = ([math.exp(value) for value in logits[b, t].tolist()] for logits in (teacher, student))
            total -= sum(x / sum(p) * math.log(y / sum(q)) for x, y in zip(p, q))
    assert abs(distillation_loss(student, teacher).item() - total / 6) < 1e-6 * total


def test_the_floor_of_distillation_is_the_entropy():
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert relative_error(distillation_loss(logits + 5, logits), entropy) < 1e-12
    assert distillation_loss(logits + torch.randn_like(logits), logits) > entropy


@pytest.mark.parametrize("at_once", [7 * VOCAB, VOCAB, 1])
def test_stage_3_in_chunks_is_stage_3(monkeypatch, at_once):
    """Loss and every gradient, in float64, whether all logits are alive at a time or those of 7 tokens or of one."""
    teacher, student = pair(dtype=torch.float64)
    whole = distillation_loss(student(rows()), teacher(rows()).detach())
    whole.backward()
    theirs = gradients(student)
    student.zero_grad()
    monkeypatch.setattr(training, "LOGITS", at_once)
    losses = []
    EndToEnd(teacher, student)(rows(), lambda loss: (losses.append(loss.detach()), (3 * loss).backward()))
    ours = gradients(student)
    assert len(losses) == 1 and relative_error(losses[0], whole) < 1e-14
    assert ours.keys() == theirs.keys() and all(relative_error(ours[name], 3 * theirs[name]) < 1e-12 for name in ours)
    assert all(p.grad is None for p in teacher.parameters())


LOSSES = [orientation_loss, alignment_loss, distillation_loss]


@pytest.mark.parametrize("loss,shape", [*zip(LOSSES, [(2, 2, 3, 3), (2, 3, 4), (2, 3, 4)])])
def test_gradcheck(loss, shape):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(loss, inputs)
    assert loss(*inputs).dtype == torch.float64


@pytest.mark.parametrize("loss,shape", [(orientation_loss, (2, 2, 3, 3)), (alignment_loss, (2, 3, 4))])
def test_no_nan_on_the_target(loss, shape):
    student = torch.randn(shape, requires_grad=True)
    loss(student, student.detach().clone()).backward()
    assert (student.grad == 0).all()


@pytest.mark.parametrize("loss,shape", [*zip(LOSSES, [(1, 2, 30, 30), (1, 30, 40), (1, 30, 40)])])
def test_half_precision_is_only_in_the_inputs(loss, shape):
    student, teacher = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(2))
    out = loss(student, teacher)
    assert out.dtype == torch.float32
    assert relative_error(out, loss(student.double(), teacher.double())) < 1e-6


@pytest.mark.parametrize("loss,what,size", [*zip(LOSSES, ["matrix", "output", "logits"], [4, 3, 3])])
def test_shapes_that_differ_are_named(loss, what, size):
    ours, theirs = (2, 3, 4, 4)[:size], (2, 1, 4, 4)[:size]
    with pytest.raises(ValueError) as error:
        loss(torch.zeros(ours), torch.zeros(theirs))  # would broadcast
    assert str(error.value) == f"student's {what} has shape {ours}, teacher's {theirs}: they must be the same"


def test_comparable_takes_the_wider_type():
    ours, theirs = comparable("x", torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64))
    assert ours.dtype == theirs.dtype == torch.float64


# --- layer by layer

@pytest.mark.parametrize("match", [match_matrix, match_output])
@pytest.mark.parametrize("keep_attention", [(), (1,)])
def test_layer_by_layer_is_the_gradient_of_the_sum(match, keep_attention):
    teacher, student = pair(keep_attention, torch.float64)
    objective, losses = LayerByLayer(teacher, student, match), []
    one_by_one = objective(rows(), lambda loss: loss.backward())
    ours = gradients(student)
    student.zero_grad()
    objective(rows(), losses.append)
    torch.stack(losses).sum().backward()
    theirs = gradients(student)
    assert ours.keys() == theirs.keys() and len(ours) > 0
    assert all(relative_error(ours[name], theirs[name]) < 1e-10 for name in ours)
    assert relative_error(one_by_one, torch.stack(losses)) < 1e-6


def test_losses_by_hand():
    """Both stages written out: the teacher's hidden state goes into every layer, block after block."""
    teacher, student = pair(dtype=torch.float64)
    orientation = LayerByLayer(teacher, student, match_matrix)(rows(), lambda loss: None)
    alignment = LayerByLayer(teacher, student, match_output)(rows(), lambda loss: None)
    with torch.no_grad():
        h = teacher.backbone.embedding(rows())
        for index, (ours, theirs) in enumerate(zip(student.backbone.layers, teacher.backbone.layers)):
            T, A = ours.mixer.matrix(ours.input_layernorm(h)), theirs.mixer.matrix(theirs.input_layernorm(h))
            assert relative_error(orientation[index], (T - A).square().sum((-1, -2)).sqrt().mean().float()) < 1e-6
            target = theirs(h)
            assert relative_error(alignment[index], (ours(h) - target).square().sum(-1).sqrt().mean().float()) < 1e-6
            h = target
        assert relative_error(teacher.head(h), teacher(rows())) < 1e-12  # so the last target is before the final norm


def test_the_last_target_is_before_the_final_norm():
    """A final norm that scales by a million changes no target."""
    teacher, student = pair()
    before = LayerByLayer(teacher, student, match_output)(rows(), lambda loss: None)
    with torch.no_grad():
        teacher.backbone.final_layernorm.weight.mul_(1e6)
    assert torch.equal(LayerByLayer(teacher, student, match_output)(rows(), lambda loss: None), before)


def test_hidden_states_of_transformers_are_our_targets_but_for_the_last(tmp_path):
    from transformers import LlamaForCausalLM

    teacher = make_teacher()
    teacher.save_pretrained(tmp_path / "teacher")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float32)
    with torch.no_grad():
        hidden = theirs(rows(), output_hidden_states=True).hidden_states[1:]
        targets = [layer.output for layer in teacher.walk(rows())]
        assert all(relative_error(ours, theirs) < 1e-5 for ours, theirs in zip(targets[:-1], hidden[:-1], strict=True))
        assert relative_error(targets[-1], hidden[-1]) > 0.1
        assert relative_error(teacher.backbone.final_layernorm(targets[-1]), hidden[-1]) < 1e-5


def test_layers_do_not_see_each_other():
    """What a layer of the student is, changes no other layer's loss: every layer reads the teacher's hidden state."""
    teacher, student = pair()
    before = LayerByLayer(teacher, student, match_output)(rows(), lambda loss: None)
    with torch.no_grad():
        for parameter in student.backbone.layers[1].parameters():
            parameter.add_(torch.randn_like(parameter))
    after = LayerByLayer(teacher, student, match_output)(rows(), lambda loss: None)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and before[1] != after[1]


class Kept:
    """A tensor that autograd saves; it dies with the graph."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("at_once", [False, True])
def test_memory_does_not_grow_with_depth(at_once):
    """At most a constant number of (len, len) tensors is kept for a backward pass, unless losses are summed first."""
    peaks = []
    for depth in (2, 6):
        teacher, student = pair(layers=depth)
        alive, counts, losses = weakref.WeakSet(), [], []

        def keep(tensor):
            alive.add(kept := Kept(tensor))
            return kept

        def ready(loss):
            counts.append(len({k.tensor.data_ptr() for k in alive if k.tensor.shape[-2:] == (LENGTH, LENGTH)}))
            losses.append(loss) if at_once else loss.backward()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
            LayerByLayer(teacher, student, match_matrix)(rows(), ready)
        peaks.append(max(counts))
        assert len(counts) == depth and counts[0] > 0
        if not at_once:
            assert not alive  # nothing outlives the walk
    assert peaks[1] >= 2.5 * peaks[0] if at_once else peaks[1] == peaks[0]


def test_one_view_at_a_time():
    """While a layer is looked at, nothing of the layers before it is alive: neither views nor losses' graphs."""
    teacher, student = pair(layers=5)
    views = []

    def match(block, layer):
        views.append(weakref.ref(layer))
        assert sum(view() is not None for view in views) <= 2  # this one, and the one that the loop is about to let go
        return match_matrix(block, layer)

    LayerByLayer(teacher, student, match)(rows(), lambda loss: loss.backward())
    assert len(views) == 5 and not any(view() is not None for view in views)


# --- who is trained

@pytest.mark.parametrize("name", NAMES)
def test_only_the_student_gets_gradients(name):
    teacher, student = pair()
    OBJECTIVES[name](teacher, student)(rows(), lambda loss: loss.backward())
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())


def trains(name):
    teacher, student = pair()
    return {
        key.removeprefix("backbone.layers.1.")
        for key, n in reached(student, OBJECTIVES[name](teacher, student), rows()).items()
        if n and (key.startswith("backbone.layers.1.") or "layers" not in key)
    }


def test_what_orientation_trains():
    assert trains("orientation") == {
        "input_layernorm.weight",
        "mixer.in_proj.weight",
        "mixer.conv1d.weight",
        "mixer.conv1d.bias",
        "mixer.D",
    }


def test_what_alignment_trains():
    block = {name for name, _ in pair()[1].backbone.layers[1].named_parameters()}
    assert trains("alignment") == block  # the MLP and both norms among it


def test_what_distillation_trains():
    teacher, student = pair()
    counts = reached(student, OBJECTIVES["distillation"](teacher, student), rows())
    assert sum(counts.values()) == sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize("name", [*NAMES, "language"])
def test_distill_leaves_the_teacher_alone(name):
    teacher, student = pair()
    teacher.backbone.embedding.weight.requires_grad_(False)
    before, flags, fresh = weights(teacher), [p.requires_grad for p in teacher.parameters()], weights(student)
    run(teacher, student, [Stage(name, 2, 1e-2)])
    assert equal(weights(teacher), before) and not equal(weights(student), fresh)
    assert [p.requires_grad for p in teacher.parameters()] == flags
    assert all(p.grad is None for p in teacher.parameters())


def test_compiled_blocks_learn_the_same(monkeypatch):
    """Traced whole, forward and backward, in all stages."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile(block, backend="aot_eager", fullgraph=True))
    stages, found = [Stage(name, 2, 1e-3) for name in NAMES], []
    for compiled in (False, True):
        torch.manual_seed(0)
        teacher, student = pair()
        run(teacher, student, stages, compile=compiled)
        found.append(weights(student))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(*(part.values() for part in found)))
    assert teacher.backbone.layers[0]._compiled_call_impl is not None


# --- on a GPU, every look at a number is a wait


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_more_steps_are_no_more_looks(monkeypatch, name, recompute):
    """What is looked at in a run is looked at before its first step. AdamW, the check of the ids and the mean of the
    losses, one look a step, read on the host, wherever the model is."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: None)
    monkeypatch.setattr(training, "check_ids", lambda *given, **marks: None)
    counts = []
    for steps in (1, 4):
        teacher, student = pair(keep_attention=[1])
        student.backbone.recompute = recompute
        with HostReads() as looks:
            run(teacher, student, [Stage(name, steps, 1e-3)], micro_batch_size=2)
        counts.append(looks.count)
    assert counts[0] == counts[1] - 3 > 0


@pytest.mark.parametrize("name, marked, looks", [
    *[(name, False, 0) for name in NAMES], ("orientation", True, 0), ("alignment", True, 10), ("distillation", True, 6),
    ("language", False, 5), ("language", True, 5)])
def test_looks_of_a_micro_batch(monkeypatch, name, marked, looks):
    """None on plain text in MOHAWK's stages. To pick tokens out, their number has to be known on the host."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: None)
    teacher, student = pair()
    objective, stage = OBJECTIVES[name](teacher, student), Stage(name, 1, 1e-3)
    batch = Batch(rows(), asked=torch.rand(BATCH, LENGTH) < 0.5 if marked else None)
    optimizer = training.optimizer_for(student, stage)
    for pieces in (1, 2, 4):
        with HostReads() as seen, unchecked():
            training.train_step(student, stage, objective, batch, optimizer, cpu(), BATCH // pieces, "here")
        assert seen.count == looks * pieces


@pytest.mark.parametrize("name", NAMES)
def test_a_step_fetches_its_numbers_together(monkeypatch, name):
    """Losses and norm come in one piece: `tolist` is one wait."""
    teacher, student = pair()
    objective, stage = OBJECTIVES[name](teacher, student), Stage(name, 1, 1e-3)
    fetched, tolist = [], torch.Tensor.tolist
    optimizer = training.optimizer_for(student, stage)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda z: fetched.append(len(z)) or tolist(z))
    losses, norm = training.train_step(student, stage, objective, rows(), optimizer, cpu(), 2, "here")
    assert fetched == [len(objective.parts) + 1]
    assert losses.shape == (len(objective.parts),) and losses.device.type == "cpu" and isinstance(norm, float)


def test_what_is_run_again_is_trusted_in_any_thread():
    """The backward pass of a GPU has a thread of its own, in which blocks are run again."""
    _, student = pair()
    student.backbone.recompute, counts = True, []

    def backward(loss):
        with HostReads() as looks:
            loss.backward()
        counts.append(looks.count)

    for trust in (unchecked, nullcontext):
        with trust():
            loss = student.hidden(rows()).sum()
        thread = Thread(target=backward, args=(loss,))
        thread.start()
        thread.join()
    assert counts[0] == 0 < counts[1]


def test_compiled_whole_with_blocks_that_are_run_again():
    """torch.compile traces through the recomputation: one graph, the same gradients."""
    _, student = pair()
    found = []
    for recompute, backend in ((False, None), (True, "aot_eager")):
        student.backbone.recompute = recompute
        run = torch.compile(student.backbone.forward, backend=backend, fullgraph=True) if backend else student.backbone
        student.zero_grad()
        run(rows()).pow(2).sum().backward()
        found.append(gradients(student))
    assert all(relative_error(found[1][name], gradient) < 1e-5 for name, gradient in found[0].items())


@pytest.mark.parametrize("name", [*NAMES, "language"])
@pytest.mark.parametrize("wrong", [VOCAB, -1])
@pytest.mark.parametrize("step", [0, 1])
def test_wrong_ids_are_refused_on_the_host(name, wrong, step):
    teacher, student = pair()
    batches = iter([rows()] * step + [torch.full((2, 5), wrong)])
    data = Data()
    data.next = lambda: next(batches)
    with pytest.raises(ValueError, match=f"^input_ids holds id {wrong}: ids must be in"):
        run(teacher, student, [Stage(name, 3, 0.1)], data)
    assert next(batches, None) is None


@pytest.mark.parametrize("name", NAMES)
def test_vocabularies_that_differ_are_refused(name):
    teacher, _ = pair()
    _, student = pair(vocab=VOCAB + 8)
    with pytest.raises(ValueError, match="token ids"):
        OBJECTIVES[name](teacher, student)


def test_ids_are_checked_against_every_model_that_reads_them():
    """An objective of one's own may have models with vocabularies of their own: an id has to be known to all."""
    small, large = make_teacher(), make_teacher(vocab=VOCAB + 8)
    data = SimpleNamespace(next=lambda: torch.full((2, 5), VOCAB))
    device = torch.device("cpu")
    assert len(training.next_batch(data, [large], device)) == 2
    with pytest.raises(ValueError, match=rf"holds id {VOCAB}: ids must be in \[0, {VOCAB}\)"):
        training.next_batch(data, [large, small], device)


def test_a_batch_travels_from_pinned_memory(monkeypatch):
    """To a GPU, and without waiting; to any other device as it is."""
    pinned, moved = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda z: pinned.append(z) or z)
    monkeypatch.setattr(torch.Tensor, "to", lambda z, device, non_blocking: moved.append((device, non_blocking)) or z)
    batch = Batch(rows(), starts=torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    for kind in ("cuda", "mps", "cpu"):
        given = training.next_batch(SimpleNamespace(next=lambda: batch), [make_teacher()], torch.device(kind))
        assert torch.equal(given.ids, batch.ids) and given.starts is batch.starts
        assert moved == 2 * [(torch.device(kind), kind == "cuda")] and len(pinned) == 2 * (kind == "cuda")
        pinned.clear()
        moved.clear()


class Kernels(TorchDispatchMode):
    """The names of the operations of this package's kernels that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "llamba_ref":
            self.names.add(operation.name().removeprefix("llamba_ref::"))
        return operation(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name, kernel", [("orientation", "matrix_distance"), ("alignment", "ssd"),
                                          ("distillation", "ssd")])
def test_a_gpu_is_waited_for_once(monkeypatch, name, kernel, recompute):
    """With CUDA itself as the judge: it raises at any wait but that for the numbers of the step. The widths are such
    that kernels run."""
    teacher = make_teacher(width=64)
    student = Llamba.from_teacher(teacher, d_state=16, chunk_size=16, **RELEASED)
    teacher, student = teacher.cuda(), student.cuda()
    student.backbone.recompute = recompute
    objective, stage = OBJECTIVES[name](teacher, student), Stage(name, 3, 1e-3)
    accelerator, optimizer = Accelerator(), training.optimizer_for(student, stage)
    data, tolist, fetched = Data(), torch.Tensor.tolist, []

    def fetch(z):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        fetched.append(len(z))
        numbers = tolist(z)
        torch.cuda.set_sync_debug_mode(before)
        return numbers

    def step():
        batch = training.next_batch(data, objective.models.values(), accelerator.device)
        with unchecked():
            training.train_step(student, stage, objective, batch, optimizer, accelerator, 2, "here")

    monkeypatch.setattr(torch.Tensor, "tolist", fetch)
    with Kernels() as seen:
        step()  # compiles, allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fetched == 2 * [len(objective.parts) + 1] and {kernel} <= seen.names


def test_orientation_moves_only_the_matrix():
    """Without weight decay, values, gate and output projection are bit for bit what they were."""
    teacher, student = pair()
    before = weights(student)
    run(teacher, student, [Stage("orientation", 5, 1e-2, weight_decay=0.0)])
    after = weights(student)
    for layer in range(3):
        mixer, width = f"backbone.layers.{layer}.mixer.", 24
        values = slice(0, width)
        assert torch.equal(before[mixer + "in_proj.weight"][values], after[mixer + "in_proj.weight"][values])
        assert not torch.equal(before[mixer + "in_proj.weight"], after[mixer + "in_proj.weight"])
        assert torch.equal(before[mixer + "out_proj.weight"], after[mixer + "out_proj.weight"])
        assert torch.equal(before[mixer + "z_bias"], after[mixer + "z_bias"])
    assert torch.equal(before["backbone.embedding.weight"], after["backbone.embedding.weight"])


# --- every kind of student

def test_kept_attention_is_skipped():
    teacher, student = pair(keep_attention=[0, 2])
    for name in ("orientation", "alignment"):
        objective = OBJECTIVES[name](teacher, student)
        student.zero_grad()
        losses = objective(rows(), lambda loss: loss.backward())
        assert objective.parts == ["layer 1"] and losses.shape == (1,)
        assert all("layers.1." in key for key in gradients(student))
    before = weights(student)
    run(teacher, student, [Stage("orientation", 2, 1e-2), Stage("alignment", 2, 1e-2)])
    assert all(torch.equal(before[key], value) == ("layers.1." not in key) for key, value in weights(student).items()
               if "layers.1." not in key or "in_proj" in key)


def test_kept_attention_trains_in_the_last_stage():
    teacher, student = pair(keep_attention=[0])
    before = weights(student)
    run(teacher, student, [Stage("distillation", 2, 1e-2)])
    key = "backbone.layers.0.mixer.q_proj.weight"
    assert not torch.equal(before[key], weights(student)[key])


def test_student_that_keeps_everything():
    teacher, student = pair(keep_attention=range(3))
    for name in ("orientation", "alignment"):
        with pytest.raises(ValueError, match="every layer of the student keeps its attention"):
            run(teacher, student, [Stage(name, 2, 1e-2)])
    run(
        teacher, student, [Stage("orientation", 0, 1e-2), Stage("distillation", 1, 1e-3)]
    )  # a stage of no steps is left out


@pytest.mark.parametrize("heads,kv_heads", [(4, 1), (4, 2), (4, 4), (1, 1)])
def test_grouped_queries(heads, kv_heads):
    teacher, student = pair(heads=heads, kv_heads=kv_heads)
    assert student.backbone.layers[0].mixer.n_heads == heads
    losses = LayerByLayer(teacher, student, match_matrix)(rows(), lambda loss: loss.backward())
    assert losses.shape == (3,) and losses.isfinite().all()


@pytest.mark.parametrize("length", [1, 7, 65])
@pytest.mark.parametrize("name", NAMES)
def test_odd_lengths(name, length):
    """Any length, more or less than a chunk of the student's `ssd`; gradients are finite."""
    teacher, student = pair()
    losses = OBJECTIVES[name](teacher, student)(rows(2, length), lambda loss: loss.backward())
    assert losses.isfinite().all() and all(grad.isfinite().all() for grad in gradients(student).values())


@settings(max_examples=10, deadline=None)
@given(layers=st.integers(1, 3), kept=st.integers(0, 2), batch=st.integers(1, 3), length=st.integers(1, 17))
def test_a_part_for_every_new_layer(layers, kept, batch, length):
    teacher, student = pair(range(min(kept, layers - 1)), layers=layers)
    for name in ("orientation", "alignment"):
        objective, seen = OBJECTIVES[name](teacher, student), []
        losses = objective(rows(batch, length), seen.append)
        assert len(losses) == len(objective.parts) == len(seen) == layers - min(kept, layers - 1)
        assert all(loss.requires_grad for loss in seen) and not losses.requires_grad


def test_other_head_count_is_refused_with_both_shapes():
    teacher = make_teacher()
    student = with_mixers(teacher, lambda _: DiscreteMamba2(24, 6, 2, 2))
    with pytest.raises(ValueError, match=r"student's matrix has shape \(4, 2, 20, 20\), teacher's \(4, 4, 20, 20\)"):
        run(teacher, student, [Stage("orientation", 1, 1e-2)])
    run(teacher, student, [Stage("alignment", 1, 1e-2)])  # outputs have no heads: this works


class Average(nn.Module):
    """A mixer that is nothing but a matrix: an exponential moving average for each head."""

    def __init__(self, d_model=24, heads=4):
        super().__init__()
        self.decay, self.out, self.heads = nn.Parameter(torch.zeros(heads)), nn.Linear(d_model, d_model), heads

    def matrix(self, u):
        place = torch.arange(u.shape[1])
        steps = (place[:, None] - place).clamp(min=0)
        a = self.decay.sigmoid()[:, None, None]
        return ((1 - a) * a**steps).tril().expand(len(u), -1, -1, -1)

    def forward(self, u, state=None):
        x = u.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out((self.matrix(u) @ x).transpose(1, 2).flatten(2))


def test_any_mixer_with_a_matrix():
    """A mixer that the package has never heard of, in a plain Decoder."""
    teacher = make_teacher()
    student = Decoder(Backbone([Average() for _ in range(3)], VOCAB, 24, 40), tie_embeddings=True)
    stages = [Stage("orientation", 10, 0.1, 0.0), Stage("alignment", 10, 0.02), Stage("distillation", 10, 0.02)]
    records = run(teacher, student, stages)
    for stage in NAMES:
        losses = [record["loss"] for record in records if record["stage"] == stage]
        assert losses[-1] < losses[0]


# --- distil

def test_every_stage_learns():
    teacher, student = pair()
    records = run(
        teacher,
        student,
        [Stage("orientation", 10, 1e-2, 0.0), Stage("alignment", 10, 1e-2), Stage("distillation", 10, 1e-2)],
    )
    with torch.no_grad():
        p = teacher(rows()).softmax(-1)
    floors = {"distillation": -(p * p.log()).sum(-1).mean()}
    for stage in NAMES:
        parts = torch.tensor([record["parts"] for record in records if record["stage"] == stage]) - floors.get(stage, 0)
        assert parts.shape == (10, 1 if stage == "distillation" else 3)
        assert (parts[-1] < 0.95 * parts[0]).all(), stage  # each layer by itself


def test_language_is_plain_next_token_prediction():
    teacher, student = pair()
    alone = copy.deepcopy(student)
    records = run(teacher, student, [Stage("language", 4, 1e-2)], Data(new=True))
    theirs = training.train(
        alone,
        [Stage("language", 4, 1e-2)],
        Data(new=True),
        lambda stage: training.CrossEntropy(alone),
        accelerator=cpu(),
        progress=False,
    )
    assert equal(weights(student), weights(alone))
    assert [record["loss"] for record in records] == [record["loss"] for record in theirs]


def test_two_runs_are_bit_identical():
    stages = [Stage(name, 3, 1e-2) for name in NAMES]
    ends = []
    for _ in range(2):
        teacher, student = pair()
        records = run(teacher, student, stages, Data(new=True))
        ends.append((weights(student), [record["parts"] for record in records]))
    assert equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_change_nothing(name):
    ends = []
    for size in (None, 3):
        teacher, student = pair(dtype=torch.float64)
        run(teacher, student, [Stage(name, 2, 1e-2)], micro_batch_size=size)
        ends.append(torch.cat([p.flatten() for p in student.parameters()]))
    assert relative_error(*ends) < 1e-6


def test_bfloat16():
    """Mixed precision: weights and losses in float32, the same course to two digits."""
    stages = [Stage(name, 2, 1e-3) for name in NAMES]
    wide = run(*pair(), stages)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        teacher, student = pair()
        records = distill(
            teacher, student, Data(), stages, progress=False, accelerator=Accelerator(cpu=True, mixed_precision="bf16")
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert all(0 < abs(ours["loss"] / theirs["loss"] - 1) < 0.02 for ours, theirs in zip(records, wide, strict=True))


def test_unknown_objective():
    teacher, student = pair()
    before = weights(student)
    wanted = "objective is 'alignement': it must be 'orientation', 'alignment', 'distillation' or 'language'"
    with pytest.raises(ValueError, match=wanted):
        run(teacher, student, [Stage("orientation", 1, 1e-2), Stage("alignement", 1, 1e-2)])
    assert equal(weights(student), before)


def test_vocabularies_that_differ_are_refused_before_the_first_stage():
    teacher, student = make_teacher(), Llamba.from_teacher(make_teacher(vocab=VOCAB + 8), d_state=6, **RELEASED)
    before = weights(student)
    with pytest.raises(ValueError, match=f"student has {VOCAB + 8} token ids, teacher {VOCAB}"):
        run(teacher, student, [Stage("orientation", 1, 1e-2), Stage("distillation", 1, 1e-2)])
    assert equal(weights(student), before)
    with pytest.raises(ValueError, match="token ids"):
        EndToEnd(teacher, student)


def test_depth_and_width_that_differ():
    teacher = make_teacher()
    with pytest.raises(ValueError, match="student has 2 layers, teacher 3: they must be the same"):
        LayerByLayer(teacher, Llamba.from_teacher(make_teacher(layers=2), d_state=6, **RELEASED), match_matrix)
    with pytest.raises(ValueError, match="student has 32 channels, teacher 24: they must be the same"):
        LayerByLayer(teacher, Llamba.from_teacher(make_teacher(width=32), d_state=6, **RELEASED), match_matrix)


def test_student_that_shares_weights_with_its_teacher():
    teacher = make_teacher()
    with pytest.raises(ValueError, match="student's backbone.embedding.weight is the teacher's own"):
        run(teacher, teacher, [Stage("distillation", 1, 1e-2)])
    student = with_mixers(teacher, lambda _: Average())
    student.backbone.layers[2].mlp = teacher.backbone.layers[2].mlp
    with pytest.raises(ValueError, match="student's backbone.layers.2.mlp.gate_proj.weight is the teacher's own"):
        run(teacher, student, [Stage("alignment", 1, 1e-2)])
    student.backbone.layers[2].mlp = copy.deepcopy(teacher.backbone.layers[2].mlp)
    student.backbone.final_layernorm.weight = nn.Parameter(
        teacher.backbone.final_layernorm.weight.data
    )  # another name, the same memory
    with pytest.raises(ValueError, match="final_layernorm.weight is the teacher's own"):
        run(teacher, student, [Stage("alignment", 1, 1e-2)])


def test_ids_that_do_not_fit_are_refused():
    teacher, student = pair()
    for name in NAMES:
        with pytest.raises(ValueError, match="input_ids"):
            OBJECTIVES[name](teacher, student)(torch.tensor([[0, VOCAB]]), lambda loss: None)


# --- the figure

def panels(figure):
    return [axis for axis in figure.axes if axis.images]


@pytest.mark.parametrize("layers,keep,columns", [(1, (), 1), (3, (1,), 2), (6, (), 4)])
def test_draw_matrices(layers, keep, columns):
    teacher, student = pair(keep, layers=layers)
    figure = draw_matrices(teacher, student, copy.deepcopy(student), rows(1), tokens=12)
    assert len(panels(figure)) == 3 * columns
    shown = torch.tensor(panels(figure)[0].images[0].get_array().filled(float("nan")))
    first_new = min(set(range(layers)) - set(keep))
    matrix = next(layer.matrix() for layer in teacher.walk(rows(1)[:, :12]) if layer.index == first_new)[0]
    heads = [relative_error(shown.tril().nan_to_num(), matrix[h].clamp(min=1e-3).tril()) for h in range(4)]
    assert shown.shape == (12, 12) and min(heads) < 1e-6 and shown[0, 1:].isnan().all()


def test_draw_matrices_of_a_short_text():
    teacher, student = pair(layers=1)
    assert len(panels(draw_matrices(teacher, student, student, rows(1, 1)))) == 3


def test_stage_can_be_imported_from_here():
    assert mohawk.Stage is training.Stage
    assert isinstance(make_teacher().backbone.layers[0].mixer, Attention)
