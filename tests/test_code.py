"""The shape of the code: which way imports run, who knows argparse, how much a function is handed."""

import ast

import pytest
from running import ROOT

SCRIPTS = [path for path in ROOT.glob("*.py") if path.name != "align_rules.py"]
FILES = sorted([*SCRIPTS, *(ROOT / "wide").rglob("*.py")])
by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(path, at_import_only=False):
    """The modules that a file imports; with `at_import_only`, without those inside functions and for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(tree.body if at_import_only else ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


@by_name
def test_no_function_takes_more_than_five_arguments(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert len([name for name in names if name not in ("self", "cls")]) <= 5, node.name


@by_name
def test_only_the_command_line_knows_argparse(path):
    assert ("argparse" in imported(path)) == (path.name == "command_line.py")


@by_name
def test_imports_run_one_way(path):
    scripts = {script.stem for script in SCRIPTS}
    assert path in SCRIPTS or not scripts & imported(path)


def test_what_a_script_declares_needs_no_loop():
    """From experiments.py no import at its top leads to the loop, nor to what carries a grid out."""
    reached, left = set(), ["wide.grids.experiments"]
    while left:
        name = left.pop()
        if name in reached:
            continue
        reached.add(name)
        modules = imported(ROOT / f"{name.replace('.', '/')}.py", at_import_only=True)
        left += [module for module in modules if module.startswith("wide.")]
    assert not reached & {"wide.training.loop", "wide.grids.grid", "wide.grids.study", "wide.reports.figures"}
    assert "wide.reports.report" in reached
