"""What a distillation takes on a GPU: memory and time, predicted from passes that are taken without numbers.

    python -m bench.predict        some minutes on one core; needs no weights and no GPU

Two commands are counted as `llamba_ref.budget` counts: all of SmolLM2-135M, and Llama-3.2-1B with the
published numbers of tokens. Memory grows in a straight line with the blocks that go through at a time; two sizes give
it.

Time is operations over a card's published rate plus bytes over its published bandwidth, as if neither waited for the
other and no operation were merged with the next; and three times that, for no card keeps what its maker promises.
Nothing here ran on a GPU. What can be measured here is memory: steps of a smaller model are taken with numbers as well,
with more blocks than those that gave the line, and the growth of the process is put beside the prediction.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from bench.common import distill_options, in_a_process, save
from bench.stage1_memory import ENVIRONMENT, resident
from llamba_ref.budget import Plan, distillation_memory, distillation_work
from llamba_ref.cli import Distill
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.llamba import Llamba, LlambaConfig, student_config
from llamba_ref.mohawk import OBJECTIVES
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


def student_of(command: Distill, teacher: LlamaConfig) -> LlambaConfig:
    """The sizes of a command's student. Raises ValueError for one that keeps attention."""
    if command.replace or command.keep_attention or command.keep_heads:
        raise ValueError("a hybrid is not predicted")
    return student_config(teacher, d_state=command.d_state, chunk_size=command.chunk_size, rotation=command.rotation,
                          bias=command.start == "teacher")


def line(command: Distill, stage: Stage, precision: str, device: str = "cuda") -> dict:
    """Memory of a stage, as a line over the blocks at a time."""
    teacher = SIZES[command.teacher]
    student, plan = student_of(command, teacher), Plan(stage.objective, LINE[0], command.corpus.length, 1, precision)
    low, high = (sum(distillation_memory(teacher, student, replace(plan, rows=rows), device).values()) for rows in LINE)
    block = (high - low) / (LINE[1] - LINE[0])
    return {"stage": stage.objective, "precision": precision, "block": block, "without_blocks": low - LINE[0] * block}


def memory(part: dict, blocks: int) -> float:
    """The line: bytes with so many blocks at a time."""
    return part["without_blocks"] + blocks * part["block"]


def counted(command: Distill, stage: Stage, precision: str) -> dict:
    """Of a stage: the line of memory; operations and bytes moved a token."""
    teacher, plan = SIZES[command.teacher], Plan(stage.objective, 1, command.corpus.length, 1, precision)
    work = distillation_work(teacher, student_of(command, teacher), plan)
    return line(command, stage, precision) | {"operations": work.operations, "moved": work.moved}


def most_resident() -> int:
    """Bytes of this process in memory at most so far."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def take_a_step(command: Distill, stage: Stage, teacher: LlamaConfig, blocks: int, precision: str) -> None:
    """With numbers: both models, so many blocks through them and back, and AdamW's step."""
    models = Llama(teacher), Llamba(student_of(command, teacher))
    objective, optimizer = OBJECTIVES[stage.objective](*models), optimizer_for(models[1], stage)
    for _ in range(2):  # AdamW's means are there during the second
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            ids = torch.randint(teacher.vocab_size, (blocks, command.corpus.length))
            objective(ids, lambda loss: loss.backward())
        optimizer.step()
        optimizer.zero_grad()


def measured(objective: str, precision: str) -> int:
    """Bytes by which this process grows at most when the steps of SMALL are taken, BEYOND blocks at a time."""
    torch.set_num_threads(1)
    command = distill_options(SMALL)
    stage = next(stage for stage in command.stages() if stage.objective == objective)
    take_a_step(command, stage, SIZES["tiny"], 1, precision)  # so that all of PyTorch is loaded
    before = resident()
    take_a_step(command, stage, SIZES["small"], BEYOND, precision)
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
        print(f"{command.teacher}, {part['stage']}, precision {part['precision']}: {memory(part, 1) / 1e9:.2f} GB with "
              f"one block, {part['block'] / 1e9:.2f} GB for one more, {part['operations'] / 1e9:.2f} GFLOP and "
              f"{part['moved'] / 1e6:.0f} MB moved a token", flush=True)
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
            predicted = memory(line(command, stage, precision, "cpu"), BEYOND)
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
