"""Layers of several kinds, and what a file has of linear attention in another order."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from mebp_triton.convert.readers import open_source
from mebp_triton.convert.readers.gguf_architectures import ARCHITECTURES
from mebp_triton.convert.readers.gguf_keys import settings_of
from mebp_triton.kernels.layout import Int4Weight
from mebp_triton.kernels.reference import decode

pytest.importorskip("gguf", reason="the gguf extra is not installed")

from gguf_models import keys_of, write_variant  # noqa: E402
from gguf_shapes import HIDDEN, KEY_GROUPS, STATE, STATE_HEADS  # noqa: E402


def settings(arch, tensors=("blk.0.a", "blk.1.a", "blk.1.b"), **changed):
    keys = keys_of(arch) | {name.replace("__", "."): value for name, value in changed.items()}
    metadata = {f"{arch}.{name}": value for name, value in keys.items() if value is not None}
    return settings_of(ARCHITECTURES[arch], arch, metadata, tensors, "x.gguf")


def bound(path):
    source = open_source(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    source.bind(model)
    return source


def test_kinds_of_layers():
    assert settings("lfm2")["layer_types"] == ["conv", "full_attention"]
    assert settings("granitehybrid")["layer_types"] == ["mamba", "attention"]
    assert settings("qwen35")["layer_types"] == ["linear_attention", "full_attention"]
    stated = {"attention__recurrent_layers": [False, True], "full_attention_interval": None}
    assert settings("qwen35", **stated)["layer_types"] == ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"^x\.gguf: qwen35\.attention\.recurrent_layers is True, which the model"):
        settings("qwen35", attention__recurrent_layers=True)
    with pytest.raises(ValueError, match=r"^x\.gguf: lfm2\.attention\.head_count_kv is \[0, 0\], which the model"):
        settings("lfm2", attention__head_count_kv=[0, 0])


def test_blocks_that_predict_further_tokens_are_left_out_with_a_warning(tmp_path):
    if transformers.__version__ < "5":
        pytest.skip("transformers 4 has no Qwen3.5")
    path = write_variant(tmp_path / "tiny.gguf", "qwen35", "nextn_predict_layers")
    with pytest.warns(UserWarning, match=r"tiny\.gguf: blocks from 2 on, which predict further tokens, are left out"):
        assert bound(path).config.num_hidden_layers == 2


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has experts as modules")
def test_rows_of_two_tensors_go_to_their_key_heads(tmp_path):
    """Qwen3-Next has each key head's query, key, values and gates together; a file has two matrices of them."""
    kinds = {"attn_qkv.weight": "Q8_0", "attn_gate.weight": "Q8_0"}
    source = bound(write_variant(tmp_path / "tiny.gguf", "qwen3next", "plain", kinds))
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    value, (mixed, gates) = source.read(name), map(source._float, source._entries[name])
    width = STATE_HEADS // KEY_GROUPS * STATE  # of a key head's values
    queries, keys, values = np.split(mixed, [KEY_GROUPS * STATE, 2 * KEY_GROUPS * STATE])
    wanted = []
    for head in range(KEY_GROUPS):
        wanted += [each[head * STATE :][:STATE] for each in (queries, keys)]
        wanted += [each[head * width :][:width] for each in (values, gates)]
    assert isinstance(value, Int4Weight)
    assert np.array_equal(decode(value, torch.float32).numpy(), np.concatenate(wanted))


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has no Qwen3.5")
@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_columns_of_value_heads_change_places(tmp_path, kind):
    """They are dealt out to key heads. Heads of 16 columns halve the groups of 32, and the codes are kept."""
    source = bound(write_variant(tmp_path / "tiny.gguf", "qwen35", "plain", {"ssm_out.weight": kind}))
    name = "model.layers.0.linear_attn.out_proj.weight"
    stored = source._float(source._entries[name][0]).reshape(HIDDEN, STATE_HEADS, STATE)
    wanted = stored[:, [0, 2, 1, 3]].reshape(HIDDEN, -1)  # heads 0 and 1 belong to key head 0
    value = source.read(name)
    if kind == "Q8_0":
        assert isinstance(value, Int4Weight) and value.form == ("symmetric", 16, 8)
        value = decode(value, torch.float32)
    assert np.array_equal(value.numpy(), wanted)
    assert not source.decoded
