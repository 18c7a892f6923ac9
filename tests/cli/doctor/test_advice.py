"""The doctor's advice: each line where it belongs, and only there."""

import importlib.util

import pytest

from mebp_triton.cli.doctor import advice as advice_module
from mebp_triton.cli.doctor.advice import advise
from mebp_triton.system.units import GIB, MIB

# A workstation with nothing to complain of.
SOUND = {
    "board": "no Jetson",
    "triton": "3.5.0",
    "torch_cuda": "12.8",
    "nvidia_device": True,
    "compute_capability": "sm_90",
    "unified_memory": False,
    "kernel_table": "shipped: 9 entries, 0 of them measured",
    "ptxas": "/triton/ptxas, release 12.8",
    "c_compiler": "/usr/bin/gcc",
    "backend": "triton",
    "cpu_code": "avx2",
    "self_test": "int4 products passed",
    "available_memory_bytes": 32 * GIB,
    "memory_limit_bytes": None,
    "swap_bytes": 0,
    "swap_zram_bytes": 0,
    "scratch_in_memory": False,
    "scratch_on_card": False,
    "scratch_bytes_per_second": 10**9,
    "scratch_speed": "read 1000 MB/s",
    "store_speed": "read 80 MB/s",
}
BOARD = {"board": "NVIDIA Jetson Orin Nano", "compute_capability": "sm_87", "unified_memory": True, "swap_bytes": GIB}
NO_GPU = {"compute_capability": "", "backend": "panel", "nvidia_device": False, "torch_cuda": "none"}


@pytest.fixture
def complete(monkeypatch):
    """A machine on which every optional package and Python's headers are installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: name)
    monkeypatch.setattr(advice_module, "_has_python_headers", lambda: True)


def test_a_sound_machine_needs_no_advice(complete):
    assert advise(SOUND, {}) == []


def test_without_compiled_code_a_cpu_is_slow(complete):
    missing = {"cpu_code": "none: the package was installed where no C compiler with OpenMP was found"}
    lines = advise(SOUND | NO_GPU | missing, {})
    assert any("install a C compiler" in line for line in lines) and len(lines) == 2
    assert advise(SOUND | missing, {}) == []  # a GPU does not use it


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (NO_GPU, "no GPU found"),
        (NO_GPU | {"nvidia_device": True}, "built without CUDA: install one with it (see pytorch.org)"),
        (
            NO_GPU | {"nvidia_device": True, "board": "Orin, L4T 36.4.3", "swap_bytes": GIB},
            "(pip install --index-url https://pypi.jetson-ai-lab.io/jp6/cu126 torch)",
        ),
        (
            NO_GPU | {"nvidia_device": True, "board": "Orin, L4T 39.2.0", "swap_bytes": GIB},
            "install one with it (pip install torch)",
        ),
        (
            NO_GPU | {"nvidia_device": True, "board": "Tegra", "swap_bytes": GIB},
            "cu126 torch; JetPack 7: pip install torch)",
        ),
        (NO_GPU | {"nvidia_device": True, "torch_cuda": "13.0"}, "built for CUDA 13.0, but finds no GPU"),
        ({"triton": "not installed", "backend": "panel"}, "pip install triton, or use --backend panel"),
        ({"ptxas": "missing: none"}, "TRITON_PTXAS_PATH=/path/to/ptxas, or use --backend panel"),
        ({"c_compiler": "none found"}, "needs a C compiler"),
        ({"kernel_table": "none for sm_75: default"}, "mebp tune --store"),
        ({"available_memory_bytes": 1000 * MIB}, "only 1000 MiB of memory are available: --memory-budget 750MiB"),
        ({"memory_limit_bytes": 4 * GIB}, "allows only 4.0 GiB of this machine's memory"),
        ({"scratch_in_memory": True}, "the scratch directory is in memory"),
        ({"scratch_on_card": True}, "SD card or eMMC: --checkpoints host --optimizer-state host"),
        ({"scratch_bytes_per_second": 10**7, "scratch_speed": "write 10 MB/s"}, "is slow (write 10 MB/s)"),
        ({"store_bytes": 40 * GIB}, "does not fit into the memory available (32.0 GiB)"),
        ({"self_test": "int4 products FAILED"}, "the self-test failed"),
    ],
)
def test_one_thing_wrong_is_one_line_of_advice(complete, changes, expected):
    (line,) = advise(SOUND | changes, {})
    assert expected in line


def test_a_store_that_fits_and_storage_not_measured_need_none(complete):
    assert advise(SOUND | {"store_bytes": GIB, "scratch_bytes_per_second": None}, {}) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"swap_zram_bytes": GIB}, "disable nvzramconfig"),
        ({"swap_bytes": 0}, "there is no swap"),
        ({"scratch_on_card": True}, "--checkpoints device --optimizer-state device"),
        ({"ptxas": "missing: none"}, "TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas"),
    ],
)
def test_advice_for_a_jetson(complete, changes, expected):
    lines = advise(SOUND | BOARD | changes, {})
    (unified,) = [line for line in lines if "share one memory" in line]
    assert "--checkpoints file save memory, host does not" in unified
    others = [line for line in lines if line is not unified]
    assert (expected is None and others == []) or (len(others) == 1 and expected in others[0])


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_warned_of_on_tegra_alone(complete, variable):
    settings = {variable: "max_split_size_mb:64,expandable_segments:True"}
    (line,) = [line for line in advise(SOUND | BOARD, settings) if "expandable_segments" in line]
    assert "were seen to fail on Jetsons" in line and "unset PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF" in line
    assert advise(SOUND, settings) == []
    others = advise(SOUND | BOARD, {variable: "max_split_size_mb:64"})
    assert not any("expandable_segments" in line for line in others)


def test_a_ptxas_that_was_named_and_not_taken(complete):
    (line,) = advise(SOUND, {"TRITON_PTXAS_PATH": "/nowhere/ptxas"})
    assert "TRITON_PTXAS_PATH=/nowhere/ptxas is not what Triton takes" in line
    assert advise(SOUND, {"TRITON_PTXAS_PATH": "/triton/ptxas"}) == []


def test_missing_packages(complete, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    monkeypatch.setattr(advice_module, "_has_python_headers", lambda: False)
    advice = " ".join(advise(SOUND, {}))
    assert "gguf is not installed: needed to read GGUF files" in advice and "matplotlib is not installed" in advice
    assert "sudo apt install python3-dev" in advice
