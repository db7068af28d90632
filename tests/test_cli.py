"""The command `llamba`: what every option does, what a run leaves behind, what errors look like, what a killed run
loses."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import is_dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import llama_config

import llamba_ref as lr
from llamba_ref import checkpoint, cli, training
from llamba_ref.cli import Range, main
from llamba_ref.data import load_documents, pack, split_documents, train_tokenizer
from llamba_ref.discrete import DiscreteMamba2
from llamba_ref.evaluate import compare, evaluate
from llamba_ref.llama import Attention, Llama, LlamaConfig
from llamba_ref.llamba import Llamba
from llamba_ref.models import load_model, save_model
from llamba_ref.rotation import RotaryMamba2
from llamba_ref.throughput import step_cost
from llamba_ref.training import read_metrics, seal

TEXT = ["--held-out", "4", "--length", "32", "--validation-blocks", "4"]
SIZE = ["--batch-size", "2", "--d-state", "4", "--chunk-size", "16"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many threads in every process here, so that numbers can be compared to the last bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A directory with a text (`text.txt`), and a Llama of 2 layers with its tokenizer (`teacher`)."""
    home = tmp_path_factory.mktemp("toy")
    chapters = load_documents("austen")["text"][:24]
    (home / "text.txt").write_text("\n\n\n\n\n".join(chapter[:1500] for chapter in chapters))
    training, _ = split_documents(load_documents(home / "text.txt"), 4)
    tokenizer = train_tokenizer(training["text"], 300)
    torch.manual_seed(0)
    save_model(home / "teacher", Llama(config_of(tokenizer)), tokenizer)
    return home


def config_of(tokenizer) -> LlamaConfig:
    return llama_config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, tie_word_embeddings=True,
                        bos_token_id=0, eos_token_id=0)


def words(toy: Path, out: Path, *more, steps=("2", "2", "2")) -> list[str]:
    """A small distillation."""
    return [
        "distill",
        "--out",
        str(out),
        "--teacher",
        str(toy / "teacher"),
        "--text",
        str(toy / "text.txt"),
        *TEXT,
        *SIZE,
        "--steps",
        *steps,
        "--save-every",
        "2",
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory) -> Path:
    """A finished distillation."""
    out = tmp_path_factory.mktemp("runs") / "run"
    main(words(toy, out))
    return out


@pytest.fixture
def llamba(capsys):
    """Run a command in this process: exit code, standard output, standard error."""

    def call(*args):
        capsys.readouterr()
        try:
            main([str(arg) for arg in args])
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def message(llamba):
    """Run a command that must fail as the user's mistake does: exit code 1, one line, no traceback. Returns the
    line."""

    def call(*args):
        code, _, err = llamba(*args)
        lines = [line for line in err.splitlines() if line.startswith("llamba: error: ")]
        assert (code, len(lines)) == (1, 1), err
        assert "Traceback" not in err and err.rstrip().endswith(lines[0])
        return lines[0]

    return call


def copy_of(teacher: Path, to: Path, **config) -> Path:
    """A copy of a checkpoint, with some entries of its config changed."""
    shutil.copytree(teacher, to)
    values = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(values))
    return to


# What a command says about itself


