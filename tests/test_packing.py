"""Several documents in a row: the numbers of each are those that it has alone, whatever the mixer."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from small import RELEASED, VOCAB, llama_config, llamba_config, mamba2_config, one_line, shaken
from together import run as run_together

from llamba_ref.associative_recall import WithConvolution
from llamba_ref.conv import causal_conv
from llamba_ref.conventions import relative_error
from llamba_ref.data import Batch, TokenBlocks, asked_for_next
from llamba_ref.decoder import Backbone, Decoder
from llamba_ref.evaluate import compare, evaluate
from llamba_ref.gateloop import GateLoop
from llamba_ref.gateloop_lm import GateLoopConfig, GateLoopLM
from llamba_ref.llama import Llama, attention_matrix
from llamba_ref.llamba import AttentionConfig, Llamba, RotaryConfig
from llamba_ref.mamba2 import Mamba2LM
from llamba_ref.mohawk import OBJECTIVES, distill, match_matrix, matrix_distance
from llamba_ref.operators import document_begin, forget
from llamba_ref.ssd import ssd_matrix
from llamba_ref.training import Stage, train_step

EDGES = (0, 1, 2, 5, 16, 32, 37, 40)  # documents of length 1, borders at those of chunks (16) and in between


def gateloop(gates="complex", mode="chunked"):
    return GateLoopLM(GateLoopConfig(
        vocab_size=VOCAB, d_model=16, n_layer=2, n_heads=2, intermediate_size=24, d_state=3, gates=gates, mode=mode))


def hybrid(**heads):
    return Llamba(llamba_config(attn_cfg=AttentionConfig((1,), 4, 2, 8, **heads)))


MODELS = {
    "llama": lambda: Llama(llama_config()),
    "mamba2": lambda: Mamba2LM(mamba2_config()),
    "llamba": lambda: Llamba(llamba_config()),
    **{f"llamba, {kind}": lambda kind=kind: Llamba(llamba_config(
        ssm_cfg=llamba_config().ssm_cfg.__class__(6, 4, 4, chunk_size=16), rotary_cfg=RotaryConfig(kind)))
       for kind in ("fixed", "learned", "data")},
    "hybrid by layer": hybrid,
    "hybrid by head": lambda: hybrid(heads=(2,)),
    **{f"gateloop, {mode}": lambda mode=mode: gateloop(mode=mode) for mode in ("chunked", "scan", "recurrent")},
    "gateloop, real": lambda: gateloop("real"),
    "a convolution before": lambda: Decoder(
        Backbone([WithConvolution(GateLoop(16, 2, 3), 16)], VOCAB, 16, 24), tie_embeddings=True),
}


def build(name):
    return shaken(MODELS[name]()).double()


def starts_at(places, length=EDGES[-1], rows=1):
    return torch.zeros(rows, length, dtype=torch.bool).index_fill(1, torch.tensor(places), True)


def documents(ids, edges=EDGES):
    return [ids[:, i:j] for i, j in zip(edges, edges[1:])]


def gradients(model, y):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    found = torch.autograd.grad((y * weight).sum(), list(model.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("first", [True, False], ids=["a start at 0", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_documents_is_its_documents(name, first):
    """Logits and all gradients."""
    model, ids = build(name), torch.randint(VOCAB, (2, EDGES[-1]))
    packed = model(ids, starts=starts_at(EDGES[0 if first else 1 : -1], rows=2))
    alone = torch.cat([model(document) for document in documents(ids)], 1)
    assert relative_error(packed, alone) < 1e-10
    assert relative_error(model(ids), alone) > 1e-3  # without starts the documents do reach each other
    assert relative_error(gradients(model, packed), gradients(model, alone)) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_rows_may_have_borders_of_their_own(name):
    model, ids = build(name), torch.randint(VOCAB, (3, 20))
    starts = torch.zeros(3, 20, dtype=torch.bool)
    starts[0, 7], starts[1, [0, 3, 18, 19]] = True, True
    packed = model(ids, starts=starts)
    for row, edges in enumerate(((0, 7, 20), (0, 3, 18, 19, 20), (0, 20))):
        alone = torch.cat([model(document) for document in documents(ids[row : row + 1], edges)], 1)
        assert relative_error(packed[row], alone[0]) < 1e-10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cut", [1, 5, 9, 12])
def test_the_first_document_goes_on_from_the_state(name, cut):
    """A text cut in two at any place: in a document, at a border, one token behind one; then steps."""
    model, ids = build(name), torch.randint(VOCAB, (1, 16))
    edges = (0, 4, 5, 9, 14)
    starts = starts_at(edges[:-1], 14)
    head, state = model.prefill(ids[:, :cut], starts=starts[:, :cut])
    tail, state = model.prefill(ids[:, cut:14], state=state, starts=starts[:, cut:])
    alone = torch.cat([model(document) for document in documents(ids, edges)], 1)
    assert relative_error(torch.cat([head, tail], 1), alone) < 1e-10
    last, steps = model(ids[:, 9:]), []
    for token in ids[:, 14:].unbind(1):  # what is written on goes on from the last document
        logits, state = model.step(token, state)
        steps.append(logits)
    assert relative_error(torch.stack(steps, 1), last[:, 5:]) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_a_start_at_the_first_token_forgets_the_state(name):
    model, ids = build(name), torch.randint(VOCAB, (1, 12))
    _, state = model.prefill(ids[:, :6])
    logits, _ = model.prefill(ids[:, 6:], state=state, starts=starts_at([0], 6))
    assert relative_error(logits, model(ids[:, 6:])) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_masked_tokens_in_a_row_of_documents(name):
    """Masked means absent, also where the masked token begins a document."""
    model, ids = build(name), torch.randint(VOCAB, (2, 12))
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1]])
    starts = starts_at([0, 4, 7], 12, rows=2)
    packed = model(ids, mask, starts=starts)
    for row, kept in ((0, ([0, 1, 2, 3], [5, 6], [7, 8, 10, 11])), (1, ([1, 2, 3], [4, 5], [9, 10, 11]))):
        for document in kept:
            assert relative_error(packed[row, document], model(ids[row : row + 1, document])[0]) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_block_diagonal(name):
    """Each block is the matrix of its document alone."""
    model, ids = build(name), torch.randint(VOCAB, (1, EDGES[-1]))
    packed = [layer.matrix() for layer in model.walk(ids, starts_at(EDGES[:-1]))]
    blocks = [[layer.matrix() for layer in model.walk(document)] for document in documents(ids)]
    for index, matrix in enumerate(packed):
        expected = torch.zeros_like(matrix)
        for i, j, block in zip(EDGES, EDGES[1:], blocks):
            expected[:, :, i:j, i:j] = block[index]
        assert relative_error(matrix, expected) < 1e-10 and not matrix[expected == 0].any()


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    """Single precision, long enough for sums to go wrong."""
    model, ids = shaken(MODELS[name]()), torch.randint(VOCAB, (1, 300))
    edges = (0, 3, 150, 151, 300)
    packed = model(ids, starts=starts_at(edges[:-1], 300))
    assert relative_error(packed, torch.cat([model(document) for document in documents(ids, edges)], 1)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "llamba", "gateloop, chunked"])
def test_wrong_starts(name):
    model, ids = build(name), torch.randint(VOCAB, (1, 6))
    for starts, what in (
        (torch.zeros(1, 5, dtype=torch.bool), r"torch.bool of shape \(1, 5\)"),
        (torch.zeros(1, 6), r"torch.float32 of shape \(1, 6\)"),
    ):
        for call in (model, model.hidden, model.prefill, lambda ids, starts: next(model.walk(ids, starts))):
            with pytest.raises(ValueError, match=f"^starts is {what}: it must be bool of shape \\(1, 6\\)$") as error:
                call(ids, starts=starts)
            one_line(error)


def test_where_documents_begin():
    starts = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert document_begin(starts).tolist() == [[0, 1, 1, 1, 4], [0] * 5, [0] * 5]
    earliest = torch.tensor([[-1], [-2], [-3]])
    assert document_begin(starts, earliest).tolist() == [[-1, 1, 1, 1, 4], [0] * 5, [-3] * 5]
    log_a = torch.full((3, 5, 2), -0.5)
    assert forget(log_a, None) is log_a
    assert torch.equal(forget(log_a, starts).isinf(), starts[..., None].expand(3, 5, 2))


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_window_holds_the_last_document_alone(width, length):
    x, weight = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(3, 1, width, dtype=torch.float64)
    before, starts = torch.randn(2, 3, width, dtype=torch.float64), torch.zeros(2, length, dtype=torch.bool)
    starts[0, length - 1] = True
    _, window = causal_conv(x, weight, None, before, starts)
    _, alone = causal_conv(x[:1, -1:], weight, None)
    _, whole = causal_conv(x[1:], weight, None, before[1:])
    assert torch.equal(window[:1], alone) and torch.equal(window[1:], whole)


# losses


def pair(**options):
    """A teacher and its student, float64."""
    torch.manual_seed(0)
    teacher = shaken(Llama(llama_config(head_dim=4))).double()
    return teacher, shaken(Llamba.from_teacher(teacher, d_state=6, chunk_size=16, **RELEASED, **options)).double()


def batch_of(rows=4, length=24, marked=True, seed=5):
    """Rows with borders, and with few, all or no tokens that are asked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, length), generator=generator)
    if not marked:
        return Batch(ids)
    asked = torch.rand(rows, length, generator=generator) < 0.3
    asked[1], asked[2] = True, False
    return Batch(ids, torch.rand(rows, length, generator=generator) < 0.15, asked)


