"""Makes a store of a model directory or a GGUF file, one matrix at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mebp_triton.blocks.runner import find_blocks
from mebp_triton.convert.bit_budget import forms_within
from mebp_triton.convert.calibration import CALIBRATION_WINDOWS
from mebp_triton.convert.calibration.calibration import Calibration
from mebp_triton.convert.calibration.layer_inputs import Columns
from mebp_triton.convert.calibration.source_run import SourceRun
from mebp_triton.convert.readers import open_source
from mebp_triton.convert.readers.source import Source, check_finite
from mebp_triton.convert.recipe import DECODED_FORM, TABLE_FORM, Recipe
from mebp_triton.convert.writers.store import StoreWriter
from mebp_triton.data.tokenized import TokenizedData
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.names import DEFAULT_FORM, Form, Scheme
from mebp_triton.kernels.reference import decode
from mebp_triton.models.kept_float import KeptFloat, kept_float
from mebp_triton.models.names import persistent_buffers
from mebp_triton.models.skeleton import Int4Site, build_skeleton, float_names, int4_sites, linear_names
from mebp_triton.store.manifest import SHARED, BaseModel, block_file
from mebp_triton.system import atomic, reading


@dataclass
class QuantizeReport:
    """A record of what became of every matrix.

    Attributes:
        errors: relative RMS error by module; 0.0 for codes taken over as they were.
        taken_over: modules whose codes were taken over bit for bit.
        decoded: modules whose codes were decoded exactly and rounded again, with what the codes are: none of our
            schemes holds them, or another form was asked for.
        forms: scheme, group size and width of codes, by module.
        sizes: the number of weights, by module, and the bytes that they take with their scales.
        linear: the modules that are linear layers, and the matrices of experts; the others are embedding and head.
        float_bytes, int4_bytes: the bytes of what stayed float and of what became int4.
        kept_float: the matrices that stayed float, by the reason; see ``models/kept_float.py``.
        compensated: with a calibration, the linear layers that were rounded by all they read: their columns make up
            for each other's errors.
        weighted: those whose inputs have too many pairs of columns for the memory: each column counts by its inputs
            alone.
        unseen: those that were quantized though the calibration text never reaches them.
    """

    errors: dict[str, float] = field(default_factory=dict)
    taken_over: list[str] = field(default_factory=list)
    decoded: dict[str, str] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    linear: list[str] = field(default_factory=list)
    float_bytes: int = 0
    int4_bytes: int = 0
    kept_float: dict[str, KeptFloat] = field(default_factory=dict)
    compensated: list[str] = field(default_factory=list)
    weighted: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    def bits_per_weight(self, names: Iterable[str] | None = None) -> float:
        """The mean bits of a weight, scales counted, over the modules ``names``, or over all that became int4."""
        weights, nbytes = zip(*(self.sizes[name] for name in (self.sizes if names is None else names)), strict=True)
        return 8 * sum(nbytes) / sum(weights)


def quantize(
    source: Path | str,
    store: Path | str,
    scheme: Scheme | None = None,
    group_size: int | None = None,
    scale_search: bool = True,
    blocks: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    bits: int | None = None,
    calibration: Callable[[Path], TokenizedData | None] = lambda companions: None,
    calibration_windows: int = CALIBRATION_WINDOWS,
    embedding_bits: int | None = None,
    bits_per_weight: float | None = None,
) -> QuantizeReport:
    """Makes the store directory ``store`` from ``source``, a transformers model directory or a GGUF file.

    Args:
        source: the file or directory. One tensor of it is in memory at a time, and one block of int4 weights.
        store: must not exist, or be empty. It appears whole or not at all.
        scheme: of the linear layers: "symmetric", "affine" or "codebook" (NF4). By default, each matrix whose codes in
            the source we hold is taken over bit for bit, whatever the others have; one with other codes becomes
            symmetric, with 8 bits. Where a source has codes, its float linear layers follow the first linear layer;
            without codes, they become codebook, or with 8 bits symmetric.
        group_size: of the linear layers: 32, 64 or 128, or, of codes of 8 bits, 16; by default that of the codes, or
            32, with 8 bits 64.
        scale_search: whether each group's scale is searched for the least squared error.
        blocks: the path of the block list, where it is not found by itself.
        progress: called with (matrices done, matrices in all).
        bits: the width of the linear layers' codes, 4 or 8; by default the source's, 8 for other codes, or 4.
        embedding_bits: the same of the embedding and of a head of its own; by default the source's, or 8, symmetric in
            groups of 64. With 4, ``scheme`` and ``group_size`` hold for them too.
        bits_per_weight: the mean bits of the linear layers' weights, scales counted, in place of ``bits``; for a source
            without codes. The layers whose rounding harms most get 8 bits, the others 4, and the mean stays below. Each
            layer is read once more before. With a calibration, the harm is what the text shows.
        calibration: called with a directory that has the source's config and tokenizer. The text that it returns goes
            through the model, block by block, and linear layers are rounded so that what they give on it changes
            little. In memory are then one block in float32, and the products of pairs of its inputs' columns.
        calibration_windows: how many windows of the text, evenly spaced, go through the model.

    Returns:
        A record of what became of every matrix.

    Raises:
        ValueError: the source cannot be read, or the arguments do not fit; nothing is left behind.
    """
    recipe = Recipe(scheme, group_size, scale_search, bits, embedding_bits)
    if bits_per_weight is not None and bits is not None:
        raise ValueError("bits_per_weight chooses the width of each layer's codes: give no other width beside it")
    atomic.check_absent(Path(store))
    opened = open_source(source)

    read = functools.cache(calibration)  # with a budget the text goes through the model twice

    def follow(directory: Path) -> Calibration | None:
        text = read(directory)
        return None if text is None else Calibration(SourceRun(opened, text, calibration_windows, directory, blocks))

    base = replace(base_model(Path(source)), crc32=reading.joint_checksum(opened.files))
    return write_store(opened, Path(store), recipe, blocks, None, progress, base, follow, bits_per_weight)


def write_store(
    opened: Source,
    target: Path,
    recipe: Recipe,
    blocks: str | None,
    form_of: Callable[[str], Form | Int4Weight] | None,
    progress: Callable[[int, int], None],
    base: BaseModel | None = None,
    follow: Callable[[Path], Calibration | None] = lambda directory: None,
    bits_per_weight: float | None = None,
) -> QuantizeReport:
    """Writes the store of an opened source; see ``quantize``.

    ``form_of`` tells the form that a matrix without codes of ours gets unless the recipe asks for another, by module,
    once the source has read it; or the weight whose grid it keeps. None: what ``quantize`` says. ``base``: see
    ``StoreWriter``. ``follow``: makes the calibration, in a directory that has the companions.
    """
    model = build_skeleton(opened.config, torch.float32)
    opened.bind(model)
    path, stack = find_blocks(model, blocks)
    sites, tied = int4_sites(model)
    floats = float_names(model, sites) + [name for name in persistent_buffers(model) if opened.has(name)]
    if not linear_names(sites):
        raise ValueError(f"{type(model).__name__} has no plain linear layers: its architecture is not supported")
    job = _Job(opened, recipe, form_of or _usual_forms(opened, sites), len(sites), progress)
    prefixes = [f"{path}.{index}." for index in range(len(stack))]
    with atomic.atomic_directory(target) as directory:
        opened.save_companions(directory)
        if bits_per_weight is not None:
            job.spend(bits_per_weight, sites, prefixes, follow(directory))
        job.calibration = follow(directory)
        writer = StoreWriter(directory, opened.description, tied, base)
        for index, prefix in enumerate(prefixes):
            with nullcontext() if job.calibration is None else job.calibration.block():
                job.write(writer, block_file(index), sites, floats, prefix)
        job.write(writer, SHARED, sites, floats, "")
        writer.finish()
    job.report.kept_float = kept_float(model, job.float_sizes)
    return job.report


def _usual_forms(opened: Source, sites: list[Int4Site]) -> Callable[[str], Form | Int4Weight]:
    """Returns what tells the form of a matrix without codes of ours if nothing is asked for, by its module's name."""
    first = f"{linear_names(sites)[0]}.weight"
    value = opened.read(first)
    default = DECODED_FORM if first in opened.decoded else DEFAULT_FORM
    native = value.form if isinstance(value, Int4Weight) else default
    tables = {site.name for site in sites if site.is_table}

    def form_of(name: str) -> Form | Int4Weight:
        if name in tables:
            return TABLE_FORM
        return DECODED_FORM if f"{name}.weight" in opened.decoded else native

    return form_of


