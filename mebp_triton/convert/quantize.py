"""A model directory or a GGUF file -> a store, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mebp_triton.blocks.runner import find_blocks
from mebp_triton.convert.readers import open_source
from mebp_triton.convert.readers.source import Source
from mebp_triton.convert.writers.store import StoreWriter
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import GROUP_SIZES, SCHEMES, Scheme
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.models.names import persistent_buffers
from mebp_triton.models.skeleton import Int4Site, build_skeleton, float_names, int4_sites
from mebp_triton.store.manifest import SHARED, block_file
from mebp_triton.system import atomic


@dataclass
class QuantizeReport:
    """What became of every matrix.

    Attributes:
        errors: relative RMS error by module; 0.0 for codes taken over as they were.
        taken_over: modules whose 4-bit codes were taken over bit for bit.
        schemes: scheme by module.
        float_bytes: bytes of what stayed float.
        int4_bytes: bytes of what became int4.
    """

    errors: dict[str, float] = field(default_factory=dict)
    taken_over: list[str] = field(default_factory=list)
    schemes: dict[str, str] = field(default_factory=dict)
    float_bytes: int = 0
    int4_bytes: int = 0


Form = tuple[Scheme, int]  # scheme and group size
DEFAULT_FORM: Form = ("symmetric", 64)


@dataclass(frozen=True)
class Recipe:
    """``scheme`` and ``group_size`` are what the user asked for, or None for what fits the source."""

    scheme: Scheme | None
    group_size: int | None
    scale_search: bool = True

    def __post_init__(self) -> None:
        if self.scheme is not None and self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size must be one of {', '.join(map(str, GROUP_SIZES))}, got {self.group_size!r}")

    def apply(self, value: Tensor | Int4Weight, native: Form) -> tuple[Int4Weight, float]:
        """``native``: the form of the source's own 4-bit matrices, which its other matrices follow by default."""
        if isinstance(value, Int4Weight):
            if self.scheme in (None, value.scheme) and self.group_size in (None, value.group_size):
                return value, 0.0
            value = decode(value, torch.float32)
        return quantize_matrix(value, self.scheme or native[0], self.group_size or native[1], self.scale_search)


def quantize(
    source: Path | str,
    store: Path | str,
    scheme: Scheme | None = None,
    group_size: int | None = None,
    scale_search: bool = True,
    blocks: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantizeReport:
    """Makes the store directory ``store`` from ``source``, a transformers model directory or a GGUF file.

    Args:
        source: what to read; one tensor is in memory at a time, and one block of int4 weights.
        store: must not exist, or be empty. It appears whole or not at all.
        scheme: "symmetric", "affine" or "codebook" (NF4). By default 4-bit matrices of a GGUF file or of a
            bitsandbytes checkpoint are taken over bit for bit and its others follow their scheme; a plain model
            directory's become symmetric.
        group_size: 32, 64 or 128; by default the source's, or 64.
        scale_search: search each group's scale for the least squared error.
        blocks: path of the block list, where it is not found by itself.
        progress: called with (matrices done, matrices in all).

    Raises:
        ValueError: the source cannot be read, or the arguments do not fit; nothing is left behind.
    """
    recipe = Recipe(scheme, group_size, scale_search)
    atomic.check_absent(Path(store))
    return write_store(open_source(source), Path(store), recipe, blocks, None, progress)


def write_store(
    opened: Source,
    target: Path,
    recipe: Recipe,
    blocks: str | None,
    form_of: Callable[[str], Form] | None,
    progress: Callable[[int, int], None],
) -> QuantizeReport:
    """``quantize`` from an opened source. ``form_of``: the form that a float matrix takes by default, by module."""
    model = build_skeleton(opened.config, torch.float32)
    opened.bind(model)
    path, stack = find_blocks(model, blocks)
    sites, tied = int4_sites(model)
    floats = float_names(model, sites) + [name for name in persistent_buffers(model) if opened.has(name)]
    linear = [site.name for site in sites if site.role == "linear"]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no plain linear layers: its architecture is not supported")
    if form_of is None:
        # The source's own 4-bit form is taken from its first linear layer.
        first = opened.read(f"{linear[0]}.weight")
        native: Form = (first.scheme, first.group_size) if isinstance(first, Int4Weight) else DEFAULT_FORM

        def form_of(name: str) -> Form:
            return native

    job = _Job(opened, recipe, form_of, len(sites), progress)
    with atomic.atomic_directory(target) as directory:
        opened.save_companions(directory)
        writer = StoreWriter(directory, opened.description, tied)
        for index in range(len(stack)):
            job.write(writer, block_file(index), sites, floats, f"{path}.{index}.")
        job.write(writer, SHARED, sites, floats, "")
        writer.finish()
    return job.report


class _Job:
    """One conversion under way. A tensor belongs to the first file that asks for its prefix."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        form_of: Callable[[str], Form],
        total: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self.source, self.recipe, self.form_of, self.total, self.progress = source, recipe, form_of, total, progress
        self.report = QuantizeReport()
        self.written: set[str] = set()

    def write(self, writer: StoreWriter, file: str, sites: list[Int4Site], floats: list[str], prefix: str) -> None:
        matrices = {}
        for site in sites:
            if site.name.startswith(prefix) and site.name not in self.written:
                matrices[site.name] = self._matrix(site)
        kept: dict[str, Tensor] = {}
        for name in floats:
            if name.startswith(prefix) and name not in self.written:
                value = self.source.read(name)
                _check_finite(name, value)
                kept[name] = decode(value, torch.float32) if isinstance(value, Int4Weight) else value
        self.written |= matrices.keys() | kept.keys()
        self.report.float_bytes += sum(tensor.nbytes for tensor in kept.values())
        self.report.int4_bytes += sum(weight.nbytes for weight, _ in matrices.values())
        writer.write_file(file, matrices, kept)

    def _matrix(self, site: Int4Site) -> tuple[Int4Weight, float]:
        value = self.source.read(f"{site.name}.weight")
        if isinstance(value, Int4Weight):
            _check_finite(f"{site.name}.weight", value)
        if site.transposed and not isinstance(value, Int4Weight):
            value = value.t().contiguous()
        try:
            weight, error = self.recipe.apply(value, self.form_of(site.name))
        except ValueError as problem:
            raise ValueError(f"{site.name}: {problem}") from None
        self.report.errors[site.name], self.report.schemes[site.name] = error, weight.scheme
        if weight is value:
            self.report.taken_over.append(site.name)
        self.progress(len(self.report.errors), self.total)
        return weight, error


def _check_finite(name: str, value: Tensor | Int4Weight) -> None:
    """Of what is taken over as it is; a matrix that is quantized is looked at there."""
    parts = value.tensors().items() if isinstance(value, Int4Weight) else [("it", value)]
    for part, tensor in parts:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} of the source is damaged: {part} must be finite; download it again")
