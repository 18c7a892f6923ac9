"""Clocks, and the limits of a device."""

import math

import torch

from mebp_triton.autotune import timing
from mebp_triton.autotune.timing import CudaTimer, WallTimer


def test_the_clock_on_the_wall():
    assert 0 < WallTimer()(lambda: None) < math.inf


def test_the_device_waits_while_launches_are_queued(monkeypatch):
    """The CUDA device of this test only records the calls."""
    events = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("wait for the end")

        def elapsed_time(self, end):
            return 0.25

    class Device:
        def __init__(self, device):
            pass

        def __enter__(self):
            events.append("enter")

        def __exit__(self, *error):
            events.append("exit")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append(cycles))
    monkeypatch.setattr(timing.WallTimer, "__call__", lambda self, run: run() or 100.0)
    timer = CudaTimer(torch.device("cuda"))
    assert timer(lambda: events.append("run")) == 250.0
    assert events == ["enter", "idle", 0, "record", "run", "record", "wait for the end", "exit"]
    assert timer(lambda: None) == 250.0
    assert 150 * CudaTimer.CYCLES_PER_US in events
