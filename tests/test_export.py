"""Exported files say what the model says, in every format, for every mixer; and what cannot be exported is refused."""

import json
import sys

import pytest
import torch

import llamba_ref as lr
from llamba_ref.edge import EdgeModel, load_edge
from llamba_ref.export import Program, export_model, exportable, growing_axes, onnx_graph
from llamba_ref.llamba import MLPConfig, SSMConfig
from llamba_ref.models import load_model

pytest.importorskip("onnxruntime", reason="the extra onnx brings it")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}
NAMES = ("published", "fixed", "learned", "data", "hybrid", "heads", "llama", "mamba2", "untied", "padded", "narrow")


@pytest.fixture(scope="module")
def tokenizer():
    return lr.load_tokenizer("llamba_ref/assets/tiny-llama")


def made(name, layers=2):
    """A small model of each kind, with the vocabulary of the shipped tokenizer."""
    torch.manual_seed(1)
    if name == "mamba2":
        sizes = {"vocab_size": 1024, "d_model": 32, "n_layer": layers, "d_state": 16, "headdim": 16, "n_groups": 2}
        return lr.Mamba2LM(lr.Mamba2Config(**sizes))
    if name == "padded":  # rows that no token has
        return lr.Llamba(lr.LlambaConfig(vocab_size=1020, d_model=32, n_layer=layers, ssm_cfg=SSMConfig(8, 2, 1),
                                         mlp_cfg=MLPConfig(64), pad_vocab_size_multiple=16))
    sizes = SIZES | {"num_hidden_layers": layers, "tie_word_embeddings": name != "untied"}
    sizes |= {"hidden_size": 48, "head_dim": 24, "intermediate_size": 72} if name == "narrow" else {}  # no whole blocks
    teacher = lr.Llama(lr.LlamaConfig(vocab_size=1024, **sizes))
    for weight in teacher.parameters():
        weight.data *= 3  # so that logits differ
    if name == "llama":
        return teacher
    if name in ("published", "untied", "narrow"):
        return lr.Llamba.from_teacher(teacher, start="published", rotation="none", d_state=8)
    if name in ("hybrid", "heads"):
        return lr.Llamba.from_teacher(teacher, [1] if name == "hybrid" else [(0, 1), (1, 0)], d_state=8)
    student = lr.Llamba.from_teacher(teacher, rotation=name, d_state=8)
    for weight_name, weight in student.named_parameters():  # what is learned begins as zero
        if weight_name.endswith(("log_speed", "speed.weight")):
            torch.nn.init.normal_(weight, std=0.1)
    return student


def far(model, edge, ids):
    """Relative error of the logits of all positions, in one piece."""
    with torch.no_grad():
        expected = model(ids)
    return ((edge(ids) - expected).norm() / expected.norm()).item()


def divergence(model, edge, ids):
    with torch.no_grad():
        ours, theirs = (one(ids).double().log_softmax(-1) for one in (edge, model))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()


@pytest.fixture(scope="module", params=NAMES)
def exported(request, tokenizer, tmp_path_factory):
    model = made(request.param).eval()
    file = export_model(model, tokenizer, tmp_path_factory.mktemp(request.param) / "m.onnx", "onnx", 32)
    return model, EdgeModel(file, 1)


@pytest.mark.parametrize("length", [1, 2, 63, 65, 200])
def test_onnx_says_what_the_model_says(exported, length):
    model, edge = exported
    assert far(model, edge, torch.randint(1000, (2, length))) < 1e-5


def test_onnx_goes_on_from_a_state(exported):
    """Pieces of any length, then steps; the state before stays valid, so that a text can go on in two ways."""
    model, edge = exported
    ids = torch.randint(1000, (2, 30))
    with torch.no_grad():
        expected = model(ids)
    _, state = edge.prefill(ids[:, :1])
    logits, state = edge.prefill(ids[:, 1:17], state)
    assert (logits - expected[:, 1:17]).abs().max() < 1e-4 * expected.abs().max()
    for _ in range(2):
        here = state
        for position in range(17, 30):
            step, here = edge.step(ids[:, position], here, in_place=True)
            assert (step - expected[:, position]).abs().max() < 1e-4 * expected.abs().max()


