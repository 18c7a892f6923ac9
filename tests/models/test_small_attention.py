"""Small attention runs in one thread; larger attention, and what runs later, in as many as before."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mebp_triton.models import small_attention
from mebp_triton.models.small_attention import small_attention_in_one_thread


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def attend(tokens, keys):
    query = torch.randn(1, 4, tokens, 64)
    key, value = torch.randn(2, 1, 2, keys, 64).unbind()
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = 2, False, False
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None)[0], query, key, value


@pytest.mark.usefixtures("two_threads")
def test_only_small_attention_runs_in_one_thread(monkeypatch):
    seen = []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *args, **kwargs: (seen.append(torch.get_num_threads()), None)
    )
    with small_attention_in_one_thread():
        least = small_attention.LEAST_SHARED // (2 * 4 * 64)
        attend(1, least - 1)
        attend(1, least)
        attend(8, least // 8)
    attend(1, 1)
    assert seen == [1, 2, 2, 2]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_attention_that_fails_leaves_the_threads_and_the_function_as_they_were(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no attention")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", fail)
    with pytest.raises(RuntimeError, match="no attention"), small_attention_in_one_thread():
        attend(1, 3)
    assert torch.get_num_threads() == 2
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is fail


def test_the_numbers_are_those_of_torch():
    with small_attention_in_one_thread():
        found, query, key, value = attend(1, 33)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double().repeat_interleave(2, 1), value.double().repeat_interleave(2, 1)
    )
    torch.testing.assert_close(found, exact.transpose(1, 2).float())
