"""The weeks of docs/course.yml as tables. The file names chapters and exercises; titles, times and numbers are looked
up in the notebooks, so that they cannot go stale."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from exercises import chapters, exercises_in
from way import about

PLANS = Path(__file__).resolve().parents[1] / "course.yml"


def spell(time: int) -> str:
    """80 is 1 h 20 min."""
    return f"{time} min" if time < 60 else f"{time // 60} h {time % 60:02} min"


def chapter_of(name: str) -> str:
    """The notebook of a name without its number: ssd is 07_ssd. Raises ValueError when there is none."""
    found = [chapter for chapter in chapters() if re.fullmatch(rf"\d+_{name}", chapter)]
    if not found:
        raise ValueError(f"docs/course.yml names a chapter {name}, which there is not")
    return found[0]


def table(weeks: list[dict]) -> str:
    """A plan: a table of all weeks, then what each lecture does."""
    rows = ["| week | | read before | time | problems |", "| --- | --- | --- | --- | --- |"]
    lectures, total = [], 0
    for number, week in enumerate(weeks, 1):
        read = [about(chapter_of(name)) for name in week["read"].split()]
        time = sum(chapter.minutes for chapter in read)
        total += time
        known = {one.label: one for chapter in read for one in exercises_in(chapter.name)}
        if unknown := set(week["problems"].split()) - known.keys():
            raise ValueError(f"week {number} sets {', '.join(sorted(unknown))}, which is in none of its chapters")
        problems = [known[label] for label in week["problems"].split()]
        links = "; ".join(f"{{doc}}`{chapter.title} </nbs/{chapter.name}>`" for chapter in read)
        refs = ", ".join(f"{{ref}}`{one.number}{'*' * bool(one.check)} <{one.label}>`" for one in problems)
        rows.append(f"| {number} | {week['title']} | {links} | {spell(time)} | {refs} |")
        lectures.append(f"**Week {number}, {week['title']}.** {week['board'].strip()} *Shown:* {week['show'].strip()} "
                        f"*Handed in:* {week['hand_in'].strip()}")
    rows.append(f"| | all weeks | | {spell(total)} | |")
    return "\n".join(rows) + "\n\n" + "\n\n".join(lectures) + "\n"


def plans() -> dict[str, str]:
    """Each plan of docs/course.yml, by name, as Markdown."""
    return {name: table(weeks) for name, weeks in yaml.safe_load(PLANS.read_text()).items()}
