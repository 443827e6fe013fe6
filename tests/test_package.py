"""align_rules as pip installs it: built from the tree, installed into a fresh environment, and used from elsewhere."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from running import ROOT


def run(*command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the tree."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("align_rules.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, source)
    return next(wheels.glob("*.whl"))


def test_the_wheel_holds_the_rules_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert [name for name in names if ".dist-info/" not in name] == ["align_rules.py"]
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    required = [line.split()[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [name.partition(">")[0].partition("<")[0] for name in required] == ["torch"]


def test_the_readmes_example_runs_on_the_installed_rules(wheel, kmnist, tmp_path):
    """torch comes from this environment (a path file in the fresh one): installing it anew takes minutes."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))

    scripts = tmp_path / "scripts"  # what the example takes from the repository, without its align_rules.py
    scripts.mkdir()
    (scripts / "wide").symlink_to(ROOT / "wide")
    shutil.copy(ROOT / "setup_kmnist.py", scripts)
    section = (ROOT / "README.md").read_text().partition("## On your own network")[2]
    code = section.partition("```python\n")[2].partition("```")[0].replace('KMNIST("data")', f"KMNIST({str(kmnist)!r})")
    code += "\nprint(align_rules.__file__)\n"
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    shown = run(python, "-c", code, cwd=scripts, env=plain)
    assert Path(shown.splitlines()[-1]).parent == site
