"""The command `llamba`: what every option does, what a run leaves behind, what errors look like, what a killed run loses."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamba_ref import cli
from llamba_ref.cli import main
from llamba_ref.models import load_model, save_model
from llamba_ref.data import load_documents, pack, split_documents, train_tokenizer
from llamba_ref.evaluate import compare, evaluate
from llamba_ref.llama import Attention, Llama, LlamaConfig
from llamba_ref.llamba import DiscreteMamba2, Llamba

TEXT = ["--held-out", "4", "--length", "32", "--validation-blocks", "4"]
SIZE = ["--batch-size", "2", "--d-state", "4", "--chunk-size", "16"]


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


def config_of(tokenizer, **sizes) -> LlamaConfig:
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 2} | sizes
    return LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                       tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, **sizes)


def words(toy: Path, out: Path, *more, steps=("2", "2", "2")) -> list[str]:
    """A small distillation."""
    return ["distill", "--out", str(out), "--teacher", str(toy / "teacher"), "--text", str(toy / "text.txt"), *TEXT, *SIZE,
            "--steps", *steps, "--save-every", "2", *map(str, more)]


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
    """Run a command that must fail as the user's mistake does: exit code 1, one line, no traceback. Returns the line."""

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


@pytest.mark.parametrize("command", ["distill", "generate", "evaluate", "pretrain"])
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
    assert code == 0 and all(command in out for command in ("distill", "generate", "evaluate", "pretrain"))


@pytest.mark.parametrize("args", [["--nosuch", "3"], ["distill", "--nosuch"], ["distill", "--steps", "1", "1"], ["distill", "--lr", "a", "b", "c"],
                                  ["distill", "--precision", "fp7"], ["nosuch"], []])
def test_options_that_do_not_exist_end_with_code_2(args, llamba):
    code, _, err = llamba(*args)
    assert code == 2 and "Traceback" not in err and err


def test_unforeseen_errors_keep_their_traceback(monkeypatch):
    def broken(name):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "load_model", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["generate", "x"])


@pytest.mark.parametrize("command, hint", [("distill", True), ("generate", False)])
def test_interrupted(command, hint, llamba, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_model", interrupted)
    code, _, err = llamba(command)
    assert code == 130 and ("--resume" in err) == hint


# What a run leaves behind


def test_run_directory(run, toy):
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    expected = {"config.json", "metrics.jsonl", "figures/matrices.png", "figures/progress.png", "student/config.json",
                "student/model.safetensors", "student/tokenizer.json", "student/tokenizer_config.json"}
    assert files - expected == {f"checkpoints/step-0000000{step}/{name}" for step in (4, 6) for name in ("training.pt", "weights.safetensors")}
    assert expected <= files
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == [2, 2, 2] and config["text"] == str(toy / "text.txt") and config["length"] == 32
    for figure in (run / "figures").glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 5000


def test_metrics(run):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in metrics if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["stage"] for record in steps] == ["orientation"] * 2 + ["alignment"] * 2 + ["distillation"] * 2
    evaluations = {record["evaluation"]: record for record in metrics if "evaluation" in record}
    assert list(evaluations) == ["attention replaced", "after orientation", "after alignment", "after distillation"]
    assert all(record["perplexity"] > 1 and record["kl"] > 0 and 0 <= record["agreement"] <= 1 for record in evaluations.values())


def test_student_is_a_checkpoint_with_its_tokenizer(run, toy):
    student, tokenizer = load_model(str(run / "student"))
    assert isinstance(student, Llamba) and all(isinstance(block.mixer, DiscreteMamba2) for block in student.backbone.layers)
    final = load_file(run / "checkpoints/step-00000006/weights.safetensors")
    assert all(torch.equal(weight, final[name]) for name, weight in Llamba.from_pretrained(run / "student").state_dict().items())
    assert tokenizer.get_vocab() == load_model(str(toy / "teacher"))[1].get_vocab()


