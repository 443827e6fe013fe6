"""The shape of the code: which way imports run, who knows argparse, how much a function is handed."""

import ast
import graphlib
import importlib
import re

import pytest
from running import ROOT

pytestmark = pytest.mark.quick

SCRIPTS = [path for path in ROOT.glob("*.py") if path.name != "align_rules.py"]
FILES = sorted([*SCRIPTS, *(ROOT / "wide").rglob("*.py")])
ROOMS = {path.parent.name for path in (ROOT / "wide").glob("*/__init__.py")}
by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name(path) for path in FILES}


def imported(path):
    """The modules that a file imports, also inside of functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (modules & MODULES) or {node.module}
    return found


def room(module):
    """The room of a module of wide/, or none: what stands beside the rooms."""
    return module.split(".")[1] if module.startswith("wide.") and module.split(".")[1] in ROOMS else None


def allowed(name):
    """The rooms that this one says it may import."""
    (line,) = re.findall(r"^May import (.*)\.$", importlib.import_module(f"wide.{name}").__doc__, re.MULTILINE)
    return set(re.findall(r"\w+", line)) & ROOMS


def test_rooms_lie_above_one_another():
    tuple(graphlib.TopologicalSorter({name: allowed(name) for name in ROOMS}).static_order())  # else a CycleError


@pytest.mark.parametrize("path", sorted((ROOT / "wide").glob("*/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_those_below_it_and_what_is_for_all(path):
    own = path.parent.name
    for module in imported(path):
        if module.partition(".")[0] == "wide":
            assert room(module) in {own, *allowed(own)} if room(module) else module in ("wide", "wide.options"), module
        assert module not in {script.stem for script in SCRIPTS}


def test_no_imports_run_in_a_circle():
    tuple(graphlib.TopologicalSorter({name(path): imported(path) for path in FILES}).static_order())


@by_name
def test_no_function_takes_more_than_five_arguments(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert len([name for name in names if name not in ("self", "cls")]) <= 5, node.name


@by_name
def test_only_the_command_line_knows_argparse(path):
    assert ("argparse" in imported(path)) == (path.name == "command_line.py")
