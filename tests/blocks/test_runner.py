"""Which list of modules is the model's stack of blocks, and who runs it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from models import ARCHITECTURES, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from mebp_triton.blocks.runner import BlockRunner, Counters, find_blocks, hidden_state, trainable_parameters

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
def test_real_architectures(architecture: str) -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(tiny_config(architecture))
    path, blocks = find_blocks(model)
    assert path == PATHS.get(architecture, "model.layers")
    assert len(blocks) == 3 and blocks is model.get_submodule(path)


def test_under_peft() -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(tiny_config("llama"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    path, blocks = find_blocks(wrapped)
    assert path == "base_model.model.model.layers" and blocks is model.model.layers


def test_as_many_layers_as_heads_or_experts() -> None:
    """A list of the same length inside the blocks lies deeper than the stack."""
    assert find_blocks(Made(4, model__layers=4, model__inner__experts=4))[0] == "model.layers"


def test_lists_of_another_length_do_not_count() -> None:
    assert find_blocks(Made(4, pre=2, model__layers=4))[0] == "model.layers"


def test_a_tower_with_as_many_blocks_as_the_decoder() -> None:
    model = Made(4, model__vision=4, model__language=4)
    model.get_decoder = lambda: model.get_submodule("model.language")  # type: ignore[assignment,operator]
    assert find_blocks(model)[0] == "model.language"


def test_blocks_that_the_config_counts_otherwise() -> None:
    """LongCat has two attentions in a block, and its config counts those."""
    model = Made(8, model__layers=4, other=4)
    model.get_submodule("model").layers = nn.ModuleList(GradientCheckpointingLayer() for _ in range(4))
    assert find_blocks(model)[0] == "model.layers"
    model.more = nn.ModuleList([GradientCheckpointingLayer()])
    with pytest.raises(ValueError, match="no list of 8 blocks"):
        find_blocks(model)


def test_one_block() -> None:
    assert len(find_blocks(Made(1, model__layers=1))[1]) == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Made(4, model__layers=3), "no list of 4 blocks; name it with blocks="),
        (Made(0, model__layers=0), "no list of 0 blocks"),
        (Made(None, model__layers=3), "does not say in its config how many blocks it has; name their list"),  # type: ignore[arg-type]
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


# --- the runner -----------------------------------------------------------------------------------------------------


def test_counts_begin_again_when_they_are_taken() -> None:
    counters = Counters(forward=3, identity=1)
    assert counters.pop_counts() == {"forward": 3, "recompute": 0, "identity": 1, "checkpoint": 0}
    assert counters == Counters()


def run_more(index: int, original: Any, x: torch.Tensor) -> torch.Tensor:
    return (index + 2) * original(x)


def test_blocks_are_run_by_the_runner_until_it_is_removed() -> None:
    blocks = [nn.Identity(), nn.Identity()]
    blocks[1].forward = own = lambda x: 10 * x  # type: ignore[method-assign,assignment]
    runner = BlockRunner(blocks, run_more)
    x = torch.ones(1)
    assert [block(x).item() for block in blocks] == [2, 30]
    with pytest.raises(ValueError, match="have an engine already"):
        BlockRunner(blocks, run_more)
    wrapped = blocks[0].forward
    blocks[0].forward = lambda x: 5 + wrapped(x)  # type: ignore[method-assign,assignment]
    assert blocks[0](x) == 7
    runner.remove()
    assert blocks[1].forward is own and blocks[0](x) == 6, "the wrapper of somebody else stays"
    blocks.append(nn.Identity())
    BlockRunner(blocks, run_more).remove()
    assert "forward" not in blocks[2].__dict__


def test_one_block_in_two_places_is_refused() -> None:
    block = nn.Identity()
    with pytest.raises(ValueError, match="one block stands in several places"):
        BlockRunner([block, block], run_more)


def test_what_is_trainable() -> None:
    block = nn.Linear(2, 2)
    block.bias.requires_grad_(False)
    assert BlockRunner([nn.Identity(), block], run_more).trainable(1) == trainable_parameters(block) == [block.weight]


def test_what_lies_below_the_lowest_trained_block() -> None:
    runner = BlockRunner([nn.Identity() for _ in range(4)], run_more)
    assert not any(runner.is_below(index, False) for index in range(4)), "all are trained at first"
    runner.treatment = lambda index: "train" if index in (1, 3) else "exact"
    assert [runner.is_below(index, False) for index in range(4)] == [True, False, False, False]
    assert runner.is_below(0, True), "nobody wants the gradient of the input"
    runner.outer_parameters = [nn.Parameter(torch.ones(1), requires_grad=False)]
    assert runner.is_below(0, True)
    runner.outer_parameters[0].requires_grad_(True)
    assert not runner.is_below(0, True) and runner.is_below(0, False)


def test_the_hidden_state() -> None:
    x, other = torch.ones(1), torch.ones(2)
    assert hidden_state((x, other), {}) is x and hidden_state((), {"other": other, "hidden_states": x}) is x
    for args, kwargs in (((), {"x": x}), ((None, x), {}), ((), {})):
        with pytest.raises(ValueError, match="without its hidden state"):
            hidden_state(args, kwargs)
