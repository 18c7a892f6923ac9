"""Puts the parameters of a source into its skeleton, as float32, and takes those of a block out again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from mebp_triton.convert.readers.source import Source, check_finite
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode
from mebp_triton.models.experts import expert_places
from mebp_triton.models.names import parameter_aliases, persistent_buffers
from mebp_triton.models.skeleton import int4_sites


class SourceWeights:
    """The parameters of a bound source, for a skeleton that it was not bound to.

    Args:
        source: an opened source, bound to another skeleton of its config.
        model: the skeleton, whose parameters are on the meta device.
    """

    def __init__(self, source: Source, model: Any) -> None:
        self.source, self.model = source, model
        self._first = {name: first for first, names in parameter_aliases(model).items() for name in names}
        self._transposed = {f"{site.name}.weight" for site in int4_sites(model)[0] if site.transposed}
        self._experts = expert_places(model)

    def read(self, name: str) -> Tensor:
        """The parameter ``name`` in float32 and in the model's shape. ValueError where it is not finite."""
        value = self.stored(name)
        check_finite(name, value)
        return self._floats(name, value)

    def stored(self, name: str) -> Tensor | Int4Weight:
        """The parameter ``name`` as the source has it."""
        return self.source.read(self._first[name])

    def _floats(self, name: str, value: Tensor | Int4Weight) -> Tensor:
        if not isinstance(value, Int4Weight):
            return value.float()
        floats = decode(value, torch.float32)
        return floats.t() if name in self._transposed else floats

    def load(self, prefix: str) -> None:
        """Fills the parameters whose names begin with ``prefix``."""
        for name in self._names(prefix):
            self._set(name, self.read(name))

    def put(self, name: str, value: Int4Weight) -> None:
        """Fills the parameter ``name``, or an expert's part of one, with what ``value`` decodes to."""
        if (place := self._experts.get(name)) is None:
            self._set(name, self._floats(name, value))
        else:
            parameter, expert = place
            self.model.get_parameter(parameter).data[expert] = self._floats(name, value)

    def unload(self, prefix: str) -> None:
        """Takes the parameters whose names begin with ``prefix`` out again."""
        for name in self._names(prefix):
            parameter = self.model.get_parameter(name)
            self._set(name, torch.empty_like(parameter, device="meta"))

    def load_rest(self, blocks: str, without: Collection[str], ids: Tensor) -> None:
        """Fills what lies outside of the blocks but for the head, and persistent buffers everywhere.

        Tables that are read by token get the rows of ``ids`` alone.

        Args:
            blocks: the path of the block list.
            without: modules that are not needed.
            ids: every token that the model will be given, of any shape.
        """
        head, table = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        # Beside the embedding, some models have a table by token for all their blocks. A table of positions may be as
        # high as the embedding, so its height alone tells nothing.
        height = getattr(self.model.config.get_text_config(), "vocab_size_per_layer_input", None)
        for name in persistent_buffers(self.model):
            if self.source.has(name):
                owner, _, attribute = name.rpartition(".")
                self.model.get_submodule(owner)._buffers[attribute] = self.source.read(name)
        for path, module in list(self.model.named_modules()):
            if module is head or path in without or f"{path}.".startswith(f"{blocks}."):
                continue
            if isinstance(module, nn.Embedding) and (module is table or module.weight.shape[0] == height):
                keep_rows(module, self.stored(f"{path}.weight"), ids)
                check_finite(f"{path}.weight", module.weight)
                continue
            for name, _ in list(module.named_parameters(path, recurse=False)):
                self._set(name, self.read(name))

    def _names(self, prefix: str) -> list[str]:
        named = self.model.named_parameters(remove_duplicate=False)
        return [name for name, _ in named if name.startswith(prefix)]

    def _set(self, name: str, value: Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        self.model.get_submodule(owner)._parameters[attribute] = nn.Parameter(value, requires_grad=False)


def keep_rows(module: nn.Embedding, table: Tensor | Int4Weight, ids: Tensor) -> None:
    """Gives ``module`` the rows of ``table`` for ``ids`` alone, in float32. It must be asked for no others but 0.

    Tables are larger than blocks, and what lies beside a model's own tokens in them is never read. Row 0 is what models
    look up where a token has no row of its own.
    """
    seen = torch.cat((ids.flatten(), ids.new_zeros(1))).unique()
    seen = seen[seen < module.weight.shape[0]]
    rows = decode(table.gather(seen), torch.float32) if isinstance(table, Int4Weight) else table[seen].float()
    module.weight = nn.Parameter(rows, requires_grad=False)
    module.padding_idx = None  # it counts for gradients alone, and may be larger than the rows that are left
    module.register_forward_pre_hook(lambda _, args: (torch.searchsorted(seen, args[0]), *args[1:]))
