"""The models of docs/write.md as a script, so that the page works from a file: weights of 8 bits in base64."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from llamba_ref.checkpoint import find_checkpoint, read_json

MODELS = {"student": "tiny-llamba", "teacher": "tiny"}


def text_of(values: Tensor) -> str:
    """The bytes of a tensor in base64."""
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def rows_of_8_bits(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as whole numbers from -127 to 127, and the scale of each row."""
    scales = matrix.abs().amax(1).clamp(min=1e-12) / 127
    return (matrix / scales[:, None]).round().to(torch.int8), scales


def packed(weights: dict[str, Tensor], bits: int = 8) -> dict:
    """Weights for write-model.js: matrices in 8 bits, all else, or with 32 everything, in float32."""
    found = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and bits == 8:
            whole, scales = rows_of_8_bits(weight.float())
            found[name] = {"data": text_of(whole), "scales": text_of(scales)}
        else:
            found[name] = {"data": text_of(weight.float())}
    return found


def model(name: str, bits: int = 8) -> dict:
    """A shipped model: its config and its weights."""
    path = find_checkpoint(name)
    return {"config": read_json(path / "config.json"), "weights": packed(load_file(path / "model.safetensors"), bits)}


def script() -> str:
    """All that the page needs: both models and their tokenizer."""
    bpe = read_json(find_checkpoint(MODELS["teacher"]) / "tokenizer.json")["model"]
    content = {part: model(name) for part, name in MODELS.items()} | {
        "tokenizer": {"vocab": bpe["vocab"], "merges": bpe["merges"]}}
    return f"window.llambaModels = {json.dumps(content, separators=(',', ':'))};\n"


def write(app) -> None:
    """Beside the page's other scripts, anew for each build."""
    Path(app.srcdir, "_static", "write-models.js").write_text(script())


def setup(app) -> dict:
    """Called by Sphinx."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}
