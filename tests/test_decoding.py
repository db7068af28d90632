"""Steps that own their state, and prompts that are read in pieces: every kind of mixer gives the same numbers."""

from functools import partial

import pytest
import torch
from small import HostReads, llama_config, llamba_config, mamba2_config, shaken
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from llamba_ref import decoder
from llamba_ref.associative_recall import WithConvolution
from llamba_ref.conventions import relative_error
from llamba_ref.decoder import Backbone, Decoder
from llamba_ref.decoding import copy_state, fork_state, restore_state, speculate
from llamba_ref.gateloop import GateLoop
from llamba_ref.llama import KVCache, Llama
from llamba_ref.llamba import Llamba, MixedState
from llamba_ref.mamba2 import Mamba2LM, SSDMixer
from llamba_ref.models import load_model
from llamba_ref.operators import peak_bytes, unchecked
from llamba_ref.ssd import ssd, ssd_step

VOCAB = 48


def gateloop(gates):
    mixers = [GateLoop(16, 4, 3, gates=gates), WithConvolution(GateLoop(16, 16, gates=gates, mode="scan"), 16)]
    return Decoder(Backbone(mixers, VOCAB, 16, 24), tie_embeddings=True)


def student(keep=(), rotation="none", d_state=8):
    torch.manual_seed(0)
    return Llamba.from_teacher(Llama(llama_config()), keep, start="published", rotation=rotation, d_state=d_state,
                               chunk_size=4)


MODELS = {
    "attention": lambda: Llama(llama_config()),
    "mamba2": lambda: Mamba2LM(mamba2_config()),
    "llamba": lambda: Llamba(llamba_config()),
    "fixed turns": lambda: student(rotation="fixed"),
    "learned turns": lambda: student(rotation="learned"),
    "turns from the token": lambda: student(rotation="data"),
    "hybrid": lambda: student([1], "fixed"),
    "some heads": lambda: student([(0, 1), (1, 2)], "fixed"),
    "complex gates": lambda: gateloop("complex"),
    "real gates": lambda: gateloop("real"),
    "fixed gates": lambda: gateloop("fixed"),
}


@pytest.fixture(params=MODELS)
def model(request):
    return shaken(MODELS[request.param]().double())


def texts(batch, length):
    return torch.randint(VOCAB, (batch, length))


@torch.no_grad()
def test_a_step_in_place_gives_the_numbers_of_a_step(model):
    _, ours = model.prefill(ids := texts(2, 7))
    _, theirs = model.prefill(ids)
    for token in texts(2, 6).unbind(1):
        logits, ours = model.step(token, ours, in_place=True)
        expected, theirs = model.step(token, theirs)
        assert relative_error(logits, expected) < 1e-14
    for z, wanted in zip(tree_leaves(ours), tree_leaves(theirs)):
        assert wanted is None or relative_error(z, wanted) < 1e-14


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba2", "llamba", "fixed turns", "learned turns", "turns from the token"])
def test_a_state_of_ssd_stays_where_it_is(name):
    model = shaken(MODELS[name]().double())
    _, state = model.prefill(texts(2, 7))
    places = [z.data_ptr() for z in tree_leaves(state)]
    for token in texts(2, 5).unbind(1):
        _, state = model.step(token, state, in_place=True)
        assert [z.data_ptr() for z in tree_leaves(state)] == places


@torch.no_grad()
def test_a_step_leaves_the_old_state_alone(model):
    _, state = model.prefill(texts(2, 7))
    first, _ = model.step(torch.tensor([1, 2]), state)
    model.step(torch.tensor([3, 4]), state)
    assert torch.equal(model.step(torch.tensor([1, 2]), state)[0], first)


