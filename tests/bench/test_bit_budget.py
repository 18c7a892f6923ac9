"""The script that measures a budget of bits rounds what it says, and spends no more than it has."""

import pytest
import torch
from runs import model_directory


@pytest.fixture
def bit_budget(bench_path, monkeypatch):
    import bit_budget

    monkeypatch.setattr(bit_budget, "BUDGETS", (8.0,))
    return bit_budget


def test_kinds_are_rounded_alone_and_budgets_are_kept(bit_budget, tmp_path):
    from quality import Model

    model = Model(model_directory(tmp_path / "model"))
    layers = {site.name for site in model.sites if site.role == "linear"}
    changed = []

    def divergence():
        exact = {name: torch.equal(model.model.get_submodule(name).weight, model.source[name]) for name in layers}
        changed.append({name for name, same in exact.items() if not same})
        return 0.5

    record = bit_budget.measure(model, divergence)
    kinds = [{name for name in layers if name.endswith(kind)} for kind in record["kinds"]]
    assert changed[:8] == [layers, *kinds] and len(kinds) == 7
    assert sum(found["weights"] for found in record["kinds"].values()) == sum(model.source[n].numel() for n in layers)
    spent, chances = record["budgets"]["8.0"]["spent"], record["budgets"]["8.0"]["by chance"]
    assert all(found["bits_per_weight"] <= 8 and 0 < found["wide"] < len(layers) for found in (spent, *chances))
    assert spent["kl"] == 0.5 and chances[0]["wide"] != chances[1]["wide"]
