"""What a distillation takes on a GPU: memory and time, predicted from steps that are taken without numbers.

    python -m bench.predict        about ten minutes on one core; needs no weights and no GPU

Teacher, student and optimiser are made of tensors that store nothing, and the steps of each stage of two commands go
through them: all of SmolLM2-135M, and Llama-3.2-1B with the published numbers of tokens. Each tensor is counted for as
long as it lives, and every operation. Memory grows by the same amount with each block that goes through at a time; two
sizes give the line. Counted is plain PyTorch, and kernels keep less, so that this is a bound from above.

Time is operations over the card's published rate, at 40% of it and at 10%. These shares are an assumption: nothing here
ran on a GPU. What can be measured here is memory: the same steps of a smaller model are taken with numbers as well, and
the growth of the process is put beside the prediction.
"""

from __future__ import annotations

import gc
import resource
import weakref
from dataclasses import dataclass
from unittest import mock

import torch
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bench.common import in_a_process, save
from bench.stage1_memory import ENVIRONMENT, resident
from llamba_ref.cli import Distill
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.llamba import Llamba, LlambaConfig
from llamba_ref.mohawk import OBJECTIVES
from llamba_ref.training import Stage, optimizer_for

TEACHERS = {
    "smollm2": LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                           num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-1B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "a small one": LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                               num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True),
    "a tiny one": LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                              num_attention_heads=1, num_key_value_heads=1, head_dim=64, tie_word_embeddings=True),
}
COMMANDS = (
    "llamba distill --teacher smollm2 --text HuggingFaceFW/fineweb-edu:sample-10BT --streaming --length 1024 "
    "--d-state 64 --chunk-size 64 --batch-size 32 --steps 0 2000 1000 --lr 5e-4 5e-4 1e-5 --held-out 1000 "
    "--validation-blocks 64 --out runs/smollm2-all",
    "llamba distill --teacher meta-llama/Llama-3.2-1B --text HuggingFaceFW/fineweb-edu:sample-10BT --streaming "
    "--length 2048 --d-state 64 --chunk-size 128 --batch-size 64 --steps 2300 20600 38000 --lr 1e-4 1e-4 1e-5 "
    "--held-out 1000 --validation-blocks 64 --out runs/llamba-1b",
)
SMALL = "llamba distill --teacher x --length 512 --d-state 64 --chunk-size 64 --steps 0 1 1"  # is also really run
SHARES = (0.4, 0.1)  # of a card's rate
FREE = 0.9  # of its memory: the rest for the allocator's gaps and the context


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it."""

    memory: float  # bytes
    rate: float  # operations a second, products of matrices in the type that `precision` computes with
    precision: str  # of the command


CARDS = {"T4": Card(16e9, 8.1e12, "no"), "A100": Card(40e9, 312e12, "bf16"), "H100": Card(80e9, 989e12, "bf16")}


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are alive, and the most that were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.end, storage.nbytes())
        return out

    def end(self, size: int) -> None:
        self.now -= size


def attention_on_cpu(q, k, v, *_, **__) -> int:
    """The operations of the attention that PyTorch takes on a CPU, which its counter does not know."""
    return sdpa_flop_count(q, k, v)


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_on_cpu}


def student_config(command: Distill, teacher: LlamaConfig) -> LlambaConfig:
    """The sizes of a command's student."""
    with torch.device("meta"):
        return Llamba.from_teacher(Llama(teacher), start="published", rotation=command.rotation,
                                   d_state=command.d_state, chunk_size=command.chunk_size).config


class Steps:
    """A teacher, its student, and steps of one stage."""

    def __init__(self, teacher: LlamaConfig, student: LlambaConfig, stage: Stage, length: int, precision: str):
        self.teacher, self.student = Llama(teacher).requires_grad_(False), Llamba(student)
        self.objective = OBJECTIVES[stage.objective](self.teacher, self.student)
        self.optimizer = optimizer_for(self.student, stage)
        self.length, self.precision = length, precision

    def backward(self, blocks: int) -> None:
        """Some blocks through both models, and back."""
        ids = torch.randint(self.teacher.vocab_size, (blocks, self.length))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            self.objective(ids, lambda loss: loss.backward())

    def __call__(self, blocks: int) -> None:
        """A step whose blocks go through in two parts, so that gradients are there during the second."""
        self.backward(blocks)
        self.backward(blocks)
        self.optimizer.step()
        self.optimizer.zero_grad()


