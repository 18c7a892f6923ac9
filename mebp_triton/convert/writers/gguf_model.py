"""Writes a merged model as a GGUF file, after the pattern of a GGUF file of its base.

Keys, tokenizer, names and the order of rows are the base's, and so are all tensors that are not matrices of the store,
and those of experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mebp_triton.convert.readers.gguf import GgufFile
from mebp_triton.convert.readers.gguf_header import Entry, Header
from mebp_triton.convert.readers.gguf_layout import GgufLayout
from mebp_triton.convert.readers.merged_store import Delta, MergedStore
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode as decode_int4
from mebp_triton.models.skeleton import Int4Site
from mebp_triton.system.errors import FileError

from . import GGUF_FLOATS
from .gguf_adapter import places_in_file
from .gguf_file import ALIGNMENT, Planned, decode, encode, kind_for, pair, write_gguf

# What a new file says of itself, and of the parts that a model is split into.
OWN_KEYS = ("general.file_type", "general.quantization_version", "split.")
QUANTIZATION_VERSION = 2
TEMPLATE = "tokenizer.chat_template"
OTHER_TEMPLATES = (f"{TEMPLATE}.", f"{TEMPLATE}s")  # by their names, which llama.cpp takes for tools before the first
COPY_BYTES = 1 << 24
# How far a tensor of the base may be from the store's: float16 has 11 bits, and both may have been rounded to 4 bits.
FLOATS_NEAR, MATRICES_NEAR = 0.01, 0.4


@dataclass
class GgufModelReport:
    """A record of what was written.

    Attributes:
        kinds: how many tensors there are of each type.
        copied: how many of them are the base's, byte for byte.
        relative_error: the largest relative RMS error of a matrix that was rounded.
        lost: the root mean square of what rounding did to the matrices that the adapter changes, over that of what the
            adapter changed; None without an adapter.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    copied: int = 0
    relative_error: float = 0.0
    lost: float | None = None


