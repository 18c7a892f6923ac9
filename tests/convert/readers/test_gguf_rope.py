"""RoPE's keys and factors give the frequencies that a file means, or are refused."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mebp_triton.convert.readers.gguf_architectures import ARCHITECTURES
from mebp_triton.convert.readers.gguf_header import Length
from mebp_triton.convert.readers.gguf_rope import FREQS, LLAMA3, from_factors, rope_settings

SETTINGS = {"hidden_size": 64, "num_attention_heads": 1, "max_position_embeddings": 128}


def frequencies(**rope):
    config = LlamaConfig(**SETTINGS, num_key_value_heads=1, head_dim=64, **rope)
    scaling = rope["rope_scaling"]["rope_type"]
    return ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"))[0].double().numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_are_those_of_transformers(factor):
    """Factors from transformers' own frequencies are recognised, so the model computes these frequencies again."""
    theta = 5e5
    scaling = {"rope_type": "llama3", "factor": factor, **LLAMA3}
    unscaled = theta ** -(np.arange(32) / 32)
    factors = unscaled / frequencies(rope_theta=theta, rope_scaling=dict(scaling))
    assert len({*factors.round(3)}) > 4
    assert from_factors(factors.astype(np.float32).astype(float), theta) == scaling


def test_equal_factors_are_linear_scaling():
    assert from_factors(np.full(8, 4.0), 1e4) == {"rope_type": "linear", "factor": 4.0}
    assert from_factors(np.ones(8), 1e4) is None


@pytest.mark.parametrize("factors", [np.linspace(1, 8, 32), np.r_[np.ones(31), 0.0], np.r_[np.ones(31), np.nan]])
def test_other_factors_are_refused_by_the_tensor(factors):
    with pytest.raises(ValueError, match=f"^{FREQS} holds"):
        from_factors(factors, 5e5)


def test_a_tensor_of_another_length_is_refused():
    with pytest.raises(ValueError, match=rf"{FREQS} has shape \(5,\), wanted \(32,\)"):
        rope_settings(ARCHITECTURES["llama"], {}, SETTINGS, {FREQS: np.ones(5, np.float32)})


@pytest.mark.parametrize("kind", ["dynamic", "su", ""])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match=rf"rope\.scaling\.type is '{kind}'"):
        rope_settings(ARCHITECTURES["llama"], {"rope.scaling.type": kind}, SETTINGS, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.freq_base", "x"),
        ("rope.freq_base", 0.0),
        ("rope.freq_base", np.nan),
        ("rope.freq_base", Length(3)),
        ("rope.dimension_count", [1]),
        ("rope.dimension_count", np.inf),
        ("rope.scaling.factor", -2.0),
        ("rope.scale_linear", -2.0),
    ],
)
def test_a_value_of_no_use_is_refused_by_its_key(key, value):
    with pytest.raises(ValueError, match=f"^{key} is"):
        rope_settings(ARCHITECTURES["llama"], {key: value}, SETTINGS, {})


def test_factors_for_long_and_short_texts():
    long, short = np.full(32, 4, np.float32), np.ones(32, np.float32)
    factors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    stated = {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.25}
    for keys in (stated, stated | {"rope.scaling.type": "longrope"}):
        scaling = rope_settings(ARCHITECTURES["phi3"], keys, dict(SETTINGS), factors)["rope_scaling"]
        assert scaling["rope_type"] == "longrope" and scaling["attention_factor"] == 1.25
        assert scaling["long_factor"] == long.tolist() and scaling["short_factor"] == short.tolist()
    for keys in ({"rope.scale_linear": 4.0}, {"rope.scaling.factor": 4.0}, {"rope.scaling.type": "yarn"}):
        with pytest.raises(ValueError, match=rf"^{[*keys][0]} is .* beside rope_factors_long"):
            rope_settings(ARCHITECTURES["phi3"], stated | keys, dict(SETTINGS), factors)
    with pytest.raises(ValueError, match=rf"^{FREQS} stands beside other factors"):
        rope_settings(ARCHITECTURES["llama"], stated, dict(SETTINGS), factors | {FREQS: short})
    with pytest.raises(ValueError, match=r"^rope_factors_short\.weight is missing"):
        rope_settings(ARCHITECTURES["phi3"], stated, dict(SETTINGS), {"rope_factors_long.weight": long})


def test_a_part_of_a_head():
    result = rope_settings(ARCHITECTURES["stablelm"], {"rope.dimension_count": 16}, SETTINGS, {})
    assert result == {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    with pytest.raises(ValueError, match=r"rope\.dimension_count is 16, wanted 64"):
        rope_settings(ARCHITECTURES["llama"], {"rope.dimension_count": 16}, SETTINGS, {})


def test_rope_of_sliding_layers_and_of_others():
    """Gemma 4: the last coordinates of a wide head stay as they are, which enormous factors say."""
    known, settings = ARCHITECTURES["gemma4"], {"global_head_dim": 16}
    factors = {FREQS: np.array([1.0] * 2 + [1e30] * 6)}
    keys = {"rope.freq_base": 5000.0, "rope.freq_base_swa": 300.0}
    result = rope_settings(known, keys, settings, factors)["rope_parameters"]
    whole = {"rope_type": "proportional", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
    assert result["full_attention"] == whole
    assert result["sliding_attention"] == {"rope_type": "default", "rope_theta": 300.0}
    for bad, message in (
        ({}, "is missing, wanted"),
        ({FREQS: np.ones(4)}, r"is of shape \(4,\), wanted \(8,\)"),
        ({FREQS: np.array([1.0] * 4 + [2.0] * 4)}, "other than 1 and 1e30"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_settings(known, keys, settings, bad)
    with pytest.raises(ValueError, match=r"rope\.scaling\.factor is 2\.0"):
        rope_settings(known, keys | {"rope.scaling.factor": 2.0}, settings, factors)


def test_yarn_whose_scores_have_a_factor_of_their_own():
    """DeepSeek: by the multiplier of all dimensions, RoPE's own factor is divided out again."""
    known, settings = ARCHITECTURES["deepseek2"], {"head_dim": 16, "max_position_embeddings": 64}
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    for stated, over_all, factor in ((0.1, 1.0, 1.0), (0.0707, 0.707, 1.0), (0.0, 1.0, 1 + 0.1 * math.log(4))):
        keys = yarn | {"rope.scaling.yarn_log_multiplier": stated}
        scaling = rope_settings(known, keys, dict(settings), {})["rope_scaling"]
        assert math.isclose(scaling["mscale_all_dim"], over_all) and math.isclose(scaling["attention_factor"], factor)
    with pytest.raises(ValueError, match=r"rope\.scaling\.attn_factor is 0\.5"):
        rope_settings(known, yarn | {"rope.scaling.attn_factor": 0.5}, dict(settings), {})
