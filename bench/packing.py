"""Should a student forget where a document ends, or read on? Stage 3 of the demo both ways, and both judged both ways.

    python -m bench.packing        about a quarter of an hour on one core

Students of the embedded Llama, of three seeds, learn from chapters (few documents end inside a row of 256 tokens) and
from paragraphs (most rows hold several), packed so that models read across the ends of documents, or forget there. All
are compared with their teacher on held-out text in both packings.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import tyro
from accelerate import Accelerator

from bench.common import save
from llamba_ref.cli import Distill, batches_of
from llamba_ref.evaluate import compare
from llamba_ref.models import load_model
from llamba_ref.mohawk import distill

SEPARATORS = {"chapters": r"\n{4,}", "paragraphs": r"\n{2,}"}
PACKINGS = ("joined", "resets")
SEEDS, STEPS, BLOCKS = (0, 1, 2), 180, 64


def command_for(text: str, packing: str, seed: int) -> Distill:
    """The demo's third stage, shorter, on one reading of the novels."""
    command = Distill(seed=seed, steps=(0, 0, STEPS))
    command.corpus = replace(command.corpus, separator=SEPARATORS[text], packing=packing, validation_blocks=BLOCKS)
    return command


def run(text: str, packing: str, seed: int) -> dict:
    """A student that learned in one packing, compared with its teacher in both."""
    command = command_for(text, packing, seed)
    teacher, tokenizer = load_model(command.teacher)
    student, documents = command.student(teacher), command.corpus.documents()
    place = {"batch_size": command.batch_size, "seed": seed, "rank": 0, "world_size": 1}
    data, _ = batches_of(command.corpus, documents, tokenizer, **place)
    distill(teacher, student, data, command.stages(), accelerator=Accelerator(cpu=True), progress=False)
    row = {"text": text, "trained": packing, "seed": seed}
    for judged in PACKINGS:
        blocks = command_for(text, judged, seed).corpus.validation(documents, tokenizer)
        found = compare(teacher, student, blocks)
        row[judged] = {"ratio": found.ratio, "kl": found.kl, "agreement": found.agreement,
                       "teacher": found.teacher.perplexity}
    return row


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for text in SEPARATORS:
        for seed in SEEDS:
            for packing in PACKINGS:
                rows.append(run(text, packing, seed))
                judged = ", ".join(f"{name} {rows[-1][name]['kl']:.4f}" for name in PACKINGS)
                print(f"{text}, seed {seed}, trained {packing}: KL judged {judged}", flush=True)
    save("packing", "python -m bench.packing", steps=STEPS, blocks=BLOCKS, rows=rows)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