def loss_and_gradient(objective, batch):
    student = objective.models.get("student", objective.models.get("model"))
    student.zero_grad()
    losses = objective(batch, lambda loss: loss.backward())
    return losses, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("kept", [(), (1,), ((0, 1), (1, 2))], ids=["no attention", "by layer", "by head"])
@pytest.mark.parametrize("name", ["alignment", "distillation", "language"])
def test_a_loss_of_documents_is_that_of_each(name, kept):
    """The mean over the tokens of a packed row: of its documents, weighed by their tokens."""
    teacher, student = pair(keep_attention=kept)
    ids, edges = torch.randint(VOCAB, (1, 20)), (0, 2, 9, 16, 20)
    objective = OBJECTIVES[name](teacher, student)
    loss, gradient = loss_and_gradient(objective, Batch(ids, starts_at(edges[:-1], 20)))
    parts = [(objective.count(Batch(document)), *loss_and_gradient(objective, document))
             for document in documents(ids, edges)]
    total = sum(count for count, *_ in parts)
    assert total == (20 - 4 if name == "language" else 20)
    for index, ours, bound in ((1, loss, 1e-6), (2, gradient, 1e-10)):  # losses are reported in float32
        assert relative_error(ours, sum(part[0] * part[index] for part in parts) / total) < bound


