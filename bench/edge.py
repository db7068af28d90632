"""What a student is worth as a file: size, agreement, speed, memory (chapter 20).

    .venv-edge/bin/python -m bench.edge        needs `make demo` and `make test-edge` first; about ten minutes

Every format and number of bits, of the demo's student and for ONNX also of its teacher: agreement with the model in
float32 on all held-out text, tokens a second in turns with the model in PyTorch, and memory along a long text, each in
a process of its own. One thread.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
import tyro

from bench.common import in_a_process, save
from llamba_ref.data import load_documents, pack, split_documents
from llamba_ref.decoder import Decoder
from llamba_ref.edge import EdgeModel, load_edge
from llamba_ref.evaluate import compare
from llamba_ref.export import SUFFIXES, export_model, optional
from llamba_ref.models import load_model
from llamba_ref.operators import unchecked
from llamba_ref.throughput import step_cost

STUDENT, TEACHER = "runs/demo", "tiny"
KINDS = [(to, bits) for to in ("executorch", "onnx") for bits in (32, 8, 4)]
LENGTHS = {"student": (100, 1000, 10_000, 100_000), "teacher": (100, 1000, 10_000)}
ROUNDS, TOKENS = 5, 200


def steps_a_second(model: Decoder | EdgeModel, ids: torch.Tensor) -> float:
    """Tokens a second, one by one, after a first few; as `generate` takes its steps."""
    with torch.inference_mode(), unchecked():
        state = model.init_state(1)
        for token in ids[:10].split(1):
            _, state = model.step(token, state, in_place=True)
        begun = time.perf_counter()
        for token in ids.split(1):
            _, state = model.step(token, state, in_place=True)
        return len(ids) / (time.perf_counter() - begun)


def reading_a_second(model: Decoder | EdgeModel, ids: torch.Tensor) -> float:
    """Tokens a second of a prompt."""
    with torch.inference_mode(), unchecked():
        begun = time.perf_counter()
        model.read(ids[None])
        return len(ids) / (time.perf_counter() - begun)


def memory(file: str, lengths: tuple[int, ...]) -> list[dict]:
    """Private memory of this process above what it had with everything imported, after so many tokens."""
    torch.set_num_threads(1)
    for name in ("onnxruntime", "executorch.runtime", "executorch.kernels.quantized", "numpy"):
        optional(name)
    process, rows = psutil.Process(), []
    start = process.memory_full_info().uss
    model = EdgeModel(file, 1)
    state, begun, before = model.init_state(1), time.perf_counter(), 0
    for done in range(1, max(lengths) + 1):
        _, state = model.step(torch.tensor([done * 37 % model.vocab_size]), state)
        if done in lengths:
            seconds = time.perf_counter() - begun
            rows.append({"tokens": done, "bytes": process.memory_full_info().uss - start,
                         "tokens_per_second": (done - before) / seconds})
            begun, before = time.perf_counter(), done
    return rows


def row(model: Decoder, file: Path, name: str, to: str, blocks, ids: torch.Tensor) -> dict:
    """One file beside its model."""
    edge = load_edge(file, 1)[0]
    compared = compare(model, edge, blocks, 8)
    with torch.no_grad():
        far = (model(ids[None, :256]) - edge(ids[None, :256])).norm() / model(ids[None, :256]).norm()
    turns = [[use(one, ids[:TOKENS]) for use in (steps_a_second, reading_a_second) for one in (edge, model)]
             for _ in range(ROUNDS)]
    step, eager, reading, eager_reading = (max(times) for times in zip(*turns))
    found = {"model": name, "format": to, "bits": edge.bits,
             "bytes": file.stat().st_size, "kl": compared.kl, "ratio": compared.ratio, "agreement": compared.agreement,
             "relative_error": far.item(), "step": step, "faster": step / eager, "reading": reading,
             "reading_faster": reading / eager_reading}
    print({key: round(value, 6) if isinstance(value, float) else value for key, value in found.items()}, flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    (student, tokenizer), teacher = load_model(STUDENT), load_model(TEACHER)[0]
    held_out = split_documents(load_documents("austen"), 20)[1]
    blocks, rows, along = pack(held_out, tokenizer, 256), [], []
    ids = pack(held_out, tokenizer, 1024, max_blocks=1)[0]
    with TemporaryDirectory() as directory:
        wanted = [("student", student, to, bits) for to, bits in KINDS] + [("teacher", teacher, "onnx", 32)]
        for name, model, to, bits in wanted:
            file = Path(directory, name, f"{bits}{SUFFIXES[to]}")
            begun = time.perf_counter()
            export_model(model, tokenizer, file, to, bits)
            made = {"export_seconds": time.perf_counter() - begun}
            rows.append(row(model.eval(), file, name, to, blocks, ids) | made)
            if bits == 8 or name == "teacher":
                call = f"bench.edge.memory({str(file)!r}, {LENGTHS[name]})"
                along.append({"model": name, "format": to, "bits": bits,
                              "rows": in_a_process(call, dict(os.environ, OMP_NUM_THREADS="1"))})
                print(along[-1], flush=True)
    save("edge", "python -m bench.edge", packages=("executorch", "torchao", "onnx", "onnxscript", "onnxruntime"),
         held_out=len(blocks) * (blocks.length - 1), state=step_cost(student).state, cache=step_cost(teacher).cache,
         rows=rows, memory=along)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
