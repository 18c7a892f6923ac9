"""What the machine has, read from a made-up root: a Jetson, containers of both cgroup versions, a bare system."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

from mebp_triton.system import machine, storage
from mebp_triton.system.storage import Mount, Speed, Swap

MIB = 1 << 20
MEMINFO = "MemTotal:       8000000 kB\nMemFree:   300000 kB\nMemAvailable:   5000000 kB\nHugePages_Total:       0\n"


def plant(root, **texts):
    """Files below ``root``; a name's double underscores are slashes."""
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(root, directory, **texts):
    place = root / directory
    place.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (place / name.replace("memory_", "memory.", 1)).write_text(text)


def test_meminfo_is_in_bytes_and_leaves_out_what_is_no_size(tmp_path):
    plant(tmp_path, proc__meminfo=MEMINFO)
    sizes = {"MemTotal": 8000000 * 1024, "MemFree": 300000 * 1024, "MemAvailable": 5000000 * 1024}
    assert machine.meminfo(tmp_path) == sizes
    assert machine.meminfo(tmp_path / "elsewhere") == {}


def test_without_any_file_the_system_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=123, total=456))
    assert machine.available_memory_bytes(tmp_path) == 123
    assert machine.cgroup_limit(tmp_path) is None and storage.swaps(tmp_path) == [] and machine.tegra(tmp_path) == ""
    assert storage.mount_of(tmp_path, tmp_path) == Mount("", "", "")


def test_available_memory_of_this_machine_is_no_more_than_the_system_says():
    assert 0 < machine.available_memory_bytes() <= psutil.virtual_memory().available + 256 * MIB


def version_2(root, current, limit=str(2048 * MIB), stat="anon 5\n"):
    plant(root, proc__meminfo=MEMINFO, proc__self__cgroup="0::/user.slice/job\n")
    group(root, "sys/fs/cgroup/user.slice", memory_max=limit, memory_current=str(current), memory_stat=stat)
    group(root, "sys/fs/cgroup/user.slice/job", memory_max="max", memory_current="7")


def test_a_limit_of_cgroups_2_holds_for_the_groups_below(tmp_path):
    version_2(tmp_path, 1536 * MIB, stat=f"inactive_file {100 * MIB}\nactive_file {28 * MIB}\nanon 1\n")
    # What lies in the page cache can be taken back.
    assert machine.cgroup_limit(tmp_path) == (2048 * MIB, 640 * MIB)
    assert machine.available_memory_bytes(tmp_path) == 640 * MIB


def test_the_tightest_group_counts(tmp_path):
    version_2(tmp_path, 100 * MIB)
    group(tmp_path, "sys/fs/cgroup/user.slice/job", memory_max=str(500 * MIB), memory_current=str(600 * MIB))
    assert machine.cgroup_limit(tmp_path) == (500 * MIB, 0)


@pytest.mark.parametrize("limit", ["max", str(8000000 * 1024), "9223372036854771712", ""])
def test_what_is_no_limit(tmp_path, limit):
    version_2(tmp_path, 100 * MIB, limit)
    assert machine.cgroup_limit(tmp_path) is None
    assert machine.available_memory_bytes(tmp_path) == 5000000 * 1024


def test_a_limit_that_leaves_more_than_there_is(tmp_path):
    version_2(tmp_path, 0, str(7000 * MIB))
    assert machine.available_memory_bytes(tmp_path) == 5000000 * 1024


def test_a_limit_of_cgroups_1_in_a_container_that_sees_the_hosts_names(tmp_path):
    plant(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="9:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    group(
        tmp_path,
        "sys/fs/cgroup/memory",
        memory_limit_in_bytes=f"{1024 * MIB}\n",
        memory_usage_in_bytes=f"{512 * MIB}\n",
        memory_stat=f"active_file 1\ninactive_file 2\ntotal_inactive_file {64 * MIB}\ntotal_active_file {MIB}\n",
    )
    assert machine.cgroup_limit(tmp_path) == (1024 * MIB, 577 * MIB)