@pytest.mark.parametrize("kept", [(), ((0, 1), (1, 2))], ids=["no attention", "by head"])
def test_orientation_of_documents(kept):
    """The squares of the distances of the blocks add up, head by head; the kernel's path gives the same."""
    teacher, student = pair(keep_attention=kept)
    ids, edges = torch.randint(VOCAB, (1, 20)), (0, 2, 9, 16, 20)
    walk = list(teacher.walk(ids, starts_at(edges[:-1], 20)))
    alone = [list(teacher.walk(document)) for document in documents(ids, edges)]
    for layer, *parts in zip(walk, *alone):
        block = student.backbone.layers[layer.index]
        loss = match_matrix(block, layer)
        squares = 0
        for part in parts:
            ours = block.mixer.matrix(block.input_layernorm(part.input))
            squares = squares + torch.linalg.matrix_norm(ours - part.matrix()).square()
        assert relative_error(loss, squares.sqrt().mean()) < 1e-10
        gradients = [torch.autograd.grad(one, block.parameters(), allow_unused=True, materialize_grads=True)
                     for one in (loss, squares.sqrt().mean())]
        ours, theirs = (torch.cat([gradient.flatten() for gradient in found]) for found in gradients)
        assert relative_error(ours, theirs) < 1e-10


def test_matrix_distance_of_documents():
    q, k, B, C = (torch.randn(2, 20, heads, 4, dtype=torch.float64) for heads in (4, 2, 2, 2))
    log_a, starts = -torch.rand(2, 20, 4, dtype=torch.float64), torch.rand(2, 20) < 0.2
    found = matrix_distance(q, k, log_a, B, C, starts=starts)
    gap = ssd_matrix(forget(log_a, starts), B, C) - attention_matrix(q, k, starts=starts)
    assert relative_error(found, torch.linalg.matrix_norm(gap)) < 1e-14


