"""The doctor: facts about this machine, and a self-test that sees a wrong product."""

import importlib.util
import json

import psutil
import pytest
import torch

from mebp_triton import doctor
from mebp_triton.doctor import examine
from mebp_triton.kernels import ops


def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_what_it_finds(monkeypatch):
    without_gpu(monkeypatch)
    findings = examine()
    json.dumps(findings, allow_nan=False)
    assert findings["torch"] == torch.__version__.split("+")[0] or findings["torch"] == torch.__version__
    assert {"mebp-triton", "python", "transformers", "memory", "swap", "scratch_directory", "cpu_threads"} <= set(
        findings
    )
    assert findings["device"] == "none: training runs on the CPU" and findings["backend"] == "panel"
    assert findings["self_test"].startswith("int4 products passed")
    assert any(line.startswith("no GPU found") for line in findings["advice"])
    assert not any("self-test failed" in line for line in findings["advice"])


@pytest.mark.parametrize("name", ["int4_matmul", "int4_matmul_dx"])
def test_the_self_test_sees_a_wrong_product(monkeypatch, name):
    without_gpu(monkeypatch)
    real = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args: real(*args) * (1 + 1e-4))
    findings = examine()
    assert "FAILED" in findings["self_test"]
    assert any("self-test failed" in line for line in findings["advice"])


def test_advice_for_little_memory_and_missing_packages(monkeypatch):
    without_gpu(monkeypatch)
    real_memory, real_find = psutil.virtual_memory(), importlib.util.find_spec
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real_memory._replace(available=1 << 30))
    missing = ("gguf", "matplotlib", "bitsandbytes")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else real_find(name, *rest)
    )
    findings = examine()
    advice = " ".join(findings["advice"])
    assert "only 1024 MiB of memory are available" in advice
    assert "gguf is not installed: needed to read GGUF files" in advice
    assert "matplotlib is not installed" in advice
    assert "bitsandbytes" not in findings


def test_advice_for_a_unified_memory_machine(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    findings = {"unified_memory": True, "self_test": "passed"}
    assert any("fails on Tegra" in line for line in doctor._advice(findings, 8 << 30, True))
    assert not any("Tegra" in line for line in doctor._advice(findings | {"unified_memory": False}, 8 << 30, True))
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    assert not any("Tegra" in line for line in doctor._advice(findings, 8 << 30, True))