def test_options_reach_the_student(toy, tmp_path, llamba):
    code, out, err = llamba(*words(toy, tmp_path / "run", "--replace", 1, "--micro-batch-size", 1, "--streaming", "--prompt", "She", steps="110"))
    assert code == 0, err
    student, _ = load_model(str(tmp_path / "run"))
    assert [type(block.mixer) for block in student.backbone.layers] == [Attention, DiscreteMamba2]
    assert student.config.ssm_cfg.d_state == 4 and student.config.ssm_cfg.chunk_size == 16
    assert "layers: 1 of Attention and 1 of DiscreteMamba2" in out and "a stream" in out and "distillation:" not in out
    assert out.count("\nShe") == 2


def test_everything_random_hangs_on_the_seed(run, toy, tmp_path, llamba):
    assert llamba(*words(toy, tmp_path / "same"))[0] == 0
    assert llamba(*words(toy, tmp_path / "other", "--seed", 1))[0] == 0
    weights = [load_file(path / "student/model.safetensors") for path in (run, tmp_path / "same", tmp_path / "other")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


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
    texts = {llamba("generate", run, "She", "--tokens", "6", "--temperature", "0", "--seed", str(seed))[1] for seed in range(2)}
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
    assert figures == pytest.approx({"perplexity": ours.student.perplexity, "bits_per_byte": ours.student.bits_per_byte, "tokens": 4 * 31,
                                     "teacher_perplexity": ours.teacher.perplexity, "agreement": ours.agreement, "kl": ours.kl}, rel=1e-5)
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["perplexity"] == pytest.approx(ours.student.perplexity, rel=1e-5)  # what the run logged
    code, out, _ = llamba("evaluate", run, *options)
    assert code == 0 and f"{evaluate(student, blocks).perplexity:.4f}" in out and "tokens: 124" in out


def test_pretrain(toy, tmp_path, llamba):
    command = ["pretrain", "--out", tmp_path / "run", "--text", toy / "text.txt", *TEXT, "--vocab-size", "280", "--d-model", "16", "--layers", "1",
               "--intermediate-size", "32", "--steps", "3", "--batch-size", "2"]
    code, out, err = llamba(*command)
    assert code == 0, err
    model, tokenizer = load_model(str(tmp_path / "run"))
    assert isinstance(model, Llama) and len(tokenizer) == model.vocab_size == 280
    assert "held-out perplexity" in out and (tmp_path / "run/figures/progress.png").exists()
    assert "there is a run already" in llamba(*command)[2]
    assert llamba(*command, "--resume")[0] == 0


# Bad input: one line, exit code 1, nothing begun


@pytest.mark.parametrize("options, expected", [
    (["--threads", "0"], "threads is 0: it must be at least 1"),
    (["--device", "gpu"], "device is 'gpu'"),
    (["--device", "cuda:99"], "device is 'cuda:99': not on this machine"),
    (["--device", "meta"], "device is 'meta': not on this machine"),
    (["--replace", "2"], "replace is 2: layers are 0 to 1"),
    (["--replace", "0", "-1"], "replace is 0 -1: layers are 0 to 1"),
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
    ("one document", "1 documents and held_out=4 needs at least 4"),
    ("\n\n\n\n\n".join("abcd"), "one block needs 32"),
    ("\n\n\n\n\n".join(["a long text " * 50] * 3 + ["x"]), "the held-out part: the corpus has 2 tokens, one block needs 32"),
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
        copy_of(teacher, to, model_type="mistral")
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
    ("another model", "model_type is 'mistral'"),
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
    for command in (words(toy, tmp_path / "run", "--teacher", bad), ["generate", bad], ["evaluate", bad, "--text", toy / "text.txt", *TEXT]):
        said = message(*command)
        assert expected.search(said) if isinstance(expected, re.Pattern) else expected in said
        assert "bad" in said or "tokenizer does not fit" in said  # which checkpoint
    assert not (tmp_path / "run").exists()


def test_a_student_cannot_be_a_teacher(run, toy, tmp_path, message):
    said = message(*words(toy, tmp_path / "run", "--teacher", run / "student"))
    assert "a teacher must be a Llama, this is a Llamba" in said


@pytest.mark.parametrize("options, expected", [
    (["--tokens", "-1"], "max_new_tokens is -1"),
    (["--temperature", "-1"], "temperature is -1"),
    (["--top-k", "-1"], "top_k is -1"),
    (["--top-p", "0"], "top_p is 0"),
    (["--top-p", "1.5"], "top_p is 1.5"),
    (["--threads", "0"], "threads is 0"),
    (["--device", "gpu"], "device is 'gpu'"),
])  # fmt: skip
def test_bad_options_of_generate(options, expected, toy, message):
    assert expected in message("generate", toy / "teacher", "She", *options)


def test_prompt_without_a_token(toy, message):
    assert "the prompt has no tokens" in message("generate", toy / "teacher", "")


@pytest.mark.parametrize("options, expected", [
    (["--batch-size", "0"], "batch_size is 0"),
    (["--length", "1"], "length is 1"),
    (["--held-out", "99"], "24 documents and held_out=99 needs at least 99"),
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
    (["--kv-heads", "3"], "multiple of n_kv_heads, 3"),
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
    assert {name: after[name] for name in before if "png" not in name} == {name: before[name] for name in before if "png" not in name}


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
    before = contents(broken / "checkpoints")
    said = message(*words(toy, broken, "--resume"))
    assert "stage distillation, step 1 of 2" in said and "layer 1" in said and "nan" in said
    assert contents(broken / "checkpoints") == before and not (broken / "student").exists()


@pytest.mark.parametrize("when", ["checkpoint", "student"])
def test_full_disk(when, run, toy, tmp_path, message, llamba, monkeypatch):
    interrupted = back_to_step_4(run, tmp_path / "run")
    before = contents(interrupted / "checkpoints")
    from llamba_ref import checkpoint

    save = checkpoint.save_file

    def full(tensors, file, metadata):
        if ("student" in str(file)) == (when == "student"):
            save({"half": torch.ones(9)}, file, metadata)
            raise OSError(28, "No space left on device")
        save(tensors, file, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        assert "No space left on device" in message(*words(toy, interrupted, "--resume"))
    kept = contents(interrupted / "checkpoints")
    assert all(kept[name] == before[name] for name in before)
    assert not list(interrupted.glob("*student*")) and not list(interrupted.rglob(".*-*"))
    assert llamba(*words(toy, interrupted, "--resume"))[0] == 0  # once there is space
    assert contents(interrupted / "student") == contents(run / "student")


# In processes of their own


def start(*args, **environment) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "llamba_ref.cli", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def losses(out: Path) -> list:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in record if name != "tokens_per_second"} for record in records]


def test_a_killed_run_ends_as_an_unbroken_one(toy, tmp_path):
    steps = ("10", "20", "30")
    main(words(toy, tmp_path / "unbroken", steps=steps))
    for step, resume in ((7, []), (35, ["--resume"])):  # in the first stage, and in the last
        process = start(*words(toy, tmp_path / "killed", *resume, steps=steps))
        metrics = tmp_path / "killed/metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and f'{{"step": {step}, "stage"' in metrics.read_text()):
            time.sleep(0.002)
        assert process.poll() is None, "the run was over before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed/student").exists()
    main(words(toy, tmp_path / "killed", "--resume", steps=steps))
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    assert contents(tmp_path / "killed/student") == contents(tmp_path / "unbroken/student")


def test_hub_name_without_network():
    """A hub that accepts connections and never answers: an error within seconds, not minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        process = start("generate", "some/model", HF_HUB_OFFLINE="0", HF_DATASETS_OFFLINE="0", HF_ENDPOINT=endpoint)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.startswith("llamba: error: some/model") and "hub" in err
    assert time.monotonic() - began < 30  # a few seconds of them are spent on imports


def test_a_closed_pipe_is_no_error(toy):
    process = start("generate", toy / "teacher", "She", "--tokens", "2000")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 141 and err == ""
