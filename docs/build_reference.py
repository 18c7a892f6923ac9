"""Writes the reference of the public interface, a page of HTML, from its docstrings.

pip install -e ".[docs]"
python docs/build_reference.py site
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import mebp_triton


def build(directory: Path) -> Path:
    """Writes ``mebp_triton.html`` and the files that it needs into ``directory``. Returns the page's path."""
    for name in mebp_triton.__all__:  # the package imports them on first use; pdoc looks into its namespace
        vars(mebp_triton).setdefault(name, getattr(mebp_triton, name))
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("mebp_triton", "!mebp_triton.", output_directory=directory)
    return directory / "mebp_triton.html"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/build_reference.py DIRECTORY")
    print(build(Path(sys.argv[1])))
