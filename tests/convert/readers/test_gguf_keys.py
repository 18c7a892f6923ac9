"""Every key of a file is set, agrees with the model, has no effect, or is refused by its name."""

import math

import pytest

from mebp_triton.convert.readers.gguf_architectures import ARCHITECTURES
from mebp_triton.convert.readers.gguf_header import Length
from mebp_triton.convert.readers.gguf_keys import ROPE, Set, Unused, settings_of

PLAIN = {
    "llama.context_length": 32,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def settings(tensors=("token_embd.weight", "output_norm.weight"), **changed):
    keys = PLAIN | {key.replace("__", "."): value for key, value in changed.items()}
    keys = {key: value for key, value in keys.items() if value is not None}
    return settings_of(ARCHITECTURES["llama"], "llama", keys, tensors, "x.gguf")


def test_settings_of_a_plain_file():
    result = settings()
    assert result["hidden_size"] == 64 and result["rms_norm_eps"] == 1e-5
    assert result["num_key_value_heads"] == 4 and result["head_dim"] == 16
    assert result["attention_bias"] is result["mlp_bias"] is False
    assert settings(tensors=["blk.0.attn_q.bias", "blk.0.attn_q.weight"])["attention_bias"] is True


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama__attention__head_count": None}, "x.gguf lacks llama.attention.head_count; give a complete GGUF"),
        ({"llama__attention__head_count": [4, 8]}, "llama.attention.head_count differs between layers"),
        ({"llama__new_thing": 3}, "x.gguf: llama.new_thing is 3, which the model in transformers does not have"),
        ({"llama__logit_scale": 0.5}, "llama.logit_scale is 0.5, wanted 0 or 1; give the model as safetensors"),
        ({"llama__block_count": "two"}, "llama.block_count is 'two', wanted a number; download it again"),
        (
            {"llama__attention__head_count_kv": 0},
            "llama.attention.head_count_kv is 0 (wanted a whole number, 1 or more)",
        ),
        ({"llama__attention__head_count": 1.5}, "llama.attention.head_count is 1.5 (wanted a whole number, 1 or more)"),
        ({"llama__attention__head_count": []}, "llama.attention.head_count is [], wanted a number; download it again"),
        ({"llama__attention__head_count": [4]}, "llama.attention.head_count has 1 numbers for 2 layers"),
        ({"llama__attention__head_count": Length(4)}, "llama.attention.head_count is 4, wanted a number"),
        ({"llama__attention__sliding_window": "x"}, "llama.attention.sliding_window is 'x', wanted a number"),
        ({"llama__attention__layer_norm_rms_epsilon": math.nan}, "layer_norm_rms_epsilon is nan, wanted a number"),
        ({"llama__attention__key_length": math.inf}, "llama.attention.key_length is inf, wanted a number"),
        ({"llama__block_count": 1 << 30}, "llama.block_count is 1073741824, more than it has tensors"),
        ({"general__type": "adapter"}, "general.type is 'adapter', wanted model"),
        ({"adapter__type": "lora"}, "adapter.type is 'lora'"),
        ({"clip__vision__block_count": 2}, "clip.vision.block_count is 2"),
    ],
)
def test_refused(keys, message):
    with pytest.raises(ValueError) as caught:
        settings(**keys)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_keys_without_effect():
    others = {"general__name": "x", "general__sampling__temp": 0.7, "quantize__imatrix__file": "y", "own__key": 1}
    neutral = {"llama__pooling_type": 1, "llama__expert_count": 0, "llama__attention__head_count_kv": [4, 4]}
    assert settings(**others, **neutral) == settings()


def test_sliding_layers_have_a_period():
    gemma = {key.replace("llama", "gemma3"): value for key, value in PLAIN.items()} | {"gemma3.block_count": 4}
    gemma |= {"gemma3.attention.sliding_window": 8}

    def layers(pattern):
        keys = gemma | {"gemma3.attention.sliding_window_pattern": pattern}
        kinds = settings_of(ARCHITECTURES["gemma3"], "gemma3", keys, "abcd", "x")["layer_types"]
        return "".join(kind[0] for kind in kinds)

    assert layers(2) == layers([True, False, True, False]) == "sfsf"
    assert layers([True] * 4) == "ssss" and layers(1) == layers([False] * 4) == "ffff"
    with pytest.raises(ValueError, match="sliding_window_pattern is .*layers slide without a period"):
        layers([False, True, True, True])
    with pytest.raises(ValueError, match="sliding_window_pattern has 1 numbers for 4 layers"):
        layers([True])
    with pytest.raises(ValueError, match="sliding_window_pattern is 0"):
        layers(0)


def settings_as(arch, **changed):
    keys = {key.replace("llama", arch): value for key, value in PLAIN.items()}
    keys |= {f"{arch}.{key.replace('__', '.')}": value for key, value in changed.items()}
    return settings_of(ARCHITECTURES[arch], arch, keys, map(str, range(99)), "x")


def test_phi3_has_the_window_that_llama_cpp_leaves_out():
    assert settings_as("phi3", attention__sliding_window=8)["sliding_window"] == 8
    assert settings_as("phi3", attention__sliding_window=0)["sliding_window"] is None
    assert settings_as("phi3")["sliding_window"] is None


@pytest.mark.parametrize(("arch", "kinds"), [("gemma2", "sfsfsfs"), ("gemma3", "sssssfs")])
def test_the_period_of_a_file_that_states_none(arch, kinds):
    sliding = {"attention__sliding_window": 8, "block_count": 7}
    assert "".join(kind[0] for kind in settings_as(arch, **sliding)["layer_types"]) == kinds
    own = settings_as(arch, **sliding, attention__sliding_window_pattern=3)["layer_types"]
    assert "".join(kind[0] for kind in own) == "ssfssfs"


@pytest.mark.parametrize(("arch", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_queries_of_the_largest_gemma_are_scaled_by_the_hidden_size(arch, layers):
    """No key tells; llama.cpp goes by the number of layers."""
    scalars = [
        settings_as(arch, attention__key_length=32, block_count=count)["query_pre_attn_scalar"]
        for count in (layers - 1, layers, layers + 1)
    ]
    assert scalars == [32, 16, 32]


def test_every_rule_says_what_it_is_for():
    for arch, known in ARCHITECTURES.items():
        for key, rule in known.keys.items():
            assert key not in ROPE - {"rope.dimension_count", "rope.scaling.finetuned"}, (arch, key)
            assert isinstance(rule, Set) or (rule.why if isinstance(rule, Unused) else rule.wanted), (arch, key)
