"""Resident memory by kind, as the kernel counts it; and freed memory, which goes back to the system when asked."""

import ctypes
import json
import mmap
import subprocess
import sys

import psutil
import pytest
import safetensors.torch
import torch

from mebp_triton.system import memory
from mebp_triton.system.memory import MemoryWatch, Resident, page_dropper, peak_resident_bytes, resident

SIZE = 64 << 20


def test_resident_is_what_the_kernel_says():
    now = resident()
    assert now.total == now.anonymous + now.file_backed
    assert abs(now.total - psutil.Process().memory_info().rss) < 8 << 20
    assert peak_resident_bytes() >= now.total - (1 << 20)


def test_pages_of_a_mapped_tensor_are_dropped_part_by_part(tmp_path):
    whole = torch.arange(SIZE // 4, dtype=torch.int32).view(16, -1)
    safetensors.torch.save_file({"rows": whole}, tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        mapped = file.get_tensor("rows")
    drop = page_dropper(mapped)
    assert torch.equal(mapped, whole)
    before = resident()
    drop(mapped[:8])
    assert abs(before.file_backed - resident().file_backed - SIZE // 2) < SIZE // 8
    assert torch.equal(mapped, whole)


def test_memory_that_no_file_holds_is_not_dropped(tmp_path):
    """Such pages would come back as zeros, or would be those that another process shares."""
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    shared = torch.from_file(str(tmp_path / "file"), shared=True, size=1 << 20, dtype=torch.uint8)
    assert page_dropper(torch.ones(1 << 20)) is None and page_dropper(shared) is None


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


def test_a_watch_keeps_the_peak_and_the_samples(monkeypatch):
    samples = iter([Resident(5, 1), Resident(9, 2), Resident(7, 30)])
    monkeypatch.setattr("mebp_triton.system.memory.resident", lambda: next(samples))
    watch = MemoryWatch(torch.device("cpu"))
    watch("forward", 0)
    watch("forward", 1)
    watch("backward", 1)
    assert watch.peak_anonymous == 9
    assert [entry[1:] for entry in watch.timeline[1:]] == [("forward", 1, 9, 2, 0), ("backward", 1, 7, 30, 0)]
    assert watch.timeline[1][0] <= watch.timeline[2][0]
    assert watch.peak_device_bytes() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_watch_of_a_device():
    watch = MemoryWatch(torch.device("cuda"))
    held = torch.zeros(1 << 20, device="cuda")
    watch("forward", 0)
    assert watch.timeline[0][5] >= held.nbytes and (watch.peak_device_bytes() or 0) >= held.nbytes


# --- processes of their own -----------------------------------------------------------------------------------------

# Each case runs in a fork, since what malloc was told stays so for its process.
PROGRAM = """
import json, os, torch
from mebp_triton.system import memory

def freed(how):
    "Bytes that leave the resident set when 128 MiB are freed in pieces, each below memory that stays in use."
    torch.ones(16 << 20, dtype=torch.uint8)  # freeing it lets glibc keep all that is smaller
    if how == "large":
        assert memory.return_large_freed_memory()
    stay, go = [], []
    for _ in range(64):
        go.append(torch.ones(2 << 20, dtype=torch.uint8))
        # What importing torch left free in the heap, which differs from run to run, is filled first: without memory in
        # use above them the pieces would go back by themselves.
        while not stay or stay[-1].data_ptr() < go[-1].data_ptr():
            stay.append(torch.ones(64 << 10, dtype=torch.uint8))
            if how == "large":
                break  # these pieces do not lie in the heap
    before = memory.resident().anonymous
    del go
    if how == "once":
        memory.return_free_memory()
    return before - memory.resident().anonymous

def peak(size):
    held = bytearray(size)
    return memory.peak_resident_bytes()

def forked(action, argument):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, str(action(argument)).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as answer:
        return int(answer.read())

torch.set_num_threads(1)
results = {how: forked(freed, how) for how in ("nothing", "large", "once")}
results["child's peak"] = forked(peak, 256 << 20)
results["peak"] = memory.peak_resident_bytes()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def processes():
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library is not glibc")


@glibc
def test_large_tensors_go_back_at_once(processes):
    assert processes["nothing"] < 28 << 20
    assert processes["large"] > 116 << 20


@glibc
def test_free_memory_goes_back_once(processes):
    assert processes["once"] > 116 << 20


def test_the_peak_is_of_one_process_alone(processes):
    assert processes["child's peak"] > processes["peak"] + (100 << 20)


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.return_large_freed_memory() is False
    memory.return_free_memory()
