"""Fixtures of the store room's tests."""

import shutil
from pathlib import Path

import pytest
from stores import golden_store, mixed_store, two_level_store


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """A small store that no test may change."""
    return golden_store(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def mixed(tmp_path):
    """A store of codes of 4 and of 8 bits, that a test may bend."""
    return mixed_store(tmp_path / "mixed")


@pytest.fixture
def two_level(tmp_path):
    """A store that has scales of two levels too, and that a test may bend."""
    return two_level_store(tmp_path / "two_level")


@pytest.fixture
def copied(golden, tmp_path):
    """A copy of it that a test may bend."""
    return Path(shutil.copytree(golden, tmp_path / "store"))
