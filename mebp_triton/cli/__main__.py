"""Runs ``python -m mebp_triton.cli`` as ``mebp``."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
