"""Steps that own their state, and prompts that are read in pieces: every kind of mixer gives the same numbers."""

from functools import partial

import pytest
import torch
from small import HostReads, llama_config, llamba_config, mamba2_config, shaken
from torch.utils._pytree import tree_leaves

from llamba_ref.associative_recall import WithConvolution
from llamba_ref.conventions import peak_bytes, relative_error, unchecked
from llamba_ref.decoder import Backbone, Decoder
from llamba_ref.gateloop import GateLoop
from llamba_ref.llama import Llama
from llamba_ref.llamba import Llamba
from llamba_ref.mamba2 import Mamba2LM, SSDMixer
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


def test_no_step_of_generate_looks_at_a_number(model):
    counts = []
    for new in (2, 12):
        with HostReads() as looks:
            model.generate(texts(2, 5), new)
        counts.append(looks.count)
    assert counts[0] == counts[1] > 0  # those of the prompt


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
