"""What the pages say: their length, links, options and files, and the examples in them."""

import re

import pytest
from running import ROOT

import alignment_kmnist
import train_imagenet
import train_kmnist
from wide.command_line import build_parser
from wide.grids.alignment_experiments import scored

pytestmark = pytest.mark.quick

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "outputs" / "README.md", ROOT / "results" / "README.md"]
)


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "lines"), [("README.md", 200), ("CONTRIBUTING.md", 60), ("CHANGELOG.md", 60)])
def test_lengths(name, lines):
    assert len(page(name).splitlines()) <= lines


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_examples_run(path):
    """Those of a page one after the other, as a reader would type them. The README's: test_other_networks.py."""
    names = {}
    for code in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)


def test_pages_with_examples_are_found():
    assert {path.name for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text(encoding="utf-8")} == {
        "alignment.md",
        "own_networks.md",
    }


def test_every_page_is_linked_from_the_readme():
    for path in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in page("README.md")


def test_every_option_is_in_the_readme():
    modules = (train_kmnist, train_imagenet)
    parsers = [build_parser("", module.SUBJECT, module.EXPERIMENTS) for module in modules]
    parsers.append(build_parser("", scored(train_kmnist.SUBJECT), alignment_kmnist.EXPERIMENTS))
    options = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    missing = {option for option in options - {"-h"} if not re.search(rf"{option}\b", page("README.md"))}
    assert not missing


def test_every_room_is_in_the_picture_of_the_code():
    picture = page("docs/code.md").split("```")[1]
    assert len(picture.strip().splitlines()) <= 20
    for path in (ROOT / "wide").glob("*/__init__.py"):
        assert f"wide/{path.parent.name}/" in picture