def counted(command: Distill, teacher: LlamaConfig, stage: Stage, precision: str) -> dict:
    """Of a stage: operations a token, bytes that are always there, and bytes more for each block at a time."""
    student, length = student_config(command, teacher), command.corpus.length
    unseen = mock.patch("torch.compiler.is_compiling", return_value=True)  # ids that store nothing are not looked at
    with FakeTensorMode(), unseen, Living() as living:
        steps, most = Steps(teacher, student, stage, length, precision), []
        steps(1)  # AdamW's means exist from here on
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            steps.backward(1)
        steps.optimizer.zero_grad()
        for blocks in (1, 2):
            gc.collect()
            living.most = living.now
            steps(blocks)
            most.append(living.most)
    return {"stage": stage.objective, "precision": precision, "fixed": 2 * most[0] - most[1],
            "block": most[1] - most[0], "operations": counter.get_total_flops() / length}


def measured(objective: str) -> int:
    """Bytes by which this process grows at most when the steps of SMALL are taken."""
    torch.set_num_threads(1)
    command = parsed(SMALL)
    stage = next(stage for stage in command.stages() if stage.objective == objective)
    with mock.patch("torch.compiler.is_compiling", return_value=True):  # as where they are counted
        for size in ("a tiny one", "a small one"):  # the first, so that PyTorch has loaded all that it needs
            teacher = TEACHERS[size]
            student, before = student_config(command, teacher), resident()
            steps = Steps(teacher, student, stage, command.corpus.length, "no")
            for _ in range(2):
                steps(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def parsed(command: str) -> Distill:
    """A command's options."""
    return tyro.cli(Distill, args=command.split()[2:], config=(tyro.conf.OmitArgPrefixes,))


def plan(command: Distill, parts: list[dict], card: Card) -> dict:
    """How many blocks of a step a card holds at a time, and how long all steps take; None for none."""
    batch = command.batch_size
    room = min((FREE * card.memory - part["fixed"]) / part["block"] for part in parts)
    blocks = max((size for size in range(1, batch + 1) if batch % size == 0 and size <= room), default=None)
    steps = {stage.objective: stage.steps for stage in command.stages()}
    work = sum(steps[part["stage"]] * part["operations"] for part in parts) * batch * command.corpus.length
    return {"blocks": blocks, "hours": [work / (card.rate * share) / 3600 for share in SHARES]}


def predict(text: str) -> dict:
    """All cards for one command."""
    command = parsed(text)
    teacher = TEACHERS[command.teacher]
    parts = [counted(command, teacher, stage, precision) for precision in ("no", "bf16") for stage in command.stages()]
    for part in parts:
        print(f"{command.teacher}, {part['stage']}, precision {part['precision']}: {part['fixed'] / 1e9:.1f} GB and "
              f"{part['block'] / 1e9:.2f} GB a block, {part['operations'] / 1e9:.2f} GFLOP a token", flush=True)
    rows = [{"card": name, "precision": card.precision, "memory": card.memory,
             **plan(command, [part for part in parts if part["precision"] == card.precision], card)}
            for name, card in CARDS.items()]
    for row in rows:
        print(f"{row['card']}: {row['blocks']} blocks at a time, {row['hours'][0]:.1f} to {row['hours'][1]:.1f} hours")
    tokens = command.batch_size * command.corpus.length * sum(command.steps)
    return {"command": text, "tokens": tokens, "parts": parts, "rows": rows}


def checked() -> list[dict]:
    """What is predicted for a small model in this process, beside what a process that takes the steps grows by."""
    command, rows = parsed(SMALL), []
    for stage in command.stages():
        part = counted(command, TEACHERS["a small one"], stage, "no")
        found = in_a_process(f"bench.predict.measured({stage.objective!r})", ENVIRONMENT)
        rows.append({"stage": stage.objective, "predicted": part["fixed"] + 2 * part["block"], "measured": found})
        print(f"a small model, {stage.objective}: predicted {rows[-1]['predicted'] / 1e6:.0f} MB, "
              f"measured {found / 1e6:.0f} MB", flush=True)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    check, predictions = checked(), [predict(command) for command in COMMANDS]
    save("predict", "python -m bench.predict", shares=SHARES, check=check, predictions=predictions)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
