"""Measures what rounding one kind of linear layer does to a model, and what spending a budget of bits wins over chance.

    python bench/bit_budget.py gemma            # the models of quality.py, or a directory with 16-bit weights
    python bench/bit_budget.py smollm2-spread

The divergence from the source is measured over 2,048 tokens of Python's topics, at every fourth position. Embedding and
head keep their 16 bits. The answers are in ``bench/results/bit-budget-NAME.json``.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from divergence import Reference, hidden_states, windows
from machine import ROOT, commit, processor
from quality import DEMOS, LENGTH, Model, texts_of, write_demo
from quantizers import Rounded
from torch import Tensor
from transformers import AutoTokenizer

from mebp_triton.convert.bit_budget import LayerCost, choose_wide, spend
from mebp_triton.convert.recipe import quantize_as
from mebp_triton.kernels.names import DEFAULT_FORMS
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import Int4Site
from mebp_triton.system import strict_json

BUDGETS = (5.0, 5.5, 6.0)
CHANCES = 2
WINDOWS, EVERY = 2, 4


def kind_of(name: str) -> str:
    return name.rpartition(".")[2]


def by_chance(costs: dict[str, LayerCost], bits_per_weight: float, seed: int) -> set[str]:
    """Layers in random order, as long as they fit into the budget."""
    order = list(costs)
    random.Random(seed).shuffle(order)
    return spend(costs, order, bits_per_weight)


def measure(model: Model, divergence: Callable[[], float]) -> dict[str, Any]:
    """The divergences: of each kind of layer alone, and of each budget, spent and by chance."""
    narrow, wide = DEFAULT_FORMS[4], DEFAULT_FORMS[8]
    held = {
        form: {
            site.name: quantize_as(form, model.source[site.name])[0] for site in model.sites if site.role == "linear"
        }
        for form in (narrow, wide)
    }
    plain = {name: quantize_as(narrow, model.source[name], scale_search=False)[1] for name in held[narrow]}
    costs = {
        name: LayerCost(model.source[name].numel(), weight.nbytes, held[wide][name].nbytes, plain[name] ** 2)
        for name, weight in held[narrow].items()
    }
    weights = sum(cost.weights for cost in costs.values())

    def found(narrow_ones: Collection[str], wide_ones: Collection[str] = ()) -> dict[str, float]:
        def round_site(site: Int4Site, _: Tensor) -> Rounded | None:
            form = wide if site.name in wide_ones else narrow if site.name in narrow_ones else None
            return None if form is None else Rounded(decode(held[form][site.name], torch.float32), 0)

        model.put(round_site)
        bits = 8 * sum(cost.wide if name in wide_ones else cost.narrow for name, cost in costs.items()) / weights
        result = {"kl": divergence(), "layers": len(narrow_ones), "wide": len(wide_ones), "bits_per_weight": bits}
        print(result, flush=True)
        return result

    kinds = {kind: [name for name in costs if kind_of(name) == kind] for kind in map(kind_of, costs)}
    record: dict[str, Any] = {"forms": [str(narrow), str(wide)], "none": found(costs)}
    record["kinds"] = {
        kind: found(names) | {"weights": sum(costs[name].weights for name in names)} for kind, names in kinds.items()
    }
    record["budgets"] = {
        str(bits): {
            "spent": found(costs, choose_wide(costs, bits, narrow, wide)),
            "by chance": [found(costs, by_chance(costs, bits, seed)) for seed in range(CHANCES)],
        }
        for bits in BUDGETS
    }
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{', '.join(DEMOS)}, or a model directory with 16-bit weights")
    given = parser.parse_args().model
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_demo(given, Path(scratch)) if given in DEMOS else Path(given)
        model, tokenizer, sources = Model(directory), AutoTokenizer.from_pretrained(directory), {"commit": commit()}
        parts = windows(tokenizer, texts_of([])["topics"], WINDOWS, LENGTH)
        head = model.model.get_output_embeddings().weight.clone()
        reference = Reference(parts, EVERY, hidden_states(model.model, parts, EVERY), head)
        record = measure(model, lambda: reference.compare(model.model)["kl"])
    record |= {"model": directory.resolve().name, "processor": processor()} | sources
    strict_json.write_json(ROOT / "bench" / "results" / f"bit-budget-{directory.resolve().name}.json", record)


if __name__ == "__main__":
    main()
