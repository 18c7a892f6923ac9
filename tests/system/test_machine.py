"""What the machine has, read from a made-up root: a Jetson, containers of both cgroup versions, a bare system."""

import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from roots import plant

from mebp_triton import __version__
from mebp_triton.system import machine

MIB = 1 << 20
MEMINFO = "MemTotal:       8000000 kB\nMemFree:   300000 kB\nMemAvailable:   5000000 kB\nHugePages_Total:       0\n"


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
    assert machine.cgroup_limit(tmp_path) is None and machine.tegra(tmp_path) == ""


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


def test_the_environment_names_versions_and_no_paths():
    found = machine.environment(torch.device("cpu"))
    assert found["versions"]["mebp-triton"] == __version__
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert str(Path.home()) not in json.dumps(found)
    assert found["device"]
