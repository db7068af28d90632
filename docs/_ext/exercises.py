"""The exercises of the notebooks: their numbers, their solutions, the code that these need, and the checks that the
package carries.

    python docs/_ext/exercises.py      # writes llamba_ref/assets/checks.json, as `make export` does

The check of an exercise is a cell of its own below the solution. It begins with `#| check: ex-label` and holds one
function whose parameters are what the exercise asks for; it may use whatever the chapter has imported or defined."""

from __future__ import annotations

import ast
import builtins
import json
import re
import symtable
from dataclasses import dataclass, field
from functools import cache

from way import NOTEBOOKS, ROOT

CHECKS = ROOT / "llamba_ref" / "assets" / "checks.json"
BLOCK = re.compile(r"^:::\{(exercise|solution)\}(.*?)\n(.*?)^:::$", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MAGIC = re.compile(r"^( *)[%!].*$", re.MULTILINE)


COMMON = {"math": "import math", "torch": "import torch",
          "relative_error": "from llamba_ref.conventions import relative_error"}  # what any check may use

MODULES = {"torch", "plt", "F", "nn", "math", "np", "os", "shutil", "warnings", "sys", *dir(builtins)}  # no values
CHANGING = r"train|distill|start_from|save|write|torch\.manual_seed"  # functions that change an argument, or a file

READING = r"\.(read_\w+|item|tolist|exists|stat)$"  # methods that change nothing


@dataclass
class Exercise:
    """One exercise, where it stands, and all that belongs to it."""

    chapter: str  # 07_ssd
    number: str  # 07.4: the fourth one of chapter 7
    label: str  # ex-ssd-packed
    name: str  # what stands behind :::{exercise}
    text: str
    place: int = 0  # the cell of its solution
    solution: str = ""
    cells: list[str] = field(default_factory=list)  # code cells of the solution
    check: str = ""  # the function that holds an answer against what is right

    @property
    def code(self) -> list[str]:
        """The solution's code: what stands in its text, then its cells."""
        return [*FENCE.findall(self.solution), *self.cells]

    @property
    def title(self) -> str:
        """Its name, or its first words."""
        text = self.name or re.sub(r"^\(.*?\) ", "", self.text)
        text = re.sub(r"\{eq\}`.*?`", "an equation", re.sub(r"\{prf:ref\}`.*?`", "a theorem", text))
        text = " ".join(re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text).replace("`", "").replace("*", "").split())
        first = re.split(r"(?<=[.?]) (?=[A-Z($])", text)[0]
        return first if len(first) < 100 else first[:97].rsplit(" ", 1)[0] + " ..."

    @property
    def wants(self) -> list[str]:
        """The names that an answer has to define."""
        return [argument.arg for argument in ast.parse(self.check).body[0].args.args] if self.check else []


def chapters() -> list[str]:
    """The notebooks, in reading order."""
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


@cache
def cells_of(chapter: str) -> list[tuple[str, str]]:
    """Kind and source of a notebook's cells."""
    cells = json.loads((NOTEBOOKS / f"{chapter}.ipynb").read_text())["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


def module_of(chapter: str) -> str | None:
    """The module that a chapter writes, if it writes one."""
    return next((m[1] for _, source in cells_of(chapter) if (m := re.match(r"#\| default_exp (\S+)", source))), None)


def exercises_in(chapter: str) -> list[Exercise]:
    """A chapter's exercises, in order."""
    found, solved = {}, None
    for place, (kind, source) in enumerate(cells_of(chapter)):
        if kind == "code":
            if wanted := re.match(r"#\| check: (\S+)\n", source):
                found[wanted[1]].check = source[wanted.end() :].strip() + "\n"
            elif solved and not source.startswith("#| hide"):
                found[solved].cells.append(source)
            continue
        solved = None
        for what, argument, body in BLOCK.findall(source):
            text = re.sub(r"^:[\w-]+:.*\n", "", body, flags=re.MULTILINE).strip()
            if what == "exercise":
                label = re.search(r"^:label: (\S+)", body, re.MULTILINE)[1]
                found[label] = Exercise(chapter, f"{chapter[:2]}.{len(found) + 1}", label, argument.strip(), text)
            else:
                solved = argument.strip()
                found[solved].solution, found[solved].place = text, place
    return [*found.values()]


# What code needs


def reads(node: ast.stmt) -> set[str]:
    """The names of the module that a statement looks up."""
    if isinstance(node, (ast.For, ast.With)):
        heads = [node.iter] if isinstance(node, ast.For) else [item.context_expr for item in node.items]
        begins = [ast.copy_location(ast.Expr(head), node) for head in heads]
        targets = [node.target] if isinstance(node, ast.For) else [item.optional_vars for item in node.items]
        bound = {n.id for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name)}
        return set().union(*map(reads, begins)) | (free(node.body) - bound)
    top = symtable.symtable(ast.unparse(node), "statement", "exec")
    found, inner = {s.get_name() for s in top.get_symbols() if s.is_referenced()}, top.get_children()
    while inner:
        table = inner.pop()
        inner += table.get_children()
        found |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and s.is_global()}
    return found


