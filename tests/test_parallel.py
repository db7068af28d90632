"""Several processes, whole and sharded: one process's numbers, at every stage; saved, killed, resumed by any number."""

import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import together
import torch
from accelerate import Accelerator
from small import RELEASED, VOCAB, llama_config, one_line
from torch.utils._python_dispatch import TorchDispatchMode

from llamba_ref import training
from llamba_ref.conventions import relative_error
from llamba_ref.data import Batches
from llamba_ref.llama import Llama
from llamba_ref.llamba import Llamba
from llamba_ref.mohawk import OBJECTIVES, distill
from llamba_ref.parallel import is_sharded, processes_of, shard, whole_copy
from llamba_ref.training import Run, Stage, optimizer_for, reached, read_metrics, train_step

STAGES = [Stage("orientation", 3, 1e-2, 0.0), Stage("alignment", 3, 1e-2), Stage("distillation", 4, 1e-2)]


def models(seed=0, tied=False):
    """A teacher and a student that keeps one head of attention, in float64. The seed is the student's."""
    torch.manual_seed(0)
    teacher = Llama(llama_config(num_hidden_layers=3, tie_word_embeddings=tied)).double()
    torch.manual_seed(seed)
    return teacher, Llamba.from_teacher(teacher, [(1, 0)], d_state=6, chunk_size=8, start="published")


def rows(number=20):
    return torch.randint(VOCAB, (number, 24), generator=torch.Generator().manual_seed(7))


def place(accelerator):
    return {"rank": accelerator.process_index, "world_size": accelerator.num_processes}


def go(path, *, sharded=False, resume=False, breaks=None, after_step=None, **options):
    """Distil under `path`; the models. `breaks`: the step after which all is broken off."""
    accelerator = Accelerator(cpu=True)
    first = accelerator.is_main_process
    teacher, student = models(seed=0 if first else 9)  # what counts is the first process's
    with accelerator.main_process_first():
        run = Run(path, {}, resume=resume or not first)
    if sharded:
        shard(accelerator, teacher, student)

    def stop(step, stage):
        if step == breaks:
            raise KeyboardInterrupt

    try:
        distill(teacher, student, Batches(rows(), 4, **place(accelerator)), STAGES, run=run, accelerator=accelerator,
                save_every=2, progress=False, after_step=after_step or stop, **options)
    except KeyboardInterrupt:
        accelerator.wait_for_everyone()
    return teacher, student


def keep(path, model):
    """Write the weights of a model that may be sharded, from the first process."""
    copy = whole_copy(model) if is_sharded(model) else model
    if Accelerator(cpu=True).is_main_process:
        torch.save(copy.state_dict(), Path(f"{path}.pt"))


def same(path, one):
    """A run has the losses and the weights of another."""
    ours, theirs = (read_metrics(each) for each in (path, one))
    assert [record["step"] for record in ours] == list(range(1, 11))
    for a, b in zip(ours, theirs, strict=True):
        assert a["tokens"] == b["tokens"] and a["stage"] == b["stage"]
        for name in ("loss", "gradient_norm"):
            assert abs(a[name] / b[name] - 1) < 1e-6, (a["step"], name)  # losses are added up in float32
    weights, expected = (torch.load(f"{each}.pt", weights_only=True) for each in (path, one))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(weights[name], tensor) < 1e-6, name


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process, whole batches."""
    path = tmp_path_factory.mktemp("one") / "run"
    keep(path, go(path)[1])
    return path


class Collectives(TorchDispatchMode):
    """Counts what processes send to each other."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            self.count[operation.name().split("::")[1].strip("_")] += 1
        return operation(*args, **(kwargs or {}))


