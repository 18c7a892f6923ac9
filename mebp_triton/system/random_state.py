"""The states of the random generators, kept and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The generators' states, so that a recompute draws the same dropout masks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def changed(self) -> bool:
        """Whether anything was drawn since."""
        now = RandomState(self.device)
        same = torch.equal(now.cpu, self.cpu)
        if self.cuda is not None and now.cuda is not None:
            same = same and torch.equal(now.cuda, self.cuda)
        return not same

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self.device] if self.cuda is not None else []):
            self.put_back()
            yield
