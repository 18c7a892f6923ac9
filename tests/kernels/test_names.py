"""Names are known without torch, so that a command's flags are read quickly."""

import subprocess
import sys
from typing import get_args

from mebp_triton.kernels import names


def test_nothing_is_imported():
    program = "import mebp_triton.kernels.names, sys; print(sorted({'torch', 'triton', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_tuples_hold_what_the_types_allow():
    assert get_args(names.Scheme) == names.SCHEMES == ("symmetric", "affine", "codebook")
    assert get_args(names.Backend) == names.BACKENDS == ("auto", "triton", "panel")
    assert get_args(names.FloatName) == names.FLOAT_NAMES == ("float32", "bfloat16", "float16")
    assert names.GROUP_SIZES == (32, 64, 128)
