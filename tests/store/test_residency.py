"""The places where tensors may wait, by name."""

import pytest

from mebp_triton.store.residency import RESIDENCIES, check_residency


def test_the_three_places_are_known():
    for place in RESIDENCIES:
        check_residency("weights", place)
    assert RESIDENCIES == ("device", "host", "file")


@pytest.mark.parametrize("value", ["disk", "", "Device", None])
def test_another_place_is_an_error_that_names_the_argument(value):
    with pytest.raises(ValueError, match=rf"^weights must be one of device, host, file, got {value!r}$"):
        check_residency("weights", value)
