"""The reference of the public interface, made from its docstrings: a page of HTML.

pip install -e ".[docs]"
python docs/build_reference.py site
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import mebp_triton


def build(directory: Path) -> Path:
    """Writes ``mebp_triton.html`` and what it needs into ``directory``."""
    for name in mebp_triton.__all__:
        vars(mebp_triton).setdefault(name, getattr(mebp_triton, name))  # they are imported on first use
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("mebp_triton", "!mebp_triton.", output_directory=directory)
    return directory / "mebp_triton.html"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/build_reference.py DIRECTORY")
    print(build(Path(sys.argv[1])))