class GgufModelWriter:
    """Writes one file.

    Args:
        source: the store and its adapter, bound.
        base: the base's file, bound; ``header`` is its header.
        layout: the names and orders of the base's files.
        parameters: the parameters of the model by GGUF's names.
        kind: the type of the matrices; embedding and head get at least 8 bits.
        trusted: whether the base is known to be what the store was made of, to the byte; if not, all its tensors are
            compared.
    """

    def __init__(
        self,
        source: MergedStore,
        base: GgufFile,
        header: Header,
        layout: GgufLayout,
        parameters: Mapping[str, str],
        kind: str,
        trusted: bool,
    ) -> None:
        self.source, self.base, self.header, self.layout = source, base, header, layout
        self.parameters, self.kind, self.trusted = parameters, kind, trusted
        self.report = GgufModelReport()
        self._errors = {"rounding": 0.0, "change": 0.0}
        self._matrices: dict[str, Int4Site] = {}
        self._parts: dict[str, dict[str, int]] = {}  # the tensors of a parameter, with their rows
        for name, parameter in parameters.items():  # in their order in the parameter
            if (entry := header.tensors.get(name)) is not None:
                self._parts.setdefault(parameter, {})[name] = math.prod(entry.shape[:-1])

    def write(
        self, target: Path, replaced: Mapping[str, str | int], progress: Callable[[int, int], None]
    ) -> GgufModelReport:
        """Writes ``target``, with the keys ``replaced`` in place of the base's.

        Raises:
            ValueError: the base is of another model, or a value is too large for its type.
        """
        for site in self.source.sites.values():
            if site.role == "expert" and self.source.delta(site) is not None:
                raise ValueError(
                    f"the adapter changes experts ({site.name}), which cannot be written to GGUF here: make a model "
                    f"directory by `mebp merge`, or use the adapter by PEFT"
                )
        planned = [self._plan(entry) for entry in self.header.tensors.values()]
        alignment = int(self.header.metadata.get("general.alignment", ALIGNMENT))
        done = 0

        def data(name: str) -> Iterator[np.ndarray]:
            nonlocal done
            entry = self.header.tensors[name]
            site = self._matrices.get(name)
            yield from _copied(entry) if site is None else self._rounded(site, kinds[name], name)
            done += 1
            progress(done, len(planned))

        kinds = {each.name: each.kind for each in planned}
        self.report.kinds = Counter(kinds.values())
        self.report.copied = len(planned) - len(self._matrices)
        write_gguf(target, self._pairs(kinds, replaced), planned, data, alignment)
        if self._errors["change"]:
            self.report.lost = (self._errors["rounding"] / self._errors["change"]) ** 0.5
        return self.report

    def _pairs(self, kinds: Mapping[str, str], replaced: Mapping[str, str | int]) -> list[bytes]:
        """The base's keys as its file has them, but for those that are replaced and those of the file itself."""
        from gguf import LlamaFileType

        names = {"F32": "ALL_F32", **{kind: f"MOSTLY_{kind}_S" for kind in ("Q4_K", "Q5_K")}}
        own: dict[str, str | int] = {"general.file_type": LlamaFileType[names.get(self.kind, f"MOSTLY_{self.kind}")]}
        if set(kinds.values()) - set(GGUF_FLOATS):
            own["general.quantization_version"] = QUANTIZATION_VERSION
        own |= replaced
        dropped = (*OWN_KEYS, *(OTHER_TEMPLATES if TEMPLATE in replaced else ()))
        pairs = []
        with open(self.header.path, "rb") as file:
            for key, (begin, end) in self.header.places.items():
                if key not in own and not key.startswith(dropped):
                    file.seek(begin)
                    pairs.append(file.read(end - begin))
        return pairs + [pair(key, value if isinstance(value, str) else int(value)) for key, value in own.items()]

    def _parameter(self, name: str) -> str:
        """The parameter that a tensor of the file is, or is a part of; "" for one that is none, as RoPE's factors."""
        return self.parameters.get(name, self.parameters.get(name.removesuffix(".weight"), ""))

    def _plan(self, entry: Entry) -> Planned:
        """The tensor that takes the place of one of the base's."""
        name = self._parameter(entry.name)
        site = self.source.sites.get(name)
        if site is None:
            if not self.trusted and entry.name in list(self._parts.get(name, ()))[:1]:
                self._compare_copied(name)
            return Planned(entry.name, entry.kind, entry.shape)
        if entry.shape[-1] != site.in_features or len(entry.shape) > 2:
            raise ValueError(f"{self.header.path} has {entry.name} on its side, which cannot be merged into yet")
        stored = self.source.store.weight(site.name)
        # In a file of floats every matrix is one: codes would have llama.cpp round activations to 8 bits.
        repeats = site.is_table and entry.name != next(iter(self._parts[name]))  # a tied head's, which is not compared
        keeps = self.kind not in GGUF_FLOATS and self.source.delta(site) is None and not repeats
        if keeps and _are_same(stored, self.base.read(name)):
            return Planned(entry.name, entry.kind, entry.shape)
        if not self.trusted:
            self._compare_matrix(site)
        wide = site.role == "linear" or self.kind in (*GGUF_FLOATS, "Q8_0")
        self._matrices[entry.name] = site
        if len(entry.shape) == 1:  # a gate of experts
            return Planned(entry.name, "F32", entry.shape)
        return Planned(entry.name, kind_for(self.kind if wide else "Q8_0", entry.shape[-1]), entry.shape)

    def _compare_copied(self, name: str) -> None:
        """Compares a parameter that is copied: a float of the store, or the experts of a mixture."""
        if name in self.source.store.floats:
            self._compare(name, self.source.store.float_tensor(name), self.base.read(name), FLOATS_NEAR)
        for site in self.source.experts_in(name):
            self._compare_matrix(site)

    def _compare_matrix(self, site: Int4Site) -> None:
        name = f"{site.name}.weight"
        found = self.base.read(name)
        found = found.t() if site.transposed and isinstance(found, Tensor) else found
        self._compare(name, self.source.store.weight(site.name), found, MATRICES_NEAR)

    def _compare(self, name: str, own: Tensor | Int4Weight, found: Tensor | Int4Weight, near: float) -> None:
        """Raises ValueError where a tensor of the base is not that of the store."""
        wanted, got = (decode_int4(v, torch.float32) if isinstance(v, Int4Weight) else v.float() for v in (own, found))
        if not bool((got - wanted).norm() <= near * wanted.norm()):
            raise ValueError(f"{self.header.path} is not the model that the store was made of: {name} differs")

    def _rounded(self, site: Int4Site, kind: str, name: str) -> Iterator[np.ndarray]:
        """The bytes of a matrix, its rows where the file has them."""
        # A base may have a tied head as a tensor of its own, which is no part of the embedding but all of it again.
        parts = {name: site.out_features} if site.is_table else self._parts[self._parameter(name)]
        places = places_in_file(self.layout, site, parts)[name]
        rounding = size = 0.0
        for rows in self.source.rows(site, places.rows):
            values = np.ascontiguousarray(rows[:, places.columns].numpy())
            data = encode(values, kind, name)
            yield data
            if kind != "F32":
                rounding += float(np.square(decode(data, kind) - values, dtype=np.float64).sum())
                size += float(np.square(values, dtype=np.float64).sum())
        if size:
            self.report.relative_error = max(self.report.relative_error, (rounding / size) ** 0.5)
        if (delta := self.source.delta(site)) is not None:
            self._errors["rounding"] += rounding
            self._errors["change"] += _square(delta, places.rows)


def _square(delta: Delta, rows: Tensor) -> float:
    """The sum of the squares of some rows of ``scaling * b @ a``."""
    a, b = delta.a.double(), delta.b[rows].double()
    return delta.scaling**2 * float(((b.t() @ b) * (a @ a.t())).sum())


def _are_same(stored: Int4Weight, value: Tensor | Int4Weight) -> bool:
    """Whether the store took a matrix of the base over bit for bit."""
    if not isinstance(value, Int4Weight) or value.form != stored.form:
        return False
    ours, theirs = stored.tensors(), value.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[part], theirs[part]) for part in ours)


def _copied(entry: Entry) -> Iterator[np.ndarray]:
    """The bytes of a tensor of the base."""
    left = entry.nbytes
    with open(entry.path, "rb") as file:
        file.seek(entry.offset)
        while left:
            data = file.read(min(left, COPY_BYTES))
            if not data:
                raise FileError(f"{entry.path} ends inside {entry.name}: download it again")
            left -= len(data)
            yield np.frombuffer(data, np.uint8)
