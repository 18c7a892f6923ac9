"""The doctor's findings: facts about this machine, and a self-test that sees a wrong product."""

import json
from types import SimpleNamespace

import pytest
import torch
from models import tiny_store

from mebp_triton.cli.doctor import findings as findings_module
from mebp_triton.cli.doctor.findings import examine
from mebp_triton.kernels import functions, native, tables
from mebp_triton.system import machine
from mebp_triton.system import storage as storage_module

MIB, GIB = 1 << 20, 1 << 30


def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_what_it_finds(monkeypatch):
    without_gpu(monkeypatch)
    findings = examine()
    json.dumps(findings, allow_nan=False)
    assert all(isinstance(value, str | int | None) for name, value in findings.items() if name != "advice")
    assert findings["torch"] == torch.__version__.split("+")[0] or findings["torch"] == torch.__version__
    names = {"mebp-triton", "python", "transformers", "memory", "swap", "scratch_directory", "cpu_threads"}
    names |= {"triton", "ptxas", "memory_limit", "page_cache", "scratch_speed", "unified_memory", "compute_capability"}
    assert names <= set(findings) and "store" not in findings
    assert findings["device"] == "none: training runs on the CPU" and findings["backend"] == "panel"
    assert findings["scratch_bytes_per_second"] > 0
    assert findings["cpu_code"].startswith(native.instructions() or "none")
    assert findings["self_test"].startswith("int4 products passed")
    assert not any("self-test failed" in line for line in findings["advice"])


@pytest.mark.parametrize("name", ["int4_matmul", "int4_matmul_dx"])
def test_the_self_test_sees_a_wrong_product(monkeypatch, name):
    without_gpu(monkeypatch)
    real = getattr(functions, name)
    monkeypatch.setattr(functions, name, lambda *arguments: real(*arguments) * (1 + 1e-4))
    findings = examine(measure=False)
    assert "FAILED" in findings["self_test"]
    assert any("self-test failed" in line for line in findings["advice"])


def test_a_self_test_that_breaks_is_a_finding(monkeypatch):
    without_gpu(monkeypatch)

    def broken(*_):
        raise RuntimeError("Cannot find\nptxas")

    monkeypatch.setattr(functions, "int4_matmul", broken)
    findings = examine(measure=False)
    assert findings["self_test"] == "int4 products FAILED: RuntimeError: Cannot find ptxas"


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def jetson(tmp_path, monkeypatch):
    """The files of a Jetson with 8 GB and zram, and a torch that sees its GPU."""
    root = tmp_path / "root"
    write(root, "proc/meminfo", "MemTotal: 7800000 kB\nMemAvailable: 1500000 kB\nCached: 1048576 kB\nDirty: 2048 kB\n")
    write(root, "proc/sys/vm/dirty_ratio", "20\n")
    write(root, "proc/sys/vm/dirty_background_ratio", "10\n")
    write(root, "proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 2097152 0 5\n")
    write(root, "proc/self/mounts", "/dev/mmcblk0p1 / ext4 rw 0 0\n")
    write(root, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    properties = SimpleNamespace(name="Orin", total_memory=7800000 * 1024, is_integrated=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 7))
    tables.device_architecture.cache_clear()
    yield root
    tables.device_architecture.cache_clear()


def test_a_jetsons_memory_storage_and_device(jetson, tmp_path):
    memory = findings_module._memory(jetson)
    assert memory["memory"] == "7.4 GiB, 1.4 GiB available" and memory["memory_limit"] == "none"
    assert memory["swap"] == "2.0 GiB, of which 2.0 GiB on zram"
    assert memory["page_cache"] == "1.0 GiB cached, 2.0 MiB dirty; writing back starts at 10 %, writers wait at 20 %"
    storage = findings_module._storage(tmp_path, None, jetson, measure=False)
    assert storage["scratch_file_system"] == "ext4 on /dev/mmcblk0p1" and storage["scratch_on_card"] is True
    device = findings_module._device(torch.device("cuda"), jetson)
    assert device["device"] == "Orin, sm_87, 7.4 GiB" and device["unified_memory"] is True
    assert device["kernel_table"].startswith("shipped: ") and device["compute_capability"] == "sm_87"


def test_a_containers_limit_is_found(jetson):
    write(jetson, "proc/self/cgroup", "0::/\n")
    write(jetson, "sys/fs/cgroup/memory.max", str(GIB))
    write(jetson, "sys/fs/cgroup/memory.current", str(GIB // 4))
    memory = findings_module._memory(jetson)
    assert memory["memory_limit"] == "1.0 GiB by a cgroup, 0.8 GiB left"
    assert memory["memory_limit_bytes"] == GIB and memory["available_memory_bytes"] == 3 * GIB // 4


def test_a_store_is_measured_and_a_mistake_is_one_line(monkeypatch, tmp_path):
    without_gpu(monkeypatch)
    findings = examine(store=tiny_store("llama", tmp_path), scratch=tmp_path)
    assert findings["store_bytes"] > 0 and findings["store_bytes_per_second"] > 0
    assert findings["store"].startswith(str(tmp_path)) and findings["scratch_directory"].startswith(f"{tmp_path},")
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        examine(scratch=tmp_path / "nowhere")
    with pytest.raises(ValueError):
        examine(store=tmp_path / "nowhere", measure=False)


def test_storage_that_cannot_be_written_is_a_finding(monkeypatch, tmp_path):
    def refuse(_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(storage_module, "scratch_speed", refuse)
    storage = findings_module._storage(tmp_path, None, machine.ROOT, measure=True)
    assert storage["scratch_speed"] == "not measured: Read-only file system"
    assert storage["scratch_bytes_per_second"] is None


def test_the_table_of_an_architecture(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entries = json.loads((tables.SHIPPED / "sm_87.json").read_text())["entries"]
    assert findings_module.kernel_table("sm_87") == (
        f"shipped: {len(entries)} entries, 0 of them measured, panels of 16 MiB"
    )
    assert findings_module.kernel_table("sm_11").startswith("none for sm_11")
    by_panels = next(entry for entry in entries if entry["route"] == "panel")
    for m, sizes in ((16, "16"), (32, "16 and 64")):
        entry = by_panels | {"provenance": "measured", "m": m} | ({} if m == 16 else {"panel_mib": 64})
        own = {"format": 1, "architecture": "sm_11", "entries": [by_panels | {"m": 64}, entry]}
        write(tmp_path, "mebp-triton/tables/sm_11.json", json.dumps(own))
        wanted = f"your own: 2 entries, 1 of them measured, panels of {sizes} MiB"
        assert findings_module.kernel_table("sm_11") == wanted


def test_the_ptxas_that_triton_would_start(monkeypatch, tmp_path):
    tool = tmp_path / "ptxas"
    tool.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.6, V12.6.68'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tool))
    assert findings_module.find_ptxas("sm_87") == f"{tool}, release 12.6"
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")

    def missing(_):
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(compiler, "get_ptxas", missing)
    assert findings_module.find_ptxas("sm_87") == "missing: Cannot find ptxas"
