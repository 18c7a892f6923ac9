"""Where the rows of a batch are in the arguments of a model's blocks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import tiny_config
from torch import nn

import mebp_triton as mebp
from mebp_triton.blocks.runner import find_blocks
from mebp_triton.models import row_places as module
from mebp_triton.models.row_places import find_row_places, row_places
from mebp_triton.models.skeleton import build_skeleton


def found(architecture: str) -> Any:
    config = tiny_config(architecture)
    return find_row_places(config, find_blocks(build_skeleton(config, torch.float32))[0])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_rows_are_the_first_dimension(architecture: str) -> None:
    for places in found(architecture):
        assert len(places) > 1 and set(places.values()) == {0}


def test_entries_of_a_container_have_rows() -> None:
    *_, last = found("gemma4_text")
    assert last["[1][0]['full_attention'][0]"] == 0, "keys that an earlier block has left"


def test_blocks_whose_outputs_have_other_first_dimensions_take_the_whole_batch() -> None:
    config = tiny_config("gemma3n_text")
    path, _ = find_blocks(build_skeleton(config, torch.float32))
    with pytest.warns(UserWarning, match="an output of block 0 .* whole batches, and block_rows=2"):
        assert row_places(config, path, 2) is None


class Strange(nn.Module):
    """A model of one block, whose arguments and outputs are what ``block`` makes of the hidden state."""

    def __init__(self, given: Any, returned: Any) -> None:
        super().__init__()
        self.given, self.returned = given, returned
        self.blocks = nn.ModuleList([nn.Identity()])
        self.blocks[0].forward = lambda hidden, other: returned(hidden)  # type: ignore[method-assign]

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        hidden = input_ids[..., None].float()
        return self.blocks[0](hidden, self.given(hidden))


def same(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@pytest.mark.parametrize(
    ("given", "returned", "match"),
    [
        (lambda x: x.repeat(4, 1, 1), same, "argument .* of block 0"),
        (lambda x: x.shape[0], same, "argument .* of block 0"),
        (same, lambda x: x.mean(0), "an output of block 0 is .*, where rows are not the first"),
        (same, lambda x: (x, x.repeat(2, 1, 1)), "output of block 0"),
        (same, lambda x: (x, x.shape[0]), "output of block 0"),
        (same, lambda x: list(x), "another size"),
    ],
)
def test_what_has_no_rows(monkeypatch: pytest.MonkeyPatch, given: Any, returned: Any, match: str) -> None:
    monkeypatch.setattr(module, "meta_model", lambda config: Strange(given, returned).to("meta"))
    with pytest.raises(ValueError, match=match):
        find_row_places(None, "blocks")


def test_an_argument_that_is_the_same_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with a first dimension of 1 may have the rows in another call, so nothing is said of it."""
    for given, places in ((lambda x: x[0], {"[0][1]": None}), (lambda x: x[:1], {}), (lambda x: None, {})):
        monkeypatch.setattr(module, "meta_model", lambda config, given=given: Strange(given, same).to("meta"))
        assert find_row_places(None, "blocks") == [{"[0][0]": 0} | places]


def test_whole_batches_need_no_places() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert row_places(None, "", None) is None


@pytest.mark.parametrize("wrong", [0, -1, 1.0, True, "2"])
def test_a_wrong_number_of_rows(wrong: Any, shared_store: Any) -> None:
    with pytest.raises(ValueError, match="block_rows must be a number of rows"):
        mebp.load(shared_store("llama"), block_rows=wrong)
