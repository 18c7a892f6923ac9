"""AdamW over paged state, one group per block, with an explicit rule for blocks that a step did not select."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mebp_triton.blocks.options import UNSELECTED_UPDATES, UnselectedUpdate
from mebp_triton.blocks.runner import BlockRunner
from mebp_triton.store.optimizer_state import Moments
from mebp_triton.store.residency import Residency


def block_groups(model: nn.Module, engine: BlockRunner) -> list[list[nn.Parameter]]:
    """Returns trainable parameters block by block; a last group has those outside of any block, if there are some."""
    groups = [engine.trainable(index) for index in range(len(engine.blocks))]
    inside = {id(parameter) for group in groups for parameter in group}
    outside = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    return [*groups, outside] if outside else groups


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns the 2-norm of all gradients together.

    It does not clip, so that the norm can be checked first: clipping by a norm of NaN makes every gradient NaN.
    """
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class BlockAdamW(torch.optim.Optimizer):
    """AdamW group by group; torch's own functional form does the arithmetic.

    Args:
        groups: parameters block by block, see ``block_groups``.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        unselected_update: what ``step`` does to a group that was not selected. "momentum": a step with a zero
            gradient, LCSB's implicit update (the moments decay, weight decay acts, the step counts). "none": nothing.
        residency: where the moments lie: "device", "host" or "file".
        directory: where "file" puts its file.
        eight_bit: keep the moments in 8 bits, as bitsandbytes' ``AdamW8bit`` does; the arithmetic is the same.

    Attributes:
        lag: for each group, the steps with a zero gradient that its moments have not taken yet. Such a step only scales
            them, so it is put off until the group is selected again, and all are taken in one go. The parameters move
            at every step, since the next forward pass needs them.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        unselected_update: UnselectedUpdate = "momentum",
        residency: Residency = "device",
        directory: Path = Path("."),
        eight_bit: bool = False,
    ) -> None:
        if unselected_update not in UNSELECTED_UPDATES:
            raise ValueError(
                f"unselected update must be one of {', '.join(UNSELECTED_UPDATES)}, got {unselected_update!r}"
            )
        self.unselected_update = unselected_update
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([{"params": list(group)} for group in groups], defaults)
        self.moments = Moments(groups, residency, directory, eight_bit)
        self.steps = [[torch.zeros(()) for _ in group] for group in groups]
        self.lag = [0] * len(self.steps)

    @torch.no_grad()
    def step(self, closure: None = None, selected: Collection[int] | None = None) -> None:  # type: ignore[override]
        """Takes one step.

        Args:
            closure: must be None; the parameter is that of torch's optimizers.
            selected: the groups whose gradients count, all if it is None. ``unselected_update`` rules the others.
        """
        if closure is not None:
            raise ValueError("BlockAdamW takes no closure")
        for index, group in enumerate(self.param_groups):
            if selected is None or index in selected:
                self._step_group(index, group)
            elif self.unselected_update == "momentum":
                self._coast(index, group)

    @contextmanager
    def step_in_backward(
        self,
        selected: Collection[int] | None = None,
        max_grad_norm: float = math.inf,
        on_norm: Callable[[int, float], None] = lambda index, norm: None,
    ) -> Iterator[list[float]]:
        """While active, a backward pass steps each selected group as soon as its gradients are complete.

        They are then freed, so that the gradients of one group exist at a time. Only one backward pass may run. At the
        end, the other groups get what ``step`` does to them. Without clipping, the result is that of ``step`` to the
        bit.

        Args:
            selected: as for ``step``.
            max_grad_norm: the limit to the norm of each group's gradients.
            on_norm: called with a group's index and the norm of its gradients before it is stepped; may raise.

        Yields:
            The norms of the groups before clipping; each group adds its own when it is stepped.
        """
        norms: list[float] = []
        missing = {
            index: {id(parameter) for parameter in group["params"]}
            for index, group in enumerate(self.param_groups)
            if selected is None or index in selected
        }

        @torch.no_grad()
        def finish(index: int) -> None:
            del missing[index]
            group = self.param_groups[index]
            total = total_norm(group["params"])
            norm = float(total)
            on_norm(index, norm)
            torch.nn.utils.clip_grads_with_norm_(group["params"], max_grad_norm, total)
            norms.append(norm)
            self._step_group(index, group)
            for parameter in group["params"]:
                parameter.grad = None

        def hook(index: int, parameter: Tensor) -> None:
            if index not in missing:
                raise RuntimeError(f"block {index} got gradients again after its step: only one backward pass may run")
            missing[index].discard(id(parameter))
            if not missing[index]:
                finish(index)

        handles = [
            parameter.register_post_accumulate_grad_hook(functools.partial(hook, index))
            for index in missing
            for parameter in self.param_groups[index]["params"]
        ]
        try:
            yield norms
        finally:
            for handle in handles:
                handle.remove()
        for index, group in enumerate(self.param_groups):
            if index in missing and any(parameter.grad is not None for parameter in group["params"]):
                finish(index)  # not all of its parameters have a part in the loss
        if selected is not None and self.unselected_update == "momentum":
            with torch.no_grad():
                for index in sorted(set(range(len(self.param_groups))).difference(selected)):
                    self._coast(index, self.param_groups[index])

    def _coast(self, index: int, group: dict[str, Any]) -> None:
        """Takes a step with a zero gradient, by the moments as they would be now, which stay as they are."""
        if not group["params"]:
            return
        self.lag[index] += 1
        lag, (beta1, beta2) = self.lag[index], group["betas"]
        with self.moments.open(index, changes=False) as (first, second):
            for parameter, m, v, steps in zip(group["params"], first, second, self.steps[index], strict=True):
                count = float(steps) + lag
                bias1, bias2 = 1 - beta1**count, 1 - beta2**count
                spread = v.sqrt().mul_(math.sqrt(beta2**lag / bias2)).add_(group["eps"])
                working = parameter.to(m.dtype)  # the parameter itself, if it is as wide as its moments
                working.mul_(1 - group["lr"] * group["weight_decay"])
                working.addcdiv_(m, spread, value=-group["lr"] * beta1**lag / bias1)
                if working is not parameter:
                    parameter.copy_(working)

    def _catch_up(self, index: int, group: dict[str, Any], first: list[Tensor], second: list[Tensor]) -> None:
        """Takes the steps with a zero gradient that the moments lag behind."""
        lag, self.lag[index] = self.lag[index], 0
        if lag == 0:
            return
        for moments, beta in zip((first, second), group["betas"], strict=True):
            for moment in moments:
                moment.mul_(beta**lag)
        for steps in self.steps[index]:
            steps += lag

    def _step_group(self, index: int, group: dict[str, Any]) -> None:
        """Steps the parameters of a group that have gradients, as torch's AdamW does."""
        places = [place for place, p in enumerate(group["params"]) if p.grad is not None]
        if not places:
            return
        parameters = [group["params"][place] for place in places]
        with self.moments.open(index) as (first, second):
            self._catch_up(index, group, first, second)
            firsts, seconds = [first[place] for place in places], [second[place] for place in places]
            working = [p.to(m.dtype) for p, m in zip(parameters, firsts, strict=True)]
            grads = [p.grad.to(w.dtype) for p, w in zip(parameters, working, strict=True)]
            adamw(
                working,
                grads,
                firsts,
                seconds,
                [],
                [self.steps[index][place] for place in places],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for parameter, worked in zip(parameters, working, strict=True):
                if worked is not parameter:
                    parameter.copy_(worked)

    def export_group(self, index: int, copy: bool = True) -> dict[str, Tensor]:
        """Returns a group's state on the CPU. Without ``copy``, the live moments themselves if they lie there."""
        steps = torch.stack(self.steps[index]) if self.steps[index] else torch.zeros(0)
        moments = self.moments.buffers[index].to("cpu", copy=copy)
        return {"moments": moments, "steps": steps, "lag": torch.tensor(self.lag[index])}

    def import_group(self, index: int, state: dict[str, Tensor]) -> None:
        """Loads what ``export_group`` returned. ValueError, and nothing is changed, if it is another model's."""
        self._check_group(index, state)
        self.moments.buffers[index].copy_(state["moments"])
        self.steps[index] = [value.clone() for value in state["steps"]]
        self.lag[index] = int(state["lag"])

    def _check_group(self, index: int, state: dict[str, Tensor]) -> None:
        buffer, saved, steps = self.moments.buffers[index], state.get("moments"), state.get("steps")
        fits = saved is not None and saved.shape == buffer.shape and saved.dtype == buffer.dtype
        counted = steps is not None and steps.shape == (len(self.steps[index]),) and state.get("lag") is not None
        if not fits or not counted:
            raise ValueError(f"the saved optimizer state does not fit block {index} of this model")

    def export_state(self) -> dict[str, Tensor]:
        """Returns a copy of the state of all groups on the CPU, by ``NAME.GROUP``."""
        groups = range(len(self.param_groups))
        return {f"{name}.{index}": value for index in groups for name, value in self.export_group(index).items()}

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Loads what ``export_state`` returned. ValueError, and nothing is changed, if it is another model's."""
        split: list[dict[str, Tensor]] = [{} for _ in self.param_groups]
        for index, group in enumerate(split):
            group |= {
                name: state[f"{name}.{index}"] for name in ("moments", "steps", "lag") if f"{name}.{index}" in state
            }
            self._check_group(index, group)
        for index, group in enumerate(split):
            self.import_group(index, group)

    def state_dict(self) -> dict[str, Any]:
        """Returns what trainers save of any torch optimizer; its state is that of ``export_state``."""
        return {**super().state_dict(), "state": self.export_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` returned; see ``import_state``."""
        self.import_state(state_dict["state"])
        super().load_state_dict({**state_dict, "state": {}})
