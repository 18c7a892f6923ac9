"""Players: the same call on any device, CUDA graphs on one that has them."""

from __future__ import annotations

import copy

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


@pytest.mark.gpu
def test_a_cuda_graph_reads_and_writes_the_same_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda")
    x, y, player = torch.zeros(3, device=device), torch.zeros(3, device=device), DeviceGraph(device)

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
