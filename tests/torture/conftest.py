"""A store and a text, which no test changes."""

import pytest
from runs import run_store, sentences


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    run_store(root)
    (root / "train.txt").write_text(sentences(40))
    return root
