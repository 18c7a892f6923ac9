"""Rules that architectures share: values of keys that are made into settings, or refused."""

import pytest

from mebp_triton.convert.readers.gguf_rules import GRANITE_DERIVED, count, key_heads, layer_types, period, some_layers


def test_periods_of_sliding_layers():
    assert period(3) == 3
    assert period([True, True, False, True]) == 3
    assert period([True, True]) == 3
    with pytest.raises(ValueError, match="slide without a period"):
        period([True, False, False])
    settings = {"sliding_window_pattern": 2, "sliding_window": 8, "num_hidden_layers": 3}
    assert layer_types(settings) == ["sliding_attention", "full_attention", "sliding_attention"]
    assert layer_types(settings | {"sliding_window": 0}) == ["full_attention"] * 3


def test_layers_without_key_heads():
    assert key_heads({"_key_heads": [0, 2, 0], "num_hidden_layers": 3}) == [0, 2, 0]
    assert key_heads({"_key_heads": 2, "num_hidden_layers": 2}) == [2, 2]
    for heads in ([0, 2], [1, 2, 0], [0, 0, 0]):
        with pytest.raises(ValueError, match=r"attention\.head_count_kv is \["):
            key_heads({"_key_heads": heads, "num_hidden_layers": 3})


def test_numbers():
    assert count(3.0) == 3
    with pytest.raises(ValueError, match="a whole number, 1 or more"):
        count(0)
    scale = GRANITE_DERIVED["attention_multiplier"]
    assert scale({"attention_multiplier": 0.0, "head_dim": 16}) == 0.25
    assert scale({"attention_multiplier": 0.5, "head_dim": 16}) == 0.5
    layers = some_layers("_some", "nextn_predict_layers")
    assert [layers({"_some": number, "num_hidden_layers": 3}) for number in (0, 2)] == [0, 2]
    for number in (3, -1, 0.5, 2**31):
        with pytest.raises(ValueError, match=r"^nextn_predict_layers is .* of 3 layers; download it again"):
            layers({"_some": number, "num_hidden_layers": 3})