def count(rows_at_a_time, logits):
    """What a step of each stage sends, and how many entries each stage trains."""
    accelerator = Accelerator(cpu=True)
    teacher, student = models(tied=True)
    shard(accelerator, teacher, student)
    found, training.LOGITS = {}, logits
    for stage in STAGES:
        objective = OBJECTIVES[stage.objective](teacher, student)
        trains = reached(student, objective, rows(1))
        optimizer = optimizer_for(student, stage)
        with Collectives() as sent:
            train_step(student, stage, objective, rows(4), optimizer, accelerator, rows_at_a_time, "here")
        found[stage.objective] = (sent.count["allgather_base"], sent.count["reduce_scatter_base"], sum(trains.values()))
        student.requires_grad_(True)
    training.LOGITS = 2**24
    return found


def by_two(path):
    """All that two processes are asked to do."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    keep(path / "whole", go(path / "whole")[1])
    keep(path / "sharded", go(path / "sharded", sharded=True, micro_batch_size=1)[1])
    keep(path / "again", go(path / "again", sharded=True, recompute=True)[1])
    for name, breaks in (("early", 3), ("late", 9)):  # in the second stage's first half; after a checkpoint at 8
        go(path / name, sharded=True, breaks=breaks)
    go(path / "late whole", breaks=9)
    found = {"counts": {f"{r} {n}": count(r, n) for r, n in ((4, 2**24), (1, 2**24), (4, 5 * VOCAB))}}

    teacher, student = models()
    ids = rows(2)
    with torch.no_grad():
        expected = student(ids), student.generate(ids[:, :5], 6)
        matrices = [layer.matrix() for layer in student.walk(ids)]
    shard(accelerator, teacher, student)
    pieces, all_of_it = (sum(p.numel() for p in each) for each in (
        (p.to_local() for p in student.parameters()), student.parameters()))
    found["held"] = pieces / all_of_it
    with torch.no_grad():
        assert relative_error(student(ids), expected[0]) < 1e-12
        assert torch.equal(student.generate(ids[:, :5], 6), expected[1])
        for layer, matrix in zip(student.walk(ids), matrices, strict=True):
            assert relative_error(layer.matrix(), matrix) < 1e-12
    with pytest.raises(ValueError, match="the teacher's own"):
        distill(student, student, Batches(ids, 2, **place(accelerator)), STAGES[2:], accelerator=accelerator)
    if accelerator.is_main_process:
        (path / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    path = tmp_path_factory.mktemp("two")
    together.run(2, by_two, path)
    return path


@pytest.mark.parametrize("name", ["whole", "sharded", "again"])
def test_two_processes_are_one(two, one, name):
    """Replicated, cut over both in micro-batches, and with blocks that are computed twice."""
    same(two / name, one)


def test_each_process_holds_half(two):
    held = json.loads((two / "found.json").read_text())["held"]
    assert 0.5 <= held < 0.52, "odd sizes are rounded up"


def test_weights_are_fetched_and_gradients_sent_no_more_often_than_needed(two):
    """Three blocks. Fetched in stage 1: teacher's and student's, each for two calls or a call and its way back; in
    stage 3 the student's both ways, its embedding and head ONCE, however many chunks of logits. Micro-batches fetch
    anew, but send their gradients once (layer by layer: what had gathered, and the last)."""
    counts = json.loads((two / "found.json").read_text())["counts"]
    whole_batch, micro, chunks = (counts[name] for name in ("4 16777216", "1 16777216", "4 240"))
    assert [whole_batch[s.objective][:2] for s in STAGES] == [[12, 3], [9, 3], [10, 4]] and chunks == whole_batch
    assert [micro[s.objective][:2] for s in STAGES] == [[48, 5], [36, 5], [40, 4]]


def test_what_trains_is_what_one_process_finds(two):
    counts = json.loads((two / "found.json").read_text())["counts"]["4 16777216"]
    teacher, student = models(tied=True)
    for stage in STAGES:
        objective = OBJECTIVES[stage.objective](teacher, student)
        assert counts[stage.objective][2] == sum(reached(student, objective, rows(1)).values())
        train_step(student, stage, objective, rows(4), optimizer_for(student, stage), Accelerator(cpu=True), 4, "here")
        student.requires_grad_(True)


# Resumed by another number of processes


@pytest.mark.parametrize("name", ["early", "late", "late whole"])
def test_one_process_goes_on_with_what_two_began(two, one, tmp_path, name):
    shutil.copytree(two / name, tmp_path / "run")
    keep(tmp_path / "run", go(tmp_path / "run", resume=True)[1])
    same(tmp_path / "run", one)


def by_four(path):
    assert Accelerator(cpu=True).num_processes == 4
    for name in ("early", "late", "late whole"):
        for sharded in (False, True):
            keep(path / f"{name} {sharded}", go(path / f"{name} {sharded}", sharded=sharded, resume=True)[1])


def test_four_processes_go_on_with_what_two_began(two, one, tmp_path):
    """Whole or sharded, from a checkpoint of either kind."""
    paths = [tmp_path / f"{name} {sharded}" for name in ("early", "late", "late whole") for sharded in (False, True)]
    for path in paths:
        shutil.copytree(two / path.name.rpartition(" ")[0], path)
    together.run(4, by_four, tmp_path)
    for path in paths:
        same(path, one)


def slowly(path):
    go(path, sharded=True, after_step=lambda step, stage: time.sleep(0.2))


def by_two_again(path):
    keep(path, go(path, sharded=True, resume=True)[1])


def test_killed_and_resumed(one, tmp_path):
    """All processes of a sharded run, by kill -9, in its second stage; then two others."""
    run = tmp_path / "run"
    with together.killed_at_the_end(together.begin(2, slowly, run)) as started:
        deadline = time.monotonic() + 60
        while not ((run / "metrics.jsonl").exists() and len(read_metrics(run)) >= 5):
            assert all(process.is_alive() for process in started) and time.monotonic() < deadline
            time.sleep(0.02)
        for process in started:
            os.kill(process.pid, signal.SIGKILL)
    assert len(read_metrics(run)) < 10, "the kill came too late to prove anything"
    together.run(2, by_two_again, run)
    same(run, one)


@pytest.mark.parametrize("damage", ["bit", "missing"])
def test_a_damaged_piece_is_named(two, tmp_path, damage):
    """Before anything is read, and in one process as in several."""
    run = Path(shutil.copytree(two / "late", tmp_path / "run"))
    piece = sorted((run / "checkpoints" / "step-00000008").glob("*.safetensors"))[1]
    if damage == "bit":
        content = bytearray(piece.read_bytes())
        content[-9] ^= 1
        piece.write_bytes(content)
    else:
        piece.unlink()
    with pytest.raises(ValueError, match="damaged or missing") as error:
        go(run, resume=True)
    assert piece.name in one_line(error) and "remove" in one_line(error)


def test_pieces_hold_no_code(two):
    """A checkpoint is safetensors, and a state without anything but tensors and plain containers."""
    names = {file.name for file in (two / "late" / "checkpoints" / "step-00000008").iterdir()}
    pieces = {f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)}
    assert names == {"checksums.json", "training.pt"} | pieces


def test_pieces_of_another_model_are_refused(two, tmp_path):
    run = Path(shutil.copytree(two / "late", tmp_path / "run"))
    teacher = Llama(llama_config(num_hidden_layers=4)).double()
    student = Llamba.from_teacher(teacher, [(1, 0)], d_state=6, chunk_size=8, start="published")
    with pytest.raises(ValueError, match="step-00000008: the weights do not fit the model: backbone.layers.3") as error:
        Run(run, {}, resume=True).load(student)
    assert "is missing" in one_line(error)


# At a NaN


def poisoned(path):
    """A NaN in one process's half of a batch alone: all must stop, at the same place, and none may wait."""
    accelerator = Accelerator(cpu=True)
    teacher, student = models()
    with torch.no_grad():
        student.backbone.embedding.weight[5] = float("nan")
    ids = rows().clone()
    ids[ids == 5] = 6
    ids[1::2, 3] = 5  # rows of the second process
    shard(accelerator, teacher, student)
    try:
        distill(teacher, student, Batches(ids, 4, **place(accelerator)), STAGES[2:], accelerator=accelerator,
                progress=False)
    except FloatingPointError as error:
        (path / f"{accelerator.process_index}").write_text(str(error))


