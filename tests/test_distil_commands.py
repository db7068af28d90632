"""The commands that the chapter on Llama-3.2-1B says to type, with one layer of its sizes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import llama_config

from llamba_ref.data import load_documents, train_tokenizer
from llamba_ref.llama import Llama
from llamba_ref.models import save_model

ROOT = Path(__file__).resolve().parent.parent


def commands():
    (path,) = (ROOT / "nbs").glob("*_distil_1b.ipynb")
    cells = json.loads(path.read_text())["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return [block.replace("\\\n", " ") for block in re.findall(r"^```sh\n(.*?)^```$", prose, re.DOTALL | re.MULTILINE)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """One layer of Llama-3.2-1B, with a small vocabulary."""
    home = tmp_path_factory.mktemp("wide")
    tokenizer = train_tokenizer(load_documents("austen")["text"][:4], 300)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=8192, num_hidden_layers=1,
                 num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    save_model(home / "teacher", Llama(llama_config(**sizes | ends)), tokenizer)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_the_commands_run(wide, tmp_path, number):
    """Two steps a stage, short texts, two processes for eight. Every other option is the chapter's."""
    assert len(commands()) == 3
    words = shlex.split(commands()[number])
    changes = {"--teacher": wide / "teacher", "--text": "austen", "--out": tmp_path / "run", "--nproc_per_node": 2,
               "--length": 32, "--batch-size": 4, "--micro-batch-size": 1, "--held-out": 20, "--validation-blocks": 2}
    for option, value in changes.items():
        if option in words:
            words[words.index(option) + 1] = str(value)
    at = words.index("--steps")
    words[at + 1 : at + 4] = ["2", "2", "2"]
    start = {"llamba": ["-m", "llamba_ref.cli"], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    done = subprocess.run([sys.executable, *start, *words[1:], "--prompt", "It is", "--device", "cpu"],
                          capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if "loss" in record] == list(range(1, 7))
    assert (tmp_path / "run/student/model.safetensors").is_file()
