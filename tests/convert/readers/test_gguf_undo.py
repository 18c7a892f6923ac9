"""What a converter to GGUF did to values is undone: each case by a small tensor whose numbers are their places."""

from types import SimpleNamespace

import numpy as np

from mebp_triton.convert.readers.gguf_undo import by_heads, halves_of, log_of_negative, minus_one, transposed

TWO_HEADS = SimpleNamespace(num_attention_heads=2)


def test_pairs_of_rows_become_halves_of_a_head():
    rows = np.array([0, 1, 2, 3, 10, 11, 12, 13.0])
    undone = halves_of("num_attention_heads")(rows, TWO_HEADS)
    assert undone.tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


def test_rows_of_queries_keys_and_values_go_to_their_heads():
    queries_keys_values = np.array([[11], [12], [21], [22], [31], [32.0]])  # hundreds of a kind, ones of a head
    assert by_heads(queries_keys_values, TWO_HEADS)[:, 0].tolist() == [11, 21, 31, 12, 22, 32]


def test_values():
    assert minus_one(np.array([1.5]), TWO_HEADS) == [0.5]
    assert np.allclose(log_of_negative(-np.exp(np.array([0.3, -2.0])), TWO_HEADS), [0.3, -2.0])
    assert transposed(np.zeros((4, 2, 3)), TWO_HEADS).shape == (4, 3, 2)
