"""A store, a text and two runs that the tests of this room share; none of them changes what it gets."""

import pytest
from runs import DEMANDING, Crash, crash_at, text_data, trainer


@pytest.fixture(scope="session")
def store(shared_store):
    return shared_store("llama")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    made = text_data(tmp_path_factory.mktemp("data"))
    assert 2 * len(made) < 8 * 2 * 2, "eight demanding steps last several epochs, so resuming across epochs is tried"
    return made


@pytest.fixture(scope="session")
def straight(store, data, tmp_path_factory):
    """Eight demanding steps in one go."""
    made = trainer(store, data, tmp_path_factory.mktemp("straight") / "run", **DEMANDING)
    made.train()
    return made


@pytest.fixture(scope="session")
def interrupted(store, data, tmp_path_factory):
    """The directory of a run that died in the sixth demanding step, with a checkpoint after the fourth."""
    output = tmp_path_factory.mktemp("interrupted") / "run"
    made = trainer(store, data, output, **DEMANDING)
    with pytest.raises(Crash):
        made.train(crash_at(5))
    with open(made.run.metrics, "a") as file:
        file.write('{"step": 6, "lo')
    return output
