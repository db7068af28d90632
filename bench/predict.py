"""What a distillation takes on a GPU: memory and time, predicted from steps that are taken without numbers.

    python -m bench.predict        about twenty minutes on one core; needs no weights and no GPU

Teacher, student and optimiser are made of tensors that store nothing, and the steps of each stage of two commands go
through them: all of SmolLM2-135M, and Llama-3.2-1B with the published numbers of tokens. Counted are the bytes that are
alive at a time, the operations of matrix products and attention, and the bytes that all operations read and write.
Memory grows in a straight line with the blocks that go through at a time; two sizes give it.

Time is operations over a card's published rate plus bytes over its published bandwidth, as if neither waited for the
other and no operation were merged with the next; and three times that, for no card keeps what its maker promises. Plain
PyTorch is counted: the kernels of the package keep less and move less. Nothing here ran on a GPU. What can be measured
here is memory: steps of a smaller model are taken with numbers as well, with more blocks than those that gave the line,
and the growth of the process is put beside the prediction.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench.common import distill_options, in_a_process, parameters, save
from bench.stage1_memory import ENVIRONMENT, resident
from llamba_ref.budget import ON_CPU, Moved
from llamba_ref.cli import Distill
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.llamba import Llamba, LlambaConfig, student_config
from llamba_ref.mohawk import OBJECTIVES
from llamba_ref.operators import peak_bytes
from llamba_ref.throughput import CARDS
from llamba_ref.training import Stage, optimizer_for

SIZES = {
    "smollm2": LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                           num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-1B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "small": LlamaConfig(vocab_size=32768, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=4, head_dim=32, tie_word_embeddings=True),
    "tiny": LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True),
}
TEXT = "--text HuggingFaceFW/fineweb-edu:sample-10BT --streaming --held-out 1000 --validation-blocks 64"
COMMANDS = (
    f"llamba distill --teacher smollm2 {TEXT} --length 1024 --d-state 64 --chunk-size 64 --batch-size 32 "
    "--steps 0 2000 1000 --lr 5e-4 5e-4 1e-5 --save-every 500 --out runs/smollm2-all",
    f"llamba distill --teacher meta-llama/Llama-3.2-1B {TEXT} --length 2048 --d-state 64 --chunk-size 128 "
    "--batch-size 64 --steps 2300 20600 38000 --lr 1e-4 1e-4 1e-5 --save-every 1000 --out runs/llamba-1b",
)
SMALL = "llamba distill --teacher small --length 256 --d-state 32 --chunk-size 64 --steps 1 1 1"  # is also really run
LINE, BEYOND = (4, 8), 12  # blocks at a time that give the line, and that it is tested with
SLOWER = 3  # what a card takes at most, times what its maker promises
FREE = 0.9  # of a card's memory: the rest for the allocator's gaps and the context


@contextmanager
def as_on_a_gpu(precision: str) -> Iterator[None]:
    """Mixed precision where it is asked for, and what else differs from a CPU: without it a GPU has no attention for
    grouped queries but the plain one, sequences are cut into chunks as they are there, and ids are not looked at."""
    backend = SDPBackend.FLASH_ATTENTION if precision == "bf16" else SDPBackend.MATH
    unseen = mock.patch("torch.compiler.is_compiling", return_value=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), sdpa_kernel(backend), unseen:
        yield


class Steps:
    """A teacher, its student, and steps of one stage."""

    def __init__(self, teacher: LlamaConfig, student: LlambaConfig, stage: Stage, length: int, precision: str):
        self.teacher, self.student, self.length, self.precision = Llama(teacher), Llamba(student), length, precision
        self.objective = OBJECTIVES[stage.objective](self.teacher, self.student)
        self.optimizer = optimizer_for(self.student, stage)
        for group in self.optimizer.param_groups:
            group["foreach"] = True  # as on a GPU

    def backward(self, blocks: int) -> None:
        """Some blocks through both models, and back."""
        ids = torch.randint(self.teacher.vocab_size, (blocks, self.length))
        with as_on_a_gpu(self.precision):
            self.objective(ids, lambda loss: loss.backward())

    def update(self) -> None:
        """AdamW's step, and the gradients are gone."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self, blocks: int) -> None:
        """A step whose blocks go through in two parts, so that gradients are there during the second."""
        self.backward(blocks)
        self.backward(blocks)
        self.update()


def student_of(command: Distill, teacher: LlamaConfig) -> LlambaConfig:
    """The sizes of a command's student. Raises ValueError for one that keeps attention."""
    if command.replace or command.keep_attention or command.keep_heads:
        raise ValueError("a hybrid is not predicted")
    return student_config(teacher, d_state=command.d_state, chunk_size=command.chunk_size, rotation=command.rotation,
                          bias=command.start == "teacher")


