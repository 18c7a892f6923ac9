"""Reads the experts of a model directory, one expert's matrix at a time, however the files have them.

A file has them as the model does, all experts in one tensor; or in pieces, which are joined as transformers does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mebp_triton.kernels.layout import TENSORS, Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.models.experts import FusedExperts, expert_places, fused_experts
from mebp_triton.models.names import check_shape, tensor_shapes

from .conversions import Conversion


class Files(Protocol):
    """The tensors of a directory, as the experts' reader sees them."""

    path: Path

    def value(self, name: str, key: str, shape: tuple[int, ...]) -> Tensor | Int4Weight:
        """Reads the tensor ``key``, a part of what is called ``name``, which must have this shape ``[out, in]``."""
        ...

    def expert_slice(self, key: str, expert: int) -> Tensor:
        """Reads the part ``[1, ...]`` of the tensor ``key`` that an expert has in it."""
        ...

    def expert_value(self, key: str, expert: int) -> Tensor | Int4Weight:
        """Reads the matrix that an expert has in the parameter that is stored as ``key``; codes as ``[out, in]``."""
        ...


class ExpertMatrices:
    """The experts of a bound model.

    Args:
        files: the directory.
        model: the model.
        keys: the tensor that each parameter is.
        made: what the others are made of.

    Raises:
        ValueError: there are more or fewer experts than the model has.
    """

    def __init__(
        self, files: Files, model: PreTrainedModel, keys: Mapping[str, str], made: Mapping[str, Conversion]
    ) -> None:
        self.files, self.model, self.keys, self.made = files, model, keys, made
        self.shapes = tensor_shapes(model)
        self.parameters: dict[str, FusedExperts] = {}
        self.places = expert_places(model)
        for experts in fused_experts(model):
            for parameter in experts.shapes:
                self.parameters[f"{experts.path}.{parameter}"] = experts
                self._check_count(f"{experts.path}.{parameter}", experts.count)

    def _check_count(self, parameter: str, count: int) -> None:
        conversion = self.made.get(parameter)
        if conversion is None or not conversion.in_pieces:
            return
        found = {pattern: len(conversion.sources.get(pattern, ())) for pattern in conversion.converter.source_patterns}
        if set(found.values()) != {count}:
            pieces = " and ".join(f"{number} of {pattern}" for pattern, number in found.items())
            raise ValueError(
                f"{self.files.path}: {parameter} should have {count} experts and has {pieces}: give a complete "
                f"checkpoint of the model its config describes"
            )

    def read_all(self, parameter: str) -> Tensor:
        """Reads a parameter with all its experts as floats, in its own shape."""
        experts, attribute = self.parameters[parameter], parameter.rpartition(".")[2]
        whole: Tensor | None = None
        for expert in range(experts.count):
            value = self.read(f"{experts.matrix(expert, attribute)}.weight")
            floats = as_floats(value)
            if isinstance(value, Int4Weight) and experts.transposed:
                floats = floats.t()
            if whole is None:
                whole = floats.new_empty(experts.count, *floats.shape)
            whole[expert] = floats
        assert whole is not None
        return whole

    def read(self, name: str) -> Tensor | Int4Weight:
        """Reads an expert's matrix: floats in the shape that its slice of the parameter has, or codes."""
        parameter, expert = self.places[name]
        whole, conversion = self.shapes[parameter], self.made.get(parameter)
        value: Tensor | Int4Weight
        if conversion is None:
            value = self.files.expert_value(self.keys[parameter], expert)
        elif conversion.in_pieces:
            value = self._joined(name, conversion, expert, whole[1:])
        else:
            keys = conversion.keys_of(expert)
            parts = {pattern: [self.files.expert_slice(key, expert)] for pattern, key in keys.items()}
            value = conversion.apply(parts, self.model, name)[0]
        is_turned = isinstance(value, Int4Weight) and self.parameters[parameter].transposed
        check_shape(str(self.files.path), name, value.shape, whole[:0:-1] if is_turned else whole[1:])
        return value

    def _joined(self, name: str, conversion: Conversion, expert: int, shape: tuple[int, ...]) -> Tensor | Int4Weight:
        """Reads an expert's pieces and joins them: codes as codes, if they are alike and lie below each other."""
        keys = conversion.keys_of(expert)
        piece_shape = shape[0] // len(keys), shape[1]
        pieces = {pattern: self.files.value(name, key, piece_shape) for pattern, key in keys.items()}
        codes = [piece for piece in pieces.values() if isinstance(piece, Int4Weight)]
        if len(codes) == len(pieces) and conversion.joins_rows() and (joined := join_rows(codes)) is not None:
            return joined
        floats = {pattern: [as_floats(piece)] for pattern, piece in pieces.items()}
        return conversion.apply(floats, self.model, name)[0]


def join_rows(weights: Sequence[Int4Weight]) -> Int4Weight | None:
    """The rows of matrices with the same columns below each other; None where their codes or scales differ in kind."""
    first, books = weights[0], [weight.codebook for weight in weights]
    kinds = {(weight.form, weight.in_features, weight.scales.dtype) for weight in weights}
    if len(kinds) > 1 or any(book is not None and not torch.equal(book, books[0]) for book in books):
        return None
    parts: dict[str, Any] = {}
    for name in set(TENSORS) - {"packed", "codebook"}:
        own = [getattr(weight, name) for weight in weights]
        if all(tensor is not None for tensor in own):
            parts[name] = torch.cat(own, dim=1)  # scales are [groups, rows]
    packed = torch.cat([weight.packed for weight in weights])
    return Int4Weight(packed, in_features=first.in_features, group_size=first.group_size, codebook=books[0], **parts)


def as_floats(value: Tensor | Int4Weight) -> Tensor:
    """A matrix as floats: codes are decoded to ``[out, in]``."""
    return decode(value, torch.float32) if isinstance(value, Int4Weight) else value