@pytest.mark.parametrize("name", ["alignment", "distillation", "language"])
def test_tokens_that_are_not_asked_do_not_count(name):
    teacher, student = pair()
    batch = batch_of()
    objective = OBJECTIVES[name](teacher, student)
    loss, _ = loss_and_gradient(objective, batch)
    with torch.no_grad():
        ours, theirs = (model(batch.ids, starts=batch.starts) for model in (student, teacher))
        if name == "language":
            asked = asked_for_next(batch)[:, :-1]
            assert torch.equal(asked, batch.asked[:, :-1] & ~batch.starts[:, 1:])
            expected = -ours[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0][asked].mean()[None]
        elif name == "distillation":
            asked = batch.asked
            expected = -(theirs.softmax(-1) * ours.log_softmax(-1)).sum(-1)[asked].mean()[None]
        else:
            asked, blocks = batch.asked, student.backbone.layers
            gaps = [blocks[layer.index](layer.input, **layer.marks) - layer.output
                    for layer in teacher.walk(batch.ids, batch.starts)]
            expected = torch.stack([gap.norm(dim=-1)[asked].mean() for gap in gaps])
    assert objective.count(batch) == asked.sum() and relative_error(loss, expected) < 1e-6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_everything_asked_is_nothing_said(name):
    """Bit for bit, gradients too: masks that say nothing change nothing."""
    batch = batch_of(marked=False)
    same = Batch(batch.ids, asked=torch.ones_like(batch.ids, dtype=torch.bool))
    found = [loss_and_gradient(OBJECTIVES[name](*pair()), one) for one in (batch, batch.ids, same)]
    assert all(torch.equal(ours, theirs) for other in found[1:] for ours, theirs in zip(found[0], other))
    objective = OBJECTIVES[name](*pair())
    assert objective.count(batch) == objective.count(same) > 0


@pytest.mark.parametrize("name", ["alignment", "distillation", "language"])
def test_a_batch_in_which_nothing_is_asked(name):
    teacher, student = pair()
    batch = replace(batch_of(), asked=torch.zeros(4, 24, dtype=torch.bool))
    objective = OBJECTIVES[name](teacher, student)
    before, optimizer = student.state_dict(), torch.optim.SGD(student.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="^step 7: nothing in the batch is asked") as error:
        train_step(student, Stage(name, 1, 1.0), objective, batch, optimizer, Accelerator(cpu=True), 2, "step 7")
    one_line(error)
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    with pytest.raises(ValueError, match="asked|true"):
        objective(batch, lambda loss: None)


class Recorder(torch.optim.SGD):
    """Changes nothing and keeps the gradients."""

    def step(self):
        self.seen = torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"] if p.grad is not None])


def stepped(name, batch, rows):
    teacher, student = (model.float() for model in pair())
    optimizer = Recorder(student.parameters(), lr=0.0)
    objective, stage = OBJECTIVES[name](teacher, student), Stage(name, 1, 1.0, clip=1e9)
    losses, norm = train_step(student, stage, objective, batch, optimizer, Accelerator(cpu=True), rows, "")
    return losses, optimizer.seen, torch.tensor(norm)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("rows", [1, 3])
def test_micro_batches_weigh_by_what_they_ask(name, rows):
    """Rows ask for different numbers of tokens, one of them for none."""
    whole, parts = stepped(name, batch_of(), 4), stepped(name, batch_of(), rows)
    assert all(relative_error(ours, theirs) < 1e-6 for ours, theirs in zip(parts, whole))


