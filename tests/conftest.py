"""Shared by all tests. The root is taken off ``sys.path``: from there ``kernels`` would shadow another package."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