def test_onnx_writes_what_the_model_writes(exported):
    model, edge = exported
    prompts = torch.randint(1000, (2, 9))
    assert torch.equal(edge.generate(prompts, 20), model.generate(prompts, 20))
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0
    assert torch.equal(edge.generate(prompts, 5, attention_mask=mask), model.generate(prompts, 5, attention_mask=mask))


MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("heads", "mamba2", "padded", "narrow", "data")]


@pytest.mark.parametrize("name", ["untied", *MORE])
def test_onnx_with_rounded_weights(tokenizer, tmp_path, name):
    """Random weights tell nothing about quality; that a scale was lost, they do."""
    model, ids, errors, sizes = made(name).eval(), torch.randint(1000, (1, 50)), [], []
    for bits in (8, 4):
        file = export_model(model, tokenizer, tmp_path / f"{bits}.onnx", "onnx", bits)
        errors.append(far(model, EdgeModel(file), ids))
        sizes.append(file.stat().st_size)
    assert 1e-4 < errors[0] < 0.06 < errors[1] < 0.6  # a lost scale: about 1
    assert sizes[1] < sizes[0] < 2 * sum(weight.numel() for weight in model.parameters()) + 100_000


@pytest.mark.slow
def test_the_student_with_rounded_weights(tokenizer, tmp_path):
    student, blocks = load_model("tiny-llamba")[0], lr.pack(lr.load_documents("austen"), tokenizer, 256, max_blocks=8)
    limits, sizes = {8: 4e-4, 4: 0.02}, {}
    for bits in (8, 4):
        file = export_model(student, tokenizer, tmp_path / f"{bits}.onnx", "onnx", bits)
        sizes[bits] = file.stat().st_size
        assert divergence(student, EdgeModel(file), blocks[:8]) < limits[bits]
    assert sizes[8] < 1.4e6 and sizes[4] < 1.0e6


@pytest.fixture(scope="module")
def executorch(tokenizer, tmp_path_factory):
    """One layer with keys that turn, in 32 bits: it takes a while, and with fewer bits longer."""
    pytest.importorskip("executorch", reason="make test-edge installs ExecuTorch")
    model = made("fixed", layers=1).eval()
    return model, export_model(model, tokenizer, tmp_path_factory.mktemp("executorch") / "m.pte", "executorch", 32)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_executorch_says_what_the_model_says(executorch, length):
    model, file = executorch
    assert far(model, EdgeModel(file, 1), torch.randint(1024, (2, length))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name, bits", [("fixed", 8), ("fixed", 4), ("mamba2", 4), ("narrow", 4), ("data", 8)])
def test_executorch_with_rounded_weights(tokenizer, tmp_path, name, bits):
    pytest.importorskip("executorch", reason="make test-edge installs ExecuTorch")
    model = made(name, layers=1).eval()
    edge = EdgeModel(export_model(model, tokenizer, tmp_path / "m.pte", "executorch", bits), 1)
    least, most = {8: (1e-5, 0.06), 4: (1e-4, 0.6)}[bits]  # a lost scale: about 1
    for length in (1, 64, 70):
        assert least < far(model, edge, torch.randint(1000, (1, length))) < most


def test_executorch_goes_on_from_a_state(executorch):
    model, file = executorch
    edge, ids = EdgeModel(file, 1), torch.randint(1024, (1, 80))
    with torch.no_grad():
        expected = model(ids)
    _, state = edge.prefill(ids[:, :70])
    for _ in range(2):
        here = state
        for position in range(70, 80):
            logits, here = edge.step(ids[:, position], here)
            assert (logits - expected[:, position]).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(edge.generate(ids, 10), model.generate(ids, 10))


def test_steps_and_states_that_do_not_fit(exported):
    _, edge = exported
    _, state = edge.read(torch.randint(1000, (2, 3)))
    for token in (torch.tensor([1]), torch.tensor([1, 2, 3]), torch.tensor([[1], [2]])):
        with pytest.raises(ValueError, match="token_ids has shape"):
            edge.step(token, state)
    for wrong in (-1, 5000):
        with pytest.raises(ValueError, match="holds id"):
            edge.step(torch.tensor([1, wrong]), state)
    for rows in (1, 3):
        for reading in (edge.read, edge.prefill):
            with pytest.raises(ValueError):
                reading(torch.randint(1000, (rows, 3)), state=state)


def test_beside_a_file_lies_what_ends_a_text(tokenizer, tmp_path):
    model = made("published", layers=1)
    model.config.eos_token_id = 7
    file = export_model(model, tokenizer, tmp_path / "m.onnx", "onnx", 32)
    edge, its = load_edge(file)
    assert edge.stop_tokens == (7,) and its.get_vocab() == tokenizer.get_vocab()
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 7}


