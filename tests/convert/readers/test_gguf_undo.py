"""What a converter to GGUF did to values is undone: each case by a small tensor whose numbers are their places."""

from types import SimpleNamespace

import numpy as np

from mebp_triton.convert.readers.gguf_undo import (
    by_heads,
    by_key_heads,
    columns_of_value_heads,
    halves_of,
    log_of_negative,
    minus_one,
    then,
    transposed,
    value_heads,
    value_heads_behind_keys,
)

TWO_HEADS = SimpleNamespace(num_attention_heads=2)


def test_pairs_of_rows_become_halves_of_a_head():
    rows = np.array([0, 1, 2, 3, 10, 11, 12, 13.0])
    undone = halves_of("num_attention_heads")(rows, TWO_HEADS)
    assert undone.tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


def test_rows_of_queries_keys_and_values_go_to_their_heads():
    queries_keys_values = np.array([[11], [12], [21], [22], [31], [32.0]])  # hundreds of a kind, ones of a head
    assert by_heads(queries_keys_values, TWO_HEADS)[:, 0].tolist() == [11, 21, 31, 12, 22, 32]


LINEAR = SimpleNamespace(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=1)


def test_value_heads_go_to_their_key_heads():
    """Tens: the value head, of which two belong to each key head; ones: the row."""
    dealt = np.array([10, 11, 30, 31, 20, 21, 40, 41.0])
    assert value_heads(dealt, LINEAR).tolist() == [10, 11, 20, 21, 30, 31, 40, 41]
    keys = np.array([1, 2, 3, 4.0])  # two queries, two keys
    assert value_heads_behind_keys(np.concatenate((keys, dealt)), LINEAR).tolist() == [
        *keys,
        *(10, 11, 20, 21, 30, 31, 40, 41),
    ]
    assert columns_of_value_heads(dealt[None], LINEAR).tolist() == [[10, 11, 20, 21, 30, 31, 40, 41]]


def test_kinds_of_rows_go_to_their_key_heads():
    """Tens: query, key, value, gate; ones: the key head."""
    rows = np.array([11, 12, 21, 22, 31, 31, 32, 32, 41, 41, 42, 42.0])
    assert by_key_heads(rows, LINEAR).tolist() == [11, 21, 31, 31, 41, 41, 12, 22, 32, 32, 42, 42]


def test_one_after_the_other():
    assert then(minus_one, log_of_negative)(np.array([0.0]), LINEAR) == [0.0]


def test_values():
    assert minus_one(np.array([1.5]), TWO_HEADS) == [0.5]
    assert np.allclose(log_of_negative(-np.exp(np.array([0.3, -2.0])), TWO_HEADS), [0.3, -2.0])
    assert transposed(np.zeros((4, 2, 3)), TWO_HEADS).shape == (4, 3, 2)
