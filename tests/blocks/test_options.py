"""The names by which users choose, which the command reads before anything heavy is imported."""

import subprocess
import sys

from mebp_triton.blocks import options


def test_reading_them_imports_no_library():
    code = "import sys, mebp_triton.blocks.options; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_names_in_their_order():
    assert options.GRANULARITIES == ("full", "selective")
    assert options.MODES == ("full", "identity", "exact", "freeze")
    assert options.SCHEDULES == ("cyclic", "strided", "random", "importance")
    assert options.UNSELECTED_UPDATES == ("momentum", "none")
