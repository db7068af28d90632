"""What every measurement records: where and when it was made, and with which versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"  # a link into the package: the chapters plot what lies there


def device_name() -> str:
    """The GPU's name, or the processor's and how many threads torch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")
    return f"{model}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def save(name: str, command: str, **content) -> Path:
    """Write bench/results/NAME.json: the command that made it, device, versions, date, and the measurements."""
    versions = {package: importlib.metadata.version(package) for package in ("llamba_ref", "torch", "transformers")}
    record = {"command": command, "device": device_name(), "python": platform.python_version(), "versions": versions,
              "date": datetime.date.today().isoformat(), **content}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: bench/results/{name}.json")
    return path
