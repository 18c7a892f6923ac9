"""Blocks as graphs: each pass of a block is recorded once and played again, with one launch.

A graph reads and writes static buffers (``static_passes``). Before it is played, everything that the pass reads is
copied in; afterwards the results are copied out. Weights that are paged lie at the addresses of one of two arenas, so
like blocks share a forward and a backward graph for each arena; resident weights have a pair for each block.

When is a graph made? The first time that a block meets a call of some shapes, it runs as usual; the second time the
pass is recorded. When is it made anew? For every other value of the key, which has the block's kind (its modules and
the addresses of its weights), the layouts of all tensors among the arguments, the values of everything else, autocast,
and which gradients are wanted. When is it used for a block? After it has given, once, the bits of the block's own pass.

What cannot be recorded runs as usual, and a warning says why, once for each reason.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .call import Arguments
from .graph_checks import agrees, warm_up
from .graph_players import Player
from .static_block import CannotBeStatic, LiveBlock, StaticBlock, check_hooks_of_all_modules, counting_attributes
from .static_buffers import StaticBuffers
from .static_passes import StaticBackward, StaticForward, StaticPass, leaf_keys

T = TypeVar("T")
SEEN = 256  # calls without a graph that are remembered for each block


@dataclass(frozen=True)
class BlockCall:
    """A call of a block, as its passes see it.

    Attributes:
        index: the block's.
        forward: the block's own forward.
        arguments: the structure of the arguments.
        leaves: their leaves.
        hidden: the place of the block's input among them.
        autocast: the arguments of ``torch.autocast`` in the forward pass.
    """

    index: int
    forward: Callable[..., Any]
    arguments: Arguments
    leaves: Sequence[Any]
    hidden: int
    autocast: dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """The results that a call asks for.

    Attributes:
        sort: which pass it is.
        places: the places of the leaves whose gradients are wanted.
        parameters: the parameters whose gradients are wanted.
        grads: the gradients of the outputs; None where an output has none.
    """

    sort: type[StaticPass]
    places: tuple[int, ...] = ()
    parameters: tuple[nn.Parameter, ...] = ()
    grads: tuple[Tensor | None, ...] = ()


@dataclass(eq=False)
class _Graph:
    """A recorded pass.

    Attributes:
        play: does what ``step`` does.
        proved: the blocks for which it gave their own bits.
    """

    step: StaticPass
    play: Callable[[], None]
    proved: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Kind:
    """Blocks that share graphs: their modules are alike, and their int4 weights lie at the same addresses.

    Attributes:
        block: computes for all of them.
        graphs: the least recently used first.
        refused: whether its blocks run as usual.
    """

    block: StaticBlock
    graphs: OrderedDict[Hashable, _Graph] = field(default_factory=OrderedDict)
    refused: bool = False


class BlockGraphs:
    """Records the passes of a model's blocks, and plays them.

    Args:
        blocks: the model's blocks, in order.
        player: records and plays.
        limit: the most graphs of a kind of blocks; the least recently used one is dropped.
        buffers: where static buffers come from.
        addresses: where the int4 weights of a block lie. Another function is for tests.
        prove: whether a graph must give a block's own bits once before it is used for that block.

    Attributes:
        made: how many graphs were recorded.
        played: how many passes were played from a graph.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        player: Player,
        limit: int = 32,
        buffers: StaticBuffers | None = None,
        addresses: Callable[[LiveBlock], tuple[int, ...]] = LiveBlock.addresses,
        prove: bool = True,
    ) -> None:
        self.blocks, self.player, self.limit, self.prove = list(blocks), player, limit, prove
        self.buffers = StaticBuffers() if buffers is None else buffers
        self.addresses = addresses
        self._forget()

    def _forget(self) -> None:
        self.made = self.played = 0
        self._counting = counting_attributes(self.blocks)
        self._live: dict[int, LiveBlock] = {}  # only blocks that can be copied are here
        self._likenesses: dict[Hashable, int] = {}
        self._alone: set[int] = set()  # blocks whose bits a shared graph did not give
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._said: set[str] = set()

    def forward(self, call: BlockCall, eager: Callable[[], Any]) -> Any:
        """Returns the block's output for ``call``, without a graph of autograd: what ``eager()`` returns."""
        return self._run(call, Wanted(StaticForward), eager)

    def backward(
        self,
        call: BlockCall,
        places: Sequence[int],
        parameters: Sequence[nn.Parameter],
        grads: Sequence[Tensor | None],
        eager: Callable[[], Sequence[Tensor | None]],
    ) -> Sequence[Tensor | None]:
        """Returns the gradients of the leaves at ``places``, then those of ``parameters``: what ``eager()`` returns.

        Args:
            call: the call, with the block's input among its leaves.
            places: the places of leaves.
            parameters: parameters of the block.
            grads: the gradients of the outputs; None where an output has none.
            eager: runs the block as usual.
        """
        return self._run(call, Wanted(StaticBackward, tuple(places), tuple(parameters), tuple(grads)), eager)

    def _run(self, call: BlockCall, wanted: Wanted, eager: Callable[[], T]) -> T:
        try:
            check_hooks_of_all_modules()
            live = self._live_block(call)
            kind = self._kind(call.index, live)
            graph = self._graph(call, wanted, live, kind)
        except CannotBeStatic as reason:
            self._say(str(reason))
            graph = None
        if graph is None:
            return eager()
        self._fill(graph.step, call, wanted, live)
        graph.play()
        result: T = graph.step.results()
        if not self.prove or call.index in graph.proved:
            self.played += 1
            return result
        truth = eager()
        if agrees(result, truth, eager):
            graph.proved.add(call.index)
        elif call.index not in self._alone:
            self._alone.add(call.index)  # its next graphs are its own
        else:
            kind.refused = True
            self._say(f"a graph of block {call.index} gives other numbers than the block")
        return truth

    @staticmethod
    def _fill(step: StaticPass, call: BlockCall, wanted: Wanted, live: LiveBlock) -> None:
        step.fill(call.leaves, call.hidden, live.tensors(), [grad for grad in wanted.grads if grad is not None])

    def _live_block(self, call: BlockCall) -> LiveBlock:
        live = self._live.get(call.index)
        if live is None or not live.unchanged():
            live = self._live[call.index] = LiveBlock(self.blocks[call.index], call.forward, self._counting)
        return live

    def _kind(self, index: int, live: LiveBlock) -> _Kind:
        addresses = self.addresses(live)
        if 0 in addresses:
            raise CannotBeStatic("its weights are not in place")
        likeness = self._likenesses.setdefault(live.likeness, len(self._likenesses))
        key = likeness, addresses, index if index in self._alone else None
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(StaticBlock(live, self.buffers))
        self._kinds.move_to_end(key)
        if len(self._kinds) > 4 * len(self.blocks):  # each in two arenas and two modes; weights were put elsewhere
            self._kinds.popitem(last=False)
        return kind

    def _graph(self, call: BlockCall, wanted: Wanted, live: LiveBlock, kind: _Kind) -> _Graph | None:
        """The graph of a pass; made at the second call of its kind. None if the block has to run as usual."""
        if kind.refused:
            return None
        slots = tuple(live.index_of[id(parameter)] for parameter in wanted.parameters)
        layouts = leaf_keys(call.leaves), leaf_keys(wanted.grads)
        key = (wanted.sort, wanted.places, slots, *layouts, tuple(call.autocast.values()), _numerics())
        graph = kind.graphs.get(key)
        if graph is not None:
            kind.graphs.move_to_end(key)
            return graph
        if self._is_first((id(kind), key)):
            return None
        self._check_devices(call, wanted, live)
        step = wanted.sort(
            kind.block,
            self.buffers,
            call.arguments,
            call.leaves,
            call.autocast,
            places=wanted.places,
            slots=slots,
            grads=wanted.grads,
        )
        self._fill(step, call, wanted, live)
        try:
            warm_up(step, self.player, call.leaves[call.hidden].device)
            graph = kind.graphs[key] = _Graph(step, self.player.record(step))
        except CannotBeStatic:
            kind.refused = True
            raise
        except RuntimeError as error:
            kind.refused = True
            raise CannotBeStatic(f"it cannot be recorded ({str(error).splitlines()[0]:.200})") from error
        self.made += 1
        if len(kind.graphs) > self.limit:
            kind.graphs.popitem(last=False)
        return graph

    def _check_devices(self, call: BlockCall, wanted: Wanted, live: LiveBlock) -> None:
        """Raises CannotBeStatic where a pass would read a tensor that lies elsewhere: a graph would keep its value."""
        read = [tensor for tensor in (*call.leaves, *wanted.grads, *live.tensors()) if isinstance(tensor, Tensor)]
        device = self.player.device or call.leaves[call.hidden].device
        if other := next((tensor.device for tensor in read if tensor.device != device), None):
            raise CannotBeStatic(f"a tensor that it reads is on {other}, and graphs are recorded on {device}")

    def _is_first(self, seen: Hashable) -> bool:
        """Whether this is the first of two calls that are alike."""
        if seen in self._seen:
            del self._seen[seen]
            return False
        self._seen[seen] = None
        if len(self._seen) > SEEN * len(self.blocks):
            self._seen.popitem(last=False)
        return True

    def _say(self, reason: str) -> None:
        """Warns of a reason for which a block runs as usual, once."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"block_graphs: a block runs without a graph, since {reason}", stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of the model, which records graphs of its own."""
        return {name: vars(self)[name] for name in ("blocks", "player", "limit", "prove", "addresses")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.buffers = StaticBuffers()
        self._forget()


def _numerics() -> Hashable:
    """Settings of torch by which the same operations may choose other kernels."""
    attention = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        attention.flash_sdp_enabled(),
        attention.mem_efficient_sdp_enabled(),
        attention.math_sdp_enabled(),
        attention.cudnn_sdp_enabled(),
    )
