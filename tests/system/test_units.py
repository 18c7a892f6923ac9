"""Sizes as users write them, and as they are shown."""

import pytest

from mebp_triton.system.units import GIB, MB, MIB, mib, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("900MiB", 900 * MIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("4GB", 4000 * MB),
        ("4gb", 4 * 10**9),
        (" 512 kib ", 512 << 10),
        ("3kB", 3000),
        ("123456", 123456),
        ("7B", 7),
        ("0.5TiB", 1 << 39),
        ("2TB", 2 * 10**12),
        ("0.001MB", 1000),
    ],
)
def test_sizes(text, size):
    assert parse_size("memory_budget", text) == size


@pytest.mark.parametrize("text", ["", "many", "-1MiB", "1e9", "1,5GiB", "5 apples", "MiB", "1.MiB", "٣MiB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="memory_budget must be a size such as 900MiB, 1.5GiB or 4GB, got"):
        parse_size("memory_budget", text)


@pytest.mark.parametrize("text", ["0", "0.0001kB", "1048576TiB", "9" * 400])
def test_sizes_that_nothing_has(text):
    with pytest.raises(ValueError, match=r"memory_budget must be between 1 byte and 2\*\*60 bytes, got"):
        parse_size("memory_budget", text)


def test_a_size_is_shown_in_whole_mebibytes():
    assert [mib(size) for size in (0, MIB, 3 * MIB // 2 + 1, 10 * GIB)] == ["0 MiB", "1 MiB", "2 MiB", "10240 MiB"]
