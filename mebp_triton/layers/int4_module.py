"""Int4 modules: a frozen packed weight whose tensors are put in place, and replaced, from outside; tables of rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mebp_triton.kernels.functions import int4_embedding
from mebp_triton.kernels.layout import TENSORS, Int4Weight
from mebp_triton.kernels.reference import decode

from .stacked_adapters import same_memory

GATHERED = 1024  # rows that an embedding gathers at a time: each may make more of a file resident than it has
DECODED_ROWS = 4096  # rows that ``Int4Table.decoded_weight`` decodes at a time


class Int4Module(nn.Module):
    """A module over a frozen int4 weight, whose tensors are put in place, and replaced, from outside.

    Attributes:
        borrowed: whether the tensors are those of a store, which nothing writes to. A copy of the module shares them.
    """

    INT4_BUFFERS: ClassVar = TENSORS

    in_features: int
    out_features: int
    group_size: int
    backend: str
    compute_dtype: torch.dtype
    borrowed: bool = False
    _made: Int4Weight | None = None

    def _init_int4(self, weight: Int4Weight, compute_dtype: torch.dtype, backend: str) -> None:
        self.out_features, self.in_features = weight.shape
        self.group_size, self.compute_dtype, self.backend = weight.group_size, compute_dtype, backend
        self.set_int4(weight)

    def _set_packed(self, packed: Tensor) -> None:
        raise NotImplementedError

    def _packed(self) -> Tensor:
        """The codes, or the parameter that holds them."""
        raise NotImplementedError

    def set_int4(self, weight: Int4Weight) -> None:
        """Puts the tensors of ``weight`` in place, without a copy."""
        self._set_packed(weight.packed)
        for name in TENSORS[1:]:
            self._buffers[name] = getattr(weight, name)
        self._keep(weight)

    def _keep(self, weight: Int4Weight | None) -> None:
        vars(self)["_made"] = weight  # as an attribute: ``Module.__setattr__`` would look through all it has

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.borrowed:
            for tensor in self._buffers.values():
                memo[id(tensor)] = tensor
            if "weight" in self._parameters:  # the parameter is the copy's own: ``to`` changes it in place
                memo[id(self.weight)] = nn.Parameter(self._packed(), requires_grad=False)
        made = memo[id(self)] = self.__new__(type(self))
        vars(made).update(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy, which makes a weight of its own of the tensors that it has."""
        return vars(self) | {"_made": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.borrowed:
            raise TypeError(
                "a model of load cannot be pickled, since its weights lie in a store: save its adapter by "
                "save_pretrained, and load the store where the model is needed"
            )
        return super().__reduce_ex__(protocol)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the int4 tensors, but keeps their dtypes: ``model.to(dtype)`` must not turn codes into floats."""
        self._keep(None)
        own = {id(self._buffers[name]) for name in self.INT4_BUFFERS if self._buffers.get(name) is not None}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in own or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Also accepts scales in the form of their bytes, which ``save_pretrained`` writes."""
        for name in set(TENSORS) - {"packed", "codebook"}:
            own, given = self._buffers.get(name), state_dict.get(prefix + name)
            if own is None or given is None or given.dtype != torch.uint8:
                continue
            if own.dtype == torch.int8 or given.shape != own.shape:
                state_dict[prefix + name] = given.contiguous().view(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def int4(self) -> Int4Weight:
        """The weight made of the tensors that are in place now: the same object for as long as they are the same."""
        made = self._made
        if made is None or torch.compiler.is_compiling() or not self._is_in_place(made):
            others: dict[str, Any] = {name: self._buffers[name] for name in TENSORS[1:]}
            made = Int4Weight(self._packed().data, in_features=self.in_features, group_size=self.group_size, **others)
            self._keep(made)
        return made

    def _is_in_place(self, weight: Int4Weight) -> bool:
        # Whoever writes to ``.data`` gives a parameter other memory, but does not make it another object.
        if not same_memory(self._packed(), weight.packed):
            return False
        own, made = self._buffers, vars(weight)
        return all([own[name] is made[name] for name in TENSORS[1:]])


class RowSource(Protocol):
    """A table whose rows are brought in when they are needed."""

    def gather(self, ids: Tensor) -> Int4Weight:
        """The rows ``ids`` (of any shape, flattened) on the device."""
        ...

    def segments(self) -> Iterator[tuple[int, Int4Weight]]:
        """All rows in order, as segments: the number of the first row, and the rows on the device.

        A segment is valid until the next one is asked for.
        """
        ...


class AbsentWeight(Tensor):
    """The float weight of an int4 table: a shape, a dtype and a device, and rows that are decoded when they are read.

    ``weight[start:stop]`` returns such rows, which trainers ask for that multiply by a head in slices; ``weight[id]``
    and ``weight[ids]`` do too, by which Gemma 4 reads the padding token's. Any other computation would need the whole
    float weight, and raises RuntimeError.
    """

    _table: Int4Table

    @staticmethod
    def __new__(cls, table: Int4Table) -> AbsentWeight:
        device = table.device or table._packed().device
        shape = (table.out_features, table.in_features)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=table.compute_dtype, device=device)
        made._table = table
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        aten = torch.ops.aten
        if func is aten.select.int and args[1] == 0:
            return args[0]._table.decoded_rows(torch.arange(args[0].shape[0], device=args[0].device)[args[2]])
        if func is aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype in (torch.int32, torch.int64):
            return args[0]._table.decoded_rows(args[1][0])
        if func is aten.embedding.default:
            return args[0]._table.decoded_rows(args[1])
        if func is aten.slice.Tensor:
            given: list[Any] = [*args, *(None, 0, None, None, 1)[len(args) :]]
            weight, dim, start, stop, step = given
            if dim == 0:
                span = range(weight.shape[0])[start:stop:step]
                ids = torch.arange(span.start, span.stop, span.step, device=weight.device)
                return weight._table.decoded_rows(ids)
        raise RuntimeError(
            f"{func}: an int4 embedding or head has no float weight to compute with, only rows of it; use "
            f"load(..., head='float'), and for what trains the embedding load(..., head='float', embedding='float')"
        )

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"AbsentWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


class Int4Table(Int4Module):
    """An embedding or a head. Other code asks its ``weight`` only for dtype, device, shape and rows.

    Attributes:
        rows: where the rows come from; None if the whole table is in place.
        device: the device that ``weight`` reports; None for that of the table itself.
    """

    rows: RowSource | None = None
    device: torch.device | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if memo:  # within a copy of the model
            return super().__deepcopy__(memo)
        raise ValueError(
            "an int4 embedding or head cannot be copied, which PEFT's modules_to_save does to train it: use "
            "load(..., head='float', embedding='float'), or take it out of modules_to_save"
        )

    def _set_packed(self, packed: Tensor) -> None:
        self._parameters.pop("weight", None)
        self._buffers["packed"] = packed

    def _packed(self) -> Tensor:
        packed = self._buffers["packed"]
        assert packed is not None
        return packed

    @property
    def weight(self) -> AbsentWeight:
        return AbsentWeight(self)

    def decoded_rows(self, ids: Tensor) -> Tensor:
        """The rows ``ids`` (any shape) as floats ``[..., K]`` in ``compute_dtype``."""
        rows = self.int4().gather(ids.reshape(-1)) if self.rows is None else self.rows.gather(ids)
        decoded = decode(rows, torch.promote_types(self.compute_dtype, torch.float32))
        return decoded.to(self.compute_dtype).view(*ids.shape, self.in_features)

    def decoded_weight(self) -> Tensor:
        """The whole table as floats ``[V, K]`` in ``compute_dtype``."""
        shape = (self.out_features, self.in_features)
        whole = torch.empty(shape, dtype=self.compute_dtype, device=self.device or self._packed().device)
        for first, rows in self.rows.segments() if self.rows is not None else [(0, self.int4())]:
            for start in range(0, rows.out_features, DECODED_ROWS):
                part = decode(rows.rows(start, start + DECODED_ROWS), torch.promote_types(whole.dtype, torch.float32))
                whole[first + start : first + start + part.shape[0]] = part
        return whole


class Int4Embedding(Int4Table, nn.Embedding):  # type: ignore[override,misc]
    """A frozen embedding over an int4 table, of which only the rows asked for are decoded.

    ``replace_embedding`` makes it of an existing embedding, and keeps what a subclass of that adds, such as a scale.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.rows is None:
            return int4_embedding(input, self.int4(), self.compute_dtype, self.backend)
        parts = [self._gathered(self.rows, ids) for ids in input.reshape(-1).split(GATHERED)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*input.shape, self.in_features)

    def _gathered(self, rows: RowSource, ids: Tensor) -> Tensor:
        places = torch.arange(len(ids), device=ids.device)
        return int4_embedding(places, rows.gather(ids), self.compute_dtype, self.backend)


def replace_embedding(module: nn.Embedding, weight: Int4Weight, compute_dtype: torch.dtype, backend: str) -> None:
    """Turns ``module`` into an ``Int4Embedding`` in place.

    A subclass of ``nn.Embedding`` keeps its own forward, whose ``super().forward`` is then the int4 one.
    """
    kind = type(module)
    bases = (Int4Embedding,) if kind is nn.Embedding else (kind, Int4Embedding)
    module.__class__ = type(f"Int4{kind.__name__}", bases, {})
    assert isinstance(module, Int4Embedding)
    module._init_int4(weight, compute_dtype, backend)


def restore_embedding(table: Int4Embedding) -> nn.Parameter:
    """Turns ``table`` back into the float embedding that it was, in place. Returns its weight: decoded, frozen."""
    module: Any = table
    weight, kind = nn.Parameter(table.decoded_weight(), requires_grad=False), type(table).__bases__[0]
    for name in Int4Module.INT4_BUFFERS:
        module._buffers.pop(name, None)
    added = ("rows", "device", "borrowed", "_made")
    for name in (*added, "in_features", "out_features", "group_size", "backend", "compute_dtype"):
        vars(module).pop(name, None)
    module.__class__ = nn.Embedding if kind is Int4Embedding else kind
    module.weight = weight
    return weight
