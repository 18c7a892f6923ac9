"""One world for all tests of the command: stores, models, texts and a finished run."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import QUICK, texts
from runs import run_store, sentences

from mebp_triton.cli.main import main
from mebp_triton.training import run_directory


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Iterator[Path]:
    """``model``, ``store``, ``wide/`` and ``gpt2/`` with a model and a store each, two texts, and ``run``."""
    root = tmp_path_factory.mktemp("world")
    run_store(root)
    run_store(root / "wide", hidden_size=64)
    run_store(root / "gpt2", "gpt2")
    (root / "train.txt").write_text(sentences(60))
    (root / "held-out.txt").write_text(sentences(12, seed=9))
    arguments = ["train", str(root / "store"), *texts(root), f"--output-dir={root / 'run'}", *QUICK, "--json"]
    assert main(arguments) == 0
    # A plan collects garbage before it measures memory. Without the libraries' objects that takes no time.
    gc.collect()
    gc.freeze()
    yield root
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Plots take most of the time of so short a run. The run of ``world`` has them."""
    monkeypatch.setattr(run_directory, "draw_plots", lambda *arguments: [])
