"""Which list of modules is the model's stack of blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from models import ARCHITECTURES, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from mebp_triton.blocks.runner import find_blocks

PATHS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


class Made(nn.Module):
    """Lists of modules by path, and a config that says how many blocks there are."""

    def __init__(self, count: int, **lists: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=count))
        for path, length in lists.items():
            owner: nn.Module = self
            *above, last = path.split("__")
            for name in above:
                if not hasattr(owner, name):
                    owner.add_module(name, nn.Module())
                owner = owner.get_submodule(name)
            owner.add_module(last, nn.ModuleList(nn.Linear(1, 1) for _ in range(length)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_of_real_architectures(architecture: str) -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(tiny_config(architecture))
    path, blocks = find_blocks(model)
    assert path == PATHS.get(architecture, "model.layers")
    assert len(blocks) == 3 and blocks is model.get_submodule(path)


def test_under_peft() -> None:
    model: Any = AutoModelForCausalLM.from_config(tiny_config("llama"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    path, blocks = find_blocks(wrapped)
    assert path == "base_model.model.model.layers" and blocks is model.model.layers


def test_as_many_layers_as_heads_or_experts() -> None:
    """A list of the same length inside the blocks lies deeper, and is not the stack."""
    assert find_blocks(Made(4, model__layers=4, model__inner__experts=4))[0] == "model.layers"


def test_lists_of_another_length_do_not_count() -> None:
    assert find_blocks(Made(4, pre=2, model__layers=4))[0] == "model.layers"


def test_one_block() -> None:
    assert len(find_blocks(Made(1, model__layers=1))[1]) == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Made(4, model__layers=3), "no list of 4 blocks; name it with blocks="),
        (Made(0, model__layers=0), "no list of 0 blocks"),
        (Made(4, model__encoder=4, model__decoder=4), r"several lists of 4 blocks \(model.encoder, model.decoder\)"),
    ],
)
def test_where_the_rule_finds_none_or_several(model: Made, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_blocks(model)


def test_a_given_path_goes_before_the_rule() -> None:
    model = Made(4, model__encoder=4, model__decoder=4, other=2)
    assert find_blocks(model, "model.decoder") == ("model.decoder", model.get_submodule("model.decoder"))
    assert len(find_blocks(model, "other")[1]) == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [("model.none", "is no module of Made"), ("model", "is a Module, wanted a ModuleList"), ("empty", "with entries")],
)
def test_wrong_paths(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"blocks='{path}' .*{message}|blocks='{path}' {message}"):
        find_blocks(Made(4, model__layers=4, empty=0), path)
