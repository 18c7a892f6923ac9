"""Facts about each optimizer, for settings and the memory plan. Imports no torch, so that parsing is quick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Optim = Literal["adamw", "adamw_8bit", "mezo"]


@dataclass(frozen=True)
class OptimizerFacts:
    """The facts about one optimizer.

    Attributes:
        help: what ``mebp train --help`` says about it.
        state_bytes: the bytes of state that it keeps for a block's adapter of so many float32 parameters, in the place
            that the setting ``optimizer_state`` names.
        gradients: whether a step runs a backward pass. Without one, nothing waits for it, and the plan has no phase
            for it.
        in_backward: whether it can step a block within the backward pass, see the setting ``optimizer_in_backward``.
        make: makes the object, of groups of parameters, whose ``step(selected=...)`` the plan runs without data to
            count what a step takes beyond gradients and state. None where that is a copy of the largest parameter.
    """

    help: str
    state_bytes: Callable[[int], int]
    gradients: bool = True
    in_backward: bool = False
    make: Callable[[Sequence[Sequence[Any]]], Any] | None = None


def _make_adamw(groups: Sequence[Sequence[Any]]) -> Any:
    from .adamw import BlockAdamW

    return BlockAdamW(groups)


def _make_adamw_8bit(groups: Sequence[Sequence[Any]]) -> Any:
    from .adamw import BlockAdamW

    return BlockAdamW(groups, eight_bit=True)


def _two_moments_in_8_bits(parameters: int) -> int:
    from mebp_triton.store.dynamic8 import encoded_bytes

    return 2 * encoded_bytes(parameters)


# ``training/updates.py`` has for each the ``Update`` that takes its steps.
OPTIMIZERS: dict[str, OptimizerFacts] = {
    "adamw": OptimizerFacts(
        "two moments in float32", lambda parameters: 2 * 4 * parameters, in_backward=True, make=_make_adamw
    ),
    "adamw_8bit": OptimizerFacts("moments in 8 bits", _two_moments_in_8_bits, in_backward=True, make=_make_adamw_8bit),
    "mezo": OptimizerFacts("zeroth order, two forward passes", lambda parameters: 0, gradients=False),
}
