"""What a file of Gemma 4 states layer by layer becomes settings, or is refused where the model has no such layers."""

import pytest

from mebp_triton.convert.readers.gguf_architectures import ARCHITECTURES
from mebp_triton.convert.readers.gguf_keys import settings_of

pytest.importorskip("gguf", reason="the gguf extra is not installed")

from gguf_models import keys_of  # noqa: E402
from gguf_shapes import FFN, HEAD, MODELS, WIDE_HEAD  # noqa: E402


def settings(tensors=tuple(MODELS["gemma4"]), **changed):
    keys = keys_of("gemma4") | {name.replace("__", "."): value for name, value in changed.items()}
    metadata = {f"gemma4.{name}": value for name, value in keys.items()}
    return settings_of(ARCHITECTURES["gemma4"], "gemma4", metadata, tensors, "x.gguf")


def test_settings():
    result = settings()
    assert (result["head_dim"], result["global_head_dim"], result["num_kv_shared_layers"]) == (HEAD, WIDE_HEAD, 2)
    assert result["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert not result["attention_k_eq_v"] and not result["enable_moe_block"] and not result["use_double_wide_mlp"]
    assert settings(feed_forward_length=[FFN, FFN, 2 * FFN, 2 * FFN])["use_double_wide_mlp"]


def test_values_that_are_keys():
    without = tuple(name for name in MODELS["gemma4"] if name != "blk.1.attn_v.weight")
    result = settings(without, attention__head_count_kv=[2, 1, 2, 1])
    assert result["attention_k_eq_v"]
    assert (result["num_key_value_heads"], result["num_global_key_value_heads"]) == (2, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention__sliding_window_pattern": [False, True] * 2}, "attention.sliding_window_pattern is [False, True,"),
        ({"attention__head_count_kv": [2, 1, 2, 1]}, "attention.head_count_kv is [2, 1, 2, 1] beside values"),
        ({"attention__head_count_kv": [2, 2, 1, 2]}, "attention.head_count_kv is [2, 2, 1, 2], which the model"),
        (
            {"feed_forward_length": [FFN, 2 * FFN, FFN, FFN]},
            f"feed_forward_length is [{FFN}, {2 * FFN}, {FFN}, {FFN}],",
        ),
        (
            {"attention__shared_kv_layers": 0, "tensors": [f"blk.{layer}.attn_v.weight" for layer in (0, 1, 2, 5)]},
            "attention.shared_kv_layers is 0: some have values",
        ),
    ],
)
def test_refused(changed, message):
    with pytest.raises(ValueError) as caught:
        settings(**changed)
    assert str(caught.value).startswith(f"x.gguf: gemma4.{message}") and "\n" not in str(caught.value)
