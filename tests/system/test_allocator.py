"""Freed memory: where glibc is, large tensors leave the resident set when they are freed."""

import ctypes
import subprocess
import sys

import pytest

from mebp_triton.system import memory

PROGRAM = """
import sys, torch
from mebp_triton import memory
from mebp_triton.allocator import return_free_memory, return_large_freed_memory
torch.set_num_threads(1)
torch.ones(16 << 20, dtype=torch.uint8)  # its release would let glibc keep all that is smaller
if sys.argv[1] == "large":
    assert return_large_freed_memory()
before = memory.resident().anonymous
kept = []
for _ in range(64):
    large = torch.ones(2 << 20, dtype=torch.uint8)
    kept.append(torch.ones(64 << 10, dtype=torch.uint8))  # lies above it, and stays
    kept.append(large)
del kept[1::2], large
if sys.argv[1] == "once":
    return_free_memory()
print(memory.resident().anonymous - before)
"""
glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library is not glibc")


def left(how: str) -> int:
    """Bytes that stay of 128 MiB which were freed, and 4 MiB which were not."""
    return int(subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True).stdout)


@glibc
def test_large_tensors_go_back_at_once():
    assert left("nothing") > 100 << 20
    assert left("large") < 12 << 20


@glibc
def test_free_memory_goes_back_once():
    assert left("once") < 12 << 20


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.return_large_freed_memory() is False
    memory.return_free_memory()
