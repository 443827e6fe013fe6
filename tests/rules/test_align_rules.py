"""align_rules.py as a file: it imports torch alone and can be copied into another project."""

import ast
import os
import pathlib
import shutil
import subprocess
import sys

import align_rules


def test_imports_torch_and_the_standard_library_only(tmp_path):
    source = pathlib.Path(align_rules.__file__)
    nodes = list(ast.walk(ast.parse(source.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= {"torch", *sys.stdlib_module_names}

    shutil.copy(source, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", "import align_rules; print(align_rules.__file__)"]
    alone = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert pathlib.Path(alone.stdout.strip()) == tmp_path / source.name, alone.stderr
