"""Which models have a language model that is taken alone; ``test_composite.py`` trains them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import composite_config, tiny_config
from torch import nn

from mebp_triton.models.language_part import LeftOut, leave_out_other_parts, parts_left_out, whole_class


@pytest.mark.parametrize(("name", "taken"), [("mistral3", True), ("qwen2_5_vl", True), ("gemma3", False)])
def test_the_whole_is_named_where_it_is_no_causal_model(name: str, taken: bool) -> None:
    config = composite_config(name)
    assert (whole_class(config) is not None) == taken
    config.architectures = ["SomethingElse"]
    assert whole_class(config) is None and whole_class(tiny_config("llama")) is None


class Made(nn.Module):
    """A decoder inside of a model, with a tower beside it and a projector at the top."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = nn.Module()
        self.inner.table, self.inner.decoder, self.inner.tower = nn.Embedding(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.projector, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.get_decoder = lambda: self.inner.decoder
        self.get_input_embeddings, self.get_output_embeddings = lambda: self.inner.table, lambda: self.head


def test_what_is_no_part_of_decoder_embedding_and_head_is_left_out() -> None:
    model = Made()
    leave_out_other_parts(model)
    assert parts_left_out(model) == ["inner.tower", "projector"]
    assert {name for name, _ in model.named_parameters()} == {
        "inner.table.weight",
        *(f"{layer}.{part}" for layer in ("inner.decoder", "head") for part in ("weight", "bias")),
    }
    with pytest.raises(ValueError, match="the language model alone, .* is left out: give text"):
        LeftOut()(torch.zeros(1))
