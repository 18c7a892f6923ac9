"""Swap, file systems and the speed of storage, read from a made-up root and by a made-up clock."""

import os
import stat
import time
from pathlib import Path

import pytest
from roots import plant

from mebp_triton.system import storage
from mebp_triton.system.storage import Mount, Speed, Swap

MIB = 1 << 20


def test_without_any_file_nothing_is_known(tmp_path):
    assert storage.swaps(tmp_path) == []
    assert storage.mount_of(tmp_path, tmp_path) == Mount("", "", "")


def test_swap_on_zram_is_told_from_swap_on_disk(tmp_path):
    head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    rows = "/dev/zram0   partition\t635148\t128\t5\n/mnt/16GB.swap   file\t16777212\t0\t-2\n"
    plant(tmp_path, proc__swaps=head + rows)
    zram, disk = storage.swaps(tmp_path)
    assert zram == Swap("/dev/zram0", 635148 * 1024, 128 * 1024) and zram.compressed
    assert disk == Swap("/mnt/16GB.swap", 16777212 * 1024, 0) and not disk.compressed


def test_the_mount_of_a_path_is_the_deepest_and_the_latest(tmp_path):
    plant(
        tmp_path,
        proc__self__mounts="/dev/mmcblk0p1 / ext4 rw 0 0\n/dev/sda1 /da ext4 rw 0 0\n"
        "/dev/nvme0n1p1 /data\\040disk xfs rw 0 0\n/dev/sdb1 /tmp/x ext4 rw 0 0\ntmpfs /tmp/x tmpfs rw 0 0\n",
    )
    find = lambda path: storage.mount_of(Path(path), tmp_path)  # noqa: E731
    assert find("/data/run") == Mount("/", "ext4", "/dev/mmcblk0p1")
    assert find("/data disk/run") == Mount("/data disk", "xfs", "/dev/nvme0n1p1")
    assert find("/tmp/x/y").in_memory and not find("/data").in_memory
    assert find("/data").is_card and not find("/data disk").is_card


@pytest.mark.parametrize(("rate", "pieces"), [(1e9, [4, 12, 48]), (2e7, [4, 12]), (5e6, [4])])
def test_slow_storage_is_written_less(tmp_path, monkeypatch, rate, pieces):
    """Time passes by what is written alone."""
    now, written = 0.0, []

    def sync(handle):
        nonlocal now
        if stat.S_ISREG(os.fstat(handle).st_mode):
            written.append(os.fstat(handle).st_size)
            now += written[-1] / rate

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(os, "fsync", sync)
    assert storage.scratch_speed(tmp_path).write == pytest.approx(rate)
    assert [size // MIB for size in written] == pieces
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("fetched", "from_cache"), [(8 * MIB, False), (4096, True), (None, None)])
def test_reading_stops_at_its_limit_and_says_what_came_from_memory(tmp_path, monkeypatch, fetched, from_cache):
    path, root = tmp_path / "file", tmp_path / "root"
    path.write_bytes(os.urandom(8 * MIB))
    if fetched is not None:
        plant(root, proc__self__io="rchar: 5\nread_bytes: 100\nwrite_bytes: 7\n")
    times = iter([0.0, 0.0, 0.1, 0.5])

    def tick():
        if fetched is not None:
            plant(root, proc__self__io=f"rchar: 5\nread_bytes: {100 + fetched}\n")
        return next(times)

    monkeypatch.setattr(time, "perf_counter", tick)
    assert storage.read_speed(path, limit=2 * MIB, root=root) == Speed(2 * MIB / 0.5, None, from_cache)


def test_reading_stops_after_a_second(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * MIB))
    monkeypatch.setattr(time, "perf_counter", iter([0.0, 0.5, 2.0, 2.0]).__next__)
    assert storage.read_speed(path).read == MIB / 2


def test_speeds_in_words():
    assert str(Speed(2e9, 4e8, False)) == "write 400 MB/s, read 2000 MB/s"
    assert str(Speed(2e9, None, True)) == "read 2000 MB/s (from the page cache)"
    assert str(Speed(9e7, None, None)) == "read 90 MB/s (may be from the page cache)"


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no file system in memory")
def test_a_file_system_in_memory_is_read_from_the_page_cache():
    speed = storage.scratch_speed(Path("/dev/shm"))
    assert speed.from_cache is not False and speed.read > 0 and speed.write > 0