def part_of_a_step(path, name):
    """What each of two processes runs: its rows of the batch, one of which has next to nothing to ask."""
    accelerator = Accelerator(cpu=True)
    rank, processes = accelerator.process_index, accelerator.num_processes
    assert processes == 2
    batch = batch_of()[rank::processes]
    torch.save(stepped(name, batch, 1), f"{path}-{name}-{rank}.pt")


def parts_of_steps(paths, names):
    for name in names:
        part_of_a_step(paths, name)


def test_two_processes_weigh_as_one(tmp_path):
    run_together(2, parts_of_steps, str(tmp_path / "step"), list(OBJECTIVES))  # both must end well
    for name in OBJECTIVES:
        whole = stepped(name, batch_of(), 4)
        for rank in "01":
            found = torch.load(tmp_path / f"step-{name}-{rank}.pt", weights_only=True)
            assert all(relative_error(ours, theirs) < 1e-6 for ours, theirs in zip(found, whole)), name


class Marked:
    """The same marked batch again and again."""

    def next(self):
        return batch_of()

    def state_dict(self):
        return {}


@pytest.mark.parametrize("micro", [None, 1])
def test_training_with_marks_learns(micro):
    """All three stages in one run; what trains is found although the first row asks for little."""
    teacher, student = (model.float() for model in pair())
    stages = [Stage("orientation", 3, 1e-2, 0.0), Stage("alignment", 6, 1e-2), Stage("distillation", 6, 1e-2)]
    records = distill(teacher, student, Marked(), stages, accelerator=Accelerator(cpu=True), progress=False,
                      micro_batch_size=micro)
    for stage in stages:
        losses = [record["loss"] for record in records if record["stage"] == stage.objective]
        assert losses[-1] < losses[0]


# evaluation


def blocks_of(batch):
    return TokenBlocks(batch.ids.int(), batch.ids.numel(), 1, 100, batch.starts, batch.asked)


def test_evaluation_of_documents_is_that_of_each():
    """Sums of documents alone, without the first token of each: nothing predicts it."""
    teacher, student = pair()
    ids, edges = torch.randint(VOCAB, (1, 20)), (0, 1, 9, 16, 20)
    packed = compare(teacher, student, blocks_of(Batch(ids, starts_at(edges[:-1], 20))))
    parts = [compare(teacher, student, blocks_of(Batch(document))) for document in documents(ids, edges)[1:]]
    counts = [part.student.tokens for part in parts]
    assert packed.student.tokens == sum(counts) == 16
    for figure in (lambda c: c.student.nll, lambda c: c.teacher.nll, lambda c: c.kl, lambda c: c.agreement):
        expected = sum(count * figure(part) for count, part in zip(counts, parts)) / sum(counts)
        assert abs(figure(packed) - expected) <= 1e-6 * expected  # sums are added up in float32
    alone = [evaluate(student, blocks_of(Batch(document))).nll for document in documents(ids, edges)[1:]]
    alone = sum(count * nll for count, nll in zip(counts, alone))
    assert abs(evaluate(student, blocks_of(Batch(ids, starts_at(edges[:-1], 20)))).nll / (alone / 16) - 1) < 1e-10


def test_evaluation_counts_what_is_asked():
    _, student = pair()
    batch = batch_of()
    result = evaluate(student, blocks_of(batch), batch_size=3)
    asked = asked_for_next(batch)[:, :-1]
    with torch.no_grad():
        log_p = student(batch.ids, starts=batch.starts)[:, :-1].log_softmax(-1)
    expected = -log_p.gather(2, batch.ids[:, 1:, None])[..., 0][asked].mean()
    assert result.tokens == asked.sum() and abs(result.nll / expected - 1) < 1e-10
    same = evaluate(student, blocks_of(Batch(batch.ids, asked=torch.ones_like(batch.starts))))
    assert same == evaluate(student, blocks_of(Batch(batch.ids)))
    with pytest.raises(ValueError, match="^the 4 blocks ask for nothing") as error:
        evaluate(student, blocks_of(Batch(batch.ids, asked=torch.zeros_like(batch.starts))))
    one_line(error)
