"""The names by which users choose, which the command reads before anything heavy is imported."""

import subprocess
import sys
from typing import get_args

from mebp_triton.blocks import options


def test_reading_them_imports_no_library():
    code = "import sys, mebp_triton.blocks.options; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tuples_hold_what_the_types_allow():
    assert get_args(options.Granularity) == options.GRANULARITIES == ("full", "selective")
    assert get_args(options.Mode) == options.MODES == ("full", "identity", "exact", "freeze")
    assert get_args(options.Schedule) == options.SCHEDULES == ("cyclic", "strided", "random", "importance")
    assert get_args(options.UnselectedUpdate) == options.UNSELECTED_UPDATES == ("momentum", "none")
