"""Memory that products need for a moment."""

import threading

import pytest
import torch

from mebp_triton.kernels.configs import PANEL
from mebp_triton.kernels.workspace import CPU_ELEMENTS, Workspace, use_workspace, workspace


def test_a_cpu_keeps_one_buffer_of_a_name_and_dtype():
    memory, cpu = Workspace(cpu_elements=100), torch.device("cpu")
    first = memory.buffer("values", 60, torch.float32, cpu)
    assert first.shape == (60,) and memory.buffer("values", 40, torch.float32, cpu).data_ptr() == first.data_ptr()
    assert memory.buffer("values", 40, torch.float16, cpu).dtype == torch.float16
    larger = memory.buffer("values", 80, torch.float32, cpu)
    assert {key: tensor.numel() for key, tensor in memory.buffers.items()} == {
        ("values", torch.float32): 80,
        ("values", torch.float16): 40,
    }
    # What is larger than a panel, or not on a CPU, is not kept.
    assert memory.buffer("values", 101, torch.float32, cpu).data_ptr() != larger.data_ptr()
    assert memory.buffer("values", 5, torch.float32, torch.device("meta")).device.type == "meta"
    assert memory.buffers["values", torch.float32].numel() == 80
    assert memory.elements(torch.device("cuda")) == PANEL.elements and workspace().elements(cpu) == CPU_ELEMENTS


def test_every_thread_has_its_own_workspace():
    mine, other, seen = workspace(), Workspace(), []
    with pytest.raises(KeyError), use_workspace(other):
        assert workspace() is other
        thread = threading.Thread(target=lambda: seen.extend((workspace(), workspace())))
        thread.start()
        thread.join()
        raise KeyError("an error within")
    assert workspace() is mine and seen[0] is seen[1] and seen[0] not in (mine, other)
