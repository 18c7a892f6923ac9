"""AdamW over paged state, one group per block, with an explicit rule for blocks that a step did not select."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mebp_triton.blocks.options import UNSELECTED_UPDATES, UnselectedUpdate
from mebp_triton.blocks.runner import BlockRunner
from mebp_triton.store.optimizer_state import Moments
from mebp_triton.store.residency import Residency

from .tensor_lists import clip, copy_back, in_dtype_of, split_like, total_norm

TEMPORARIES = 1 << 20  # elements of a batch of groups for which a step makes temporaries, in float32


def block_groups(model: nn.Module, engine: BlockRunner) -> list[list[nn.Parameter]]:
    """Returns trainable parameters block by block; a last group has those outside of any block, if there are some."""
    groups = [engine.trainable(index) for index in range(len(engine.blocks))]
    inside = {id(parameter) for group in groups for parameter in group}
    outside = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    return [*groups, outside] if outside else groups


class BlockAdamW(torch.optim.Optimizer):
    """AdamW over groups of parameters; torch's own fused form does the arithmetic, in one call where it can.

    Moments that lie on the device are stepped all at once. Others are brought there group by group.

    Args:
        groups: parameters block by block, see ``block_groups``.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        unselected_update: what ``step`` does to a group that was not selected. "momentum": a step with a zero
            gradient, LCSB's implicit update (the moments decay, weight decay acts, the step counts). "none": nothing.
        residency: where the moments lie: "device", "host" or "file".
        directory: where "file" puts its file.
        eight_bit: keep the moments in 8 bits, as bitsandbytes' ``AdamW8bit`` does; the arithmetic is the same.

    Attributes:
        steps: for each parameter, how many steps its moments have taken: numbers on the CPU.
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
        self._counts = torch.zeros(sum(map(len, groups)))
        self.steps = split_like(self._counts, groups)
        self._first = list(itertools.accumulate(map(len, groups), initial=0))
        self._copies: dict[torch.device, tuple[Tensor, list[list[Tensor]]]] = {}
        self._copied: dict[torch.device, int] = {}  # the version of the counts that a copy has
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
        chosen = [index for index in range(len(self.param_groups)) if selected is None or index in selected]
        # Without narrow parameters a step has no temporaries, so it may take all groups at once.
        self._each(self._step_groups, self._batches(chosen, None if self._wide() else TEMPORARIES))
        if self.unselected_update == "momentum":
            self._coast_all(chosen)

    def _coast_all(self, selected: Collection[int]) -> None:
        others = [index for index in range(len(self.param_groups)) if index not in selected]
        self._each(self._coast, self._batches(others, TEMPORARIES))

    def _each(self, take: Callable[[list[int]], None], batches: Iterable[list[int]]) -> None:
        """Calls ``take`` with each batch of groups, while the moments of the next one come."""
        for batch, following in itertools.pairwise([*batches, []]):
            self.moments.prefetch([*batch, *following])
            take(batch)
        self.moments.prefetch([])

    def _wide(self) -> bool:
        """Whether every parameter and gradient has the dtype in which it is computed."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return all(p.itemsize >= 4 and (p.grad is None or p.grad.dtype == p.dtype) for p in parameters)

    def _batches(self, indices: Iterable[int], limit: int | None) -> Iterator[list[int]]:
        """Groups that one call can step: of the same settings, with moments on the device; else one by one.

        ``limit``: the most elements of a batch of several groups.
        """
        batch: list[int] = []
        settings, size = None, 0
        for index in indices:
            group = self.param_groups[index]
            if not group["params"]:
                continue
            own = tuple(group[name] for name in ("lr", "betas", "eps", "weight_decay"))
            elements = sum(parameter.numel() for parameter in group["params"])
            full = limit is not None and size + elements > limit
            if batch and (own != settings or full or not self.moments.resident):
                yield batch
                batch, size = [], 0
            batch.append(index)
            settings, size = own, size + elements
        if batch:
            yield batch

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
            if group["params"] and (selected is None or index in selected)
        }

        @torch.no_grad()
        def finish(index: int) -> None:
            del missing[index]
            group = self.param_groups[index]
            total = total_norm(group["params"])
            norm = float(total)
            on_norm(index, norm)
            clip(group["params"], max_grad_norm, total, norm)
            norms.append(norm)
            self._step_groups([index])
            for parameter in group["params"]:
                parameter.grad = None
            self.moments.prefetch([lower for lower in missing if lower < index][-1:])

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
        self.moments.prefetch([])
        if selected is not None and self.unselected_update == "momentum":
            with torch.no_grad():
                self._coast_all(selected)

    @contextmanager
    def _moments(self, indices: Sequence[int], changes: bool = True) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """While active, the first and second moments of all parameters of some groups are at hand."""
        with ExitStack() as stack:
            opened = [stack.enter_context(self.moments.open(index, changes)) for index in indices]
            yield [pair for first, second in opened for pair in zip(first, second, strict=True)]

    def _coast(self, indices: Sequence[int]) -> None:
        """Takes a step with a zero gradient, by the moments as they would be now, which stay as they are."""
        group = self.param_groups[indices[0]]
        (beta1, beta2), rate = group["betas"], group["lr"]
        parameters, spreads, sizes = [], [], []
        for index in indices:
            self.lag[index] += 1
            lag = self.lag[index]
            for parameter, steps in zip(self.param_groups[index]["params"], self.steps[index], strict=True):
                count = float(steps) + lag
                parameters.append(parameter)
                spreads.append(math.sqrt(beta2**lag / (1 - beta2**count)))
                sizes.append(-rate * beta1**lag / (1 - beta1**count))
        with self._moments(indices, changes=False) as moments:
            first, second = ([pair[which] for pair in moments] for which in (0, 1))
            spread = torch._foreach_sqrt(second)
            torch._foreach_mul_(spread, spreads)
            torch._foreach_add_(spread, group["eps"])
            working = in_dtype_of(first, parameters)
            torch._foreach_mul_(working, 1 - rate * group["weight_decay"])
            torch._foreach_addcdiv_(working, first, spread, sizes)
            copy_back(working, parameters)

    def _catch_up(self, indices: Sequence[int], moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Takes the steps with a zero gradient that the moments lag behind."""
        given = iter(moments)
        late = [(self.lag[index], pair) for index in indices for _, pair in zip(self.steps[index], given, strict=False)]
        late = [(lag, pair) for lag, pair in late if lag]
        if late:
            for which, beta in enumerate(self.param_groups[indices[0]]["betas"]):
                torch._foreach_mul_([pair[which] for _, pair in late], [beta**lag for lag, _ in late])
        for index in indices:
            for steps in self.steps[index] if self.lag[index] else ():
                steps += self.lag[index]
            self.lag[index] = 0

    def _step_groups(self, indices: Sequence[int]) -> None:
        """Steps the parameters of some groups that have gradients, as torch's AdamW does."""
        groups = [(index, self.param_groups[index]["params"]) for index in indices]
        groups = [(index, members) for index, members in groups if any(p.grad is not None for p in members)]
        if not groups:
            return
        chosen, settings = [index for index, _ in groups], self.param_groups[indices[0]]
        with self._moments(chosen) as moments:
            self._catch_up(chosen, moments)
            places = [(index, place) for index, members in groups for place in range(len(members))]
            parameters = [parameter for _, members in groups for parameter in members]
            rows = [row for row in zip(parameters, moments, places, strict=True) if row[0].grad is not None]
            parameters = [parameter for parameter, *_ in rows]
            first, second = ([pair[which] for _, pair, _ in rows] for which in (0, 1))
            working = in_dtype_of(first, parameters)
            device = parameters[0].device
            steps = self._steps_on(device)
            adamw(
                working,
                in_dtype_of(first, [p.grad for p in parameters]),
                first,
                second,
                [],
                [steps[index][place] for _, _, (index, place) in rows],
                fused=device.type in ("cpu", "cuda"),
                amsgrad=False,
                beta1=settings["betas"][0],
                beta2=settings["betas"][1],
                lr=settings["lr"],
                weight_decay=settings["weight_decay"],
                eps=settings["eps"],
                maximize=False,
            )
            if steps is not self.steps:
                self._counts[torch.tensor([self._first[index] + place for _, _, (index, place) in rows])] += 1
                self._copied[device] = self._counts._version
            # The fused step does not count as a change of the parameters, which a backward pass would have to notice.
            torch.autograd.graph.increment_version(working)
            copy_back(working, parameters)

    def _steps_on(self, device: torch.device) -> list[list[Tensor]]:
        """``steps`` where a fused step reads them, on the parameters' device."""
        return self.steps if device.type == "cpu" else self._copied_steps(device)

    def _copied_steps(self, device: torch.device) -> list[list[Tensor]]:
        """A copy of ``steps`` in which a step counts on. It is made anew, in one transfer, only where ours differ.

        They do after ``_catch_up`` and after a resume. The transfer waits for the device.
        """
        if device not in self._copies:
            copy = torch.empty_like(self._counts, device=device)
            self._copies[device] = copy, split_like(copy, self.steps)
        copy, views = self._copies[device]
        if self._copied.pop(device, None) != self._counts._version:
            copy.copy_(self._counts)
        return views

    def export_group(self, index: int, copy: bool = True) -> dict[str, Tensor]:
        """Returns a group's state on the CPU. Without ``copy``, the live moments themselves if they lie there."""
        steps = torch.stack(self.steps[index]) if self.steps[index] else torch.zeros(0)
        self.moments.settle(index)
        moments = self.moments.buffers[index].to("cpu", copy=copy)
        return {"moments": moments, "steps": steps, "lag": torch.tensor(self.lag[index])}

    def import_group(self, index: int, state: dict[str, Tensor]) -> None:
        """Loads what ``export_group`` returned. ValueError, and nothing is changed, if it is another model's."""
        self._check_group(index, state)
        self.moments.settle(index)
        self.moments.buffers[index].copy_(state["moments"])
        for own, value in zip(self.steps[index], state["steps"], strict=True):
            own.copy_(value)
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
