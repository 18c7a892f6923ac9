"""The script that measures quality counts every weight, keeps what it has, and leaves the model as it found it."""

import json
from functools import partial

import pytest
import torch
from runs import model_directory, sentences

from mebp_triton.convert.quantize import quantize
from mebp_triton.kernels.reference import decode
from mebp_triton.store.reader import Store


@pytest.fixture
def quality(bench_path, monkeypatch):
    import quality

    monkeypatch.setattr(quality, "LENGTH", 16)
    return quality


@pytest.fixture
def directory(tmp_path):
    return model_directory(tmp_path / "model")


def test_a_run_measures_what_is_not_there(quality, directory, tmp_path, monkeypatch):
    kept, changed = (quality.Setting("mebp", "affine 32 4 float16", tables) for tables in ("", "affine 32 8 float16"))
    monkeypatch.setattr(quality, "SETTINGS", [kept])
    output, texts = tmp_path / "quality.json", {"topics": sentences(40), "other": sentences(40, 1)}
    quality.run(directory, output, texts, [""], again=False)
    first = json.loads(output.read_text())
    assert first["texts"]["topics"]["positions"] == 4 * 16
    assert first["texts"]["other"]["positions"] == 2 * 16
    row = first["settings"][str(kept)]
    assert row["bits_tables"] == 16
    assert row["error_tables"] == 0 < row["error_linear"]
    assert row["topics"]["kl"] > 1e-4
    assert row["topics"]["kl"] != row["other"]["kl"]

    monkeypatch.setattr(quality, "SETTINGS", [kept, changed])
    first["settings"][str(kept)]["commit"] = "an earlier one"
    output.write_text(json.dumps(first))
    quality.run(directory, output, texts, [""], again=False)
    second = json.loads(output.read_text())["settings"]
    assert second[str(kept)]["commit"] == "an earlier one"
    assert second[str(changed)]["topics"]["kl"] > row["topics"]["kl"]
    quality.run(directory, output, texts, ["8 float16"], again=True)
    assert json.loads(output.read_text())["settings"] == second  # the same figures, whatever was measured before


def test_every_weight_counts(quality, directory):
    model = quality.Model(directory)
    every = sum(parameter.numel() for parameter in model.model.parameters())
    assert model.put(lambda site, weight: None)["bits"] == 16
    linear = sum(site.out_features * site.in_features for site in model.sites if site.role == "linear")
    found = model.put(
        lambda site, weight: quality.Rounded(weight, 4 * weight.numel()) if site.role == "linear" else None
    )
    assert found["bits"] == (4 * linear + 16 * (every - linear)) / every
    assert (found["bits_linear"], found["bits_tables"], found["error_linear"]) == (4, 16, 0)


def test_a_store_is_measured_as_it_is(quality, directory, tmp_path):
    quantize(directory, tmp_path / "store", group_size=32)
    store, model = Store(tmp_path / "store"), quality.Model(directory)
    kept, whole = (quality.Setting("mebp quantize", "", tables) for tables in ("", "store"))
    found = model.put(partial(quality.rounded_by_store, whole, store))
    for site in model.sites:
        weight = model.model.get_submodule(site.name).weight
        assert torch.equal(weight, decode(store.weight(site.name), torch.float32))
    assert found["bits_tables"] < 16
    assert model.put(partial(quality.rounded_by_store, kept, store))["bits_tables"] == 16


def test_noise_stays_within_half_a_step(quality, directory, tmp_path):
    from safetensors.torch import load_file, save_file

    quantize(directory, tmp_path / "store", "affine", group_size=32, embedding_bits=4)
    store = Store(tmp_path / "store")
    exact = {f"{name}.weight": decode(store.weight(name), torch.float32) for name in store.matrices}
    save_file({name: tensor.half() for name, tensor in exact.items()}, directory / "model.safetensors")
    quality.spread(directory, store)
    for name, tensor in load_file(directory / "model.safetensors").items():
        codes = store.weight(name.removesuffix(".weight"))
        steps = codes.float_scales().abs().t().repeat_interleave(codes.group_size, 1)[:, : codes.in_features]
        parts = (tensor.float() - exact[name]).abs() / steps
        assert 0.2 < float(parts.mean()) < 0.3
        assert float(parts.max()) < 0.51
