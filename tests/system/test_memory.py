"""What a process takes, by kind: the numbers are the kernel's, and each kind is told from the other."""

import mmap
import subprocess
import sys

import psutil
import pytest
import torch

from mebp_triton.system.foreign_errors import is_out_of_memory
from mebp_triton.system.memory import MemoryWatch, Resident, peak_resident_bytes, resident

SIZE = 64 << 20


def test_resident_is_what_the_kernel_says():
    now = resident()
    assert now.total == now.anonymous + now.file_backed
    assert abs(now.total - psutil.Process().memory_info().rss) < 8 << 20
    assert peak_resident_bytes() >= now.total - (1 << 20)


def test_anonymous_and_file_backed_pages_are_told_apart(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    before = resident()
    block = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block[:: mmap.PAGESIZE] = b"x" * (SIZE // mmap.PAGESIZE)
    with_block = resident()
    assert abs(with_block.anonymous - before.anonymous - SIZE) < SIZE // 8
    assert abs(with_block.file_backed - before.file_backed) < SIZE // 8
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)
    assert sum(mapped[:: mmap.PAGESIZE]) == 0
    with_file = resident()
    assert abs(with_file.file_backed - with_block.file_backed - SIZE) < SIZE // 8
    assert abs(with_file.anonymous - with_block.anonymous) < SIZE // 8
    mapped.madvise(mmap.MADV_DONTNEED)
    assert resident().file_backed < with_file.file_backed - SIZE // 2
    assert peak_resident_bytes() >= with_file.total - (1 << 20), "the peak forgot"
    block.close()
    assert resident().anonymous < with_block.anonymous - SIZE // 2


def test_without_proc_the_peak_is_all_there_is(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    peak = peak_resident_bytes()
    assert resident() == Resident(peak, 0) and peak > 10 << 20


def test_the_peak_is_of_this_process_alone():
    code = "from mebp_triton.memory import peak_resident_bytes as p; a = bytearray(300 << 20); print(p())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert child > 300 << 20


def test_a_watch_keeps_the_peak_and_records_when_told(monkeypatch):
    samples = iter([Resident(5, 1), Resident(9, 2), Resident(7, 30), Resident(1, 1)])
    monkeypatch.setattr("mebp_triton.system.memory.resident", lambda: next(samples))
    watch = MemoryWatch(torch.device("cpu"))
    watch("forward", 0)
    watch.recording = True
    watch("forward", 1)
    watch("backward", 1)
    watch.recording = False
    watch("backward", 0)
    assert watch.peak_anonymous == 9
    assert [entry[1:] for entry in watch.timeline] == [("forward", 1, 9, 2, 0), ("backward", 1, 7, 30, 0)]
    assert watch.timeline[0][0] <= watch.timeline[1][0]
    assert watch.peak_device_bytes() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_watch_of_a_device():
    watch = MemoryWatch(torch.device("cuda"))
    watch.recording = True
    held = torch.zeros(1 << 20, device="cuda")
    watch("forward", 0)
    assert watch.timeline[0][5] >= held.nbytes and (watch.peak_device_bytes() or 0) >= held.nbytes


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
