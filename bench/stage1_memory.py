"""Peak memory of one step of stage 1 against depth: layer by layer, and with the loss summed over all layers first.

    python -m bench.stage1_memory

Each measurement is a process of its own, in which the allocator gives large tensors back to the system as soon as they
are freed, so that the peak is that of live memory and not of the allocator's reserves. "step" is the peak during the
step above what lay in memory before it (both models), less the student's gradients: the gradients are as large as the
weights that they belong to, and are wanted.
"""

from __future__ import annotations

import os
import resource

import torch
import tyro

from bench.common import in_a_process, save
from llamba_ref.llama import Llama, LlamaConfig
from llamba_ref.llamba import Llamba
from llamba_ref.mohawk import LayerByLayer, match_matrix

BATCH, LENGTH, WIDTH, HEADS = 2, 512, 256, 8
DEPTHS = (4, 8, 16, 32)
MIB = 2**20
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # glibc


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * resource.getpagesize()


def measure(layers: int, way: str) -> dict:
    """One step of stage 1 in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = Llama(LlamaConfig(vocab_size=1024, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
                                num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=HEADS,
                                head_dim=WIDTH // HEADS, tie_word_embeddings=True))
    student = Llamba.from_teacher(teacher, d_state=32, start="published", rotation="none")
    input_ids = torch.randint(1024, (BATCH, LENGTH))
    objective, losses = LayerByLayer(teacher, student, match_matrix), []
    before = resident()
    if way == "layer by layer":
        objective(input_ids, lambda loss: loss.backward())
    else:  # keep every layer's graph until the losses are summed
        objective(input_ids, losses.append)
        torch.stack(losses).sum().backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gradients = sum(p.grad.nbytes for p in student.parameters() if p.grad is not None)
    weights = sum(p.nbytes for model in (teacher, student) for p in model.parameters())
    return {"layers": layers, "way": way, "step_mib": (peak - before - gradients) / MIB, "weights_mib": weights / MIB}


def main() -> None:
    rows = []
    for way in ("layer by layer", "all layers at once"):
        for layers in DEPTHS:
            rows.append(in_a_process(f"bench.stage1_memory.measure({layers}, {way!r})", ENVIRONMENT))
            print(
                f"{way:>20}  {layers:3d} layers  {rows[-1]['step_mib']:8.1f} MiB above weights and gradients",
                flush=True,
            )
    ours = [row["step_mib"] for row in rows if row["way"] == "layer by layer"]
    print(f"layer by layer: largest over smallest {max(ours) / min(ours):.3f}")
    save(
        "stage1_memory",
        "python -m bench.stage1_memory",
        batch=BATCH,
        length=LENGTH,
        width=WIDTH,
        heads=HEADS,
        rows=rows,
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)  # --help says what it does, and does not start it