def test_axes_that_grow():
    assert not set().union(*growing_axes(Program(made("fixed"))))
    assert set().union(*growing_axes(Program(made("llama")))) == {2}
    hybrid = growing_axes(Program(made("hybrid")))
    assert hybrid[-2:] == [{2}, {2}] and not set().union(*hybrid[:-2])


@pytest.mark.parametrize(
    "name, to, words",
    [("hybrid", "executorch", "layer 1 has a cache that grows"), ("heads", "executorch", "layer 0 has a cache"),
     ("llama", "executorch", "layer 0 has a cache")],
)
def test_what_executorch_cannot_hold(tokenizer, tmp_path, name, to, words):
    with pytest.raises(ValueError, match=words):
        export_model(made(name), tokenizer, tmp_path / "m.pte", to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to, suffix", [("onnx", ".onnx"), ("executorch", ".pte")])
def test_gateloop_is_refused(tokenizer, tmp_path, to, suffix):
    with pytest.raises(ValueError, match="layer 0 has a GateLoop"):
        export_model(load_model("tiny-gateloop")[0], tokenizer, tmp_path / f"m{suffix}", to)


def test_wrong_arguments(tokenizer, tmp_path):
    model = made("published", layers=1)
    wrong = {"to is": {"to": "tflite"}, "bits is": {"bits": 3}, "must end in": {"to": "executorch"}}
    for words, options in wrong.items():
        with pytest.raises(ValueError, match=words):
            export_model(model, tokenizer, tmp_path / "m.onnx", **({"to": "onnx"} | options))
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        export_model(model, tokenizer, tmp_path / "m.onnx", "onnx")
    assert (tmp_path / "m.onnx").read_text() == "mine"


def test_another_models_directory(tokenizer, tmp_path):
    model = made("published", layers=1)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    with pytest.raises(ValueError, match="is of another model"):
        export_model(model, tokenizer, tmp_path / "m.onnx", "onnx")
    other = lr.load_tokenizer("llamba_ref/assets/tiny-llama")
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="tokenizer.json: is of another model"):
        export_model(model, tokenizer, tmp_path / "b" / "m.onnx", "onnx")


@pytest.fixture(scope="module")
def of_somebody_else():
    """An ONNX graph that says nothing of this package."""
    return onnx_graph(exportable(made("published", layers=1), "onnx")).SerializeToString()


@pytest.mark.parametrize("suffix", [".onnx", ".pte"])
@pytest.mark.parametrize("size", [0, 3, 1000, 100_000])
def test_a_file_that_is_cut(request, of_somebody_else, tmp_path, suffix, size):
    file, whole = tmp_path / f"m{suffix}", of_somebody_else
    if suffix == ".pte":
        whole = request.getfixturevalue("executorch")[1].read_bytes()
    assert len(whole) > size
    file.write_bytes(whole[:size])
    with pytest.raises(ValueError, match="not a file that llamba export has written, or damaged"):
        EdgeModel(file)


def test_an_onnx_file_of_somebody_else(of_somebody_else, tmp_path):
    file = tmp_path / "m.onnx"
    file.write_bytes(of_somebody_else)
    with pytest.raises(ValueError, match="not a file that llamba export has written"):
        EdgeModel(file)


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        EdgeModel(tmp_path / "m.onnx")
    (tmp_path / "m.gguf").write_text("")
    with pytest.raises(ValueError, match="ends in .onnx or .pte"):
        EdgeModel(tmp_path / "m.gguf")


def test_wrong_ids(exported):
    edge = exported[1]
    for ids in (torch.tensor([[1024]]), torch.tensor([[-1]]), torch.tensor([1]), torch.tensor([[0.5]])):
        with pytest.raises(ValueError, match="input_ids"):
            edge(ids)


def test_without_the_packages(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "m.onnx").write_text("")
    with pytest.raises(ImportError, match=r"onnxruntime is not installed.*pip install 'llamba_ref\[edge\]'"):
        EdgeModel(tmp_path / "m.onnx")
