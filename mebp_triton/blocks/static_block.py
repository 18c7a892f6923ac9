"""A block over static buffers: a copy of its module that computes from memory which stays where it is.

The copy, a ``StaticBlock``, has the int4 weights of its block where they lie, in an arena or resident, and copies of
all other parameters and buffers. It can stand for another block if that block's int4 weights lie at the same addresses
and its modules are alike: of the same classes, with the same plain attributes and shapes. Attributes that count blocks,
such as ``layer_idx``, may differ here; whether they make a difference has to be tried (see ``graphs``).
"""

from __future__ import annotations

import copy
import functools
import operator
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from mebp_triton.layers.experts import Int4Experts
from mebp_triton.layers.int4_module import Int4Module
from mebp_triton.layers.shared_input import layers_by_input
from mebp_triton.layers.stacked_adapters import BlockAdapters

from .call import PLAIN
from .recompute import Recompute
from .replay import OpaqueModule
from .static_buffers import StaticBuffers, has_buffer, layout_of

FUNCTIONS = (types.BuiltinFunctionType, type)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# An int4 weight, which is compared by its addresses; and what is set only while a block runs.
PASSING = ("_made", "tape", "stacks", "forward")
# What every module has. It is compared in other ways where a forward pass depends on it.
COMMON = vars(nn.Module()).keys() - {"training"}


def _attributes(module: nn.Module) -> Set[str]:
    """The names of a module's own attributes, and ``training``."""
    return vars(module).keys() - COMMON - set(PASSING)


def _snapshot(value: Any) -> Any:
    """The value of an attribute, for a comparison later: a container is copied, so that a change within it is seen."""
    return copy.copy(value) if isinstance(value, dict | list | set) else value


class CannotBeStatic(Exception):
    """Something of a block or its arguments has no place in static buffers; the message is half a sentence."""


def check_hooks_of_all_modules() -> None:
    """Raises CannotBeStatic where somebody has hooks on every module, which would have to run inside of blocks."""
    everywhere = vars(nn.modules.module)
    if any(everywhere.get(f"_global{name}") for name in HOOKS):
        raise CannotBeStatic("there are hooks on all modules")


def counting_attributes(blocks: Sequence[nn.Module]) -> frozenset[tuple[str, str]]:
    """The (module path, name) of attributes that several blocks have, and that are each block's number."""
    values: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    values.setdefault((path, name), []).append((index, value))
    return frozenset(
        place for place, pairs in values.items() if len(pairs) > 1 and all(index == value for index, value in pairs)
    )


class _Module:
    """One module of a block, and a quick look at whether it is still as it was."""

    def __init__(self, module: nn.Module, root: bool) -> None:
        self.module, self.kind, self.state = module, type(module), vars(module)
        self.root = root
        self.get = operator.itemgetter(*_attributes(module), "training")  # twice, so that it always returns a tuple
        self.values = tuple(map(_snapshot, self.get(self.state)))
        self.children = tuple(self.state["_modules"].values())
        self.count, self.present = self._count(), self._present()
        self.check()

    def check(self) -> None:
        # The hooks of the block itself run outside of its forward.
        if not self.root and any(self.state.get(hooks) for hooks in HOOKS):
            raise CannotBeStatic("a module inside of it has hooks")
        if not self.root and "forward" in self.state:
            raise CannotBeStatic("the forward of a module inside of it was replaced")

    def unchanged(self) -> bool:
        state = self.state
        try:
            same = self.get(state) == self.values and tuple(state["_modules"].values()) == self.children
        except (KeyError, RuntimeError):  # an attribute is gone, or is another tensor
            return False
        same = same and type(self.module) is self.kind and self._count() == self.count
        hooked = not self.root and ("forward" in state or any(state.get(hooks) for hooks in HOOKS))
        return same and not hooked and self._present() == self.present

    def _count(self) -> int:
        """How many attributes the module has, without those that come and go."""
        return len(self.state) - sum(name in self.state for name in PASSING)

    def _present(self) -> list[str]:
        """The names of the parameters and buffers that the module has, which may be None."""
        tables = self.state["_parameters"], self.state["_buffers"]
        return [name for table in tables for name, tensor in table.items() if tensor is not None]