def test_a_jetson_by_its_device_tree_and_its_release(tmp_path):
    release = (
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8\n# KERNEL\n"
    )
    both = plant(
        tmp_path / "both",
        **{"proc__device-tree__model": "NVIDIA Jetson Orin Nano Developer Kit\0", "etc__nv_tegra_release": release},
    )
    assert machine.tegra(both) == "NVIDIA Jetson Orin Nano Developer Kit, L4T 36.4.3"
    # A container hides the device tree, or the release.
    assert machine.tegra(plant(tmp_path / "release", etc__nv_tegra_release=release)) == "Tegra, L4T 36.4.3"
    model = plant(tmp_path / "model", **{"proc__device-tree__model": "NVIDIA Jetson AGX Orin Developer Kit\0"})
    assert machine.tegra(model) == "NVIDIA Jetson AGX Orin Developer Kit"
    other = plant(tmp_path / "other", **{"proc__device-tree__model": "Raspberry Pi 5 Model B Rev 1.0\0"})
    assert machine.tegra(other) == ""
    assert machine.has_nvidia_device(model) and not machine.has_nvidia_device(other)


def test_an_nvidia_driver_is_seen_without_torch(tmp_path):
    assert not machine.has_nvidia_device(tmp_path)
    assert machine.has_nvidia_device(plant(tmp_path, proc__driver__nvidia__version="NVRM version: ..."))


@pytest.mark.parametrize("integrated", [0, 1])
def test_unified_memory_is_what_the_device_says(monkeypatch, tmp_path, integrated):
    plant(tmp_path, etc__nv_tegra_release="# R36 (release), REVISION: 4.3, GCID: 1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(is_integrated=integrated))
    assert machine.is_unified(torch.device("cuda"), tmp_path) is bool(integrated)
    assert machine.is_unified(torch.device("cpu"), tmp_path) is False


def test_unified_memory_of_a_board_whose_torch_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    assert machine.is_unified(torch.device("cuda"), tmp_path) is False
    plant(tmp_path, etc__nv_tegra_release="# R36 (release), REVISION: 4.3, GCID: 1")
    assert machine.is_unified(torch.device("cuda"), tmp_path) is True


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
    find = lambda path: storage.mount_of(machine.Path(path), tmp_path)  # noqa: E731
    assert find("/data/run") == Mount("/", "ext4", "/dev/mmcblk0p1")
    assert find("/data disk/run") == Mount("/data disk", "xfs", "/dev/nvme0n1p1")
    assert find("/tmp/x/y").in_memory and not find("/data").in_memory
    assert find("/data").is_card and not find("/data disk").is_card


def clock(monkeypatch, seconds_per_byte):
    """Time passes by what is written and read alone."""
    now = [0.0]
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    written, real = [], machine.files.write_bytes

    def write(path, data):
        written.append(len(data))
        now[0] += len(data) * seconds_per_byte
        real(path, data)

    monkeypatch.setattr(machine.files, "write_bytes", write)
    return written


@pytest.mark.parametrize(("rate", "pieces"), [(1e9, [4, 12, 48]), (2e7, [4, 12]), (5e6, [4])])
def test_slow_storage_is_written_less(tmp_path, monkeypatch, rate, pieces):
    written = clock(monkeypatch, 1 / rate)
    assert storage.scratch_speed(tmp_path).write == pytest.approx(rate)
    assert [size // MIB for size in written] == pieces
    assert list(tmp_path.iterdir()) == []


def test_reading_stops_at_its_limit_and_says_what_came_from_memory(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * MIB))
    for fetched, said in (([0, 8 * MIB], False), ([0, 4096], True), ([None, None], None)):
        counts, times = iter(fetched), iter([0.0, 0.0, 0.1, 0.5])
        monkeypatch.setattr(storage, "_fetched", lambda counts=counts: next(counts))
        monkeypatch.setattr(machine.time, "perf_counter", lambda times=times: next(times))
        speed = storage.read_speed(path, limit=2 * MIB)
        assert speed == Speed(2 * MIB / 0.5, None, said)
    monkeypatch.setattr(machine.time, "perf_counter", iter([0.0, 0.5, 2.0, 2.0]).__next__)
    monkeypatch.setattr(storage, "_fetched", lambda: None)
    assert storage.read_speed(path).read == MIB / 2  # a second is over


def test_speeds_in_words():
    assert str(Speed(2e9, 4e8, False)) == "write 400 MB/s, read 2000 MB/s"
    assert str(Speed(2e9, None, True)) == "read 2000 MB/s (from the page cache)"
    assert str(Speed(9e7, None, None)) == "read 90 MB/s (may be from the page cache)"


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no file system in memory")
def test_a_file_system_in_memory_is_read_from_the_page_cache():
    speed = storage.scratch_speed(machine.Path("/dev/shm"))
    assert speed.from_cache is not False and speed.read > 0 and speed.write > 0
