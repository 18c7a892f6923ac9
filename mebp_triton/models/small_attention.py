"""Attention of few tokens in one thread, while a model answers on a CPU.

One token's attention takes some 10 microseconds in one thread. Shared among threads it gains nothing there, and beside
other busy processes each of these small parallel regions may wait for a processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa"  # transformers' name of torch's own attention
LEAST_SHARED = 1 << 20  # multiplications that are worth a second thread: some 100 microseconds


@contextmanager
def small_attention_in_one_thread() -> Iterator[None]:
    """While active, torch's attention in transformers' models runs in one thread on a CPU where it is small.

    It is small if it takes less than ``LEAST_SHARED`` multiplications. Every other attention is as before.
    """
    shared = ALL_ATTENTION_FUNCTIONS[NAME]

    def attend(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        # query is [batch, heads, tokens, width], key [batch, heads, tokens so far, width].
        threads = torch.get_num_threads()
        if query.device.type != "cpu" or threads == 1 or 2 * query.numel() * key.shape[-2] >= LEAST_SHARED:
            return shared(module, query, key, *args, **kwargs)
        torch.set_num_threads(1)
        try:
            return shared(module, query, key, *args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    ALL_ATTENTION_FUNCTIONS[NAME] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[NAME] = shared