class LiveBlock:
    """A block of the model as it is now: all that its forward depends on beside its arguments and the int4 weights.

    Args:
        module: the block.
        forward: the forward of its own.
        counting: see ``counting_attributes``.

    Attributes:
        likeness: equal for blocks whose modules are alike.
        index_of: the places of parameters among ``tensors()``, by id.

    Raises:
        CannotBeStatic: the block cannot be copied, or it is not known whether a copy would be like it.
    """

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], counting: frozenset[tuple[str, str]] = frozenset()
    ) -> None:
        own = getattr(forward, "__func__", None)
        if getattr(forward, "__self__", None) is not module or own is not type(module).forward:
            raise CannotBeStatic("its forward was replaced")
        if any(isinstance(part, Int4Experts) for part in module.modules()):
            raise CannotBeStatic("which of its experts run, and where they lie, is known only while it runs")
        self.module = module
        self.modules = [_Module(part, part is module) for part in module.modules()]
        self.int4 = [part for part in module.modules() if isinstance(part, Int4Module)]
        self.configs = {
            id(value): value for part in self.modules for value in part.values if isinstance(value, PretrainedConfig)
        }
        self._attention = self._attention_names()
        self._slots: list[tuple[dict[str, Any], str]] = []
        self.index_of: dict[int, int] = {}
        for part in module.modules():
            own_names = part.int4().tensors() if isinstance(part, Int4Module) else {}
            packed = {"weight", *own_names} if isinstance(part, Int4Module) else set()
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is not None and name not in packed and id(tensor) not in self.index_of:
                        if not has_buffer(tensor):
                            raise CannotBeStatic(f"its tensor {name} is a {type(tensor).__name__} of an unusual layout")
                        self.index_of[id(tensor)] = len(self._slots)
                        self._slots.append((table, name))
        self._layouts = [layout_of(tensor) for tensor in self.tensors()]
        self.likeness = _Likeness(self, counting).key()

    def tensors(self) -> list[Tensor]:
        """The parameters and buffers that are not int4 weights, each once."""
        return [table[name] for table, name in self._slots]

    def addresses(self) -> tuple[int, ...]:
        """Returns the addresses of the int4 weights, which change when another arena holds them."""
        return tuple(tensor.data_ptr() for part in self.int4 for tensor in part.int4().tensors().values())

    def unchanged(self) -> bool:
        """Whether this object is still true of the block. Attributes that are objects are compared by identity."""
        if not all(part.unchanged() for part in self.modules) or self._attention_names() != self._attention:
            return False
        tensors = self.tensors()
        if [self.index_of.get(id(tensor)) for tensor in tensors] != list(range(len(tensors))):
            return False
        return [layout_of(tensor) for tensor in tensors] == self._layouts

    def _attention_names(self) -> list[Any]:
        """Which attention each config chooses: modules look it up there when they run."""
        return [getattr(config, "_attn_implementation", None) for config in self.configs.values()]


class _Likeness:
    """Makes a value of a block that is equal for like blocks."""

    def __init__(self, live: LiveBlock, counting: frozenset[tuple[str, str]]) -> None:
        self.live, self.counting = live, counting
        self.paths = {id(part): path for path, part in live.module.named_modules()}
        self.visited: dict[int, int] = {}

    def key(self) -> Hashable:
        parts = []
        for path, part in self.live.module.named_modules():
            attributes = [
                (name, self._value(vars(part)[name], name))
                for name in sorted(_attributes(part))
                if (path, name) not in self.counting
            ]
            slots = [
                (name, self.live.index_of.get(id(tensor)), None if tensor is None else layout_of(tensor))
                for table in (part._parameters, part._buffers)
                for name, tensor in table.items()
            ]
            parts.append((path, _class_key(type(part)), tuple(attributes), tuple(slots)))
        return tuple(parts), tuple(self.live._attention)

    def _value(self, value: Any, name: str) -> Hashable:
        if isinstance(value, PLAIN):
            return type(value), value
        if isinstance(value, (PretrainedConfig, *FUNCTIONS)):
            return id(value)
        if isinstance(value, nn.Module | Tensor):
            places: Mapping[int, Hashable] = self.paths if isinstance(value, nn.Module) else self.live.index_of
            if id(value) in places:
                return type(value).__name__, places[id(value)]
        elif isinstance(value, types.FunctionType):
            cells = tuple(self._value(cell.cell_contents, name) for cell in value.__closure__ or ())
            return id(value.__code__), cells
        elif isinstance(value, types.MethodType):
            return id(value.__func__), self._value(value.__self__, name)
        elif isinstance(value, functools.partial):
            return self._value((value.func, value.args, value.keywords), name)
        elif id(value) in self.visited:
            return "again", self.visited[id(value)]
        elif isinstance(value, Mapping | list | tuple | Set) or type(value).__module__.startswith("mebp_triton."):
            self.visited[id(value)] = len(self.visited)
            return type(value), tuple(self._value(part, name) for part in _contents(value))
        raise CannotBeStatic(f"its attribute {name} is a {type(value).__name__}")


