"""Whether a pass of a block can be played again, and whether playing it gives the block's own bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mebp_triton.system.random_state import RandomState

from .graph_players import Player
from .static_block import CannotBeStatic
from .static_passes import StaticPass

WARM_UPS = 3  # the first recompute finds the layer that need not be computed, and the second leaves it out

# Operations after which the host waits for the device: their result is a Python value, or decides on a shape.
_aten = torch.ops.aten
HOST_WAITS = {
    _aten._local_scalar_dense,
    _aten.bincount,
    _aten.equal,
    _aten.is_nonzero,
    _aten.masked_select,
    _aten.nonzero,
    _aten.unique_consecutive,
    _aten.unique_dim,
    _aten._unique2,
}


class _HostWaits(TorchDispatchMode):
    """Raises CannotBeStatic at an operation after which the host waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        waits = packet in HOST_WAITS or func is _aten.repeat_interleave.Tensor
        if packet in (_aten.index, _aten.index_put, _aten.index_put_):
            waits = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if waits:
            raise CannotBeStatic(f"it calls {packet.__name__.lstrip('_')}, after which the host waits for the device")
        return func(*args, **(kwargs or {}))


def warm_up(step: StaticPass, player: Player, device: torch.device) -> None:
    """Runs ``step`` as often as it takes to settle, and checks what it does. Its inputs are filled.

    Raises:
        CannotBeStatic: a graph would not do all that ``step`` does.
    """
    block = step.block
    read = [*(buffer.tensor for buffer in step.inputs.values()), *block.tensors]
    versions, before, random = [tensor._version for tensor in read], block.state(), RandomState(device)
    try:
        for attempt in range(WARM_UPS):
            if attempt == 1:
                with _HostWaits():
                    player.warm_up(step, strict=False)
            else:
                player.warm_up(step, strict=attempt == WARM_UPS - 1)
            if [tensor._version for tensor in read] != versions:
                raise CannotBeStatic("it changes an argument, a parameter or a buffer in place")
            if block.state() != before:
                raise CannotBeStatic("it keeps something in an attribute of a module")
            if random.changed():
                raise CannotBeStatic("it draws random numbers, as dropout above 0 does")
    finally:
        random.put_back()


def bits_differ(ours: Any, theirs: Any) -> bool:
    """Whether the tensors of two results differ in a bit, or there are others."""
    return any(not _same(one, other) for one, other in _pairs(ours, theirs))


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other or bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    bits = [tensor.detach().contiguous().view(torch.uint8) for tensor in (one, other)]  # NaN is equal to itself here
    return torch.equal(*bits)


def _pairs(ours: Any, theirs: Any) -> list[tuple[Any, Any]]:
    one, other = tree_leaves(ours), tree_leaves(theirs)
    return list(zip(one, other, strict=True)) if len(one) == len(other) else [(None, theirs)]


def agrees(played: Any, truth: Any, again: Callable[[], Any]) -> bool:
    """Whether ``played`` is the block's own result.

    It is, if it has the same bits. Where the block itself gives other bits each time, as the backward pass of an
    attention may that adds up in any order, it may be as far from ``truth`` as another result of the block, fourfold.

    Args:
        played: what a graph gave.
        truth: what the block gave.
        again: runs the block once more.
    """
    if not bits_differ(played, truth):
        return True
    second = again()
    spread = max(_distances(second, truth), default=0.0)
    return 0 < spread < float("inf") and max(_distances(played, truth)) <= 4 * spread


def _distances(ours: Any, theirs: Any) -> Sequence[float]:
    """Returns, for each pair, the norm of its difference over that of ``theirs``; infinite for NaN or another shape."""
    found = []
    for one, other in _pairs(ours, theirs):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
            found.append(0.0 if _same(one, other) else float("inf"))
            continue
        difference = float((one.double() - other.double()).norm())
        norm = float(other.double().norm())
        distance = difference / norm if norm else 0.0 if difference == 0 else float("inf")
        found.append(float("inf") if math.isnan(distance) else distance)  # a maximum may pass over NaN
    return found
