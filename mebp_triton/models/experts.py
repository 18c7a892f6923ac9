"""Finds the experts of a mixture that lie in one tensor: transformers 5 gives such classes one interface.

Their class was decorated by transformers' ``use_experts_implementation``, which says by attributes how the parameters
lie. An expert's matrix is a slice of ``gate_up_proj`` (or ``up_proj``) and one of ``down_proj``. Classes that do not
follow the interface are not found; their experts stay float.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class FusedExperts:
    """The experts of one module.

    Attributes:
        path: the module's path in the model.
        count: the number of experts.
        shapes: out and in features of an expert's two matrices, by the names of their parameters; the first reads the
            input.
        transposed: whether the parameters are ``[experts, in, out]``, not ``[experts, out, in]``.
    """

    path: str
    count: int
    shapes: dict[str, tuple[int, int]]
    transposed: bool

    def matrix(self, expert: int, parameter: str) -> str:
        """The name of an expert's matrix, as a store has it."""
        return f"{self.path}.{expert}.{parameter}"

    def matrices(self) -> Iterator[tuple[int, str]]:
        """The number of the expert and the name of the parameter, of each matrix in the order of a store."""
        return ((expert, parameter) for expert in range(self.count) for parameter in self.shapes)


def fused_experts(model: nn.Module) -> list[FusedExperts]:
    """The modules of ``model`` whose experts lie in one tensor, in the order of the model."""
    found = (_experts_of(path, module) for path, module in model.named_modules())
    return [experts for experts in found if experts is not None]


def expert_parameters(model: nn.Module) -> dict[str, FusedExperts]:
    """The experts of each parameter that has all of a module's, by its path."""
    return {f"{experts.path}.{name}": experts for experts in fused_experts(model) for name in experts.shapes}


def expert_places(model: nn.Module) -> dict[str, tuple[str, int]]:
    """The parameter, and the number of the expert in it, that each expert's matrix is, by ``Source.read``'s name."""
    return {
        f"{experts.matrix(expert, parameter)}.weight": (f"{experts.path}.{parameter}", expert)
        for experts in fused_experts(model)
        for expert, parameter in experts.matrices()
    }


def _experts_of(path: str, module: nn.Module) -> FusedExperts | None:
    """The experts of ``module``; None where it does not follow the interface to the letter."""
    flags = {name: getattr(module, name, None) for name in FLAGS}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        return None
    parameters = dict(module.named_parameters(recurse=False))
    names = ("gate_up_proj" if flags["has_gate"] else "up_proj", "down_proj")
    biases = {f"{name}_bias" for name in names if flags["has_bias"]}
    if parameters.keys() != {*names, *biases} or any(parameters[name].dim() != 3 for name in names):
        return None
    counts = {len(parameter) for parameter in parameters.values()}
    if counts != {getattr(module, "num_experts", None)}:
        return None
    transposed = bool(flags["is_transposed"])
    shapes = {name: _out_in(parameters[name], transposed) for name in names}
    return FusedExperts(path, counts.pop(), shapes, transposed)


def _out_in(parameter: nn.Parameter, transposed: bool) -> tuple[int, int]:
    _, rows, columns = parameter.shape
    return (columns, rows) if transposed else (rows, columns)
