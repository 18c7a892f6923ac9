"""Parameters that transformers 5 makes of other tensors of a checkpoint while it loads, such as experts in pieces.

Its table says which, and its own operations do it here. An expert alone goes through them as a model of one expert, so
that the parameter with all experts is never needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mebp_triton.models.experts import fused_experts


@dataclass(frozen=True)
class Conversion:
    """A parameter in the making.

    Attributes:
        sources: the keys of the tensors that it is made of, in order, by the pattern of the table.
        converter: the entry of the table.
        part: which of the parameters it is that the entry makes.
    """

    sources: dict[str, list[str]]
    converter: Any
    part: int = 0

    @property
    def keys(self) -> list[str]:
        """All keys of ``sources``."""
        return [key for keys in self.sources.values() for key in keys]

    @property
    def in_pieces(self) -> bool:
        """Whether each expert has tensors of its own."""
        return any(type(step).__name__ == "MergeModulelist" for step in self.converter.operations)

    def keys_of(self, expert: int) -> dict[str, str]:
        """The key of an expert's tensor, or of the tensor with all experts, by pattern in the order of the table."""
        place = expert if self.in_pieces else 0
        patterns = self.converter.source_patterns
        return {pattern: self.sources[pattern][place] for pattern in patterns if pattern in self.sources}

    def joins_rows(self) -> bool:
        """Whether an expert's matrix is its pieces below each other, and nothing else."""
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in self.converter.operations]
        return steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])

    def apply(self, tensors: Mapping[str, list[Tensor]], model: PreTrainedModel, name: str) -> Tensor:
        """Makes the parameter ``name`` of the tensors by pattern; or, of those of one expert, its part of it.

        Raises:
            ValueError: transformers' operations do not take them.
        """
        made: Any = {pattern: tensors[pattern] for pattern in self.converter.source_patterns if pattern in tensors}
        patterns = {
            "source_patterns": self.converter.source_patterns,
            "target_patterns": self.converter.target_patterns,
        }
        try:
            for step in self.converter.operations:
                made = step.convert(made, **patterns, full_layer_name=name, model=model, config=model.config)
            value = list(made.values())[self.part]
        except Exception as error:  # code of transformers, on tensors of somebody's file
            raise ValueError(f"{name} cannot be made of {self.keys[0]}: {error}") from None
        return value[0] if isinstance(value, list) else value


# Operations that treat each expert alone, where they do not act along the first dimension.
ALONE = ("Concatenate", "Interleave")


def conversions(model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, Conversion]:
    """Finds what transformers does to a checkpoint's tensors beyond renaming them, by the parameter's name.

    Args:
        model: the model.
        names: the keys of the checkpoint, each with its current name.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4 renames and converts nothing
        return {}
    converters = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightConverter)]
    experts = {f"{found.path}.{parameter}" for found in fused_experts(model) for parameter in found.shapes}
    made: dict[str, Conversion] = {}
    for key, name in sorted(names.items(), key=lambda item: _natural(item[1])):
        for converter in converters:
            first, pattern = converter.rename_source_key(name)
            if pattern is None:
                continue
            targets = _targets(first, converter.target_patterns)
            if experts.isdisjoint(targets) or (len(targets) == 1 and _treats_experts_alone(converter.operations)):
                for part, target in enumerate(targets):
                    conversion = made.setdefault(target, Conversion({}, converter, part))
                    conversion.sources.setdefault(pattern, []).append(key)
                break
    return made


def _targets(first: str, patterns: Sequence[str]) -> list[str]:
    """The names of all parameters that an entry makes, of which ``first`` is the first."""
    before, _, after = first.partition(patterns[0])
    return [first, *(f"{before}{pattern}{after}" for pattern in patterns[1:])]


def _treats_experts_alone(operations: Sequence[Any]) -> bool:
    kinds = [type(step).__name__ for step in operations]
    along = [getattr(step, "dim", 0) for step in operations]
    merges = [kind == "MergeModulelist" and dim == 0 for kind, dim in zip(kinds, along, strict=True)]
    alone = [kind in ALONE and dim > 0 for kind, dim in zip(kinds, along, strict=True)]
    return all(merge or other for merge, other in zip(merges, alone, strict=True))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which ``experts.9`` comes before ``experts.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