def counted(command: Distill, stage: Stage, precision: str) -> dict:
    """Of a stage: operations and bytes moved a token; and the line of memory."""
    teacher, length = SIZES[command.teacher], command.corpus.length
    with FakeTensorMode():
        steps = Steps(teacher, student_of(command, teacher), stage, length, precision)
        steps(1)  # AdamW's means exist from here on
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter, Moved() as moved:
            steps.backward(1)
        steps.update()
        peaks = []
        for blocks in LINE:
            gc.collect()
            peaks.append(peak_bytes(lambda: steps(blocks)))
        states = tree_leaves([list(state.values()) for state in steps.optimizer.state.values()])
        lasting = 4 * (parameters(steps.teacher) + parameters(steps.student)) + sum(state.nbytes for state in states)
    block = (peaks[1] - peaks[0]) / (LINE[1] - LINE[0])
    return {"stage": stage.objective, "precision": precision, "lasting": lasting, "block": block,
            "without_blocks": lasting + peaks[0] - LINE[0] * block, "operations": counter.get_total_flops() / length,
            "moved": moved.bytes / length}


def memory(part: dict, blocks: int) -> float:
    """The line: bytes with so many blocks at a time."""
    return part["without_blocks"] + blocks * part["block"]


def most_resident() -> int:
    """Bytes of this process in memory at most so far."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measured(objective: str, precision: str) -> int:
    """Bytes by which this process grows at most when the steps of SMALL are taken, BEYOND blocks at a time."""
    torch.set_num_threads(1)
    command = distill_options(SMALL)
    stage = next(stage for stage in command.stages() if stage.objective == objective)
    for name, blocks in (("tiny", 1), ("small", BEYOND)):  # first a tiny one, so that all of PyTorch is loaded
        teacher, before = SIZES[name], resident()
        steps = Steps(teacher, student_of(command, teacher), stage, command.corpus.length, precision)
        steps(1)
        steps(blocks)
    return most_resident() - before


def plan(text: str, parts: list[dict], name: str) -> dict:
    """How many blocks of a step a card holds at a time, and how long all steps take; None where not one fits."""
    command, card = distill_options(text), CARDS[name]
    parts = [part for part in parts if part["precision"] == card.precision]
    fitting = [blocks for blocks in range(1, command.batch_size + 1)
               if max(memory(part, blocks) for part in parts) <= FREE * card.memory]
    row = {"card": name, "precision": card.precision, "memory": card.memory, "blocks": max(fitting, default=None)}
    if not fitting:
        return row | {"command": None, "hours": None}
    tokens = {stage.objective: stage.steps * command.batch_size * command.corpus.length for stage in command.stages()}
    seconds = sum(tokens[part["stage"]] * (part["operations"] / card.rate + part["moved"] / card.bandwidth)
                  for part in parts)
    return row | {"command": f"{text} --precision {card.precision} --micro-batch-size {row['blocks']}",
                  "hours": [seconds / 3600, SLOWER * seconds / 3600]}


def predict(text: str) -> dict:
    """All cards for one command."""
    command = distill_options(text)
    parts = [counted(command, stage, precision) for precision in ("no", "bf16") for stage in command.stages()]
    for part in parts:
        print(f"{command.teacher}, {part['stage']}, precision {part['precision']}: {part['lasting'] / 1e9:.1f} GB that "
              f"last, {memory(part, 1) / 1e9:.2f} GB with one block, {part['block'] / 1e9:.2f} GB for one more, "
              f"{part['operations'] / 1e9:.2f} GFLOP and {part['moved'] / 1e6:.0f} MB moved a token", flush=True)
    rows = [plan(text, parts, card) for card in CARDS]
    for row in rows:
        hours = "" if row["hours"] is None else ", {:.1f} to {:.1f} hours".format(*row["hours"])
        print(f"{row['card']}: {row['blocks'] or 'no'} blocks at a time{hours}", flush=True)
    tokens = command.batch_size * command.corpus.length * sum(command.steps)
    return {"teacher": command.teacher, "tokens": tokens, "parts": parts, "rows": rows}


def checked() -> list[dict]:
    """What the line says of a small model, beside what a process that takes the steps grows by."""
    command, rows = distill_options(SMALL), []
    for stage in command.stages():
        for precision in ("no", "bf16"):
            predicted = memory(counted(command, stage, precision), BEYOND)
            found = in_a_process(f"bench.predict.measured({stage.objective!r}, {precision!r})", ENVIRONMENT)
            rows.append({"stage": stage.objective, "precision": precision, "predicted": predicted, "measured": found})
            print(f"a small model, {stage.objective}, precision {precision}: predicted {predicted / 1e6:.0f} MB, "
                  f"measured {found / 1e6:.0f} MB", flush=True)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    check, predictions = checked(), [predict(command) for command in COMMANDS]
    save("predict", "python -m bench.predict", slower=SLOWER, free=FREE, check=check, predictions=predictions)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
