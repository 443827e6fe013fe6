"""align_rules.py as a file: it imports torch alone, so that it can be copied into another project."""

import ast
import pathlib
import sys

import align_rules


def test_imports_torch_and_the_standard_library_only():
    nodes = list(ast.walk(ast.parse(pathlib.Path(align_rules.__file__).read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= {"torch", *sys.stdlib_module_names}
