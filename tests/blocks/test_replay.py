"""What a recompute is given back: outputs that were kept, autocast, random numbers."""

from __future__ import annotations

import pytest
import torch
from lora_layers import adapted
from torch import Tensor

from mebp_triton.blocks.replay import ForwardState, OpaqueModule, Recording, Replay
from mebp_triton.store.block_inputs import DeviceBlockInputs, HostBlockInputs


@pytest.mark.parametrize("random", [False, True])
def test_the_state_of_the_forward_pass(random: bool) -> None:
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        state = ForwardState(torch.device("cpu"), random)
    first = torch.rand(4)
    after = torch.get_rng_state()
    with state.replayed():
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert not torch.is_autocast_cache_enabled()
        assert torch.equal(torch.rand(4), first) == random
    assert not torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
    assert torch.equal(torch.get_rng_state(), after) == random


def outputs(count: int) -> list[Tensor]:
    return [torch.full((2, 9), float(place), requires_grad=True) * 1 for place in range(count)]


def test_outputs_come_back_call_by_call_without_a_graph() -> None:
    first, second, x = adapted(), adapted(), torch.ones(2, 70)
    recording = Recording(HostBlockInputs())
    made = outputs(3)
    for layer, y in zip((first, second, first), made, strict=True):
        assert recording.lookup(layer, x) is None
        recording.record(layer, y)
    for _ in range(2):  # a graph may be run backward twice
        replay = Replay(recording, None)
        for layer, y in zip((first, second, first), made, strict=True):
            found = replay.lookup(layer, x)
            assert found is not None and torch.equal(found, y) and found.grad_fn is None
            replay.record(layer, found)
        assert replay.lookup(first, x) is None, "a third call was not recorded"


def test_a_layer_that_is_looked_up_twice_gets_the_same_call() -> None:
    """The tape goes on only when the layer was called."""
    layer, x = adapted(), torch.ones(2, 70)
    recording = Recording(DeviceBlockInputs())
    for y in outputs(2):
        recording.record(layer, y)
    replay = Replay(recording, None)
    found = replay.lookup(layer, x), replay.lookup(layer, x)
    assert torch.equal(*found)
    assert found[0] is not found[1], "each becomes the output of a function, which gives it a graph"


def test_the_unused_output_is_not_kept_and_comes_back_as_nan() -> None:
    layer, x = adapted(), torch.ones(2, 70, dtype=torch.float64)
    recording = Recording(DeviceBlockInputs())
    recording.unused = layer
    recording.record(layer, outputs(1)[0])
    assert not recording.kept
    found = Replay(recording, layer).lookup(layer, x)
    assert found.isnan().all() and (found.shape, found.dtype) == ((2, 9), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Replay(None, layer).lookup(layer, x.float()).dtype == torch.bfloat16
    module = OpaqueModule()
    assert Replay(None, module).lookup(module, x).shape == x.shape


def test_without_a_recording_everything_is_computed() -> None:
    layer, module = adapted(), OpaqueModule()
    replay = Replay(None, None)
    assert replay.lookup(layer, torch.ones(2, 70)) is None and replay.part(module) is None


def test_an_output_that_was_changed_in_place_is_computed_again() -> None:
    layer, y = adapted(), torch.ones(2, 9)
    recording = Recording(DeviceBlockInputs())
    recording.record(layer, y)
    y.mul_(2)
    assert Replay(recording, None).lookup(layer, torch.ones(2, 70)) is None


def test_pieces_of_an_opaque_module_have_recordings_of_their_own() -> None:
    module, other = OpaqueModule(), OpaqueModule()
    recording = Recording(DeviceBlockInputs())
    parts = [recording.part(module), recording.part(module), recording.part(other)]
    assert len(set(map(id, parts))) == 3 and all(part.store is recording.store for part in parts)
    replay = Replay(recording, None)
    assert [replay.part(module), replay.part(other), replay.part(module)] == [parts[0], parts[2], parts[1]]
    assert replay.part(module) is None
