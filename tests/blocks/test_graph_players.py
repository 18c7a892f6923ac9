"""Players: the same call on any device, CUDA graphs on one that has them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from unittest.mock import MagicMock, create_autospec

import pytest
import torch

from mebp_triton.blocks.graph_players import DeviceGraph, SameCall, device_player


def test_the_same_call() -> None:
    x, player = torch.zeros(3), SameCall()
    player.warm_up(lambda: x.add_(1), strict=True)
    play = player.record(lambda: x.add_(1))
    before = x.clone()
    play()
    play()
    assert torch.equal(x, before + 2)


def test_a_player_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="records CUDA graphs, and this model is on cpu: leave it out"):
        device_player(torch.device("cpu"), keep_outputs=False)
    with pytest.warns(UserWarning, match="blocks run without graphs, since a recompute_granularity of 'selective'"):
        assert device_player(torch.device("cuda"), keep_outputs=True) is None
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.warns(UserWarning, match="ROCm is not supported"):
        assert device_player(torch.device("cuda"), keep_outputs=False) is None


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device: streams wait for each other, one pool and stream serve all graphs, and waiting is an error."""
    asked: list[str] = []
    stream, current, modes = MagicMock(), MagicMock(), [0]
    graph = create_autospec(torch.cuda.graph)
    for name, fake in {
        "Stream": lambda device: stream,
        "current_stream": lambda device: current,
        "stream": nullcontext,
        "device": nullcontext,
        "graph": graph,
        "CUDAGraph": MagicMock,
        "graph_pool_handle": lambda: "pool",
        "get_sync_debug_mode": lambda: modes[-1],
        "set_sync_debug_mode": modes.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    player = DeviceGraph(torch.device("cuda"))
    player.warm_up(lambda: asked.append(f"warm {modes[-1]}"), strict=False)
    player.warm_up(lambda: asked.append(f"warm {modes[-1]}"), strict=True)
    play = player.record(lambda: asked.append("captured"))
    assert asked == ["warm 0", "warm error", "captured"] and modes[-1] == 0
    assert stream.wait_stream.call_args.args == (current,) and current.wait_stream.call_args.args == (stream,)
    captured, options = graph.call_args.args[0], graph.call_args.kwargs
    assert options == {"pool": "pool", "stream": stream, "capture_error_mode": "thread_local"}
    play()
    captured.replay.assert_called_once_with()


@pytest.mark.gpu
def test_a_cuda_graph_reads_and_writes_the_same_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda")
    x, y, player = torch.zeros(3, device=device), torch.zeros(3, device=device), DeviceGraph(device)
    assert player.device == x.device

    def function() -> None:
        y.copy_(x * 2)

    for strict in (False, True):
        player.warm_up(function, strict)
    plays = [copy.deepcopy(player).record(function), player.record(function)]
    for number, play in enumerate(plays, 1):
        x.fill_(number)
        play()
        assert torch.equal(y, torch.full_like(y, 2 * number))


@pytest.mark.gpu
def test_waiting_for_the_device_is_an_error() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x, player = torch.ones(3, device="cuda"), DeviceGraph(torch.device("cuda"))
    with pytest.raises(RuntimeError):
        player.warm_up(lambda: float(x.sum()), strict=True)
    assert torch.cuda.get_sync_debug_mode() == 0
