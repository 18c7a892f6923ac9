"""Names are known without torch, so that a command's flags are read quickly."""

import subprocess
import sys

from mebp_triton.kernels import names


def test_nothing_is_imported():
    program = "import mebp_triton.kernels.names, sys; print(sorted({'torch', 'triton', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_the_names_in_their_order():
    assert names.SCHEMES == ("symmetric", "affine", "codebook")
    assert names.BACKENDS == ("auto", "triton", "panel")
    assert names.FLOAT_NAMES == ("float32", "bfloat16", "float16")
    assert names.GROUP_SIZES == (32, 64, 128)
