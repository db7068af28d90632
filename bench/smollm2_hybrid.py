"""A real teacher on a CPU: some of the 30 layers of SmolLM2-135M-Instruct replaced, beside windows in the same layers.

    python -m bench.smollm2_hybrid        the same as `make smollm2`; needs `make teacher` first

The student goes through MOHAWK's last two stages. A window in the place of each of its mixers keeps as many numbers:
the teacher's attention to its first 4 and last 110 tokens, untrained, and distilled for about as long. A student that
is there already, from a run that was broken off after it, is not trained again.

Text: State of the Union addresses; every 20th of them is held out and seen by no stage. All are compared with the
teacher on blocks as long as those of the training, and four times as long.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import tyro
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bench.common import distill_options, save
from bench.students import WindowAttention, with_attention
from llamba_ref.cli import Text, settings_of
from llamba_ref.cli import main as llamba
from llamba_ref.data import Batches, TokenBlocks, pack
from llamba_ref.decoder import Decoder
from llamba_ref.evaluate import compare
from llamba_ref.llama import Llama
from llamba_ref.models import load_model
from llamba_ref.mohawk import distill
from llamba_ref.training import Stage

OUT, LAYERS = Path("runs/smollm2"), (3, 6, 9, 12, 15, 18)
COMMAND = (
    f"distill --teacher smollm2 --text sotu --replace {' '.join(map(str, LAYERS))} --d-state 64 --chunk-size 64 "
    "--batch-size 4 --steps 0 190 35 --lr 5e-4 5e-4 1e-5 --validation-blocks 16 --save-every 0 --threads 2 "
    f"--out {OUT}"
)
OPTIONS = distill_options(COMMAND)
WINDOW_STAGE = Stage("distillation", 70, 1e-5)  # the rate of the student's last stage, and about its time


class Window(WindowAttention):
    """A cache of as many numbers as the state of the student's mixer: 114 tokens have 43,776, the state 44,064."""

    window, sinks = 110, 4


def evaluation_blocks(
    corpus: Text, documents: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[int, TokenBlocks]:
    """Held-out blocks as long as those of the training, and four times as long: as many tokens of each."""
    tokens = corpus.length * corpus.validation_blocks
    return {length: pack(documents, tokenizer, length, max_blocks=tokens // length)
            for length in (corpus.length, 4 * corpus.length)}


def measured(name: str, teacher: Llama, model: Decoder, blocks: dict) -> dict:
    """A row: how close a model is to the teacher, at both lengths."""
    found = {length: compare(teacher, model, part, 4) for length, part in blocks.items()}
    ratios = {str(length): one.ratio for length, one in found.items()}
    print(f"{name:>24}: " + ", ".join(f"{ratio:.3f} x the teacher's at {length}" for length, ratio in ratios.items()))
    return {"name": name, "ratios": ratios, "agreement": {str(length): one.agreement for length, one in found.items()},
            "kl": {str(length): one.kl for length, one in found.items()}}


def minutes(records: list[dict]) -> float:
    """How long the steps of a training took."""
    return sum(record["tokens"] / record["tokens_per_second"] for record in records) / 60


def main() -> None:
    if not (OUT / "student").exists():
        llamba([*COMMAND.split(), "--prompt", "My fellow citizens,"])
        shutil.rmtree(OUT / "checkpoints")  # 4 GB with AdamW's means
    elif json.loads((OUT / "config.json").read_text()) != json.loads(json.dumps(settings_of(OPTIONS))):
        raise SystemExit(f"{OUT}: a run with other options is there; remove it or keep its figures")
    records = [json.loads(line) for line in (OUT / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "stage" in record]
    torch.set_num_threads(OPTIONS.machine.threads)
    teacher, tokenizer = load_model(OPTIONS.teacher)
    (training, held_out), = OPTIONS.corpus.documents()
    blocks = evaluation_blocks(OPTIONS.corpus, held_out, tokenizer)
    rows = [measured("student", teacher, load_model(str(OUT))[0], blocks),
            measured("window, untrained", teacher, with_attention(teacher, Window, LAYERS), blocks)]
    window = with_attention(teacher, Window, LAYERS)
    data = Batches(pack(training, tokenizer, OPTIONS.corpus.length), OPTIONS.batch_size, OPTIONS.seed)
    window_steps = distill(teacher, window, data, [WINDOW_STAGE])
    rows.append(measured("window, distilled", teacher, window, blocks))
    tokens = {"student": sum(record["tokens"] for record in steps),
              "window": sum(record["tokens"] for record in window_steps)}
    save("smollm2_hybrid", "make smollm2", arguments=COMMAND, tokens=tokens,
         minutes={"student": minutes(steps), "window": minutes(window_steps)}, rows=rows,
         evaluations=[record for record in records if "evaluation" in record])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
