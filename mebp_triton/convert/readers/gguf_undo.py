"""Undoes what a converter to GGUF did to the values of a tensor.

A converter permutes rows for llama.cpp's RoPE, transposes matrices of ``Conv1D``, adds one to norms, and so on. Each
function here takes a tensor's float32 values as the file has them and the model's config, and returns them as the model
wants them. The shape may still differ from the parameter's by sides of 1.

Source: ``conversion/`` of https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from transformers import PretrainedConfig

Undo = Callable[[np.ndarray, PretrainedConfig], np.ndarray]


def halves_of(heads: str) -> Undo:
    """Rows in halves of a head, where a file has pairs: RoPE turns row i of a head with row i + 1 there.

    Args:
        heads: the setting that counts the heads.
    """

    def undo(values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
        pairs = values.reshape(getattr(config, heads), -1, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    return undo


def minus_one(values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """Norms that add one to their weight; a file has the sum."""
    return values - 1


def transposed(values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """Matrices ``[in, out]`` in the model."""
    return values.swapaxes(-1, -2)


def log_of_negative(values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """The logarithm of a state's decay; a file has the negative decay itself."""
    return np.log(-values)


def by_heads(values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """Rows of each head's query, key and value in turn, where a file has all queries, all keys, all values (BLOOM)."""
    heads = config.num_attention_heads
    return values.reshape(3, heads, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)


def then(first: Undo, second: Undo) -> Undo:
    """One after the other."""
    return lambda values, config: second(first(values, config), config)


def value_heads(values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """Value heads, of one or more rows, beside the key head that they belong to; a file deals them out by turns."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    dealt = values.reshape(heads // keys, keys, -1, *values.shape[1:])
    return dealt.swapaxes(0, 1).reshape(values.shape)


def value_heads_behind_keys(values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """Rows of queries and keys, and then ``value_heads``."""
    start = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return np.concatenate((values[:start], value_heads(values[start:], config)))


def columns_of_value_heads(values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """Columns that read ``value_heads``."""
    return value_heads(values.T, config).T


def by_key_heads(values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """Rows of each key head's query, key, values and gates in turn, where a file has all of a kind (Qwen3-Next)."""
    heads, keys = config.linear_num_key_heads, config.linear_num_key_heads * config.linear_key_head_dim
    kinds = np.split(values, np.cumsum([keys, keys, (len(values) - 2 * keys) // 2]))
    of_heads = [kind.reshape(heads, -1, *values.shape[1:]) for kind in kinds]
    return np.concatenate(of_heads, 1).reshape(values.shape)
