"""Finds the layers whose weight the modelling code reads itself, instead of calling the layer.

An int4 layer has no float weight to hand out, and an adapter on it would have no effect there. So such layers stay
float. They are found in the source of the code that is about to run: AltUp of Gemma 3n reads a weight only in training
mode, and Mamba's mixers hand theirs to fused kernels, which a machine may lack.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

# What can be asked of an int4 layer's weight as well.
FACTS = frozenset({"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad"})
# Code of these packages only calls layers, or is no modelling code.
LIBRARIES = ("torch.", "transformers.modeling_", "transformers.generation.", "peft.", "mebp_triton.")
SETUP = ("__init__", "_init", "init_", "reset_parameters", "load_", "save_")
EACH = "*"  # stands for every child of a module, where the code walks over them or indexes them
COMPARISONS = {
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
    ast.GtE: operator.ge,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


@dataclass(frozen=True)
class Read:
    """A place in the code of a module that reads the weight of a module inside it.

    Attributes:
        path: attributes from the module to the one whose weight is read.
        conditions: the tests of the ``if`` around the place, each with the outcome that leads there.
    """

    path: tuple[str, ...]
    conditions: tuple[tuple[ast.expr, bool], ...]


def directly_read(model: nn.Module) -> set[str]:
    """The paths of the modules of ``model`` whose weight another module's code reads and computes with.

    A read that the module's own settings rule out does not count (Bloom's, for a number of shards that nobody sets).
    Reads through a function that is handed the layer are not seen.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        kind: Any = type(module)
        for read in _reads_of(kind):
            if all(_outcome(test, module) in (None, outcome) for test, outcome in read.conditions):
                found.update(f"{name}.{path}" if name else path for path in _resolved(module, read.path))
    return found


def _resolved(module: nn.Module, path: tuple[str, ...]) -> Iterator[str]:
    """The paths below ``module`` that ``path`` stands for; none where an attribute is no module."""
    if not path:
        yield ""
        return
    names = list(module._modules) if path[0] == EACH else [path[0]]
    for name in names:
        if isinstance(child := module._modules.get(name), nn.Module):
            yield from (f"{name}.{rest}" if rest else name for rest in _resolved(child, path[1:]))


@cache
def _reads_of(kind: Any) -> tuple[Read, ...]:
    """The reads in the methods that a module of class ``kind`` has."""
    methods: dict[str, Any] = {}
    for parent in kind.__mro__:
        for name, member in vars(parent).items():
            methods.setdefault(name, member)
    functions = [inspect.unwrap(member) for member in methods.values() if isinstance(member, FunctionType)]
    return tuple(read for function in functions for read in _reads_in(function))


@cache
def _reads_in(method: Any) -> tuple[Read, ...]:
    if not isinstance(method, FunctionType) or "weight" not in method.__code__.co_names:
        return ()
    if f"{method.__module__}.".startswith(LIBRARIES) or method.__name__.startswith(SETUP):
        return ()
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    except (OSError, TypeError, SyntaxError):  # code without a file
        warnings.warn(
            f"the source of {method.__module__}.{method.__qualname__} is not there: if it computes with the weight of "
            f"a layer itself, that layer cannot be int4, and a step fails",
            stacklevel=2,
        )
        return ()
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return ()
    return tuple(_walk(definition.body, {definition.args.args[0].arg: ()}, ()))


Names = dict[str, tuple[str, ...]]  # local variables that hold a module, by its path from ``self``
Conditions = tuple[tuple[ast.expr, bool], ...]


