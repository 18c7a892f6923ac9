"""Adapters go to PEFT and come back, and damaged or foreign ones are refused."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import batch, decoded_model, randomize_adapter
from safetensors.torch import load_file, save_file

import mebp_triton as mebp
from mebp_triton.models.adapter import adapter_layers, adapter_shapes, adapter_tensors
from mebp_triton.models.adapter_seal import WEIGHTS, read_adapter_tensors
from mebp_triton.store.manifest import MANIFEST
from mebp_triton.system import strict_json

TOLERANCE = 1e-4  # logits, absolute


@pytest.fixture(scope="module")
def llama(shared_store: Any) -> Path:
    return shared_store("llama")


@pytest.fixture(scope="module")
def decoded(shared_store: Any) -> Any:
    """A copy of transformers' model with a shared store's decoded weights, by architecture."""
    models: dict[str, Any] = {}

    def copied(architecture: str) -> Any:
        if architecture not in models:
            models[architecture] = decoded_model(shared_store(architecture))
        return copy.deepcopy(models[architecture])

    return copied


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    """A model with an adapter of rank 2, whose values any test may change."""
    return mebp.load(llama, mebp.LoraConfig(r=2))


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 2 that tests only read."""
    return saved(llama, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(adapter, tmp_path / "copied")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch(2, 12, None)["input_ids"]).logits


def ours_with(store: Path, directory: Path) -> Any:
    model = mebp.load(store, lora=mebp.read_adapter_config(directory))
    mebp.load_adapter(model, directory)
    return model


LORA = [
    {"r": 4, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 8, "use_rslora": True},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"q_proj": 3}},
    {"r": 3, "target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    {"r": 3, "target_modules": r".*layers\.[02]\..*(v|gate)_proj"},
    {"r": 3, "exclude_modules": ["k_proj", "down_proj"]},
]


CASES = [("llama", lora) for lora in LORA]
CASES += [("gpt2", LORA[0]), ("gpt2", {"r": 5, "lora_alpha": 7, "target_modules": ["c_attn", "mlp.c_proj"]})]


@pytest.mark.parametrize(("architecture", "lora"), CASES, ids=str)
def test_ours_gives_the_same_logits_in_peft(
    architecture: str, lora: dict[str, Any], shared_store: Any, decoded: Any, tmp_path: Path
) -> None:
    store = shared_store(architecture)
    model = mebp.load(store, mebp.LoraConfig(**lora))
    randomize_adapter(model, scale=0.3)
    mebp.save_adapter(model, tmp_path)
    base = decoded(architecture)
    plain = logits(base)
    wrapped = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert (logits(wrapped) - logits(model)).abs().max() <= TOLERANCE
    assert (logits(wrapped) - plain).abs().max() > 100 * TOLERANCE, "the adapter should matter"
    # And back into ours, from our own files: to the bit.
    assert torch.equal(logits(ours_with(store, tmp_path)), logits(model))


