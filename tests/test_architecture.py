"""Documents name files that exist; docs/architecture.md also classes and functions, and the rooms in their order."""

import ast
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = runpy.run_path(str(ROOT / "tests" / "test_floors.py"))["FLOORS"]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
TOP = "autotune|bench|docs|kernels|mebp_triton|tests"
# Paths in backticks: `kernels/`, `store/pages.py`, `store/pages.py::MappedPages`.
NAMED = sorted(set(re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)(?:::([\w.]+))?`", PAGE)))


def find(path):
    """The path on disk, which the page gives from the root or from mebp_triton/; None where there is none."""
    return next((place for place in (ROOT / path, ROOT / "mebp_triton" / path) if place.exists()), None)


def names_in(path):
    """Every class, function and method that a file defines, methods as ``Class.method``."""
    names = set()

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(path.read_text()), "")
    return names


def test_every_named_file_class_and_function_exists():
    assert len(NAMED) > 50
    missing = []
    for path, name in NAMED:
        if path.endswith("NAME.py"):  # stands for a file to be written: its folder must be there
            path = path.removesuffix("NAME.py")
        place = find(path)
        if place is None or (name and name not in names_in(place)):
            missing.append((path, name))
    assert not missing


def test_every_document_names_paths_that_exist():
    missing = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(rf"`((?:{TOP})/[\w./-]*)[:`]", page.read_text()):
            if "NAME" not in path and not (ROOT / path).exists():
                missing.append((page.name, path))
    assert not missing


def test_the_picture_shows_the_rooms_in_their_order():
    picture = PAGE.split("```")[1]
    assert re.findall(r"^  (\w+)  ", picture, re.M) == [*reversed(FLOORS)]


def test_the_readme_lists_the_rooms_in_the_same_order():
    tree = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]
    assert [name for name in re.findall(r"^ *(\w+)/ ", tree, re.M) if name in FLOORS] == [*reversed(FLOORS)]


def test_every_room_has_its_row():
    rows = re.findall(r"^\| `(\w+)/` \|", PAGE, re.M)
    assert rows == [*FLOORS]
