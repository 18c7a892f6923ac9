"""Time that passes while data is waited for."""

import time

import pytest

from mebp_triton.store.waiting import Waiting


def test_seconds_add_up_and_are_taken_once():
    waiting = Waiting()
    for _ in range(2):
        with waiting.counted():
            time.sleep(0.01)
    assert 0.02 <= waiting.seconds < 5
    assert waiting.pop_seconds() >= 0.02 and waiting.pop_seconds() == 0


def test_bytes_are_taken_once() -> None:
    waiting = Waiting(paged=5)
    assert (waiting.pop_paged(), waiting.pop_paged()) == (5, 0)


def test_a_failure_counts_as_well():
    waiting = Waiting()
    with pytest.raises(OSError), waiting.counted():
        time.sleep(0.01)
        raise OSError
    assert waiting.seconds >= 0.01
