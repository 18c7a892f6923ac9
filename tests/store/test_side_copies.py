"""Copies beside the computation: right however late they are made, and each wait is one that must not be missing."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from late_copies import LateStreams, MissingWait
from torch import Tensor

from mebp_triton.store.side_copies import SideCopies, side_streams


def there_and_back(side: SideCopies, device: torch.device) -> list[Tensor]:
    """Sends tensors to the host and brings them back, the next one while one is used."""
    host = [torch.zeros(16) for _ in range(6)]
    for at, memory in enumerate(host):
        side.send(torch.full((16,), float(at)).add_(1), memory)
        torch.ones(16).mul_(3)  # takes what is free
    coming, found = side.bring(host[0], device), []
    for following in (*host[1:], None):
        current, coming = coming, None if following is None else side.bring(following, device)
        found.append(side.take(current).mul(2))
    return found


def right(found: list[Tensor]) -> bool:
    return all((tensor == 2 * (at + 1)).all() for at, tensor in enumerate(found))


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_what_was_sent_is_brought(seed: int | None) -> None:
    with LateStreams(seed) as streams:
        assert right(there_and_back(SideCopies(streams), torch.device("cpu")))
    assert streams.copies == 12


def test_a_computation_that_does_not_wait_is_seen() -> None:
    with LateStreams(forgotten="computing") as streams:
        assert not right(there_and_back(SideCopies(streams), torch.device("cpu")))


def test_a_copy_that_does_not_wait_is_seen() -> None:
    with LateStreams(forgotten="copying") as streams, pytest.raises(MissingWait, match="does not wait"):
        there_and_back(SideCopies(streams), torch.device("cpu"))


def test_memory_that_is_not_kept_is_seen() -> None:
    with LateStreams() as streams, pytest.raises(MissingWait, match="given back"):
        side = SideCopies(streams)
        side._held = deque(maxlen=0)
        there_and_back(side, torch.device("cpu"))


def test_what_is_not_taken_is_kept_until_its_copy_is_over() -> None:
    with LateStreams() as streams:
        side = SideCopies(streams)
        host = torch.arange(4.0)
        side.bring(host, torch.device("cpu"))  # dropped at once
        assert torch.equal(side.take(side.bring(host, torch.device("cpu"))), host)


def test_two_are_under_way_at_most() -> None:
    with LateStreams() as streams:
        side, host = SideCopies(streams), torch.zeros(4)
        for at in range(5):
            side.send(torch.ones(4), host)
            assert len(streams.pending) == min(at + 1, 2)
        side.settle()
        assert not streams.pending and not side._held


def test_a_device_that_shares_the_memory_of_the_host_has_none() -> None:
    assert side_streams(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    streams = side_streams(device)
    if streams is not None:
        with device:
            host = torch.zeros(1 << 20, pin_memory=True, device="cpu")
            side = SideCopies(streams)
            for _ in range(20):
                side.send(torch.full((1 << 20,), 7.0), host)
                assert (side.take(side.bring(host, device)) == 7).all()
