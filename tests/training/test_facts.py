"""The facts of a setting: what its field carries, and which values they allow."""

import dataclasses
from typing import Literal

import pytest

from mebp_triton.training.facts import MOST_INTEGER, Facts, check_range, check_type, setting


def test_a_declared_setting_carries_its_facts():
    @dataclasses.dataclass
    class Settings:
        rate: float = setting(0.5, "how fast", above=0, resume="free")

    (field,) = dataclasses.fields(Settings)
    assert Settings().rate == 0.5 and field.metadata["help"] == "how fast"
    assert field.metadata["facts"] == Facts("how fast", above=0, resume="free")


@pytest.mark.parametrize(
    ("facts", "value", "allowed"),
    [
        ({"least": 1}, 0, "at least 1"),
        ({"most": 8}, 9, "at most 8"),
        ({"above": 0}, 0.0, "larger than 0"),
        ({"above": 0, "most": 1}, 1.5, r"in \(0, 1\]"),
        ({}, MOST_INTEGER + 1, f"at most {MOST_INTEGER}"),
        ({}, float("inf"), "finite"),
    ],
)
def test_a_number_out_of_its_range_is_refused(facts, value, allowed):
    with pytest.raises(ValueError, match=f"size must be {allowed}, got"):
        check_range("size", Facts("", **facts), value)


def test_types_are_those_of_the_field():
    check_type("size", int | None, None)
    check_type("size", float, 3)
    check_type("mode", Literal["a", "b"], "b")
    with pytest.raises(ValueError, match="mode must be one of a, b, got 'c'"):
        check_type("mode", Literal["a", "b"], "c")
    with pytest.raises(ValueError, match="size must be of type int, got True"):
        check_type("size", int, True)
