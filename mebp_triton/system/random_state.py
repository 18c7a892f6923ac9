"""The states of the random generators, saved and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomState:
    """The states of the generators, taken when it is made: with them, a recompute draws the same dropout masks.

    Args:
        device: whose generator is saved beside the CPU's.
        states: saved states, to put back in place of the present ones.

    Attributes:
        states: "cpu", and "cuda" where ``device`` is one.
    """

    def __init__(self, device: torch.device, states: Mapping[str, Tensor] | None = None) -> None:
        self.device = device
        if states is None:
            states = {"cpu": torch.get_rng_state()}
            if device.type == "cuda":
                states["cuda"] = torch.cuda.get_rng_state(device)
        self.states = states

    def put_back(self) -> None:
        """Sets the generators to these states."""
        torch.set_rng_state(self.states["cpu"])
        if "cuda" in self.states:
            torch.cuda.set_rng_state(self.states["cuda"], self.device)

    def changed(self) -> bool:
        """Whether random numbers have been drawn since."""
        now = RandomState(self.device).states
        return any(not torch.equal(now[kind], state) for kind, state in self.states.items())

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """While active, the generators go on from these states; afterwards from where they were."""
        with torch.random.fork_rng(devices=[self.device] if "cuda" in self.states else []):
            self.put_back()
            yield
