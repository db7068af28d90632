"""Put the saved measurements into README.md: tables between markers, and figures of chapters in docs/images.

    python -m bench.report            write
    python -m bench.report --check    exit with 1 when README.md does not show what bench/results holds
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from llamba_ref.conventions import load_result
from llamba_ref.throughput import StepCost

ROOT = Path(__file__).parent.parent
FIGURES = {ROOT / "docs" / "images" / "stages.png": "fig-mohawk-budgets",
           ROOT / "docs" / "images" / "throughput.png": "fig-throughput-derived"}
SHOWN = (  # of the rows of bench.students; chapter 16 has them all
    "silence", "running mean", "window of 40 + 4 tokens", "published start", "start from the teacher, keys turn",
    "published 1+2+3", "standing keys 1+2+3", "turning keys 1+2+3", "turning keys 3",
    "turning keys, language modelling", "window 3", "teacher, language modelling", "from scratch",
    "published 1+2+3, full", "turning keys 1+2+3, full", "window 3, full", "teacher, language modelling, full",
)


def stages_table() -> str:
    """The rows of bench.students that tell most."""
    saved = load_result("students")
    lines = ["| student | tokens | held-out perplexity over the teacher's | same next token | KL |",
             "| --- | --- | --- | --- | --- |"]
    rows = {row["name"]: row for row in saved["rows"]}
    for row in (rows[name] for name in SHOWN):
        spread = f" ({row['lowest']:.3f} to {row['highest']:.3f})" if row["seeds"] > 1 else ""
        tokens = f"{row['tokens'] / 1e6:.2f} M" if row["tokens"] else "none"
        figures = f"{row['ratio']:.3f}{spread} | {row['agreement']:.1%} | {row['kl']:.3f}"
        lines.append(f"| {row['name']} | {tokens} | {figures} |")
    seeds = f"Means of {len(saved['seeds'])} seeds (lowest to highest)." if len(saved["seeds"]) > 1 else "One seed."
    return "\n".join([*lines, "", f"{seeds} {made_by(saved)}"])


def memory_table() -> str:
    """Peak memory of a step of stage 1."""
    saved = load_result("stage1_memory")
    depths = sorted({row["layers"] for row in saved["rows"]})
    lines = ["| layers | " + " | ".join(map(str, depths)) + " |", "| --- |" + " --- |" * len(depths)]
    for way in ("layer by layer", "all layers at once"):
        sizes = {row["layers"]: row["step_mib"] for row in saved["rows"] if row["way"] == way}
        lines.append(f"| {way} | " + " | ".join(f"{sizes[depth]:.0f} MiB" for depth in depths) + " |")
    return "\n".join([*lines, "", made_by(saved)])


def compared_table(title: str, saved: dict, before: Sequence[str] = ()) -> str:
    """A row for each model that was compared with the teacher at two lengths, after some others."""
    short, long = saved["rows"][0]["ratios"]
    lines = [f"| {title} | over the teacher's perplexity, blocks of {short} | blocks of {long} | same next token |",
             "| --- | --- | --- | --- |", *before]
    for row in saved["rows"]:
        ratios = " | ".join(f"{row['ratios'][length]:.3f}" for length in (short, long))
        lines.append(f"| {row['name']} | {ratios} | {row['agreement'][short]:.1%} |")
    return "\n".join([*lines, "", made_by(saved)])


def teacher_table() -> str:
    """The real teacher: a hybrid through its stages, and windows in the same layers."""
    saved = load_result("smollm2_hybrid")
    stages = [f"| student, {row['evaluation']} | {row['perplexity'] / row['teacher_perplexity']:.3f} | | "
              f"{row['agreement']:.1%} |" for row in saved["evaluations"][:-1]]
    return compared_table("six of 30 layers", saved, stages)


def whole_table() -> str:
    """The real teacher: all layers, as far as a CPU comes."""
    saved = load_result("smollm2_all")
    return compared_table(f"all 30 layers, {saved['minutes']:.0f} minutes", saved)


def prediction_table() -> str:
    """What the two large distillations would take on a GPU."""
    saved = load_result("predict")
    cards = [f"{row['card']}, {row['memory'] / 1e9:.0f} GB" for row in saved["predictions"][0]["rows"]]
    lines = ["| predicted | tokens | " + " | ".join(cards) + " |", "| --- | --- |" + " --- |" * len(cards)]
    for one in saved["predictions"]:
        cells = ["{} blocks at a time, {:,.0f} to {:,.0f} hours".format(row["blocks"], *row["hours"])
                 if row["blocks"] else "does not fit" for row in one["rows"]]
        lines.append(f"| {one['teacher']} | {one['tokens'] / 1e6:,.0f} M | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"*`{saved['command']}`, {saved['date']}; nothing of this has run on a GPU.*"])


def speed_table() -> str:
    """How many times the time of `ssd` other chunked implementations take on a CPU."""
    saved = load_result("ssd_cpu")
    names = list(saved["results"][0]["ratios"]["forward"]["ratios"])
    lines = ["| time over `ssd`'s | threads | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(names)]
    kinds = {1: "one group (Mamba-2)", saved["shape"]["heads"]: "a group for each head (Llamba)"}
    for one in saved["results"]:
        for what, found in one["ratios"].items():
            lines.append(
                f"| {kinds[one['groups']]}, {what} | {one['threads']} | "
                + " | ".join(f"{found['ratios'][name]:.2f}" for name in names)
                + " |"
            )
    return "\n".join([*lines, "", f"*`{saved['command']}` on {saved['processor']}, {saved['date']}.*"])


def throughput_table() -> str:
    """Tokens a second of each kind of model, at its best."""
    saved = load_result("throughput")
    lines = ["| tokens a second | transformers' Llama, best cache | our Llama | Llamba | hybrid | bytes moved, Llama : "
             "Llamba |", "| --- |" + " --- |" * 5]
    costs = {name: StepCost(**cost) for name, cost in saved["costs"].items()}
    for batch, context in dict.fromkeys((row["batch"], row["context"]) for row in saved["writing"]):
        best: dict[str, float] = {}
        for row in saved["writing"]:
            if (row["batch"], row["context"]) == (batch, context):
                name = row["model"].split(",")[0]
                best[name] = max(best.get(name, 0), row["tokens_per_second"])
        moved = costs["Llama"].moved(batch, context) / costs["Llamba"].moved(batch, context)
        lines.append(f"| batch {batch}, context {context:,} | " + " | ".join(f"{speed:.0f}" for speed in best.values())
                     + f" | {moved:.2f} |")
    return "\n".join([*lines, "", f"Each with or without torch.compile, whichever is faster. {made_by(saved)}"])


def edge_table() -> str:
    """What a student is worth as a file."""
    saved = load_result("edge")
    lines = ["| model, runtime, bits | MB | KL to the model | perplexity over its | tokens a second over PyTorch's |",
             "| --- |" + " --- |" * 4]
    runtimes = {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}
    for row in saved["rows"]:
        name = f"{row['model']}, {runtimes[row['format']]}, {row['bits']}"
        lines.append(f"| {name} | {row['bytes'] / 1e6:.2f} | {max(row['kl'], 0):.1e} | {row['ratio']:.4f} "
                     f"| {row['faster']:.1f} |")
    for one in saved["memory"]:
        first, last = one["rows"][0], one["rows"][-1]
        name = f"{one['model'].capitalize()}, {runtimes[one['format']]}, {one['bits']} bits"
        lines.append(f"\n{name}: {first['bytes'] / 1e6:.1f} MB of memory after {first['tokens']:,} tokens, "
                     f"{last['bytes'] / 1e6:.1f} MB after {last['tokens']:,}.")
    alone = load_result("runner")
    last = alone["rows"][-1]
    runner = (f"The C++ program, ExecuTorch, 8 bits: {last['tokens_per_second']:,.0f} tokens a second, in "
              f"{last['peak_mib']:.0f} MiB after {last['tokens']:,} tokens. {made_by(alone)}")
    return "\n".join([*lines, "", made_by(saved), "", runner])


def tasks_table() -> str:
    """Scores of lm-eval, a row for each model."""
    saved = load_result("tasks")
    cells: dict[str, list[str]] = {}
    for score in saved["scores"]:
        error = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
        cells.setdefault(score["model"], []).append(f"{score['value']:.3f}{error}")
    heads = dict.fromkeys(f"`{score['task']}` {score['metric'].replace('_', ' ')}" for score in saved["scores"])
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    lines += [f"| {model} | " + " | ".join(row) + " |" for model, row in cells.items()]
    return "\n".join([*lines, "", f"Of four choices, guessing finds 0.250. {made_by(saved)}"])


def made_by(saved: dict) -> str:
    """Where a measurement comes from."""
    return f"*`{saved['command']}` on {saved['device']}, {saved['date']}.*"


TABLES = {"stages": stages_table, "memory": memory_table, "teacher": teacher_table, "whole": whole_table,
          "throughput": throughput_table, "tasks": tasks_table, "edge": edge_table, "predict": prediction_table,
          "speed": speed_table}


def filled(text: str) -> str:
    """README.md with every table as the saved measurements have it."""
    for name, table in TABLES.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda m: m[1] + table() + m[2], text, flags=re.DOTALL
        )
    return text


def chapter_figure(label: str) -> bytes:
    """The picture that a chapter's cell of this label has saved."""
    for chapter in (ROOT / "nbs").glob("*.ipynb"):
        for cell in json.loads(chapter.read_text())["cells"]:
            if f"#| label: {label}\n" in cell["source"]:
                return base64.b64decode(next(out["data"]["image/png"] for out in cell["outputs"] if "data" in out))
    raise SystemExit(f"no chapter has a figure {label}")


def main() -> None:
    readme = ROOT / "README.md"
    text, figures = readme.read_text(), {path: chapter_figure(label) for path, label in FIGURES.items()}
    if "--check" in sys.argv[1:]:
        shown = filled(text) == text and all(path.read_bytes() == figure for path, figure in figures.items())
        sys.exit(0 if shown else "README.md does not show the saved measurements: run python -m bench.report")
    readme.write_text(filled(text))
    for path, figure in figures.items():
        path.write_bytes(figure)
    print("written: README.md, " + ", ".join(str(path.relative_to(ROOT)) for path in figures))


if __name__ == "__main__":
    main()