def test_a_nan_in_one_process_stops_all(tmp_path):
    together.run(2, poisoned, tmp_path)
    first, second = ((tmp_path / name).read_text() for name in "01")
    assert first == second
    assert first.endswith("of the logits is nan; the first bad value comes out of the embedding of the student")


# Mixed precision


def in_bfloat16(path):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    torch.manual_seed(0)
    teacher = Llama(llama_config(num_hidden_layers=2))
    student = Llamba.from_teacher(teacher, d_state=5, chunk_size=8, **RELEASED)
    sharded = [Llama(teacher.config), Llamba(student.config)]
    for ours, theirs in zip(sharded, (teacher, student)):
        ours.load_state_dict(theirs.state_dict())
    shard(accelerator, *sharded)
    results = [distill(*pair, Batches(rows(), 4, **place(accelerator)), STAGES, accelerator=accelerator, progress=False)
               for pair in ((teacher, student), sharded)]
    assert {p.dtype for p in sharded[1].parameters()} == {torch.float32}
    for a, b in zip(*results, strict=True):
        assert abs(a["loss"] / b["loss"] - 1) < 0.02


def test_mixed_precision_agrees_with_autocast(tmp_path):
    together.run(2, in_bfloat16, tmp_path)


# How processes are started


@pytest.mark.parametrize(("environment", "device", "gpus", "found"), [
    ({}, "cpu", 0, 1), ({}, "cuda", 1, 1), ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, "cpu", 0, 4),
    ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "cuda", 8, 16), ({"WORLD_SIZE": "2"}, "cuda", 2, 2),
    ({"WORLD_SIZE": "2", "ACCELERATE_DYNAMO_BACKEND": "NO"}, "cpu", 0, 2),
    ({"ACCELERATE_USE_FSDP": "false"}, "cpu", 0, 1), ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, "mps", 0, 1),
])  # fmt: skip
def test_processes_are_counted(environment, device, gpus, found):
    assert processes_of(environment, device, gpus) == found


