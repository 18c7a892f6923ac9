"""What is merged is what the adapter computes: in a model directory for stock transformers, and in a store."""

import json
import shutil

import pytest
import torch
from models import bnb_directory, decoded_model, randomize_adapter, relative_rms, save_tiny_model, tiny_store
from runs import run_store, word_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mebp_triton.convert import merge
from mebp_triton.convert.quantize import quantize
from mebp_triton.convert.readers import merged_store
from mebp_triton.convert.writers import model_directory
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.adapter import load_adapter, read_adapter_config, save_adapter
from mebp_triton.models.load import load
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.manifest import SHARED
from mebp_triton.store.reader import Store
from mebp_triton.system import errors, safetensors_file

# Tied and not, Conv1D with biases and position tables, norms of their own and logits that are not the head's.
KINDS = ["llama", "qwen2", "gpt2", "gemma3_text", "opt"]
IDS = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(3))


def adapter_of(store, directory, seed=0, **lora):
    model = load(store, LoraConfig(**({"r": 4, "lora_alpha": 12} | lora)))
    randomize_adapter(model, seed, 0.2)
    save_adapter(model, directory)
    return directory


def with_adapter(store, adapter):
    model = load(store, read_adapter_config(adapter))
    load_adapter(model, adapter)
    return model


def stock(directory, dtype=torch.float32):
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(store, adapter) of an architecture."""
    root = tmp_path_factory.mktemp(request.param)
    store = tiny_store(request.param, root)
    return store, adapter_of(store, root / "adapter")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    store = run_store(root)
    return store, adapter_of(store, root / "adapter")


def test_a_merged_directory_computes_what_the_adapter_computes(kind, tmp_path):
    store, adapter = kind
    assert merge.merge(store, tmp_path / "out", adapter, "float32") == "float32"
    truth, plain = logits(with_adapter(store, adapter)), logits(load(store))
    assert relative_rms(plain, truth) > 0.05, "the adapter does nothing"
    assert relative_rms(logits(stock(tmp_path / "out")), truth) < 2e-5


def test_merged_weights_are_those_of_peft(kind, tmp_path):
    """PEFT merges the same adapter into the decoded model; float64 says what is right."""
    peft = pytest.importorskip("peft")
    store, adapter = kind
    merge.merge(store, tmp_path / "out", adapter, "float32")
    wrapped = peft.PeftModel.from_pretrained(decoded_model(store, torch.float64), adapter)
    truth = dict(wrapped.merge_and_unload().named_parameters())
    for name, parameter in stock(tmp_path / "out").named_parameters():
        assert relative_rms(parameter.detach(), truth[name].detach()) < 2e-7, name


@pytest.mark.parametrize("dtype", list(merge.DTYPES))
def test_without_an_adapter_the_decoded_weights_exactly(kind, tmp_path, dtype):
    store, _ = kind
    merge.merge(store, tmp_path / "out", dtype=dtype)
    wide = merge.DTYPES[dtype]
    truth = dict(decoded_model(store, wide).named_parameters())
    for name, parameter in stock(tmp_path / "out", wide).named_parameters():
        assert parameter.dtype == wide and torch.equal(parameter, truth[name]), name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert len(list(opened.keys())) == len(truth), "a tied head is stored once"


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3.0}},
        {"target_modules": ["q_proj", "layers.1.mlp.down_proj"]},
    ],
)
def test_scalings_ranks_and_targets(llama, tmp_path, lora):
    store, _ = llama
    adapter = adapter_of(store, tmp_path / "adapter", **lora)
    merge.merge(store, tmp_path / "out", adapter, "float32")
    assert relative_rms(logits(stock(tmp_path / "out")), logits(with_adapter(store, adapter))) < 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_in_float32_and_rounded_once(llama, tmp_path, dtype):
    store, adapter = llama
    for name in ("float32", dtype):
        merge.merge(store, tmp_path / name, adapter, name)
    wide = load_file(tmp_path / "float32" / "model.safetensors")
    for name, tensor in load_file(tmp_path / dtype / "model.safetensors").items():
        assert torch.equal(tensor, wide[name].to(merge.DTYPES[dtype])), name


def test_the_directory_is_a_whole_model(llama, tmp_path):
    store, adapter = llama
    assert merge.merge(store, tmp_path / "out", adapter) == "float32", "by default the config's"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == ["LlamaForCausalLM"]
    merge.merge(store, tmp_path / "half", adapter, "float16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.float16
    text = "the cat sees the moon ."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == word_tokenizer()(text).input_ids
    assert not (tmp_path / "out" / "manifest.json").exists()
    # And it can be quantized as any other model.
    assert quantize(tmp_path / "out", tmp_path / "again", group_size=32).errors.keys() == Store(store).matrices.keys()


def test_shards(llama, tmp_path, monkeypatch):
    store, adapter = llama
    merge.merge(store, tmp_path / "whole", adapter, "float32")
    monkeypatch.setattr(model_directory, "SHARD_BYTES", 60_000)
    merge.merge(store, tmp_path / "out", adapter, "float32")
    shards = sorted(path for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 64_000 for path in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    found = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    truth = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == truth.keys() and all(torch.equal(found[name], truth[name]) for name in truth)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in truth.values())
    assert torch.equal(logits(stock(tmp_path / "out")), logits(stock(tmp_path / "whole")))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_pieces_of_a_few_rows_give_the_same(architecture, tmp_path, monkeypatch):
    store = tiny_store(architecture, tmp_path)
    merge.merge(store, tmp_path / "whole", dtype="float32")
    monkeypatch.setattr(merged_store, "PIECE_ELEMENTS", 300)
    source = merged_store.MergedStore(store)
    source.bind(build_skeleton(source.config, torch.float32))
    table = next(name for name in source._sites if "embed" in name or "wte" in name)
    assert {len(piece) for piece in source.pieces(table)} == {6, 1}, "97 rows of 48"
    merge.merge(store, tmp_path / "pieces", dtype="float32")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieces"))
    assert one == two


def test_a_persistent_buffer_keeps_its_dtype(tmp_path):
    store = tiny_store("llama", tmp_path)
    source = merged_store.MergedStore(store)
    entries = {"a": ("U8", (3,), 3), "b": ("F32", (2,), 8), "c": ("F16", (1,), 2)}
    assert model_directory.shards(entries) == [["b", "c", "a"]], "each tensor must be aligned"
    assert source.dtype("model.norm.weight") == torch.float32
    ids = torch.arange(3, dtype=torch.uint8)
    assert model_directory.rounded(ids, torch.float16, "ids") is ids


# --- into a store ---------------------------------------------------------------------------------------------------


def test_a_merged_store_is_quantized_anew_where_the_adapter_is(llama, tmp_path):
    store, _ = llama
    adapter = adapter_of(store, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    report = merge.merge_to_store(store, tmp_path / "out", adapter)
    merge.merge(store, tmp_path / "float", adapter, "float32")
    floats, old, new = load_file(tmp_path / "float" / "model.safetensors"), Store(store), Store(tmp_path / "out")
    assert new.tied_head == old.tied_head and new.source == "safetensors directory model, merged with adapter adapter"
    for name, info in new.matrices.items():
        before, after = old.weight(name), new.weight(name)
        assert (after.scheme, after.group_size) == (before.scheme, before.group_size) == ("symmetric", 32)
        if name.endswith(("q_proj", "down_proj")):
            wanted, error = quantize_matrix(floats[f"{name}.weight"], "symmetric", 32)
            assert torch.equal(after.packed, wanted.packed) and torch.equal(after.scales, wanted.scales)
            assert info.relative_error == error and 0 < error < 0.15
        else:
            assert name in report.taken_over
            assert all(torch.equal(after.tensors()[part], tensor) for part, tensor in before.tensors().items()), name
    close = relative_rms(logits(load(tmp_path / "out")), logits(with_adapter(store, adapter)))
    assert close < relative_rms(logits(load(store)), logits(with_adapter(store, adapter)))


def test_each_matrix_keeps_its_own_form(tmp_path):
    """Of a bitsandbytes checkpoint: linear layers in NF4 with float32 scales; a Conv1D's weight is transposed."""
    quantize(bnb_directory(tmp_path, "gpt2", bnb_4bit_quant_type="nf4"), tmp_path / "store")
    adapter = adapter_of(tmp_path / "store", tmp_path / "adapter", target_modules=["c_proj"])
    report = merge.merge_to_store(tmp_path / "store", tmp_path / "out", adapter)
    new = Store(tmp_path / "out")
    assert set(report.schemes.values()) == {"codebook"}
    assert set(report.errors) - set(report.taken_over) == {name for name in new.matrices if name.endswith("c_proj")}
    merge.merge(tmp_path / "store", tmp_path / "wide", adapter, "float32")
    for name, tensor in load_file(tmp_path / "wide" / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith("c_proj") and module in new.matrices:
            assert relative_rms(decode(new.weight(module)).t(), tensor) < 0.15


def test_another_scheme(llama, tmp_path):
    store, adapter = llama
    report = merge.merge_to_store(store, tmp_path / "out", adapter, "affine", 64)
    assert not report.taken_over and set(report.schemes.values()) == {"affine"}
    assert {info.group_size for info in Store(tmp_path / "out").matrices.values()} == {64}


def test_without_an_adapter_a_store_is_copied_bit_for_bit(llama, tmp_path):
    store, _ = llama
    merge.merge_to_store(store, tmp_path / "out")
    for path in store.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


# --- what is refused, and what is left behind -----------------------------------------------------------------------


def edited(adapter, target, config=None, **tensors):
    shutil.copytree(adapter, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    values = load_file(target / "adapter_model.safetensors") | tensors
    save_file({k: v for k, v in values.items() if v is not None}, target / "adapter_model.safetensors")
    return target


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
HEAD = {f"base_model.model.lm_head.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}


@pytest.mark.parametrize("into", [merge.merge, merge.merge_to_store])
@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({}, {A: None}, f"lacks {A}"),
        ({}, {A: torch.ones(4, 47)}, r"has shape \(4, 47\), wanted \(4, 48\)"),
        ({}, {A: torch.full((4, 48), float("nan"))}, "is not finite"),
        ({}, HEAD, "has base_model.model.lm_head.lora_A.weight and 1 more"),
        ({"target_modules": ["q_proj"]}, {}, "does not fit this model: it has"),
        ({"r": 8}, {}, r"has rank 8 by its config, and .* has shape \(4, 80\)"),
        ({"use_dora": True}, {}, "use_dora"),
    ],
)
def test_an_adapter_that_does_not_fit(llama, tmp_path, into, config, tensors, words):
    store, adapter = llama
    wrong = edited(adapter, tmp_path / "adapter", config, **tensors)
    with pytest.raises(ValueError, match=words) as caught:
        into(store, tmp_path / "out", wrong)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_weights_too_large_for_float16(tmp_path):
    source = save_tiny_model("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(source, tmp_path / "store", group_size=32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is too large for float16: merge into bfloat16"):
        merge.merge(tmp_path / "store", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    merge.merge(tmp_path / "store", tmp_path / "out", dtype="bfloat16")


def test_wrong_arguments(llama, tmp_path):
    store, adapter = llama
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        merge.merge(store, tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match="is not a store"):
        merge.merge(adapter, tmp_path / "out")
    with pytest.raises(errors.FileError, match="exists already"):
        merge.merge(store, store, adapter)
    with pytest.raises(ValueError, match="group_size must be one of"):
        merge.merge_to_store(store, tmp_path / "out", adapter, group_size=48)
    assert not list(tmp_path.iterdir())


def test_a_damaged_store_is_seen_before_it_is_merged(llama, tmp_path):
    store, adapter = llama
    shutil.copytree(store, tmp_path / "store")
    file = tmp_path / "store" / SHARED
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for into in (merge.merge, merge.merge_to_store):
        with pytest.raises(errors.FileError, match="is damaged: checksum"):
            into(tmp_path / "store", tmp_path / "out", adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_pieces_that_do_not_fill_the_file(tmp_path):
    with pytest.raises(RuntimeError, match="8 bytes of data were written, 12 announced"):
        safetensors_file.write_safetensors_pieces(tmp_path / "x", {"a": ("F32", (3,), 12)}, [torch.ones(2)])
    assert not list(tmp_path.iterdir())