def base(node: ast.AST) -> str:
    """The name that `a.b[c].d` or `(a / b).c` begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call, ast.BinOp)):
        node = node.func if isinstance(node, ast.Call) else node.left if isinstance(node, ast.BinOp) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def binds(node: ast.stmt) -> set[str]:
    """The names that a statement gives a value, at the level of the module."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    inner = {m for n in ast.walk(node) if isinstance(n, ast.comprehension) for m in ast.walk(n.target)}
    stored = [n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    names = {n.id for n in stored if n not in inner}
    for n in ast.walk(node):
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in n.names}
    return names


def changes(node: ast.stmt) -> set[str]:
    """The names whose values a statement may change in place: `a.b = 1`, `a[0] = 1`, `a.sort()`, `train(a)`."""
    found = {base(n) for n in ast.walk(node)
             if isinstance(n, (ast.Attribute, ast.Subscript)) and isinstance(n.ctx, ast.Store)}
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        function = ast.unparse(node.value.func)
        if base(node.value) not in MODULES and not re.search(READING, function):
            found.add(base(node.value))
        if re.match(CHANGING, function):
            found |= {base(part) for part in node.value.args}
            found |= {"torch"} if function == "torch.manual_seed" else set()
    return found - {""}


def statements(source: str) -> list[ast.stmt]:
    return ast.parse(MAGIC.sub(r"\1pass", source)).body


def free(nodes: list[ast.stmt]) -> set[str]:
    """The names that statements look up and do not bind before."""
    wanted = set()
    for node in reversed(nodes):
        wanted = (wanted - binds(node)) | reads(node)
    return wanted


def changed_by(node: ast.stmt, acts: dict[str, set[str]]) -> set[str]:
    """The names whose values a statement may change in place, by itself or through functions that it calls or hands
    on; `acts` from `effects`."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return changes(node)
    return changes(node).union(*(acts.get(part.id, set()) for part in ast.walk(node) if isinstance(part, ast.Name)))


def effects(chapter: str) -> dict[str, set[str]]:
    """What a chapter's own functions change in place outside of themselves, such as a table that one fills."""
    found = {}
    for node in (node for kind, source in cells_of(chapter) if kind == "code" for node in statements(source)):
        if isinstance(node, ast.FunctionDef):
            inside = [part for part in ast.walk(node) if isinstance(part, ast.stmt) and part is not node]
            own = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}.union(*map(binds, inside))
            found[node.name] = set().union(*map(changes, inside)) - own
    return found


def needed(chapter: str, place: int, code: str, only_names: bool = False) -> list[str]:
    """The statements of a chapter's cells before one place that some code needs; what the chapter exports comes from
    the package. `only_names`: leave out those that change a value in place."""
    wanted, kept, module, acts = free(statements(code)), [], module_of(chapter), effects(chapter)
    for kind, source in reversed(cells_of(chapter)[:place]):
        if kind != "code" or source.startswith(("#| eval: false", "#| check")):
            continue
        for node in reversed(statements(source)):
            bound = binds(node) & wanted
            if bound and isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in bound]
                kept.append(ast.unparse(type(node)(**{**vars(node), "names": names})))
                wanted -= bound
            elif bound and source.startswith("#| export"):
                kept.append(f"from llamba_ref.{module} import {', '.join(sorted(bound))}")
                wanted -= bound
            elif bound or not (only_names or source.startswith("#| export")) and changed_by(node, acts) & wanted:
                wanted = (wanted - binds(node)) | reads(node)
                kept.append(ast.unparse(node))
    return kept[::-1]


# Checks for the package


def standalone(exercise: Exercise) -> str:
    """A check with what it needs of its chapter."""
    found = needed(exercise.chapter, exercise.place, exercise.check, only_names=True)
    found += [line for name, line in COMMON.items() if name in free(statements(exercise.check)) and line not in found]
    code = "\n".join([*dict.fromkeys(found), "", exercise.check])
    if unknown := free(statements(code)) - {*dir(builtins), "annotations"}:
        raise ValueError(f"{exercise.chapter} does not know what the check of {exercise.label} uses: {unknown}")
    return code


def packaged() -> str:
    """The text of checks.json: every exercise, in order, and the check of those that have one."""
    rows = [
        {"number": one.number, "label": one.label, "title": one.title, "wants": one.wants,
         "check": standalone(one) if one.check else None}
        for chapter in chapters() for one in exercises_in(chapter)
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    CHECKS.write_text(packaged())