@pytest.mark.parametrize(("environment", "device", "gpus", "words"), [
    ({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "True"}, "cpu", 0,
     "accelerate launch started one process.*torchrun --nproc_per_node N -m -- llamba_ref.cli distill"),
    ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, "cuda", 2, "ACCELERATE_USE_FSDP.*distill --shard"),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}, "cuda", 2, "ACCELERATE_USE_DEEPSPEED"),
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "cuda", 1, "2 processes.* 1 GPU: type torchrun --nproc_per_node 1"),
    ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "cuda", 4, "8 processes.* 4 GPUs: .*--nproc_per_node 4"),
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "cuda:1", 2, "device is 'cuda:1', which 2 processes would share"),
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "mps", 0, "device is 'mps'"),
])  # fmt: skip
def test_a_start_that_cannot_work_is_refused(environment, device, gpus, words):
    with pytest.raises(ValueError, match=words) as error:
        processes_of(environment, device, gpus)
    one_line(error)


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    """In a script that forgets cpu=True where there is no GPU."""
    teacher, student = models()
    alone = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but the accelerator knows of 1.*Accelerator\(cpu=True\)"):
        distill(teacher, student, Batches(rows(), 4), STAGES, accelerator=alone, progress=False)


def test_nothing_is_cut_over_one_process():
    with pytest.raises(ValueError, match="there is one process.*distill --shard"):
        shard(Accelerator(cpu=True), *models())