def _contents(value: Any) -> Iterator[Any]:
    """Yields the parts of a container or of an object of ours, in the same order for like ones."""
    if isinstance(value, Mapping):
        for pair in value.items():
            yield from pair
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, Set):
        yield from sorted(value, key=repr) if all(isinstance(part, str) for part in value) else value
    else:
        yield from (part for name, part in sorted(vars(value).items()) for part in (name, part))


def _class_key(kind: type) -> Hashable:
    """A class, without those above it that only join others, such as are made for a module of its own."""
    empty = {"__module__", "__doc__", "__qualname__", "__firstlineno__", "__static_attributes__"}
    return tuple(id(base) for base in kind.__mro__ if not vars(base).keys() <= empty)


class StaticBlock:
    """A copy of a block over static buffers.

    Args:
        live: the block, whose int4 weights are in place.
        buffers: where the copy's other tensors lie. Copies that are alike share them.

    Attributes:
        module: the copy.
        recompute: runs it.
        adapters: stacks its adapters in each pass.
        slots: the buffers of its parameters and buffers, in the order of ``LiveBlock.tensors``.
        tensors: those parameters and buffers.
    """

    def __init__(self, live: LiveBlock, buffers: StaticBuffers) -> None:
        originals = live.tensors()
        self.slots = [buffers.get(("state", place), tensor) for place, tensor in enumerate(originals)]
        self.tensors: list[Tensor] = []
        # What the engine put into the block is left out: its forward, and the stacks of the pass that runs.
        left_out = [vars(part).get(name) for part in live.module.modules() for name in ("forward", "stacks")]
        memo: dict[int, Any] = dict.fromkeys(map(id, left_out)) | live.configs
        for buffer, original in zip(self.slots, originals, strict=True):
            own = buffer.tensor.detach()
            own = nn.Parameter(own, requires_grad=False) if isinstance(original, nn.Parameter) else own
            memo[id(original)] = own
            self.tensors.append(own)
        for part in live.int4:
            weight = part.int4()
            memo |= {id(tensor): tensor for tensor in weight.tensors().values()}
            if "weight" in part._parameters:
                memo[id(part._parameters["weight"])] = nn.Parameter(weight.packed, requires_grad=False)
        self.module = copy.deepcopy(live.module, memo)
        self.recompute = Recompute(self.module)
        self.adapters = BlockAdapters(layers_by_input(self.module), buffers.stacks(originals))
        for part in self.module.modules():
            for name in ("forward", "stacks"):
                vars(part).pop(name, None)
            if isinstance(part, OpaqueModule):
                part.draws = False  # what draws random numbers is not recorded

    def train_only(self, wanted: Set[int]) -> None:
        """Lets the parameters at the places ``wanted`` require a gradient, and no other."""
        for place, tensor in enumerate(self.tensors):
            if tensor.requires_grad != (place in wanted):
                tensor.requires_grad_(place in wanted)

    def state(self) -> dict[tuple[int, str], Any]:
        """The attributes of all modules, for a comparison: plain values and containers, else identities."""
        compared = (*PLAIN, dict, list, set)
        return {
            (place, name): _snapshot(value) if isinstance(value := vars(part)[name], compared) else id(value)
            for place, part in enumerate(self.module.modules())
            for name in _attributes(part)
        }