@pytest.mark.parametrize("command", ["distill", "generate", "evaluate", "bench", "pretrain"])
def test_help_explains_every_option(command, llamba, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = llamba(command, "--help")
    assert code == 0
    rows = [line.strip("│ ") for line in out.splitlines() if line.strip("│ ").startswith("--")]
    assert len(rows) > 8
    below = [line.strip("│ ") for line in out.splitlines()]
    for row in rows:
        explained = len(row.split("  ", 1)) == 2 or not below[below.index(row) + 1].startswith("--")
        assert explained, row


def test_help_names_every_command(llamba):
    code, out, _ = llamba("--help")
    assert code == 0 and all(command in out for command in ("distill", "generate", "evaluate", "bench", "pretrain"))


@pytest.mark.parametrize(
    "args",
    [
        ["--nosuch", "3"],
        ["distill", "--nosuch"],
        ["distill", "--steps", "1", "1"],
        ["distill", "--lr", "a", "b", "c"],
        ["distill", "--precision", "fp7"],
        ["distill", "--start", "random"],
        ["distill", "--rotation", "some"],
        ["nosuch"],
        [],
    ],
)
def test_options_that_do_not_exist_end_with_code_2(args, llamba):
    code, _, err = llamba(*args)
    assert code == 2 and "Traceback" not in err and err


def test_unforeseen_errors_keep_their_traceback(monkeypatch):
    for bug in (KeyError("a bug"), TypeError("a bug"), AttributeError("a bug"), RuntimeError("a bug")):

        def broken(name, bug=bug):
            raise bug

        monkeypatch.setattr(lr, "load_model", broken)
        with pytest.raises(type(bug), match="a bug"):
            main(["generate", "x"])


@pytest.mark.parametrize("command", ["distill", "generate", "evaluate"])
def test_interrupted_before_anything_is_written(command, llamba, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no demo has been run

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(lr, "load_model", interrupted)
    assert llamba(command) == (130, "", "llamba: stopped\n")


def test_an_interrupt_that_became_another_error(monkeypatch, capsys):
    """As in the middle of an import. The next Ctrl+C is then ignored, so that it can't disturb the end."""

    def broken(name):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as err:
            raise RecursionError("half a module") from err

    monkeypatch.setattr(lr, "load_model", broken)
    monkeypatch.setattr(sys, "argv", ["llamba", "generate", "x"])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130 and capsys.readouterr().err == "llamba: stopped\n"


def test_interrupted_run_says_how_to_go_on(toy, tmp_path, llamba, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_step", interrupted)
    code, _, err = llamba(*words(toy, tmp_path / "run"))
    assert code == 130 and err.splitlines()[-1].startswith("llamba: stopped; the same command with --resume goes on")


# What a run leaves behind


def test_run_directory(run, toy):
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} - {".lock"}
    expected = {"config.json", "machine.json", "metrics.jsonl", "figures/matrices.png", "figures/progress.png"}
    expected |= {
        f"student/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    parts = ("training.pt", "weights.safetensors")
    expected |= {f"checkpoints/step-0000000{step}/{name}" for step in (4, 6) for name in parts}
    others = {"student/generation_config.json", *(f"checkpoints/step-0000000{step}/checksums.json" for step in (4, 6))}
    assert expected <= files <= expected | others
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == [2, 2, 2] and config["text"] == [str(toy / "text.txt")] and config["length"] == 32
    for figure in (run / "figures").glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 5000


def test_metrics(run):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in metrics if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["stage"] for record in steps] == ["orientation"] * 2 + ["alignment"] * 2 + ["distillation"] * 2
    evaluations = {record["evaluation"]: record for record in metrics if "evaluation" in record}
    assert list(evaluations) == ["attention replaced", "after orientation", "after alignment", "after distillation"]
    assert all(
        record["perplexity"] > 1 and record["kl"] > 0 and 0 <= record["agreement"] <= 1
        for record in evaluations.values()
    )


def test_student_is_a_checkpoint_with_its_tokenizer(run, toy):
    student, tokenizer = load_model(str(run / "student"))
    assert isinstance(student, Llamba) and all(
        isinstance(block.mixer, DiscreteMamba2) for block in student.backbone.layers
    )
    final = load_file(run / "checkpoints/step-00000006/weights.safetensors")
    assert all(
        torch.equal(weight, final[name])
        for name, weight in Llamba.from_pretrained(run / "student").state_dict().items()
    )
    assert tokenizer.get_vocab() == load_model(str(toy / "teacher"))[1].get_vocab()


@pytest.mark.parametrize(
    "given, kind", [((), RotaryMamba2), (("--start", "published", "--rotation", "none"), DiscreteMamba2)]
)
def test_options_reach_the_student(toy, tmp_path, llamba, given, kind):
    code, out, err = llamba(
        *words(
            toy,
            tmp_path / "run",
            "--replace",
            1,
            "--micro-batch-size",
            1,
            "--streaming",
            "--prompt",
            "She",
            *given,
            steps="110",
        )
    )
    assert code == 0, err
    student, _ = load_model(str(tmp_path / "run"))
    assert [type(block.mixer) for block in student.backbone.layers] == [Attention, kind]
    assert student.config.ssm_cfg.bias == (not given)  # a start from the teacher needs them
    assert student.config.ssm_cfg.d_state == 4 and student.config.ssm_cfg.chunk_size == 16
    assert f"layers: 1 of Attention and 1 of {kind.__name__}" in out
    assert "a stream" in out and "distillation:" not in out
    assert out.count("\nShe") == 2


def test_everything_random_hangs_on_the_seed(run, toy, tmp_path, llamba):
    assert llamba(*words(toy, tmp_path / "same"))[0] == 0
    assert llamba(*words(toy, tmp_path / "other", "--seed", 1))[0] == 0
    weights = [load_file(path / "student/model.safetensors") for path in (run, tmp_path / "same", tmp_path / "other")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


# Several documents in a row, conversations, mixes


@pytest.fixture(scope="module")
def talks(toy) -> Path:
    """Conversations, and beside the teacher one whose tokenizer can write them out (`speaker`)."""
    rows = [[{"role": "user", "content": f"Who is {i}?"}, {"role": "assistant", "content": "A lady. " * (i % 4 + 1)}]
            for i in range(60)]
    (toy / "talks.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    teacher, tokenizer = load_model(str(toy / "teacher"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    save_model(toy / "speaker", teacher, tokenizer)
    return toy / "talks.jsonl"


AS_A_STREAM = pytest.param(["--streaming"], marks=pytest.mark.slow)


@pytest.mark.parametrize("streaming", [[], AS_A_STREAM], ids=["in memory", "as a stream"])
def test_a_run_on_everything_at_once(toy, talks, tmp_path, llamba, no_pictures, streaming):
    """Two texts of which one holds conversations, three to one, rows that forget; killed, resumed, to the same bits."""
    options = ["--teacher", toy / "speaker", "--text", toy / "text.txt", talks, "--weights", "3", "1", *streaming]
    options += ["--chat", "no", "assistant", "--packing", "resets"]
    runs = {}
    for name, steps in (("whole", None), ("killed", 3)):
        command = words(toy, tmp_path / name, *options)
        if steps:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "shares", stop_after(steps))
                assert llamba(*command)[0] == 130
            command.append("--resume")
        code, out, err = llamba(*command)
        assert code == 0, err
        assert all(words in out for words in ("text.txt: ", "75% of the rows; ", "talks.jsonl: ", "25% of the rows"))
        runs[name] = [{key: value for key, value in record.items() if key != "tokens_per_second"}
                      for record in read_metrics(tmp_path / name)]
    assert runs["whole"] == runs["killed"]
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["packing"], config["chat"], config["weights"]) == ("resets", ["no", "assistant"], [3, 1])
    for changed in (["--packing", "joined"], ["--chat", "no", "all"], ["--weights", "1", "1"]):
        code, _, err = llamba(*words(toy, tmp_path / "whole", *options, *changed, "--resume"))
        assert code == 1 and f"differ from the config.json of the run: {changed[0][2:]}" in err


def stop_after(steps: int):
    """`training.shares`, which every step begins with, but Ctrl+C when it has been called so often."""
    calls = iter(range(steps))

    def shares(*args, kept=training.shares):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return kept(*args)

    return shares


def test_evaluate_in_both_packings(toy, talks, llamba):
    """Of the same text: other contexts, so other figures; and fewer tokens that something predicts."""
    text = ["--text", toy / "text.txt", "--held-out", "4", "--length", "256", "--separator", r"\n+", "--json"]
    found = {}
    for packing in ("joined", "resets"):
        code, out, err = llamba("evaluate", toy / "teacher", *text, "--packing", packing)
        assert code == 0, err
        found[packing] = json.loads(out)
    assert found["resets"]["tokens"] < found["joined"]["tokens"]
    assert found["resets"]["perplexity"] != found["joined"]["perplexity"]
    counts = []
    for chat in ("assistant", "all"):
        code, out, err = llamba("evaluate", toy / "speaker", "--text", talks, "--chat", chat, *TEXT, "--json")
        assert code == 0, err
        counts.append(json.loads(out)["tokens"])
    assert counts[0] < counts[1]


@pytest.mark.parametrize("options, expected", [
    (["--weights", "1", "2"], "weights is 1.0 2.0: it must be one, or one for each of 1 texts"),
    (["--weights", "0"], "weights is 0.0: it must be from 1e-06"),
    (["--chat", "no", "all"], "chat is no all: it must be one, or one for each of 1 texts"),
    (["--chat", "all"], "text.txt is plain text: conversations are read from the column 'messages' of a table"),
    (["--text", "austen", "nosuch.txt"], "nosuch.txt does not exist"),
])
def test_bad_mixes(options, expected, toy, tmp_path, message):
    assert expected in message(*words(toy, tmp_path / "run"), *options)
    assert not (tmp_path / "run").exists()


def test_conversations_need_a_template(toy, talks, tmp_path, message):
    said = message(*words(toy, tmp_path / "run"), "--text", talks, "--chat", "assistant")
    assert "the tokenizer has no chat template" in said


# generate and evaluate


def test_generate(run, llamba):
    command = ["generate", run / "student", "She was", "--tokens", "8"]
    first = llamba(*command)
    assert first[0] == 0 and first[1].startswith("She was") and len(first[1]) > len("She was\n")
    assert llamba(*command) == first  # the seed decides
    assert llamba("generate", run, "She was", "--tokens", "8") == first  # the run stands for its student
    others = {llamba(*command, "--seed", str(seed))[1] for seed in range(1, 5)}
    assert others - {first[1]}


def test_generate_greedy_needs_no_seed(run, llamba):
    texts = {
        llamba("generate", run, "She", "--tokens", "6", "--temperature", "0", "--seed", str(seed))[1]
        for seed in range(2)
    }
    assert len(texts) == 1
    assert texts == {llamba("generate", run, "She", "--tokens", "6", "--top-k", "1")[1]}


def test_evaluate(run, toy, llamba):
    options = ["--text", toy / "text.txt", *TEXT]
    code, out, _ = llamba("evaluate", run, "--teacher", toy / "teacher", "--json", *options)
    assert code == 0
    figures = json.loads(out)
    (teacher, tokenizer), (student, _) = load_model(str(toy / "teacher")), load_model(str(run))
    _, held_out = split_documents(load_documents(toy / "text.txt"), 4)
    blocks = pack(held_out, tokenizer, 32, max_blocks=4)
    ours = compare(teacher, student, blocks)
    assert figures == pytest.approx(
        {
            "perplexity": ours.student.perplexity,
            "bits_per_byte": ours.student.bits_per_byte,
            "tokens": 4 * 31,
            "teacher_perplexity": ours.teacher.perplexity,
            "agreement": ours.agreement,
            "kl": ours.kl,
        },
        rel=1e-5,
    )
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["perplexity"] == pytest.approx(ours.student.perplexity, rel=1e-5)  # what the run logged
    code, out, _ = llamba("evaluate", run, *options)
    assert code == 0 and f"{evaluate(student, blocks).perplexity:.4f}" in out and "tokens: 124" in out


def test_pretrain(toy, tmp_path, llamba):
    command = [
        "pretrain",
        "--out",
        tmp_path / "run",
        "--text",
        toy / "text.txt",
        *TEXT,
        "--vocab-size",
        "280",
        "--d-model",
        "16",
        "--layers",
        "1",
        "--intermediate-size",
        "32",
        "--steps",
        "3",
        "--batch-size",
        "2",
    ]
    code, out, err = llamba(*command)
    assert code == 0, err
    model, tokenizer = load_model(str(tmp_path / "run"))
    assert isinstance(model, Llama) and len(tokenizer) == model.vocab_size == 280
    assert "held-out perplexity" in out and (tmp_path / "run/figures/progress.png").exists()
    assert "there is a run already" in llamba(*command)[2]
    assert llamba(*command, "--resume")[0] == 0


@pytest.mark.parametrize("option, word", [("--keep-attention", "auto:1"), ("--keep-heads", "heads:1")])
def test_what_needs_attention_keeps_it(option, word, toy, tmp_path, llamba):
    code, _, err = llamba(*words(toy, tmp_path / "run", option, 1, steps="111"))
    assert code == 0, err
    teacher, student = load_model(str(toy / "teacher"))[0], load_model(str(tmp_path / "run"))[0]
    chosen = Llamba.from_teacher(teacher, word, d_state=8).config.attn_cfg
    assert student.config.attn_cfg == chosen and len(chosen.layers) == 1


# Bad input: one line, exit code 1, nothing begun


@pytest.mark.parametrize("options, expected", [
    (["--threads", "-1"], "threads is -1: it must be from 0 to 1024"),
    (["--device", "gpu"], "device is 'gpu'"),
    (["--device", "cuda:99"], "device is 'cuda:99': not "),
    (["--device", "meta"], "device is 'meta': not on this machine"),
    (["--replace", "2"], "replace is 2: layers are 0 to 1"),
    (["--replace", "0", "-1"], "replace is 0 -1: layers are 0 to 1"),
    (["--keep-attention", "3"], "keep_attention is 'auto:3': it must be layers, or (layer, head) pairs, or 'auto:K'"),
    (["--keep-heads", "9"], "keep_attention is 'heads:9': it must be layers, or (layer, head) pairs, or 'auto:K'"),
    (["--keep-heads", "1", "--replace", "0"], "keep_heads is 1: replace says already which layers"),
    (["--keep-heads", "1", "--keep-attention", "1"], "keep_attention is 1 and keep_heads is 1: only one of them"),
    (["--keep-attention", "1", "--replace", "0"], "keep_attention is 1: replace says already which layers"),
    (["--keep-attention", "1", "--start", "published"], "start is 'published': keep_attention='auto:1' needs one from"),
    (["--steps", "0", "0", "0"], "steps is 0"),
    (["--steps", "2", "-1", "2"], "steps is -1"),
    (["--lr", "1", "1", "-1"], "lr is -1"),
    (["--batch-size", "0"], "batch_size is 0"),
    (["--micro-batch-size", "-1"], "micro_batch_size is -1"),
    (["--save-every", "-1"], "save_every is -1"),
    (["--d-state", "0"], "d_state is 0"),
    (["--chunk-size", "0"], "chunk_size is 0"),
    (["--length", "0"], "length is 0"),
    (["--length", "1"], "length is 1"),
    (["--validation-blocks", "-1"], "validation_blocks is -1"),
    (["--seed", "-1"], "seed is -1"),
    (["--prompt", ""], "the prompt has no tokens"),
    (["--held-out", "1"], "held_out is 1"),
    (["--held-out", "100"], "24 documents"),
    (["--length", "9999999"], "one block needs 9999999"),
    (["--separator", "("], "separator is '('"),
    (["--text", "nosuch.txt"], "nosuch.txt"),
    (["--text", "nosuch/data"], "nosuch/data"),
    (["--teacher", "nosuch"], "nosuch: no such directory"),
    (["--teacher", "nosuch/model"], "nosuch/model"),
])  # fmt: skip
def test_bad_options(options, expected, toy, tmp_path, message):
    said = message(*words(toy, tmp_path / "run"), *options)
    assert expected in said
    assert not (tmp_path / "run").exists()  # so that the next attempt need not remove anything


@pytest.mark.parametrize("text, expected", [
    ("", "holds no text"),
    ("\n\n \n", "holds no text"),
    ("one document", "1 documents and held_out=4 holds out all of them"),
    ("\n\n\n\n\n".join("abcd"), "one block needs 32"),
    ("\n\n\n\n\n".join(["a long text " * 50] * 3 + ["x"]),
     "the held-out part: the corpus has 2 tokens, one block needs 32"),
])  # fmt: skip
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_text_that_is_too_small(text, expected, streaming, toy, tmp_path, message):
    (tmp_path / "small.txt").write_text(text)
    said = message(*words(toy, tmp_path / "run"), "--text", tmp_path / "small.txt", *streaming)
    assert expected in said and str(tmp_path / "small.txt") in said or "one block needs" in said
    # a stream is not read before the training begins, so that a run may have begun
    assert streaming or not (tmp_path / "run").exists()


def test_table_without_the_column(toy, tmp_path, message):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": "text"}) + "\n" for _ in range(9)))
    said = message(*words(toy, tmp_path / "run"), "--text", tmp_path / "rows.jsonl")
    assert "no column 'text'" in said and "body" in said


def spoiled(kind: str, teacher: Path, to: Path) -> Path:
    """A checkpoint with one fault."""
    if kind == "a file":
        to.write_text("no checkpoint")
    elif kind == "an empty directory":
        to.mkdir()
    elif kind == "another model":
        copy_of(teacher, to, model_type="gpt2")
    elif kind == "config is no JSON":
        (copy_of(teacher, to) / "config.json").write_text("{")
    elif kind == "no tokenizer":
        (copy_of(teacher, to) / "tokenizer.json").unlink()
    elif kind == "no weights":
        (copy_of(teacher, to) / "model.safetensors").unlink()
    elif kind == "damaged weights":
        file = copy_of(teacher, to) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    elif kind == "a tokenizer that is too large":
        copy_of(teacher, to)
        _, tokenizer = load_model(str(teacher))
        tokenizer.add_tokens(["<|one|>", "<|more|>"])
        tokenizer.save_pretrained(to)
    else:
        weights = load_file(copy_of(teacher, to) / "model.safetensors")
        if kind == "a missing weight":
            del weights["model.norm.weight"]
        elif kind == "a weight too many":
            weights["model.extra"] = torch.ones(1)
        elif kind == "a wrong shape":
            weights["model.norm.weight"] = torch.ones(31)
        save_file(weights, to / "model.safetensors")
    return to


@pytest.mark.parametrize("kind, expected", [
    ("a file", "a checkpoint is a directory or a .gguf file"),
    ("an empty directory", "no config.json"),
    ("another model", "model_type is 'gpt2'"),
    ("config is no JSON", "not a valid JSON file"),
    ("no tokenizer", "tokenizer.json"),
    ("no weights", "neither model.safetensors nor"),
    ("damaged weights", "damaged"),
    ("a tokenizer that is too large", "the tokenizer does not fit the model: its largest id is 301, vocab_size is 300"),
    ("a missing weight", "missing (backbone.final_layernorm.weight)"),
    ("a weight too many", "1 unexpected (backbone.extra)"),
    ("a wrong shape", "shape (31,) instead of (32,)"),
])  # fmt: skip
def test_bad_checkpoints(kind, expected, toy, tmp_path, message):
    bad = spoiled(kind, toy / "teacher", tmp_path / "bad")
    if "weight" in expected and "missing" in kind or "too many" in kind:
        expected = re.compile(r"(missing|unexpected) \((backbone|model)\.(final_layernorm|norm|extra)")
    for command in (
        words(toy, tmp_path / "run", "--teacher", bad),
        ["generate", bad],
        ["evaluate", bad, "--text", toy / "text.txt", *TEXT],
    ):
        said = message(*command)
        assert expected.search(said) if isinstance(expected, re.Pattern) else expected in said
        assert "bad" in said or "tokenizer does not fit" in said  # which checkpoint
    assert not (tmp_path / "run").exists()


def test_a_student_cannot_be_a_teacher(run, toy, tmp_path, message):
    said = message(*words(toy, tmp_path / "run", "--teacher", run / "student"))
    assert "a teacher must be a Llama, this is a Llamba" in said


@pytest.mark.parametrize("options, expected", [
    (["--tokens", "-1"], "tokens is -1"),
    (["--temperature", "-1"], "temperature is -1"),
    (["--top-k", "-1"], "top_k is -1"),
    (["--top-p", "0"], "top_p is 0"),
    (["--top-p", "1.5"], "top_p is 1.5"),
    (["--threads", "-1"], "threads is -1"),
    (["--device", "gpu"], "device is 'gpu'"),
])  # fmt: skip
def test_bad_options_of_generate(options, expected, toy, message):
    assert expected in message("generate", toy / "teacher", "She", *options)


def test_prompt_without_a_token(toy, message):
    assert "the prompt has no tokens" in message("generate", toy / "teacher", "")


@pytest.mark.parametrize("options, expected", [
    (["--batch-size", "0"], "batch_size is 0"),
    (["--length", "1"], "length is 1"),
    (["--held-out", "99"], "24 documents and held_out=99 holds out none of them"),
])  # fmt: skip
def test_bad_options_of_evaluate(options, expected, toy, message):
    assert expected in message("evaluate", toy / "teacher", "--text", toy / "text.txt", *TEXT, *options)


def test_models_with_different_tokenizers_are_not_compared(toy, tmp_path, message):
    tokenizer = train_tokenizer(["abc " * 9, "other text"], 300)
    save_model(tmp_path / "other", Llama(config_of(tokenizer)), tokenizer)
    said = message("evaluate", toy / "teacher", "--teacher", tmp_path / "other", "--text", toy / "text.txt", *TEXT)
    assert "different tokenizers" in said


@pytest.mark.parametrize("options, expected", [
    (["--heads", "3"], "d_model is 128: it must be a positive multiple of 2 * heads, 6"),
    (["--kv-heads", "3"], "kv_heads is 3: it must divide heads, 4"),
    (["--vocab-size", "100"], "vocab_size is 100"),
    (["--steps", "0"], "steps is 0"),
    (["--layers", "0"], "layers is 0"),
    (["--lr", "-1"], "lr is -1"),
])  # fmt: skip
def test_bad_options_of_pretrain(options, expected, toy, tmp_path, message):
    assert expected in message("pretrain", "--out", tmp_path / "run", "--text", toy / "text.txt", *TEXT, *options)
    assert not (tmp_path / "run").exists()


# What is there already is never lost


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_run_is_never_overwritten(run, toy, message):
    before = contents(run)
    assert "there is a run already" in message(*words(toy, run))
    assert contents(run) == before


def test_out_may_hold_something_else(toy, tmp_path, message):
    (tmp_path / "notes.txt").write_text("mine")
    assert str(tmp_path) in message(*words(toy, tmp_path))
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    assert "notes.txt" in message(*words(toy, tmp_path / "notes.txt"))


def test_resume_with_other_settings(run, toy, message):
    before = contents(run)
    said = message(*words(toy, run, "--resume", "--length", 16, "--lr", 1, 1, 1))
    assert "these settings differ" in said and "length, lr" in said
    assert contents(run) == before


def test_resume_of_nothing(toy, tmp_path, message):
    assert "there is no run to resume" in message(*words(toy, tmp_path / "nosuch", "--resume"))


def test_resume_of_a_finished_run_changes_nothing(run, toy, llamba):
    before = contents(run)
    code, out, _ = llamba(*words(toy, run, "--resume"))
    assert code == 0 and "the student continues" in out
    after = contents(run)
    assert {name: after[name] for name in before if "png" not in name} == {
        name: before[name] for name in before if "png" not in name
    }


def test_run_without_a_student_yet(run, toy, tmp_path, message):
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("student"))
    assert "has not written its model yet" in message("generate", unfinished)


def back_to_step_4(run: Path, to: Path) -> Path:
    """A run as it was when its third stage began."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("student", "step-00000006"))
    return to


def test_nan_stops_the_run_and_keeps_the_checkpoints(run, toy, tmp_path, message):
    broken = back_to_step_4(run, tmp_path / "run")
    file = broken / "checkpoints/step-00000004/weights.safetensors"
    weights = load_file(file)
    weights["backbone.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, file)
    seal(file.parent)
    before = contents(broken / "checkpoints")
    said = message(*words(toy, broken, "--resume"))
    assert "stage distillation, step 1 of 2" in said and "layer 1" in said and "nan" in said
    assert contents(broken / "checkpoints") == before and not (broken / "student").exists()


@pytest.mark.parametrize("when", ["checkpoint", "student"])
def test_full_disk(when, run, toy, tmp_path, message, llamba, monkeypatch):
    interrupted = back_to_step_4(run, tmp_path / "run")
    before = contents(interrupted / "checkpoints")
    from llamba_ref import checkpoint

    save = checkpoint.save_torch_state_dict

    def full(tensors, folder, **how):
        if ("student" in str(folder)) == (when == "student"):
            save({"half": torch.ones(9)}, folder, **how)
            raise OSError(28, "No space left on device")
        save(tensors, folder, **how)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_torch_state_dict", full)
        assert "No space left on device" in message(*words(toy, interrupted, "--resume"))
    kept = contents(interrupted / "checkpoints")
    assert all(kept[name] == before[name] for name in before)
    assert not list(interrupted.glob("*student*")) and not list(interrupted.rglob(".*-*"))
    assert llamba(*words(toy, interrupted, "--resume"))[0] == 0  # once there is space
    assert contents(interrupted / "student") == contents(run / "student")


# Whatever is typed: an option with a value that makes no sense ends in one line, or does what it says


def options_of(command: type):
    """Name, type and marks of every option of a command, those that it shares with others too."""
    for name, kind in get_type_hints(command, include_extras=True).items():
        plain = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
        if is_dataclass(plain):
            yield from options_of(plain)
        else:
            yield name, plain, getattr(kind, "__metadata__", ())


COMMANDS = {"distill": cli.Distill, "generate": cli.Generate, "evaluate": cli.Evaluate, "bench": cli.Bench,
            "pretrain": cli.Pretrain}
SHARED = {
    "text",
    "weights",
    "chat",
    "packing",
    "text_field",
    "separator",
    "held_out",
    "length",
    "validation_blocks",
    "device",
    "threads",
    "streaming",
}
WHOLE, BROKEN = (0, -1, 2**31, 2**63, 2**70), ("nan", "inf", "-inf", "1e-300", "1e300")
STRINGS = ("", "\udcff", "~nosuch/x", "/dev/null", "/dev/null/x", "x" * 5000)
SWEEP = [
    (command, name, value)
    for command, kind in COMMANDS.items()
    for name, plain, _ in options_of(kind)
    if not (name in SHARED and command in ("distill", "generate", "bench"))  # of the same classes as in the other two
    for value in {int: WHOLE, float: BROKEN, str: STRINGS}.get((get_args(plain) or (plain,))[0], ())
]


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the end of a training run, which takes most of its time: figures and samples of text."""
    monkeypatch.setattr(cli, "save_figure", lambda run, name, figure: None)
    monkeypatch.setattr("llamba_ref.plots.draw_progress", lambda metrics: None)
    monkeypatch.setattr(cli, "stream_text", lambda *_, **__: None)


@pytest.fixture(scope="module")
def smallest(toy) -> dict[str, list[str]]:
    """The quickest use of each command; its words come before an option, its names are replaced by those of the
    sweep."""
    short = [document[:150] for document in load_documents(toy / "text.txt")["text"]]  # so that all of it is quick, too
    (toy / "short.txt").write_text("\n\n\n\n\n".join(short))
    teacher, text = str(toy / "teacher"), ["--text", str(toy / "short.txt"), "--held-out", "4", "--length", "16"]
    text += ["--validation-blocks", "1"]
    small = ["--vocab-size", "260", "--d-model", "8", "--layers", "1", "--intermediate-size", "8", "--steps", "1"]
    return {
        "distill": ["--teacher", teacher, *text, *SIZE, "--steps", "0", "1", "0"],
        "generate": [teacher, "She", "--tokens", "2"],
        "evaluate": [teacher, *text],
        "bench": [teacher, "--context", "3", "--new", "1"],
        "pretrain": [*text, *small, "--batch-size", "2"],
    }


def typed(command: str, name: str, value, usual: list[str]) -> list[str]:
    """The words of a command with one option set to a value."""
    plain = {name: plain for name, plain, _ in options_of(COMMANDS[command])}[name]
    if name in ("model", "models", "prompt"):
        changed = int(name == "prompt")
        return [command, *(str(value) if place == changed else word for place, word in enumerate(usual))]
    count = len([part for part in get_args(plain) if part is not ...]) or 1
    if str(value).startswith("-") and count == 1:
        return [command, *usual, f"--{name.replace('_', '-')}={value}"]
    return [command, *usual, f"--{name.replace('_', '-')}", *[str(value)] * count]


def test_the_sweep_has_every_option():
    swept = {(command, name) for command, name, _ in SWEEP}
    for command, kind in COMMANDS.items():
        for name, plain, marks in options_of(kind):
            number = (get_args(plain) or (plain,))[0] in (int, float)
            assert not number or name == "replace" or any(isinstance(mark, Range) for mark in marks) or plain is float
            shared = [other for other in ("evaluate", "pretrain") if (other, name) in swept]
            words = get_origin(get_args(plain)[0] if get_origin(plain) is tuple else plain) is Literal
            assert (command, name) in swept or shared or plain is bool or words, (command, name)


@pytest.mark.parametrize("command, name, value", SWEEP)
def test_no_value_of_an_option_ends_in_a_traceback(
    command, name, value, smallest, tmp_path, llamba, monkeypatch, request
):
    """Also: what is refused leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    if command in ("distill", "pretrain"):
        request.getfixturevalue("no_pictures")
    if hasattr(COMMANDS[command], "resume") and not (name == "out" and value in ("", "\udcff", "~nosuch/x")):
        smallest = smallest | {command: ["--out", "run", *smallest[command]]}
    code, _, err = llamba(*typed(command, name, value, smallest[command]))
    lines = [line for line in err.splitlines() if line.startswith("llamba: error: ")]
    assert (code, len(lines)) in ((0, 0), (1, 1)), err
    assert code == 0 or (not Path("run").exists() and err.rstrip().endswith(lines[0]))
    known = name not in ("text_field", "separator", "prompt", "tokens", "temperature")
    if value in (-1, 2**63, 2**70, "nan", "\udcff") and known and not (name, value) == ("seed", 2**63 - 1):
        assert code == 1 and name.replace("_", " ") in lines[0].replace("_", " ")


HUGE = [("distill", "d_state"), ("pretrain", "intermediate_size")]


@pytest.mark.parametrize("command, name", HUGE)
def test_what_does_not_fit_into_memory(command, name, smallest, tmp_path, message):
    said = message(*typed(command, name, 10**9, ["--out", str(tmp_path / "run"), *smallest[command]]))
    assert "out of memory" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command, name", [
    (command, name) for command, kind in COMMANDS.items() for name, _, marks in options_of(kind)
    if any(isinstance(mark, Range) for mark in marks) and command in ("distill", "pretrain")
    and name not in ("steps", "batch_size", "threads", "layers", "lr")  # a thousand years, gigabytes, threads, blocks
])  # fmt: skip
def test_the_largest_value_that_is_allowed(command, name, smallest, tmp_path, llamba, no_pictures):
    (most,) = [mark.most for option, _, marks in options_of(COMMANDS[command]) if option == name for mark in marks
               if isinstance(mark, Range)]
    code, _, err = llamba(*typed(command, name, most, ["--out", str(tmp_path / "run"), *smallest[command]]))
    assert code == 0 or (code == 1 and err.count("llamba: error: ") == 1)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("Storage size calculation overflowed with sizes=[9]"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("numel: integer multiplication overflow"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_every_way_to_be_out_of_memory(error, message, monkeypatch):
    def full(name):
        raise error

    monkeypatch.setattr(lr, "load_model", full)
    assert "out of memory: try a smaller" in message("generate", "x")


def test_an_error_without_words_is_named(message, monkeypatch):
    def silent(name):
        raise ValueError

    monkeypatch.setattr(lr, "load_model", silent)
    assert message("generate", "x") == "llamba: error: ValueError"


def test_a_temperature_that_no_float_can_divide_by(toy, llamba):
    greedy = llamba("generate", toy / "teacher", "She", "--tokens", "9", "--temperature", "0")
    assert llamba("generate", toy / "teacher", "She", "--tokens", "9", "--temperature", "1e-300") == greedy
    assert llamba("generate", toy / "teacher", "She", "--tokens", "9", "--top-p", "1e-300") == greedy


def test_the_home_directory(toy, tmp_path, llamba, monkeypatch, no_pictures):
    monkeypatch.setenv("HOME", str(toy))
    text = ["--text", "~/text.txt", *TEXT]
    code, _, err = llamba(
        "distill", "--out", "~/at-home", "--teacher", "~/teacher", *text, *SIZE, "--steps", "0", "1", "0"
    )
    assert code == 0 and (toy / "at-home/student").is_dir(), err
    assert llamba("evaluate", "~/at-home", "--teacher", "~/teacher", *text)[0] == 0
    assert llamba("generate", "~/teacher", "She", "--tokens", "1")[0] == 0
    assert llamba("pretrain", "--out", "~/tiny", *text, "--vocab-size", "260", "--layers", "1", "--steps", "1")[0] == 0
    assert (toy / "tiny/model").is_dir() and not list(tmp_path.rglob("~*"))


def test_a_group_in_the_separator_is_no_document(toy, tmp_path, llamba):
    (tmp_path / "text.txt").write_text((toy / "text.txt").read_text().replace("\n\n\n\n\n", "\n---\n"))
    found = [
        llamba("evaluate", toy / "teacher", "--json", *TEXT, "--text", tmp_path / "text.txt", "--separator", separator)
        for separator in ("\n-+\n", "\n(-+)\n", "(\n)(-)+\n")
    ]
    assert found[0][0] == 0 and found[1] == found[2] == found[0]


@pytest.mark.parametrize(
    "device",
    [
        "cpu:0",
        "cpu:7",
        "cuda",
        "cuda:0",
        "cuda:-1",
        "cuda:300",
        "cuda:99999999999999999999",
        "mps",
        "xla",
        "hpu",
        "meta",
        "vulkan",
        "privateuseone",
        "cuda:x",
        "auto:1",
        "CPU",
        " cpu",
    ],
)
def test_every_device(device, toy, llamba):
    code, _, err = llamba("generate", toy / "teacher", "She", "--tokens", "1", "--device", device)
    assert code == 0 or (code, err.count("\n")) == (1, 1) and f"device is {device!r}" in err


# Whatever lies in a file


def written(path: Path, content) -> Path:
    """A file with these bytes, or a directory for None."""
    path.mkdir(parents=True) if content is None else path.write_bytes(content)
    return path


NOISE = bytes(range(256)) * 8


@pytest.mark.parametrize(
    "name", ["x.txt", "x.md", "x.jsonl", "x.json", "x.parquet", "x.csv", "x", "x.gguf", "x.tar.gz"]
)
@pytest.mark.parametrize(
    "content",
    [b"", b"\0", NOISE, b"[" * 20000, b'{"text": 3}\n' * 30, b'{"text": "a"}\n{"text"', None],
    ids=["empty", "nul", "noise", "deep", "numbers", "cut", "directory"],
)
def test_any_file_as_text(name, content, toy, tmp_path, message):
    file = written(tmp_path / name, content)
    assert file.name in message("evaluate", toy / "teacher", *TEXT, "--text", file)


@pytest.mark.parametrize("name", ["x.gguf", "x.safetensors", "x.txt", "x"])
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + NOISE, NOISE, None],
                         ids=["empty", "cut", "gguf", "noise", "directory"])
def test_any_file_as_model(name, content, tmp_path, message, monkeypatch):
    monkeypatch.setenv("LLAMBA_CACHE", str(tmp_path / "cache"))
    file = written(tmp_path / name, content)
    assert file.name in message("generate", file)


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"null", b'"text"', b"[" * 20000, NOISE, None],
                         ids=["empty", "cut", "object", "list", "null", "string", "deep", "noise", "directory"])
def test_any_content_of_a_checkpoint(part, content, toy, tmp_path, llamba):
    bad = tmp_path / "bad"
    shutil.copytree(toy / "teacher", bad)
    (bad / part).unlink()
    written(bad / part, content)
    code, _, err = llamba("generate", bad, "She", "--tokens", "1")
    assert (code, err.count("llamba: error: ")) in ((0, 0), (1, 1)) and "Traceback" not in err
    assert part == "tokenizer_config.json" or code == 1 and "bad" in err


@pytest.mark.parametrize(
    "value", [None, "x", -1, 0, 2**70, float("nan"), True, [1, "x"], {"a": None}], ids=repr
)
def test_any_value_in_a_config(value, toy, tmp_path, llamba):
    """One line, or a model that generates; each key of the config in turn."""
    config = json.loads((toy / "teacher/config.json").read_text())
    bad = tmp_path / "bad"
    shutil.copytree(toy / "teacher", bad)
    for key in config:
        (bad / "config.json").write_text(json.dumps(config | {key: value}))
        code, _, err = llamba("generate", bad, "She", "--tokens", "1")
        lines = [line for line in err.splitlines() if line.startswith("llamba: error: ")]
        assert (code, len(lines)) in ((0, 0), (1, 1)), (key, value, err)
        assert code == 0 or "bad" in lines[0], (key, value, lines)


@pytest.mark.parametrize("name", ["config.json", "machine.json", "metrics.jsonl", "checkpoints"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"threads": "x"}', b"[" * 20000, NOISE, None],
                         ids=["empty", "list", "text", "deep", "noise", "directory"])
def test_any_content_of_a_run(name, content, run, toy, tmp_path, llamba, no_pictures):
    bad = tmp_path / "run"
    back_to_step_4(run, bad)
    shutil.rmtree(bad / name) if (bad / name).is_dir() else (bad / name).unlink()
    written(bad / name, content)
    code, _, err = llamba(*words(toy, bad, "--resume"))
    assert (code, err.count("llamba: error: ")) in ((0, 0), (1, 1)) and "Traceback" not in err, err
    assert code == 0 or name in err or name == "checkpoints"


@pytest.mark.parametrize(
    "out, error",
    [
        ("file", "there is a run already"),
        ("file/run", "Not a directory"),
        ("/proc/llamba/run", "No such file|Permission"),
        ("/dev/full", "there is a run already"),
    ],
)
def test_an_output_that_cannot_be(out, error, toy, tmp_path, message):
    (tmp_path / "file").write_text("mine")
    assert re.search(error, message(*words(toy, tmp_path / out)))
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_run_of_another_command(run, toy, smallest, tmp_path, message):
    before = contents(run)
    assert "there is a run already" in message("pretrain", "--out", run, *smallest["pretrain"])
    said = message("pretrain", "--out", run, "--resume", *smallest["pretrain"])
    assert "these settings differ" in said and "command" in said
    assert contents(run) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_read_only(toy, tmp_path, message):
    tmp_path.chmod(0o500)
    assert "Permission denied" in message(*words(toy, tmp_path / "run"))


# What programs read


def test_json_is_all_there_is_on_standard_output(run, toy, llamba, monkeypatch):
    load = lr.load_model

    def talkative(name):
        print("converting a model")
        os.write(2, b"a warning\n")
        return load(name)

    monkeypatch.setattr(lr, "load_model", talkative)
    options = ["--teacher", toy / "teacher", "--text", toy / "text.txt", *TEXT]
    code, out, err = llamba("evaluate", run, "--json", *options)
    figures = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and err.count("converting a model") == 2
    code, out, _ = llamba("evaluate", run, *options)
    assert [line.split(":")[0].strip().replace(" ", "_") for line in out.splitlines()] == list(figures)
    assert llamba("generate", run, "She", "--tokens", "2")[1].startswith("She")


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_figures_that_are_not_finite(teacher, form, toy, tmp_path, llamba):
    shutil.copytree(toy / "teacher", tmp_path / "broken")
    weights = load_file(tmp_path / "broken/model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "broken/model.safetensors")
    compared = ["--teacher", toy / "teacher"] * teacher
    code, out, err = llamba("evaluate", tmp_path / "broken", "--text", toy / "text.txt", *TEXT, *form, *compared)
    assert (code, out) == (1, "") and re.search("llamba: error: .*(nan|finite)", err)


def test_an_error_leaves_standard_output_empty(toy, llamba):
    code, out, err = llamba("evaluate", "nosuch", "--json")
    assert (code, out) == (1, "") and err.startswith("llamba: error: nosuch")


def test_letters_that_the_terminal_lacks(toy, capsys, monkeypatch):
    import io

    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    main(["generate", str(toy / "teacher"), "Caf\xe9", "--tokens", "1"])
    assert ascii_only.buffer.getvalue().startswith(rb"Caf\xe9")


# Threads


def test_threads_are_the_cores_that_are_free(tmp_path, monkeypatch):
    import psutil

    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 16)
    for busy, free in ((0, 16), (25, 12), (95, 1), (100, 1)):
        monkeypatch.setattr(psutil, "cpu_percent", lambda interval, busy=busy: float(busy))
        assert cli.free_cores(tmp_path) == free
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 0.0)
    for quota, free in (("max 100000", 16), ("400000 100000", 4), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert cli.free_cores(tmp_path) == free
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    for quota, free in (("-1", 16), ("300000", 3)):
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota + "\n")
        assert cli.free_cores(tmp_path) == free
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # of a process that may use two cores
    assert cli.free_cores(tmp_path) == 2


def test_threads_of_a_command(toy, tmp_path, llamba, monkeypatch):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(cli, "free_cores", lambda: 5)
    for given, decided, number in ([], "3", 5), (["--threads", "4"], None, 4), ([], None, 5):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if decided is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", decided)
        monkeypatch.setattr(torch, "get_num_threads", lambda: number)
        assert llamba("generate", toy / "teacher", "She", "--tokens", "0", *given)[0] == 0
        assert used[-1] == number


def test_a_run_goes_on_with_as_many_threads_as_it_began_with(run, toy, tmp_path, llamba, monkeypatch):
    again = back_to_step_4(run, tmp_path / "run")
    assert json.loads((again / "machine.json").read_text())["threads"] == 1
    (again / "machine.json").write_text('{"threads": 3}')
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    assert llamba(*words(toy, again, "--resume"))[0] == 0 and used == [3]
    assert llamba(*words(toy, again, "--resume", "--threads", "2"))[0] == 0 and used[1:] == [2]


# Several processes


ACCELERATE = {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "True"}  # what accelerate launch --cpu sets
TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(("environment", "command", "words"), [
    (ACCELERATE, ["distill"], "accelerate launch started one process"),
    (ACCELERATE, ["generate", "tiny", "It"], "accelerate launch started one process"),
    ({"ACCELERATE_USE_FSDP": "true"}, ["distill"], "torchrun --nproc_per_node N -m -- llamba_ref.cli distill --shard"),
    (TORCHRUN, ["generate", "tiny", "It"], "2 processes were started for a command that runs in one"),
    (TORCHRUN, ["distill", "--device", "mps"], "device is 'mps', which 2 processes would share"),
    ({}, ["distill", "--shard"], "shard was given to one process: type torchrun --nproc_per_node N -m -- llamba"),
])  # fmt: skip
def test_a_start_that_cannot_work_says_what_to_type(message, tmp_path, monkeypatch, environment, command, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert words in message(*command, *(["--out", tmp_path / "run"] if "distill" in command else []))
    assert not (tmp_path / "run").exists()


def test_only_mixers_train(toy, tmp_path, llamba):
    assert llamba(*words(toy, tmp_path / "run", "--train", "mixers", steps=("0", "1", "1")))[0] == 0
    student, teacher = (load_model(str(path))[0].state_dict() for path in (tmp_path / "run/student", toy / "teacher"))
    shared = [name for name in teacher if ".mixer." not in name]
    assert shared and all(torch.equal(student[name], teacher[name]) for name in shared)


def test_blocks_that_are_computed_twice_change_nothing(toy, tmp_path, llamba, run):
    assert llamba(*words(toy, tmp_path / "run", "--recompute"))[0] == 0
    assert losses(tmp_path / "run") == losses(run)


def torchrun(number: int, *command) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(number), "-m", "llamba_ref.cli",
            *map(str, command)]


@pytest.mark.slow
def test_torchrun_killed_and_resumed(toy, tmp_path, run):
    """Two processes that share both models, stopped by kill -9 all together; then four, and what one process has."""
    command = words(toy, tmp_path / "run", "--shard", "--batch-size", "4", steps=("2", "2", "40"))
    with subprocess.Popen(torchrun(2, *command), start_new_session=True, stdout=subprocess.DEVNULL) as started:
        metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and '{"step": 7, "stage"' in metrics.read_text()):
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(started.pid, signal.SIGKILL)
    assert not (tmp_path / "run/student").exists()
    done = subprocess.run(torchrun(4, *command, "--resume"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "the student continues:" in done.stdout, done.stderr
    main(words(toy, tmp_path / "one", "--batch-size", "4", steps=("2", "2", "40")))
    ours, theirs = losses(tmp_path / "run"), losses(tmp_path / "one")
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for a, b in zip(ours, theirs):
        for name in ("loss", "perplexity", "kl"):
            assert name not in a or abs(a[name] / b[name] - 1) < 1e-3  # AdamW makes much of the rounding of float32


# In processes of their own


def child(words: list[str], out, err, file: str | None) -> None:
    """A process: its streams, then the command."""
    os.dup2(os.open(file, os.O_WRONLY) if file else out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    main(words)


class Started:
    """A command in a process of its own. The processes branch off from one that has imported everything."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, *words, file: str | None = None):
        """`file` is what standard output goes to; None: it is read."""
        pipes = [self.context.Pipe(duplex=False) for _ in range(2)]
        self.streams = [read for read, _ in pipes]
        written = [write for _, write in pipes]
        self.process = self.context.Process(target=child, args=([str(word) for word in words], *written, file))
        self.process.start()
        for _, write in pipes:
            write.close()

    def end(self, timeout: float = 60) -> tuple[int, str, str]:
        """Wait: exit code, standard output, standard error."""
        texts = []
        for stream in self.streams:
            with open(os.dup(stream.fileno()), errors="replace") as file:
                texts.append(file.read())
        self.process.join(timeout)
        return self.process.exitcode, *texts


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Begin to import at once, beside the first tests, in the process that the others branch off from."""
    Started.context.set_forkserver_preload(
        ["llamba_ref.mohawk", "llamba_ref.models", "llamba_ref.evaluate", "llamba_ref.cli"]
    )
    from multiprocessing import forkserver

    forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()


def losses(out: Path) -> list:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in record if name != "tokens_per_second"} for record in records]


def wait_for(step: int, out: Path, started: Started) -> None:
    """Wait until a run has taken a step."""
    metrics = out / "metrics.jsonl"
    while started.process.is_alive() and not (metrics.exists() and f'{{"step": {step}, "stage"' in metrics.read_text()):
        time.sleep(0.002)
    assert started.process.is_alive(), ("the run was over too early", started.end())


def test_a_killed_run_ends_as_an_unbroken_one(toy, tmp_path):
    steps = ("6", "4", "10")
    unbroken = Started(*words(toy, tmp_path / "unbroken", steps=steps))
    for step, resume in ((5, []), (13, ["--resume"])):  # in the first stage, and in the last
        killed = Started(*words(toy, tmp_path / "killed", *resume, steps=steps))
        wait_for(step, tmp_path / "killed", killed)
        killed.process.kill()
        assert killed.end()[0] == -signal.SIGKILL and not (tmp_path / "killed/student").exists()
    main(words(toy, tmp_path / "killed", "--resume", steps=steps))
    assert unbroken.end()[0] == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    assert contents(tmp_path / "killed/student") == contents(tmp_path / "unbroken/student")


def test_a_run_that_is_alive_is_not_resumed(toy, tmp_path, message):
    alive = Started(*words(toy, tmp_path / "run", steps=("200", "0", "0")))
    wait_for(3, tmp_path / "run", alive)
    alive.process.pid and os.kill(alive.process.pid, signal.SIGSTOP)  # it lives, and writes nothing meanwhile
    before = contents(tmp_path / "run")
    said = message(*words(toy, tmp_path / "run", "--resume", steps=("200", "0", "0")))
    assert "another process" in said and str(tmp_path / "run") in said
    assert contents(tmp_path / "run") == before
    alive.process.kill()
    alive.end()


def test_what_a_kill_left_is_removed(run, toy, tmp_path, llamba):
    again = back_to_step_4(run, tmp_path / "run")
    left = [
        again / ".student-0123abcd",
        again / "checkpoints/.step-00000006-0123abcd",
        again / "checkpoints/.step-00000002-old",
    ]
    for directory in left:
        directory.mkdir()
        (directory / "weights.safetensors").write_bytes(b"half")
    assert llamba(*words(toy, again, "--resume"))[0] == 0
    assert not any(directory.exists() for directory in left)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_text_that_changed_since(streaming, toy, tmp_path, message, llamba):
    text = tmp_path / "text.txt"
    shutil.copy(toy / "text.txt", text)
    command = words(toy, tmp_path / "run", "--text", text, *streaming)
    assert llamba(*command)[0] == 0
    shutil.rmtree(tmp_path / "run/student")
    text.write_text(text.read_text().replace("the", "a"))
    before = contents(tmp_path / "run")
    assert "text" in message(*command, "--resume")
    assert contents(tmp_path / "run") == before


def test_every_end_token_ends_a_text(toy, tmp_path, llamba):
    """Each token in turn: where a greedy text has it, the text ends with it."""
    text = ["She", "--tokens", "12", "--temperature", "0"]
    model, tokenizer = load_model(str(toy / "teacher"))
    ids = model.generate(torch.tensor(tokenizer("She")["input_ids"])[None], 12)[0].tolist()
    prompt = len(tokenizer("She")["input_ids"])
    for place in (prompt + 1, prompt + 5):
        bad = copy_of(toy / "teacher", tmp_path / f"ends{place}", eos_token_id=[0, ids[place]])
        (bad / "generation_config.json").unlink(missing_ok=True)
        first = ids.index(ids[place], prompt)
        expected = tokenizer.decode(ids[: first + 1], skip_special_tokens=True)
        assert llamba("generate", bad, *text)[1].strip() == expected.strip()


def test_hub_name_without_network(message, monkeypatch):
    """A hub that accepts connections and never answers: an error when the patience ends, and not minutes later."""
    from huggingface_hub import constants

    assert checkpoint.PATIENCE <= 5
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(checkpoint, "PATIENCE", 0.5)
        began = time.monotonic()
        said = message("generate", "some/model")
    assert said.startswith("llamba: error: some/model") and "hub" in said
    assert time.monotonic() - began < 5


def test_a_closed_pipe_is_no_error(toy):
    started = Started("generate", toy / "teacher", "She", "--tokens", "2000")
    started.streams[0].close()
    code, err = started.process.join(60), os.fdopen(os.dup(started.streams[1].fileno())).read()
    assert code is None and started.process.exitcode == 141 and err == ""


def shell(line: str, **environment) -> tuple[int, str, str]:
    """Run a line of shell, in which $LLAMBA is the program."""
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True,
                          env=os.environ | {"LLAMBA": f"{sys.executable} -m llamba_ref.cli"} | environment)
    return done.returncode, done.stdout, done.stderr


def test_help_comes_at_once():
    began = time.monotonic()
    code, out, err = shell("$LLAMBA --help")
    assert code == 0 and "distill" in out and not err
    script = 'import sys, llamba_ref.cli; print(sys.modules.keys() & {"torch", "numpy", "datasets"})'
    loaded = shell(f"{sys.executable} -c '{script}'")[1]
    assert loaded == "set()\n"  # a measure that does not depend on the machine
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("line, expected", [
    ("$LLAMBA --help >/dev/full", "No space left on device"),
    ("$LLAMBA generate tiny 'It is' --tokens=-1 >&-", "tokens is -1"),
    ("$LLAMBA generate tiny 'It is' --tokens=-1 <&- >&-", "tokens is -1"),
    ("$LLAMBA evaluate '' >/dev/full", "models is empty"),
    ("$LLAMBA generate \"$(printf 'caf\\351')\"", "model is 'caf"),
    ("$LLAMBA generate tiny \"$(printf '\\377')\"", "prompt is"),
    ("$LLAMBA distill --out \"$(printf '/tmp/\\377')\"", "out is"),
])  # fmt: skip
def test_streams_and_bytes_of_a_shell(line, expected):
    code, out, err = shell(line)
    assert code == 1 and err.startswith("llamba: error: ") and err.count("\n") == 1 and expected in err and not out


def test_streams_that_are_closed_are_no_error():
    assert shell("$LLAMBA --help >&-") == (0, "", "")
    assert shell("$LLAMBA --help <&- >&- 2>&-") == (0, "", "")
    assert shell("$LLAMBA distill --help | head -1")[2] == ""


def test_a_closed_output_is_not_given_to_a_file(run, toy, tmp_path):
    """File descriptor 1 of a program whose output is closed must not become that of a file of weights."""
    code = (
        "import sys, os; from llamba_ref.cli import main\ntry: main(['generate', '', 'x'])\nexcept SystemExit: pass\n"
    )
    code += f"file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'noise'); file.write(str(file.fileno() > 2))"
    assert shell(f"{sys.executable} -c \"{code}\" <&- >&-")[0] == 0
    assert (tmp_path / "file").read_text() == "True"


def test_a_full_disk_behind_standard_output(toy):
    ended = Started("generate", toy / "teacher", "She", "--tokens", "3", file="/dev/full").end()
    assert ended == (1, "", "llamba: error: [Errno 28] No space left on device\n")


def test_control_c_while_it_starts():
    """Wherever it is by then: in torch, among the other libraries, or at the model."""
    waiting = {}
    for delay in (0.0, 0.3, 1.0):
        command = [sys.executable, "-m", "llamba_ref.cli", "evaluate", "tiny"]
        waiting[subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)] = delay
    started = {}  # when torch is being imported
    while waiting:
        for process in list(waiting):
            if process not in started and imports_begun(process):
                started[process] = time.monotonic()
            if process in started and time.monotonic() - started[process] >= waiting[process]:
                process.send_signal(signal.SIGINT)
                del waiting[process]
        time.sleep(0.01)
    for process in started:
        out, err = process.communicate(timeout=60)
        assert (out, err) == ("", "llamba: stopped\n")
        assert process.returncode in (130, -signal.SIGINT)  # which a shell shows as 130 too


def imports_begun(process: subprocess.Popen) -> bool:
    """Whether a process has come to the libraries, of which torch is the first."""
    maps = Path(f"/proc/{process.pid}/maps")
    return not maps.exists() or "torch" in maps.read_text() or process.poll() is not None


# llamba bench


BENCH = ["--batch", "1", "3", "--context", "5", "9", "--new", "2"]


def test_bench_measures_every_size_beside_transformers(toy, llamba, tmp_path):
    code, out, _ = llamba("bench", toy / "teacher", "tiny-mamba2", *BENCH, "--json", "--memory", "2GB",
                          "--figure", tmp_path / "speeds.png")
    found = json.loads(out)
    assert code == 0 and found["memory"] == 2 * 10**9 and (tmp_path / "speeds.png").stat().st_size > 5000
    ours, theirs = str(toy / "teacher"), f"{toy / 'teacher'}, transformers, "
    sizes = [(1, 5), (1, 9), (3, 5), (3, 9)]
    names = [name for _ in sizes for name in (ours, f"{theirs}dynamic cache", f"{theirs}static cache")]
    assert [row["model"] for row in found["rows"]] == names + ["tiny-mamba2"] * 4
    assert [(row["batch"], row["context"]) for row in found["rows"]][-4:] == sizes
    for row in found["rows"]:
        assert 0 < row["step"] and 0 < row["first"] and row["tokens_per_second"] == row["batch"] / row["step"]
    cost = step_cost(load_model(str(toy / "teacher"))[0])
    assert found["rows"][0]["fit"] == cost.largest_batch(2e9, 5 + 8)
    code, out, _ = llamba("bench", toy / "teacher", *BENCH)
    assert code == 0 and len(out.splitlines()) == 13 and out.startswith("model ")


def test_bench_keeps_what_it_has_when_memory_ends(toy, llamba, tmp_path):
    options = ["--batch", "2", "65536", "--context", "20", "--new", "2", "--memory", "64MB"]
    code, out, err = llamba("bench", toy / "teacher", *options, "--json", "--figure", tmp_path / "speeds.png")
    assert code == 1 and err.count("llamba: error: ") == 1 and "batch 65536 and context 20 need" in err
    assert [row["batch"] for row in json.loads(out)["rows"]] == [2, 2, 2] and (tmp_path / "speeds.png").exists()


@pytest.mark.parametrize("text, size", [("4GiB", 2**32), ("1.5GB", 1.5e9), ("512 MiB", 2**29), ("800K", 8e5), ("9", 9)])
def test_bytes_in_words(text, size):
    assert cli.bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "0", "0GB", "-1GB", "4Gib", "4 G i B", "1e9", "nan", "9" * 40])
def test_what_is_no_number_of_bytes(text, toy, message):
    with pytest.raises(ValueError, match="^memory is "):
        cli.bytes_of(text)
    if text:
        assert "memory is" in message("bench", toy / "teacher", f"--memory={text}")


def test_bench_of_what_is_not_there(toy, message, tmp_path):
    assert "nosuch" in message("bench", tmp_path / "nosuch")
    assert "models is empty" in message("bench", toy / "teacher", "")
    assert "batch is 0" in message("bench", toy / "teacher", "--batch", "4", "0")
    assert "batch is empty" in message("bench", toy / "teacher", "--batch", "--context", "5")
    for figure in (tmp_path / "nosuch" / "x.png", tmp_path / "x.txt", tmp_path):
        assert "figure is" in message("bench", toy / "teacher", *BENCH, "--figure", figure)


def test_bench_compiles(toy, llamba, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step: compile(step, backend="eager"))
    code, out, _ = llamba("bench", toy / "teacher", "--context", "5", "--new", "2", "--compile", "--json")
    assert code == 0 and json.loads(out)["compile"] and len(json.loads(out)["rows"]) == 3


def test_without_a_compiler(toy, message, monkeypatch):
    def compile(step):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in the path")

    monkeypatch.setattr(torch, "compile", compile)
    said = message("bench", toy / "teacher", "--context", "5", "--new", "1", "--compile")
    assert "compile needs a C++ compiler" in said


# llamba export


needs_runtimes = pytest.mark.skipif(sys.version_info < (3, 11), reason="ONNX Runtime has left Python 3.10 behind")


@needs_runtimes
def test_export_and_what_runs_its_file(run, toy, llamba, tmp_path):
    file, text = tmp_path / "edge" / "student.onnx", ["--text", toy / "text.txt", *TEXT, "--json"]
    code, out, err = llamba("export", run, "--to", "onnx", "--bits", "32", "--out", file)
    assert code == 0 and out.startswith(f"written to {file}: ") and not err
    assert {path.name for path in file.parent.iterdir()} == {
        "student.onnx", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    for options in (["--temperature", "0"], ["--seed", "3", "--top-k", "5"]):
        texts = [llamba("generate", model, "The house", "--tokens", "9", *options) for model in (file, run)]
        assert texts[0] == texts[1] and texts[0][0] == 0 and texts[0][1].startswith("The house")
    ours, theirs = (json.loads(llamba("evaluate", model, "--teacher", toy / "teacher", *text)[1])
                    for model in (file, run))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert json.loads(llamba("evaluate", file, *text)[1])["tokens"] == 4 * 31
    said = llamba("export", run, "--to", "onnx", "--out", file)
    assert said[0] == 1 and "exists already, and nothing is overwritten" in said[2]


@needs_runtimes
def test_export_by_default_writes_beside_the_user(run, llamba, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert llamba("export", run, "--to", "onnx")[0] == 0
    assert (tmp_path / "edge" / "model.onnx").is_file()


@needs_runtimes
def test_export_removes_a_file_that_says_something_else(run, llamba, tmp_path, monkeypatch):
    """As if the exporter had lost a scale."""
    from llamba_ref import export
    graph = export.onnx_graph
    monkeypatch.setattr(export, "onnx_graph", lambda program: graph(program.apply(
        lambda part: part.weight.data.mul_(2) if isinstance(part, torch.nn.Linear) else None)))
    code, out, err = llamba("export", run, "--to", "onnx", "--bits", "32", "--out", tmp_path / "m.onnx")
    assert code == 1 and not out and "nats a token from the model" in err and not (tmp_path / "m.onnx").exists()


@needs_runtimes
def test_export_of_what_cannot_be(toy, message, tmp_path):
    out = ["--out", tmp_path / "m.pte"]
    assert "layer 0 has a cache that grows" in message("export", toy / "teacher", *out)
    assert "layer 0 has a GateLoop" in message("export", "tiny-gateloop", *out)
    assert "must end in .onnx" in message("export", "tiny-mamba2", "--to", "onnx", *out)
    assert "no such directory" in message("export", tmp_path / "nosuch", *out)
    (tmp_path / "broken.onnx").write_text("nothing")
    for command in ("generate", "evaluate"):
        assert "or damaged" in message(command, tmp_path / "broken.onnx")
        assert "no such file" in message(command, tmp_path / "nosuch.onnx")
    assert "a checkpoint is a directory" in message("bench", tmp_path / "broken.onnx")
    assert not (tmp_path / "m.pte").exists()
