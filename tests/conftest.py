"""The environment and the fixtures of all tests.

The root is taken off ``sys.path``, where ``kernels`` would shadow another package. Kernels are compiled anew in each
run: a compiler's cache from an earlier run would hide what no longer compiles.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Before torch is imported: its threads do not spin, as the command sets it, and each of several workers has one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# In the background of a script Ctrl-C is ignored, and processes that the tests start would ignore it as well.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
COMPILED = tempfile.TemporaryDirectory(prefix="mebp-triton-compiled-")
os.environ["TRITON_CACHE_DIR"] = COMPILED.name


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The same random numbers in each run, whatever ran before and in whichever worker."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory):
    """Tiny stores that tests read and never change: ``shared_store("llama", scheme="affine")`` is a path.

    See ``runs.SharedStores``.
    """
    from runs import SharedStores

    stores = SharedStores(tmp_path_factory.mktemp("shared-stores"))
    yield stores
    assert stores.stamps(stores.root) == stores.written, "a test has changed a store that other tests read"


@pytest.fixture
def mebp(capsys):
    """Runs the command in this process: exit code, standard output, standard error."""
    from mebp_triton.cli.main import main

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def plain_torch():
    """While a test runs, no compiled code takes the place of plain torch."""
    from mebp_triton.kernels import native

    with native.using("off"):
        yield
