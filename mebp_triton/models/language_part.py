"""The language model inside a model for text and images, whose other parts are left out.

The class and the names of its tensors are those of the whole model, so that an adapter trained here fits that.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn


def whole_class(config: Any) -> Any:
    """The class of a model that takes images beside text, where transformers makes no causal model of it all.

    None where ``AutoModelForCausalLM`` makes the whole model, or where the config or its ``architectures`` name another
    kind.
    """
    kind: Any = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    causal: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    declared = config.architectures or []
    if kind is None or causal is kind or kind.__name__ not in declared:
        return None
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is config:
        return None
    return kind


class LeftOut(nn.Module):
    """Stands in the place of a part of a model that text alone never needs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "the store has the language model alone, and what reads images or sound is left out: give text"
        )


def leave_out_other_parts(model: Any) -> None:
    """Replaces each module of ``model`` that is no part of its decoder, embedding or head by a ``LeftOut``."""
    needed: set[nn.Module] = set()
    for module in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()):
        needed |= set(module.modules())

    def visit(parent: nn.Module) -> None:
        for name, child in list(parent.named_children()):
            if child in needed:
                continue
            if needed.isdisjoint(child.modules()):
                parent.add_module(name, LeftOut())
            else:
                visit(child)

    visit(model)


def parts_left_out(model: nn.Module) -> list[str]:
    """The paths of the modules that are left out of ``model``."""
    return [path for path, module in model.named_modules() if isinstance(module, LeftOut)]
