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
    """The rooms that this one says it may import, and command_line where it stands above that."""
    (line,) = re.findall(r"^May import (.*)\.$", importlib.import_module(f"wide.{name}").__doc__, re.MULTILINE)
    return set(re.findall(r"\w+", line)) & (ROOMS | {"command_line"})


def test_rooms_lie_above_one_another():
    tuple(graphlib.TopologicalSorter({name: allowed(name) for name in ROOMS}).static_order())  # else a CycleError


def test_a_room_imports_those_below_it_and_what_is_for_all():
    for path in (ROOT / "wide").glob("*/*.py"):
        own, below = path.parent.name, allowed(path.parent.name)
        beside = {"wide", "wide.options"} | ({"wide.command_line"} if "command_line" in below else set())
        for module in imported(path):
            where = room(module)
            assert where in {None, own, *below}, (path, module)
            assert where or module in beside or module not in MODULES, (path, module)


def test_no_imports_run_in_a_circle():
    tuple(graphlib.TopologicalSorter({name(path): imported(path) for path in FILES}).static_order())


def test_no_function_takes_more_than_five_arguments():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len(set(names) - {"self", "cls"}) <= 5, (path, node.name)


def test_only_the_command_line_knows_argparse():
    assert [path.name for path in FILES if "argparse" in imported(path)] == ["command_line.py"]
