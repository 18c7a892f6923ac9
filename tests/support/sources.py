"""The package's own sources, each read once: what the tests of the house rules look at.

A rule is a generator function. Given a file's path and its syntax tree, it yields the line and the text of each breach.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"kernels": "mebp_triton.kernels", "autotune": "mebp_triton.autotune", "mebp_triton": "mebp_triton"}
SOURCES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TREES = {path: ast.parse((ROOT / path).read_text()) for path in SOURCES}

Rule = Callable[[Path, ast.Module], Iterator[tuple[int, str]]]


def breaches(rule: Rule) -> list[str]:
    """Every breach of ``rule`` in the package, as ``FILE:LINE TEXT``."""
    return [f"{path}:{line} {text}" for path in SOURCES for line, text in rule(path, TREES[path])]


def check(rule: Rule) -> None:
    """Fails with all breaches of ``rule`` at once."""
    found = breaches(rule)
    assert not found, "\n" + "\n".join(found)


def module_name(path: Path) -> str:
    """The name that a file is imported by: kernels/ops.py is mebp_triton.kernels.ops."""
    parts = [FOLDERS[path.parts[0]], *path.with_suffix("").parts[1:]]
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the absolute name of everything that a file imports, anywhere in it."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            yield node.lineno, source
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