@pytest.mark.parametrize(("architecture", "rslora"), [("llama", True), ("gpt2", False), ("phi3", False)])
def test_trained_by_peft_gives_the_same_logits_in_ours(
    architecture: str, rslora: bool, shared_store: Any, decoded: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=9, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1
    )
    wrapped = peft.get_peft_model(decoded(architecture), config)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):  # B is zero at first, so the first step moves B alone
        wrapped(**batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(tmp_path)
    model = ours_with(shared_store(architecture), tmp_path)
    assert (logits(wrapped.eval()) - logits(model)).abs().max() <= TOLERANCE
    assert adapter_layers(model)


def test_all_linear_never_means_the_head(shared_store: Any, tmp_path: Path) -> None:
    model = mebp.load(shared_store("qwen2"), mebp.LoraConfig(r=2))
    assert not any("lm_head" in name for name in adapter_tensors(model))
    mebp.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def saved(store: Path, directory: Path, **lora: Any) -> Path:
    mebp.save_adapter(mebp.load(store, mebp.LoraConfig(**({"r": 2} | lora))), directory)
    return directory


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_adapter_of_another_model(model: Any, shared_store: Any, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    with pytest.raises(ValueError, match="does not fit this model.*shape"):
        mebp.load_adapter(model, saved(shared_store("llama", config={"hidden_size": 64}), tmp_path))
    with pytest.raises(ValueError, match="does not fit this model: it lacks"):
        mebp.load_adapter(model, saved(shared_store("gpt2"), tmp_path))
    with pytest.raises(ValueError, match=r"does not fit this model: .* has shape \(3, 48\), wanted \(2, 48\)"):
        mebp.load_adapter(model, saved(shared_store("llama"), tmp_path, r=3))
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_tensors(model).items())


def test_damaged_files(model: Any, copied: Path) -> None:
    weights = copied / "adapter_model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    name = sorted(tensors)[3]
    for values, message in (
        (torch.full_like(tensors[name], float("nan")), f"{name} is not finite"),
        (tensors[name].int(), f"{name} has the dtype torch.int32"),
    ):
        save_file(tensors | {name: values}, weights)
        with pytest.raises(ValueError, match=message):
            mebp.load_adapter(model, copied)
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="damaged"):
        mebp.load_adapter(model, copied)
    weights.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        mebp.load_adapter(model, copied)
    (copied / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list, wanted an object"):
        mebp.read_adapter_config(copied)
    (copied / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="is not an adapter"):
        mebp.read_adapter_config(copied)


def test_a_pickled_adapter_is_refused_with_the_way_that_reads_it(model: Any, llama: Path, copied: Path) -> None:
    weights = load_file(copied / "adapter_model.safetensors")
    torch.save(weights, copied / "adapter_model.bin")
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle, .* load the adapter once by PEFT"):
        mebp.load_adapter(model, copied)
    peft.PeftModel.from_pretrained(decoded_model(llama), copied).save_pretrained(copied / "again")
    mebp.load_adapter(model, copied / "again")
    for name, tensor in load_file(copied / "again" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, weights[name])


def test_a_model_without_adapter_saves_none(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter of ours to save"):
        mebp.save_adapter(mebp.load(llama), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_patterns_that_are_regular_expressions(llama: Path, decoded: Any, tmp_path: Path) -> None:
    """PEFT matches them so; another reading gives other scalings without a word."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=9,
        target_modules=r".*\.(q_proj|up_proj)",
        rank_pattern={r"layers\.[01]\.mlp\..*": 2},
        alpha_pattern={r"model\.layers\.\d\.self_attn.q_proj": 30, "^model.layers.1.mlp.up_proj": 50},
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(decoded("llama"), config)
    wrapped.save_pretrained(tmp_path)
    assert (logits(wrapped.eval()) - logits(ours_with(llama, tmp_path))).abs().max() <= TOLERANCE


def test_an_adapter_that_changes_its_base_is_refused(decoded: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    peft.get_peft_model(decoded("llama"), config).save_pretrained(tmp_path)
    change_config(tmp_path, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        mebp.read_adapter_config(tmp_path)


def test_a_loaded_adapters_scaling_is_saved_again(llama: Path, tmp_path: Path) -> None:
    trained = mebp.load(llama, mebp.LoraConfig(r=2, lora_alpha=40, alpha_pattern={"q_proj": 10}, use_rslora=True))
    randomize_adapter(trained)
    mebp.save_adapter(trained, tmp_path / "first")
    model = mebp.load(llama, mebp.LoraConfig(r=2, lora_alpha=2))
    mebp.load_adapter(model, tmp_path / "first")
    mebp.save_adapter(model, tmp_path / "second")
    again = ours_with(llama, tmp_path / "second")
    assert torch.equal(logits(model), logits(trained)) and torch.equal(logits(again), logits(trained))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"r": 4}, {"rank_pattern": {"v_proj": 1}}], ids=str)
def test_a_config_that_does_not_fit_leaves_the_model_as_it_was(model: Any, copied: Path, changes: Any) -> None:
    change_config(copied, **changes)
    randomize_adapter(model)
    before, scaling = logits(model), model.mebp.lora
    with pytest.raises(ValueError, match="use_dora|contradicts itself: .* has rank [14] by its config"):
        mebp.load_adapter(model, copied)
    assert torch.equal(logits(model), before) and model.mebp.lora is scaling


def test_peft_finds_the_base_by_the_name_in_the_adapter(llama: Path, tmp_path: Path) -> None:
    directory = saved(llama, tmp_path)
    found = peft.AutoPeftModelForCausalLM.from_pretrained(str(directory))
    assert found.peft_config["default"].base_model_name_or_path == str(llama.parent / "model")
    embedding = load_file(llama.parent / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(found.get_input_embeddings().weight, embedding)
    assert adapter_tensors(ours_with(llama, directory)).keys() == load_file(directory / WEIGHTS).keys()


def test_a_base_on_the_hub_is_named_with_its_revision(llama: Path, tmp_path: Path) -> None:
    store = shutil.copytree(llama, tmp_path / "store")
    manifest = strict_json.read_sealed(store / MANIFEST)
    entry = {"name_or_path": "team/model", "revision": "0123abc"}
    strict_json.write_json(store / MANIFEST, strict_json.sealed(manifest | {"base_model": entry}))
    config = json.loads((saved(store, tmp_path / "adapter") / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("team/model", "0123abc")


def test_a_store_that_does_not_know_its_base_is_named_itself(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older stores do not, and a bare name would be looked up on the hub."""
    store = shutil.copytree(llama, tmp_path / "store")
    manifest = strict_json.read_sealed(store / MANIFEST)
    del manifest["base_model"]
    strict_json.write_json(store / MANIFEST, strict_json.sealed(manifest))
    monkeypatch.chdir(tmp_path)
    config = json.loads((saved(Path("store"), tmp_path / "adapter") / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(store), None)


def test_loading_on_a_store_of_another_base_warns(llama: Path, copied: Path, tmp_path: Path) -> None:
    """What was quantized is known by its weights, wherever it lies; an older store does not know them."""
    manifest = json.loads((llama / MANIFEST).read_text())
    moved = {"name_or_path": "elsewhere", "revision": None, "crc32": manifest["base_model"]["crc32"]}
    bases = {"moved": moved, "other": moved | {"crc32": 1}, "older": {"name_or_path": "elsewhere", "revision": None}}
    for name, base in bases.items():
        store = shutil.copytree(llama, tmp_path / name)
        (store / MANIFEST).write_text(json.dumps(strict_json.sealed(manifest | {"base_model": base})))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mebp.load_adapter(mebp.load(store, mebp.LoraConfig(r=2)), copied)
        lines = [str(each.message) for each in caught if "was trained on" in str(each.message)]
        known = manifest["base_model"]["name_or_path"]
        wanted = f"the adapter {copied} was trained on {known}, and {store} was made of other weights, elsewhere"
        assert lines == ([wanted] if name == "other" else []), name


def test_saving_replaces_an_older_adapter_whole(llama: Path, tmp_path: Path) -> None:
    saved(llama, tmp_path, target_modules=["q_proj", "k_proj"])
    saved(llama, tmp_path, target_modules=["v_proj"])
    assert {name.split(".")[-3] for name in load_file(tmp_path / "adapter_model.safetensors")} == {"v_proj"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_bfloat16_adapter_keeps_its_dtype(llama: Path, tmp_path: Path) -> None:
    model = mebp.load(llama, mebp.LoraConfig(r=2), adapter_dtype=torch.bfloat16)
    randomize_adapter(model)
    mebp.save_adapter(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    wide = ours_with(llama, tmp_path)
    assert {tensor.dtype for tensor in adapter_tensors(wide).values()} == {torch.float32}
    for name, tensor in adapter_tensors(wide).items():
        assert torch.equal(tensor, adapter_tensors(model)[name].float())


def test_a_flipped_bit_in_the_weights_is_found(copied: Path) -> None:
    weights = copied / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for place in (-1, -500, -3000):
        bent = bytearray(whole)
        bent[place] ^= 1
        weights.write_bytes(bent)
        with pytest.raises(ValueError, match="damaged: its checksum differs"):
            read_adapter_tensors(copied)
    tensors = load_file(weights)
    save_file(tensors, weights)  # PEFT writes no checksum
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_adapter_tensors(copied).items())


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}], ids=str
)
def test_a_scaling_that_the_weights_were_not_saved_with(copied: Path, changes: Any) -> None:
    change_config(copied, **changes)
    with pytest.raises(ValueError, match="is not what .* was saved with"):
        mebp.read_adapter_config(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"r": 0}, "at least 1, got 0"),
        ({"r": True}, "at least 1, got True"),
        ({"r": 1 << 30}, "contradicts itself"),
        ({"rank_pattern": {"no_such_layer": 1 << 30}}, "a rank that no tensor has"),
        ({"rank_pattern": [1]}, "rank_pattern must map"),
        ({"lora_alpha": None}, "it has no lora_alpha"),
        ({"lora_alpha": True}, "must be finite"),
        ({"lora_alpha": "8"}, "must be finite"),
        ({"lora_dropout": 2}, "lora_dropout"),
        ({"lora_dropout": "0"}, "lora_dropout must lie in"),
        ({"use_rslora": "no"}, "use_rslora must be true or false"),
        ({"use_dora": 0}, "use_dora=0"),
        ({"target_modules": None}, "it has no target_modules"),
        ({"target_modules": ["q_proj", 1]}, "target_modules must be names"),
        ({"lora_of_the_future": True}, "'lora_of_the_future', which is not known here"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_honoured(copied: Path, changes: Any, message: str) -> None:
    change_config(copied, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        mebp.read_adapter_config(copied)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_an_adapter_that_is_not_finite_is_not_written(llama: Path, copied: Path, tmp_path: Path) -> None:
    model = mebp.load(llama, mebp.LoraConfig(r=2))
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        parameter[0, 0] = float("nan")
    for target in (copied, tmp_path / "other"):
        with pytest.raises(ValueError, match=r"lora_A\.weight is not finite: the adapter is not written"):
            mebp.save_adapter(model, target)
    assert before == {path.name: path.read_bytes() for path in copied.iterdir()}
    assert not (tmp_path / "other").exists()


def test_shapes_by_pefts_names() -> None:
    config = mebp.LoraConfig(r=2, rank_pattern={"up": 3}, target_modules=["up", "down"])
    layers = {"a.up": (8, 4), "a.down": (4, 8), "a.gate": (8, 4)}
    assert adapter_shapes(config, layers) == {
        "base_model.model.a.up.lora_A.weight": (3, 4),
        "base_model.model.a.up.lora_B.weight": (8, 3),
        "base_model.model.a.down.lora_A.weight": (2, 8),
        "base_model.model.a.down.lora_B.weight": (4, 2),
    }
