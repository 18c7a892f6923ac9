"""Block graphs on a CPU, and faults that are planted in what they copy and where they look."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from models import assert_same, batch, our_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mebp_triton.blocks.graph_players import SameCall
from mebp_triton.blocks.graphs import BlockGraphs
from mebp_triton.blocks.static_buffers import StaticBuffer, StaticBuffers


def with_graphs(model: Any, player: Any = None, **options: Any) -> BlockGraphs:
    """Lets the blocks of ``model`` be played by ``player``, or by calling the same functions again."""
    engine = model.mebp.engine
    engine.graphs = BlockGraphs(engine.blocks, player or SameCall(), **options)
    return engine.graphs


def run(model: Any, **examples: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss and every gradient of one pass."""
    model.zero_grad()
    loss = model(**(examples or batch()), use_cache=False).loss
    loss.backward()
    return loss.detach(), our_gradients(model)


def same_run(ours: Any, plain: Any, **examples: Any) -> None:
    """Both models give the same loss and gradients, to the bit."""
    (loss, gradients), (expected, truth) = run(ours, **examples), run(plain, **examples)
    assert torch.equal(loss, expected)
    assert_same(gradients, truth)


def differs(ours: Any, plain: Any, **examples: Any) -> bool:
    """Whether ``same_run`` fails."""
    try:
        same_run(ours, plain, **examples)
    except AssertionError:
        return True
    return False


class WatchedBuffers(StaticBuffers):
    """Buffers that remember what was copied in, and that no longer fill those of ``stale`` after the first time."""

    def __init__(self, stale: str | None = None) -> None:
        super().__init__()
        self.stale = stale
        self.sources: dict[int, Tensor] = {}
        self.filled: set[int] = set()

    def fill(self, pairs: Iterable[tuple[StaticBuffer, Tensor]]) -> None:
        stale = {id(buffer) for key, buffer in self._made.items() if key[0][0] == self.stale}  # type: ignore[index]
        fresh = [(buffer, source) for buffer, source in pairs if id(buffer) not in stale & self.filled]
        self.filled |= {id(buffer) for buffer, _ in fresh}
        self.sources |= {id(source): source for _, source in fresh}
        super().fill(fresh)


class Poisoned(SameCall):
    """Plays while everything that was copied in is NaN where it came from, so that a pass must read its buffers."""

    def __init__(self, buffers: WatchedBuffers) -> None:
        self.buffers, self.poisoned = buffers, 0

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        def play() -> None:
            sources = [source for source in self.buffers.sources.values() if source.is_floating_point()]
            kept = [source.detach().clone() for source in sources]
            for source in sources:
                source.data.fill_(float("nan"))
            self.poisoned += len(sources)
            function()
            for source, value in zip(sources, kept, strict=True):
                source.data.copy_(value)
            self.buffers.sources.clear()

        return play


class Wrong(SameCall):
    """Plays something else than it recorded: the results of a pass are wrong in one bit."""

    def record(self, function: Any) -> Callable[[], None]:
        def play() -> None:
            function()
            function.outputs[0].tensor.view(-1).view(torch.uint8)[0] ^= 1

        return play


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Tape(TorchDispatchMode):
    """Takes down each operation that is run, with the tensors that it read and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, _tensors(output)))
        return output


class Taped(SameCall):
    """Plays as a CUDA graph does: the same operations over the same memory, and nothing of the code that ran them."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        tape = _Tape()
        with tape:
            function()

        @torch.no_grad()
        def play() -> None:
            for func, args, kwargs, outputs in tape.operations:
                for kept, now in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                    if kept.data_ptr() != now.data_ptr():  # neither a view nor an operation in place
                        kept.data.copy_(now)

        return play