def base_model(source: Path) -> BaseModel:
    """The name by which PEFT finds the model ``source``: on the hub, where it lies in the hub's cache, or its path."""
    path = source.resolve()
    cached = path.parent.parent.name  # models--ORGANISATION--NAME/snapshots/COMMIT
    if path.is_dir() and path.parent.name == "snapshots" and cached.startswith("models--"):
        return BaseModel(cached.removeprefix("models--").replace("--", "/"), path.name)
    return BaseModel(str(path if path.is_dir() else source.parent.resolve() / source.name))


class _Job:
    """One conversion under way. It writes a tensor into the first file whose prefix its name has."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        form_of: Callable[[str], Form | Int4Weight],
        total: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self.source, self.recipe, self.form_of, self.total, self.progress = source, recipe, form_of, total, progress
        self.calibration: Calibration | None = None
        self.report = QuantizeReport()
        self.done = 0
        self.written: set[str] = set()
        self.float_sizes: dict[str, int] = {}

    def spend(
        self, bits_per_weight: float, sites: list[Int4Site], prefixes: list[str], calibration: Calibration | None
    ) -> None:
        """Chooses the forms of the linear layers by a budget; see ``quantize``."""
        asked = self.recipe
        self.total += sum(not site.is_table for site in sites)
        chosen = forms_within(self.source, sites, prefixes, asked, bits_per_weight, calibration, self._advance)
        self.recipe = Recipe(scale_search=asked.scale_search, embedding_bits=asked.embedding_bits)
        table = asked.form(TABLE_FORM, "embedding")
        self.form_of = lambda name: chosen.get(name, table)

    def _advance(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def write(self, writer: StoreWriter, file: str, sites: list[Int4Site], floats: list[str], prefix: str) -> None:
        mine = [site for site in sites if site.name.startswith(prefix) and site.name not in self.written]
        matrices = {site.name: self._matrix(site) for site in mine}
        kept: dict[str, Tensor] = {}
        for name in floats:
            if name.startswith(prefix) and name not in self.written:
                value = self.source.read(name)
                check_finite(name, value)
                kept[name] = decode(value, torch.float32) if isinstance(value, Int4Weight) else value
        self.written |= matrices.keys() | kept.keys()
        self.float_sizes |= {name: tensor.nbytes for name, tensor in kept.items()}
        self.report.float_bytes += sum(tensor.nbytes for tensor in kept.values())
        self.report.int4_bytes += sum(weight.nbytes for weight, _ in matrices.values())
        writer.write_file(file, matrices, kept, {site.name for site in mine if site.role == "expert"})

    def _matrix(self, site: Int4Site) -> tuple[Int4Weight, float]:
        value = self.source.read(f"{site.name}.weight")
        if isinstance(value, Int4Weight):
            check_finite(f"{site.name}.weight", value)
        if site.transposed and not isinstance(value, Int4Weight):
            value = value.t().contiguous()
        try:
            weight, error = self.recipe.apply(value, self.form_of(site.name), site.role, lambda: self._columns(site))
        except ValueError as problem:
            raise ValueError(f"{site.name}: {problem}") from None
        self.report.errors[site.name], self.report.forms[site.name] = error, weight.form
        self.report.sizes[site.name] = site.out_features * site.in_features, weight.nbytes
        if not site.is_table:
            self.report.linear.append(site.name)
        if (codes := self.source.decoded.get(f"{site.name}.weight")) is not None:
            self.report.decoded[site.name] = codes
        if weight is value:
            self.report.taken_over.append(site.name)
        elif isinstance(value, Int4Weight):
            self.report.decoded[site.name] = f"codes of {value.form}"
        self._advance()
        if self.calibration is not None and weight is not value:
            self.calibration.replace(site.name, weight)
        return weight, error

    def _columns(self, site: Int4Site) -> Columns:
        """What a calibration knows of the columns of a matrix that is about to be rounded; nothing without one."""
        if self.calibration is None:
            return Columns()
        columns = self.calibration.columns(site.name)
        if not site.is_table:
            report, (importance, factor) = self.report, columns
            names = report.unseen if importance is None else report.weighted if factor is None else report.compensated
            names.append(site.name)
        return columns
