"""What a plan says of experts: all of them, those expected, and the most that tokens can be routed to."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from plans import SMALL, at, planner

from mebp_triton.store.reader import Store
from mebp_triton.training.plan.expert_bytes import ExpertBytes, of_module
from mebp_triton.training.settings import TrainConfig

needs_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules in transformers 4")


def test_expected_and_most() -> None:
    assert of_module(800, 8, 2.0, 1) == ExpertBytes(800, 200, 200)
    assert of_module(800, 8, 2.0, 3) == ExpertBytes(800, round(800 * (1 - 0.75**3)), 600)
    assert of_module(800, 8, 2.0, 100) == ExpertBytes(800, 800, 800)
    assert of_module(800, 8, 0.0, 100) == ExpertBytes(800, 0, 0)


@needs_5
def test_a_plan_counts_the_experts_that_tokens_can_reach(shared_store: Any) -> None:
    """DeepSeek's first block has none, and a token of Qwen3-MoE has two of six."""
    store = shared_store("qwen3_moe")
    plans = {
        length: planner(store).resolve(TrainConfig(**SMALL | {"max_length": length, "weights": "file"}))
        for length in (2, 32)
    }
    size = {name: info for name, info in Store(store).matrices.items() if ".layers.0." in name and ".experts." in name}
    one, many = plans[2].experts, plans[32].experts
    assert many.every == many.most == one.every and len(size) == 12
    assert one.most == one.every * 4 // 6 and 0.4 * one.every < one.expected < one.most
    weights = [at(plan, "backward of the top block")["weights of blocks"] for plan in plans.values()]
    assert weights[1] - weights[0] == many.most - one.most
    dense = planner(shared_store("llama")).resolve(TrainConfig(**SMALL))
    assert dense.experts == ExpertBytes()
    assert planner(shared_store("deepseek_v3")).resolve(TrainConfig(**SMALL)).experts.every > 0


@needs_5
def test_adapters_on_experts_are_counted(shared_store: Any) -> None:
    store = shared_store("mixtral")
    few, all_of_them = (
        planner(store).resolve(TrainConfig(**SMALL | {"target_modules": targets}))
        for targets in ("all-linear", "all-linear-and-experts")
    )
    more = at(all_of_them, "optimizer step")["LoRA"] - at(few, "optimizer step")["LoRA"]
    assert more == 4 * 3 * 4 * 4 * ((160 + 48) + (48 + 80))  # bytes, blocks, experts, rank