def _walk(nodes: list[Any], names: Names, conditions: Conditions) -> Iterator[Read]:
    """The reads in ``nodes``, in order; ``names`` takes up the variables that hold modules."""
    for node in nodes:
        if isinstance(node, ast.If | ast.IfExp):
            yield from _walk([node.test], names, conditions)
            for part, outcome in ((node.body, True), (node.orelse, False)):
                branch = part if isinstance(part, list) else [part]
                yield from _walk(branch, names, (*conditions, (node.test, outcome)))
            continue
        _take_names(node, names)
        if (path := _cast_to(node, names)) is not None:
            yield Read(path, conditions)
        if isinstance(node, ast.Attribute) and node.attr in FACTS and _is_weight(node.value):
            continue
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "hasattr"):
            continue
        if _is_weight(node) and (path := _path(node.value, names)):
            yield Read(path, conditions)
        yield from _walk(list(ast.iter_child_nodes(node)), names, conditions)


def _cast_to(node: Any, names: Names) -> tuple[str, ...] | None:
    """The path of a module in ``x.to(module.weight.dtype)``: codes have a dtype that no activation can have."""
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "to":
        for value in (*node.args, *(keyword.value for keyword in node.keywords)):
            if isinstance(value, ast.Attribute) and value.attr == "dtype" and _is_weight(value.value):
                return _path(value.value.value, names) or None  # type: ignore[attr-defined]
    return None


def _is_weight(node: Any) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)


def _take_names(node: Any, names: Names) -> None:
    """Takes note of ``layer = self.a`` and of ``for layer in self.layers``, also in ``enumerate`` and the like."""
    if isinstance(node, ast.Assign):
        found = [(node.targets[0], _path(node.value, names))]
    elif isinstance(node, ast.For | ast.comprehension):
        found = _walked(node.target, node.iter, names)
    else:
        return
    for target, path in found:
        if isinstance(target, ast.Name) and path:
            names[target.id] = path
        elif isinstance(target, ast.Name):
            names.pop(target.id, None)


def _walked(target: Any, walked: Any, names: Names) -> list[tuple[Any, tuple[str, ...] | None]]:
    """The targets of a loop over ``walked``, each with the path of what it stands for."""
    function = getattr(walked.func, "id", "") if isinstance(walked, ast.Call) else ""
    if function in ("reversed", "list", "tuple") and walked.args:
        return _walked(target, walked.args[0], names)
    if function in ("enumerate", "zip") and isinstance(target, ast.Tuple):
        parts = walked.args if function == "zip" else [ast.Constant(0), *walked.args[:1]]
        pairs = zip(target.elts, parts, strict=False)
        return [found for part, inner in pairs for found in _walked(part, inner, names)]
    path = _path(walked, names)
    return [(target, (*path, EACH) if path else None)]


def _path(node: Any, names: Names) -> tuple[str, ...] | None:
    """The path of the module that an expression names; None for any other expression."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute | ast.Subscript):
        path = _path(node.value, names)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
            return path  # some of the children: those are told apart when one is taken
        step = node.attr if isinstance(node, ast.Attribute) else EACH
        return None if path is None else (*path, step)
    return None


def _outcome(test: ast.expr, module: nn.Module) -> bool | None:
    """Whether a test holds, if that depends on the settings of ``module`` alone; None for any other."""
    value = _value(test, module)
    return bool(value) if isinstance(value, bool | int | float | str) else None


def _value(test: Any, module: nn.Module) -> Any:
    """The value of an expression of the settings of ``module``; None for any other."""
    if isinstance(test, ast.Constant):
        return test.value
    if isinstance(test, ast.Attribute):
        owner = module if getattr(test.value, "id", "") == "self" else _value(test.value, module)
        # A module's mode changes, and so does what it has been handed.
        known = owner is not None and test.attr != "training"
        return getattr(owner, test.attr, None) if known else None
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, module)
        return None if value is None else not value
    if isinstance(test, ast.BoolOp):
        values = [_value(part, module) for part in test.values]
        decides = isinstance(test.op, ast.Or)
        if any(value is not None and bool(value) is decides for value in values):
            return decides
        return None if None in values else not decides
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        left, right = _value(test.left, module), _value(test.comparators[0], module)
        compare = COMPARISONS.get(type(test.ops[0]))
        if compare is not None and left is not None and right is not None:
            return bool(compare(left, right))
    return None
