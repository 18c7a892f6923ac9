"""Errors of other libraries: one line, unless memory ran out, however a library says that."""

import pytest
import torch

from mebp_triton.system.foreign_errors import is_out_of_memory, one_line


class PanicException(BaseException):
    """As pyo3, which carries Rust's panics into Python, calls its own."""


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("first\nsecond"), PanicException("at the disco")])
def test_whatever_a_library_raises_is_one_line(error):
    with (
        pytest.raises(ValueError, match=r"^the file is bad \(\w+: .*\); mend it$") as caught,
        one_line("the file is bad", "mend it"),
    ):
        raise error
    assert "\n" not in str(caught.value) and type(error).__name__ in str(caught.value)
    assert caught.value.__cause__ is error and type(caught.value) is ValueError


def test_a_long_reason_is_cut_and_an_empty_one_is_none():
    with pytest.raises(ValueError) as caught, one_line("bad", "mend it"):
        raise RuntimeError("x" * 10_000)
    assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match=r"bad \(RuntimeError: \); mend it"), one_line("bad", "mend it"):
        raise RuntimeError


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError(), OSError(12, "no memory")])
def test_what_is_not_the_files_fault_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught, one_line("bad", "mend it"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"), True),
        (ImportError("x.so: failed to map segment from shared object"), True),
        (ImportError("no module named x"), False),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_the_ways_to_say_that_memory_is_short(error, is_memory):
    assert is_out_of_memory(error) is is_memory


def test_torch_says_it_like_that():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
