"""Put the saved measurements into README.md: tables between markers, figures in docs/images.

    python -m bench.report            write
    python -m bench.report --check    exit with 1 when README.md does not show what bench/results holds
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from llamba_ref.conventions import load_result

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
COLORS = {
    "stages 1+2+3": "C0",
    "stages 2+3": "C1",
    "stage 3 only": "C2",
    "stage 3 only, more time": "C2",
    "from scratch, more time": "C3",
}


def stages_table() -> str:
    """The ablation and the baselines of bench.mohawk_stages."""
    saved = load_result("mohawk_stages")
    lines = [
        "| student | tokens | CPU seconds | held-out perplexity | over the teacher's |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in saved["rows"]:
        found = f"{row['perplexity']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        lines.append(
            f"| {row['name']} | {row['tokens'] / 1e6:.2f} M | {row['cpu_seconds']:.0f} | {found} | {row['ratio']:.3f} |"
        )
    lines.append(f"| *teacher* | | | {saved['teacher_perplexity']:.2f} | 1 |")
    return "\n".join([*lines, "", f"Means of {len(saved['seeds'])} seeds (lowest to highest). {made_by(saved)}"])


def memory_table() -> str:
    """Peak memory of a step of stage 1."""
    saved = load_result("stage1_memory")
    depths = sorted({row["layers"] for row in saved["rows"]})
    lines = ["| layers | " + " | ".join(map(str, depths)) + " |", "| --- |" + " --- |" * len(depths)]
    for way in ("layer by layer", "all layers at once"):
        sizes = {row["layers"]: row["step_mib"] for row in saved["rows"] if row["way"] == way}
        lines.append(f"| {way} | " + " | ".join(f"{sizes[depth]:.0f} MiB" for depth in depths) + " |")
    return "\n".join([*lines, "", made_by(saved)])


def teacher_table() -> str:
    """The real teacher: perplexity through the stages of a hybrid."""
    saved = load_result("smollm2_hybrid")
    lines = ["| | held-out perplexity | over the teacher's | same next token |", "| --- | --- | --- | --- |",
             f"| teacher (SmolLM2-135M-Instruct) | {saved['evaluations'][0]['teacher_perplexity']:.2f} | 1 | |"]
    for row in saved["evaluations"]:
        ratio = row["perplexity"] / row["teacher_perplexity"]
        lines.append(f"| {row['evaluation']} | {row['perplexity']:.2f} | {ratio:.3f} | {row['agreement']:.1%} |")
    return "\n".join([*lines, "", made_by(saved)])


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


def made_by(saved: dict) -> str:
    """Where a measurement comes from."""
    return f"*`{saved['command']}` on {saved['device']}, {saved['date']}.*"


TABLES = {"stages": stages_table, "memory": memory_table, "teacher": teacher_table, "speed": speed_table}


def filled(text: str) -> str:
    """README.md with every table as the saved measurements have it."""
    for name, table in TABLES.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda m: m[1] + table() + m[2], text, flags=re.DOTALL
        )
    return text


def draw_stages() -> None:
    """Held-out perplexity over the teacher's against tokens, for every way to train the student: all of it, and the
    last stretch."""
    saved = load_result("mohawk_stages")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis in axes:
        for row in saved["rows"]:
            tokens, ratio = zip(
                *((point["tokens"] / 1e6, point["perplexity"] / saved["teacher_perplexity"]) for point in row["curve"])
            )
            dotted = row["name"] == "stage 3 only, more time"
            axis.plot(tokens, ratio, color=COLORS[row["name"]], ls=":" if dotted else "-", label=row["name"])
        axis.axhline(1, color="k", ls="--", lw=1, label="teacher")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(xlabel="tokens seen, millions")
    axes[0].set(ylabel="held-out perplexity,\nmultiple of the teacher's", yscale="log")
    axes[0].set_yticks([1, 2, 5, 10, 20], labels=["1", "2", "5", "10", "20"])
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].set(ylim=(0.98, 1.4), title="the last stretch")
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "stages.png", dpi=110)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    if "--check" in sys.argv[1:]:
        sys.exit(
            0 if filled(text) == text else "README.md does not show the saved measurements: run python -m bench.report"
        )
    readme.write_text(filled(text))
    draw_stages()
    print("written: README.md, docs/images/stages.png")


if __name__ == "__main__":
    main()
