"""A store and a planner that the planner's tests share."""

import pytest
from plans import planner


@pytest.fixture(scope="session")
def store(shared_store):
    return shared_store("llama")


@pytest.fixture(scope="session")
def plans(store):
    """A planner for ``store``, which keeps what it has traced for the next test."""
    return planner(store, framework=0)
