"""The wheel holds every source file of the package and nothing else; an unlisted folder would be left out silently."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mebp_triton

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"mebp_triton": "mebp_triton", "kernels": "mebp_triton/kernels", "autotune": "mebp_triton/autotune"}


def expected():
    """The installed paths of all source files and data files of the tree."""
    found = {"mebp_triton/py.typed"}
    for folder, installed in MAPPED.items():
        for path in (ROOT / folder).rglob("*.py"):
            found.add(f"{installed}/{path.relative_to(ROOT / folder)}")
    found |= {f"mebp_triton/kernels/tables/{path.name}" for path in (ROOT / "kernels" / "tables").glob("*.json")}
    found |= {f"mebp_triton/kernels/native/{path.name}" for path in (ROOT / "kernels" / "native").iterdir()}
    return found | {"mebp_triton/kernels/_native.abi3.so"}


def build(tree, out, **environment):
    """The wheel of a copy of the tree, made in the folder ``tree``."""
    if importlib.util.find_spec("build") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("build and setuptools are not installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in (*MAPPED, "tests", "bench"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "_native*"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == expected()
    assert len(inside) > 40


def test_without_a_compiler_the_package_is_built_all_the_same(tmp_path):
    (tree := tmp_path / "tree").mkdir()
    built = build(tree, tmp_path, CC="/nowhere/cc")
    inside = {name for name in built.namelist() if ".dist-info/" not in name}
    assert inside == expected() - {"mebp_triton/kernels/_native.abi3.so"}


def test_no_top_level_package_but_ours(wheel):
    """A top-level ``kernels`` would overwrite Hugging Face's package, which transformers imports."""
    tops = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert tops == {"mebp_triton"}
    listed = [name for name in wheel.namelist() if name.endswith("top_level.txt")]
    assert [wheel.read(name).decode().split() for name in listed] in ([], [["mebp_triton"]])


def test_the_files_are_the_trees(wheel):
    for folder, installed in MAPPED.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert wheel.read(f"{installed}/{path.relative_to(ROOT / folder)}") == path.read_bytes()


def test_metadata(wheel):
    names = wheel.namelist()
    metadata = wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert f"\nVersion: {mebp_triton.__version__}\n" in metadata and "\nName: mebp-triton\n" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("LICENSE") for name in names)
    entries = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert re.search(r"^mebp = mebp_triton\.cli\.main:main$", entries, re.MULTILINE)


def test_the_installed_wheel_works_from_anywhere(wheel, tmp_path):
    """Unpacked, without the repository on the path: the mapped packages are found, and the command answers."""
    site = tmp_path / "site"
    wheel.extractall(site)
    code = (
        "import sys; sys.path[:] = [sys.argv[1]] + [p for p in sys.path if p]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "from importlib.util import find_spec\n"
        "names = ('cli.training_run', 'kernels.layout', 'autotune.tune')\n"
        "print(*(find_spec(f'mebp_triton.{name}').origin for name in names))\n"
        "from mebp_triton.cli.main import main\n"
        "main(['--version'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    places, version = done.stdout.splitlines()
    assert all(place.startswith(str(site)) for place in places.split())
    assert version == f"mebp {mebp_triton.__version__}"


def test_importing_the_package_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, mebp_triton; print([m for m in ('torch', 'transformers', 'triton', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in mebp_triton.__all__:
        assert getattr(mebp_triton, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mebp_triton.nothing
