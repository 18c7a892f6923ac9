"""Fixtures of the planner's tests."""

import pytest
from models import tiny_store
from plans import planner


@pytest.fixture(scope="session")
def store():
    return tiny_store("llama")


@pytest.fixture(scope="session")
def plans(store):
    """What one traces the others need not."""
    return planner(store, framework=0)