def test_a_step_in_place_has_no_gradient(model):
    """Refused before anything is overwritten."""
    _, state = model.prefill(texts(2, 7))
    kept = [z.clone() for z in tree_leaves(state) if z is not None]
    with pytest.raises(RuntimeError, match="^a step in place keeps nothing for a gradient"):
        model.step(torch.tensor([1, 2]), state, in_place=True)
    assert all(map(torch.equal, kept, [z for z in tree_leaves(state) if z is not None]))
    for block in model.backbone.layers:
        mixer = block.mixer
        if isinstance(mixer, SSDMixer):
            window, ssm = (part.clone() for part in mixer.init_state(2)[:2])
            start = mixer.init_state(2)._replace(conv=window, ssm=ssm)
            with pytest.raises(RuntimeError, match="keeps nothing for a gradient"):
                mixer.step_in_place(torch.randn(2, 16, dtype=torch.float64), start)
            assert not window.any() and not ssm.any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_steps_in_place_from_nothing(name, dtype, autocast):
    """In every precision, also where autocast makes the first window narrower than it began."""
    model = shaken(MODELS[name]()).to(dtype)
    ours, theirs = model.init_state(2), model.init_state(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for token in texts(2, 5).unbind(1):
            logits, ours = model.step(token, ours, in_place=True)
            expected, theirs = model.step(token, theirs)
            assert logits.dtype == expected.dtype and relative_error(logits, expected) < 8 * torch.finfo(
                torch.bfloat16 if autocast else dtype).eps


@torch.no_grad()
def test_a_state_holds_no_more_memory_than_it_shows(model):
    """No view into what was made on the way: else a snapshot would keep a whole piece alive."""
    _, state = model.read(texts(1, 64))
    for z in tree_leaves(state):
        if z is not None and not isinstance(model, Llama):  # keys and values are views of the projections
            whole = z.untyped_storage().nbytes()
            assert whole == z.nbytes or z.dim() == 4 and z.shape[2] == 64, (z.shape, whole)


@pytest.mark.parametrize("name", ["llamba", "turns from the token", "some heads", "attention"])
def test_a_compiled_step_is_one_graph(name, monkeypatch):
    """What torch.compile traces for `generate` is whole, and writes the same text."""
    model = shaken(MODELS[name]())
    compile = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr("llamba_ref.decoder._compiled", compile)
    ids = texts(2, 5)
    expected = model.generate(ids, 7)
    torch._dynamo.reset()
    assert torch.equal(model.generate(ids, 7, compile=True), expected)


MASKS = {
    "none": None,
    "left": torch.tensor([[0] * 9 + [1] * 4, [1] * 13, [0] * 2 + [1] * 11]),
    "between": torch.tensor([[1, 0] * 6 + [1], [1] * 13, [0] * 12 + [1]]),
}


@torch.no_grad()
@pytest.mark.parametrize("piece", [1, 5, 99])
@pytest.mark.parametrize("mask", MASKS)
def test_reading_in_pieces_is_reading_at_once(model, mask, piece):
    ids, mask = texts(3, 13), MASKS[mask]
    last = None if mask is None else 12 - mask.flip(1).argmax(1)
    logits, state = model.prefill(ids, mask)
    expected = logits[:, -1] if last is None else logits[torch.arange(3), last]
    found, ours = model.read(ids, mask, piece=piece)
    assert relative_error(found, expected) < 1e-13
    after = texts(3, 1)[:, 0]
    assert relative_error(model.step(after, ours)[0], model.step(after, state)[0]) < 1e-13
    more = texts(3, 6)
    found, _ = model.read(more, state=ours, piece=piece)
    assert relative_error(found, model.prefill(more, state=state)[0][:, -1]) < 1e-13


def test_reading_takes_the_memory_of_a_piece():
    """What is made besides the state does not grow with the prompt."""
    model = student()
    with torch.no_grad():
        short, long = (peak_bytes(lambda: model.read(texts(1, length), piece=64)) for length in (128, 2048))
        whole = peak_bytes(lambda: model.prefill(texts(1, 2048)))
    assert long - short < 2048 * 8 * 2 and long < whole / 8  # the ids themselves have 8 bytes each


def test_what_cannot_be_read_is_refused():
    model = student()
    _, state = model.prefill(texts(2, 3))
    with pytest.raises(ValueError, match="^piece is 0: it must be an integer of at least 1"):
        model.read(texts(1, 4), piece=0)
    with pytest.raises(ValueError, match="^attention_mask and state cannot be given together"):
        model.read(texts(2, 4), torch.ones(2, 4), state)
    with pytest.raises(ValueError, match="^input_ids holds id 48"):
        model.read(torch.full((1, 4), 48))


@pytest.mark.parametrize("options", [
    {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_no_step_of_generate_looks_at_a_number(model, options):
    """Counted twice: calls that give a number to Python, and numbers that PyTorch takes inside its operations."""
    counts = []
    for new in (2, 12):
        with HostReads() as looks:
            model.generate(texts(2, 5), new, **options)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            model.generate(texts(2, 5), new, **options)
        inside = sum(event.name == "aten::_local_scalar_dense" for event in seen.events())
        counts.append((looks.count, inside))
    assert counts[0] == counts[1] and min(counts[0]) > 0  # those of the prompt


@pytest.mark.parametrize("vocab", [3, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_is_drawn_as_multinomial_draws_it(vocab, dtype):
    """The same token of the same random numbers, and as many of them are used."""
    probs = torch.randn(9, vocab, dtype=dtype).softmax(-1)
    probs[:, 1::3] = 0
    for seed in range(5):
        first, second = (torch.Generator().manual_seed(seed) for _ in range(2))
        assert torch.equal(decoder._pick(probs, first), torch.multinomial(probs, 1, generator=second)[:, 0])
        assert torch.equal(first.get_state(), second.get_state())


def test_a_checked_step_does_look():
    arguments = torch.randn(1, 2, 3), -torch.rand(1, 2), *torch.randn(2, 1, 2, 4), torch.randn(1, 2, 3, 4)
    with HostReads() as checked:
        ssd_step(*arguments)
    with HostReads() as trusted, unchecked():
        ssd_step(*arguments)
    assert checked.count > trusted.count == 0


def test_unchecked_ends_with_its_block():
    x, B = torch.randn(1, 5, 2, 3), torch.randn(1, 5, 2, 4)
    growing = torch.ones(1, 5, 2)
    with pytest.raises(RuntimeError, match="stop"), unchecked():
        ssd(x, growing, B, B)
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="^log_a reaches 1"):
        ssd(x, growing, B, B)
    with unchecked():
        with unchecked():
            pass
        ssd(x, growing, B, B)
        ssd(x=x, log_a=growing, B=B, C=B, chunk_size=2)
    with pytest.raises(ValueError, match="^log_a reaches 1"):
        ssd(x=x, log_a=growing, B=B, C=B)


def test_unchecked_operators_stay_out_of_autocast():
    """A state of float32 is read in float32, checked or not."""
    arguments = torch.randn(1, 2, 3), -torch.rand(1, 2), *torch.randn(2, 1, 2, 4), torch.randn(1, 2, 3, 4)
    expected = ssd_step(*arguments)[0]
    with torch.autocast("cpu", torch.bfloat16), unchecked():
        assert torch.equal(ssd_step(*arguments)[0], expected)
        assert torch.equal(ssd_step(**dict(zip(("x_t", "log_a_t", "B_t", "C_t", "state"), arguments)))[0], expected)


@torch.no_grad()
def go_on(model, state, tokens):
    """The logits after steps in place."""
    for token in tokens.unbind(1):
        logits, state = model.step(token, state, in_place=True)
    return logits, state


@torch.no_grad()
def test_a_snapshot_is_out_of_reach_of_steps_in_place(model):
    _, state = model.read(texts(2, 7))
    snapshot, ending, other = copy_state(state), texts(2, 5), texts(2, 3)
    expected, state = go_on(model, state, ending)
    _, state = go_on(model, state, other)
    assert torch.equal(go_on(model, copy_state(snapshot), ending)[0], expected)
    places = [z.data_ptr() for z in tree_leaves(state) if z is not None]
    state = restore_state(state, snapshot)
    kinds = {type(z) for z in state}
    if not kinds & {KVCache, MixedState}:  # the memory stays; a cache's cannot
        assert [z.data_ptr() for z in tree_leaves(state) if z is not None] == places
    assert torch.equal(go_on(model, state, ending)[0], expected)
    assert torch.equal(go_on(model, copy_state(snapshot), ending)[0], expected)  # the snapshot is as it was


@torch.no_grad()
def test_a_fork_goes_on_as_each_sequence_would(model):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    _, state = model.read(texts(2, 6), mask)
    rows, ending = [1, 0, 1, 1], texts(4, 5)
    found, _ = go_on(model, fork_state(state, rows), ending)
    for row, (source, tokens) in enumerate(zip(rows, ending)):
        alone, _ = go_on(model, fork_state(state, [source]), tokens[None])
        assert relative_error(found[row], alone[0]) < 1e-13
    for wrong in ([0, 2], [-1]):
        with pytest.raises(IndexError, match="the state has 2 sequences"):
            fork_state(state, wrong)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llamba", "attention", "hybrid", "some heads", "fixed turns"])
def test_a_snapshot_of_something_else_is_not_restored(name):
    """Another number of sequences, type or model, if only in the last layer; then nothing is changed."""
    model, other = MODELS[name](), student([0])
    (_, one), (_, two), (_, three) = model.read(texts(1, 5)), model.read(texts(2, 5)), other.read(texts(2, 5))
    (_, wide), before = model.double().read(texts(2, 5)), [z.clone() for z in tree_leaves(two) if z is not None]
    for snapshot in (one, wide, three, [*two[:-1], one[-1]], [*two[:-1], wide[-1]], two[:-1]):
        with pytest.raises(ValueError):
            restore_state(two, snapshot)
        assert all(map(torch.equal, before, [z for z in tree_leaves(two) if z is not None]))


@torch.no_grad()
def test_generate_goes_on_from_a_state_and_leaves_it(model):
    ids = texts(2, 9)
    expected = model.generate(ids, 6)[:, 9:]
    _, state = model.read(ids[:, :6])
    for _ in range(2):
        assert torch.equal(model.generate(ids[:, 6:], 6, state=state)[:, 3:], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ahead", [1, 3, 20])
def test_speculation_writes_the_teachers_text(name, ahead):
    teacher = shaken(MODELS["attention"]().double())
    model = teacher if name == "attention" else shaken(MODELS[name]().double())
    for length in (1, 9):
        ids = texts(1, length)
        found = speculate(teacher, model, ids, 14, ahead)
        assert torch.equal(found.tokens, teacher.generate(ids, 14))
        assert sum(found.accepted) + len(found.accepted) + 1 >= 14 and 0 <= found.rate <= 1
        assert all(0 <= a <= p <= ahead for a, p in zip(found.accepted, found.proposed))
        if name == "attention":
            assert found.accepted == found.proposed and found.rate == 1


@torch.no_grad()
def test_speculation_ends_where_the_teacher_ends():
    """Wherever the stop token comes: in the first token, among the proposals, or as the teacher's own."""
    teacher, model = shaken(Llama(llama_config()).double()), shaken(student().double())
    ids = texts(1, 6)
    whole = teacher.generate(ids, 12)
    for stop in set(whole[0, 6:].tolist()):
        for one in (model, teacher):
            found = speculate(teacher, one, ids, 12, 4, stop_tokens=[stop])
            assert torch.equal(found.tokens, teacher.generate(ids, 12, stop_tokens=[stop]))


@torch.no_grad()
def test_speculation_goes_back_by_any_number_of_tokens():
    """Students that are often right: rounds of which none, some and all proposals stand."""
    teacher, ahead = load_model("tiny")[0].double(), 3
    for name in ("tiny-mamba2", "tiny-gateloop"):
        model, counts = load_model(name)[0].double(), set()
        for seed in range(4):
            ids = torch.randint(teacher.vocab_size, (1, 12), generator=torch.Generator().manual_seed(seed))
            found = speculate(teacher, model, ids, 40, ahead)
            assert torch.equal(found.tokens, teacher.generate(ids, 40))
            counts |= set(found.accepted)
        assert counts == set(range(ahead + 1))


@torch.no_grad()
def test_speculation_keeps_the_type_of_ids_and_refuses_what_generate_refuses():
    teacher, model = Llama(llama_config()), student()
    assert speculate(teacher, model, texts(1, 3).int(), 5).tokens.dtype == torch.int32
    with pytest.raises(ValueError, match="stop_tokens holds 9999"):
        speculate(teacher, model, texts(1, 3), 5, stop_tokens=[9999])
    teacher.backbone.final_layernorm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="no token can be drawn"):
        speculate(teacher, model, texts(1, 3), 5)


def test_what_cannot_be_speculated():
    teacher, model = Llama(llama_config()), student()
    for arguments, wrong in (((teacher, model, texts(2, 3), 4), "input_ids has 2 rows"),
                             ((model, teacher, texts(1, 3), 4), "the teacher has recurrent layers"),
                             ((teacher, model, texts(1, 3), 0), "max_new_tokens is 0"),
                             ((teacher, model, texts(1, 3), 4, 0), "ahead is 0")):
        with pytest.raises(ValueError, match=wrong):
            speculate(*arguments)


@torch.no_grad()
def test_a_cropped_cache_is_the_earlier_one():
    _, (cache, *_) = Llama(llama_config()).read(texts(2, 9))
    keys = cache.k.clone()
    for length in (9, 6, 1, 0):
        cache = cache.crop(length)
        assert cache.k.shape[2] == cache.v.shape[2] == length and torch.equal(cache.k, keys[:, :, :length])
    for length in (-1, 1):
        with pytest.raises(ValueError, match=f"length is {length}: the cache has 0 entries"):
            cache.crop(length)


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_a_cropped_cache_goes_on_as_if_nothing_had_been(length):
    """Also when it is cropped inside of the padding."""
    model, ids = shaken(Llama(llama_config()).double()), texts(2, 6)
    mask, more = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6]), texts(2, 5)
    _, long = model.read(ids, mask)
    found, _ = model.read(more, state=[layer.crop(length) for layer in long])
    rows = [torch.cat([row[:length][keep[:length] > 0], rest]) for row, keep, rest in zip(ids, mask, more)]
    for row, text in enumerate(rows):
        assert relative_error(found[row], model.read(text[None])[0][0]) < 1e-12
