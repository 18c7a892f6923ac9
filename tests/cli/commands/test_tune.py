"""Which layers are tuned together; the command itself is tried in test_cli."""

import pytest
from models import ARCHITECTURES, tiny_config

from mebp_triton.cli.commands import tune

GROUPS = {
    "llama": [[(48, 48), (24, 48), (24, 48)], [(48, 48)], [(80, 48), (80, 48)], [(48, 80)]],
    "gemma3_text": [[(64, 48), (32, 48), (32, 48)], [(48, 64)], [(80, 48), (80, 48)], [(48, 80)]],
    "gpt2": [[(144, 48)], [(48, 48)], [(192, 48)], [(48, 192)]],
    "phi3": [[(96, 48)], [(48, 48)], [(160, 48)], [(48, 80)]],
    "phi": [[(48, 48), (24, 48), (24, 48)], [(48, 48)], [(80, 48)], [(48, 80)]],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_that_share_their_input_are_found(architecture):
    groups = tune._shared_inputs(tiny_config(architecture))
    blocks = {tuple(map(tuple, groups[i : i + len(groups) // 3])) for i in range(0, len(groups), len(groups) // 3)}
    assert len(blocks) == 1, "three blocks, all alike"
    if architecture in GROUPS:
        assert sorted(map(list, blocks.pop())) == sorted(GROUPS[architecture])


def test_a_model_that_cannot_be_followed_is_tuned_layer_by_layer(monkeypatch, capsys):
    import transformers

    def fail(*arguments, **named):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", fail)
    groups = tune._shared_inputs(tiny_config("llama"))
    assert len(groups) == 21 and all(len(group) == 1 for group in groups)
    assert "data-dependent" in capsys.readouterr().err
