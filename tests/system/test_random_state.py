"""Random states: the same numbers are drawn again, and the generators go on where they were."""

import pytest
import torch

from mebp_triton.system.random_state import RandomState

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_are_drawn_again_and_the_generator_goes_on_where_it_was(device):
    torch.manual_seed(3)
    state = RandomState(torch.device(device))
    assert not state.changed()
    first = torch.rand(4, device=device)
    assert state.changed()
    after = RandomState(torch.device(device))
    with state.replayed():
        assert torch.equal(torch.rand(4, device=device), first)
    assert not after.changed()
    state.put_back()
    assert not state.changed() and torch.equal(torch.rand(4, device=device), first)


@pytest.mark.parametrize("device", DEVICES)
def test_states_that_were_saved_are_put_back(device):
    torch.manual_seed(3)
    saved = RandomState(torch.device(device)).states
    assert list(saved) == (["cpu"] if device == "cpu" else ["cpu", "cuda"])
    first = torch.rand(4), torch.rand(4, device=device)
    RandomState(torch.device(device), {name: state.clone() for name, state in saved.items()}).put_back()
    again = torch.rand(4), torch.rand(4, device=device)
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
