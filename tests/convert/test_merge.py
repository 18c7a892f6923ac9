"""Merged weights compute what the adapter does: in a model directory for stock transformers, and in a store."""

import json
import shutil

import pytest
import torch
import transformers
from models import bnb_directory, decoded_model, randomize_adapter, relative_rms, save_tiny_model
from runs import word_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mebp_triton.convert import merge
from mebp_triton.convert.quantize import quantize
from mebp_triton.convert.recipe import TABLE_FORM, Recipe
from mebp_triton.kernels.names import DEFAULT_FORM, Form
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.layers.lora_config import LoraConfig
from mebp_triton.models.adapter import load_adapter, read_adapter_config, save_adapter
from mebp_triton.models.adapter_seal import read_adapter_tensors
from mebp_triton.models.load import load
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.manifest import SHARED, accept_companions
from mebp_triton.store.reader import Store
from mebp_triton.system import errors

# Tied and not, Conv1D with biases and position tables, norms of their own and logits that are not the head's.
# Experts in one tensor: in pieces in other checkpoints, and turned, with biases.
needs_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules, or lie otherwise")
KINDS = ["llama", "qwen2", "gpt2", "gemma3_text", "opt"]
KINDS += [pytest.param(name, marks=needs_5) for name in ("qwen3_moe", "gpt_oss")]
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
def kind(request, shared_store, tmp_path_factory):
    """(store, adapter) of an architecture."""
    store = shared_store(request.param)
    experts = {"target_modules": "all-linear-and-experts", "alpha_pattern": {"experts.down_proj": 3.0}}
    experts = experts if request.param in ("qwen3_moe", "gpt_oss") else {}
    return store, adapter_of(store, tmp_path_factory.mktemp(request.param) / "adapter", **experts)


@pytest.fixture(scope="module")
def llama(shared_store, tmp_path_factory):
    store = shared_store("llama")
    return store, adapter_of(store, tmp_path_factory.mktemp("merge") / "adapter")


@pytest.fixture(scope="module")
def merged(llama, tmp_path_factory):
    """The directory in float32 of that store and adapter."""
    store, adapter = llama
    directory = tmp_path_factory.mktemp("merged") / "out"
    merge.merge(store, directory, adapter, "float32")
    return directory


def test_a_merged_directory_computes_what_the_adapter_computes(kind, tmp_path):
    """PEFT merges the same adapter into the decoded model; float64 says what is right."""
    peft = pytest.importorskip("peft")
    store, adapter = kind
    assert merge.merge(store, tmp_path / "out", adapter, "float32") == "float32"
    found, truth, plain = stock(tmp_path / "out"), logits(with_adapter(store, adapter)), logits(load(store))
    assert relative_rms(plain, truth) > 0.05, "the adapter does nothing"
    assert relative_rms(logits(found), truth) < 2e-5
    wrapped = peft.PeftModel.from_pretrained(decoded_model(store, torch.float64), adapter)
    theirs = dict(wrapped.merge_and_unload().named_parameters())
    for name, parameter in found.named_parameters():
        assert relative_rms(parameter.detach(), theirs[name].detach()) < 2e-7, name


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", "float16"), ("qwen2", "bfloat16"), ("gpt2", "float32"), ("opt", "float16")]
)
def test_without_an_adapter_the_decoded_weights_exactly(shared_store, tmp_path, architecture, dtype):
    store = shared_store(architecture)
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
        {"use_rslora": True, "target_modules": ["q_proj", "layers.1.mlp.down_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3.0}},
    ],
)
def test_scalings_ranks_and_targets(llama, tmp_path, lora):
    store, _ = llama
    adapter = adapter_of(store, tmp_path / "adapter", **lora)
    merge.merge(store, tmp_path / "out", adapter, "float32")
    assert relative_rms(logits(stock(tmp_path / "out")), logits(with_adapter(store, adapter))) < 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_in_float32_and_rounded_once(llama, merged, tmp_path, dtype):
    store, adapter = llama
    merge.merge(store, tmp_path / "out", adapter, dtype)
    wide = load_file(merged / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, wide[name].to(merge.DTYPES[dtype])), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == merge.DTYPES[dtype]


def test_the_directory_is_a_whole_model(llama, merged, tmp_path):
    store, adapter = llama
    assert merge.merge(store, tmp_path / "out", adapter) == "float32", "by default the config's"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == ["LlamaForCausalLM"]
    text = "the cat sees the moon ."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == word_tokenizer()(text).input_ids
    assert not (tmp_path / "out" / "manifest.json").exists()
    # And it can be quantized as any other model.
    assert quantize(tmp_path / "out", tmp_path / "again", group_size=32).errors.keys() == Store(store).matrices.keys()


def test_progress_counts_tensors(llama, tmp_path):
    seen = []
    merge.merge(llama[0], tmp_path / "out", dtype="float16", progress=lambda *pair: seen.append(pair))
    count = len(load_file(tmp_path / "out" / "model.safetensors"))
    assert seen == [(done + 1, count) for done in range(count)]


def test_a_persistent_buffer_keeps_its_dtype(llama, tmp_path, monkeypatch):
    """The dtype that is asked for is that of floats; some models have masks and counts as buffers."""
    store = shutil.copytree(llama[0], tmp_path / "store")
    opened = Store(store)
    file = opened.floats["model.norm.weight"]
    name = "model.norm.mask"
    entries = opened.files[file].entries
    entries[name] = entries["model.embed_tokens.packed"]
    opened.floats[name] = file

    def with_buffer(config, dtype):
        model = build_skeleton(config, dtype)
        model.model.norm.register_buffer("mask", torch.zeros(entries[name][1], dtype=torch.uint8))
        model.model.norm.register_buffer("absent", torch.zeros(2))
        return model

    monkeypatch.setattr(merge, "build_skeleton", with_buffer)
    merge.merge(opened, tmp_path / "out", dtype="float16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found[name].dtype == torch.uint8 and torch.equal(found[name], opened.float_tensor(name))
    assert found["model.norm.weight"].dtype == torch.float16 and "model.norm.absent" not in found


def test_a_config_of_another_dtype_gives_bfloat16(llama, tmp_path):
    store = shutil.copytree(llama[0], tmp_path / "store")
    config = json.loads((store / "config.json").read_text())
    (store / "config.json").write_text(json.dumps(config | {"dtype": "float64"}))
    accept_companions(store)
    assert merge.merge(store, tmp_path / "out") == "bfloat16"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


# --- into a store ---------------------------------------------------------------------------------------------------


def test_a_large_change_is_quantized_anew_where_the_adapter_is(llama, tmp_path):
    store, _ = llama
    adapter = adapter_of(store, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    report = merge.merge_to_store(store, tmp_path / "out", adapter)
    merge.merge(store, tmp_path / "float", adapter, "float32")
    floats, old, new = load_file(tmp_path / "float" / "model.safetensors"), Store(store), Store(tmp_path / "out")
    assert new.tied_head == old.tied_head and new.source == "safetensors directory model, merged with adapter adapter"
    for name, info in new.matrices.items():
        before, after = old.weight(name), new.weight(name)
        assert after.form == before.form == (TABLE_FORM if "embed" in name else DEFAULT_FORM)
        if name.endswith(("q_proj", "down_proj")):
            wanted, error = quantize_matrix(floats[f"{name}.weight"], *before.form[:2], scale_dtype=torch.int8)
            assert all(torch.equal(after.tensors()[part], tensor) for part, tensor in wanted.tensors().items())
            assert info.relative_error == error and 0 < error < 0.15
        else:
            assert name in report.taken_over
            assert all(torch.equal(after.tensors()[part], tensor) for part, tensor in before.tensors().items()), name
    close = relative_rms(logits(load(tmp_path / "out")), logits(with_adapter(store, adapter)))
    assert close < relative_rms(logits(load(store)), logits(with_adapter(store, adapter)))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("gpt2", {"scheme": "codebook"}), ("qwen2", {"scheme": "affine"}), ("llama", {"bits": 8})],
)
def test_changes_smaller_than_a_step_are_kept(shared_store, tmp_path, architecture, options):
    """The nearest codes are the old ones nearly everywhere, and would undo the training."""
    store = shared_store(architecture, config={"hidden_size": 384, "intermediate_size": 384}, **options)
    model = load(store, LoraConfig(r=2, lora_alpha=2))
    randomize_adapter(model, 0, 0.01)
    save_adapter(model, tmp_path / "adapter")
    report = merge.merge_to_store(store, tmp_path / "out", tmp_path / "adapter")
    old, new, share = Store(store), Store(tmp_path / "out"), []
    tensors = read_adapter_tensors(tmp_path / "adapter")
    for name in report.errors.keys() - set(report.taken_over):
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        found, wanted = decode(new.weight(name)) - decode(old.weight(name)), b @ a
        share.append(float((found * wanted).sum() / wanted.square().sum()))
    assert 0.9 < sum(share) / len(share) < 1.1


def test_the_form_that_loses_least_is_kept(llama, tmp_path):
    store, adapter = llama[0], adapter_of(llama[0], tmp_path / "q", target_modules=["q_proj"])
    forms, losses = [Form("symmetric", 32), Form("affine", 64)], {"codebook": 3.0, "symmetric": 1.0, "affine": 2.0}
    seen = []

    def loss_of(made):
        (scheme,) = {info.scheme for name, info in Store(made).matrices.items() if "q_proj" in name}
        seen.append(scheme)
        return losses[scheme]

    tried = merge.merge_to_measured_store(store, tmp_path / "out", adapter, forms, loss_of, 0.5)
    assert seen == ["codebook", "symmetric", "affine"] and sorted(made.loss for made in tried) == [1.0, 2.0, 3.0]
    assert (tried[-1].form, tried[-1].loss) == (Form("symmetric", 32), 1.0)
    own = {name for name in Store(store).matrices if "q_proj" not in name}
    assert own == set(tried[-1].report.taken_over), "the adapter changes none of these"
    assert tried[-1].nbytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    merge.merge_to_store(store, tmp_path / "direct", adapter, form_of_changed=Form("symmetric", 32))
    for path in (tmp_path / "direct").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct", "out", "q"], "nothing else is left"
    seen.clear()
    tried = merge.merge_to_measured_store(store, tmp_path / "first", adapter, forms, loss_of, 3.0)
    assert seen == ["codebook"] and len(tried) == 1, "the first is good enough"


def test_wide_codes_are_not_made_narrow(shared_store, tmp_path):
    """What is tried for codes of 4 bits is no gain for those of 8."""
    store = shared_store("llama", bits=8, group_size=16)
    adapter = adapter_of(store, tmp_path / "q", target_modules=["q_proj"])
    report = merge.merge_to_store(store, tmp_path / "out", adapter, form_of_changed=Form("affine", 32))
    changed = report.errors.keys() - report.taken_over
    assert changed and all("q_proj" in name for name in changed)
    forms = {name: info.form for name, info in Store(tmp_path / "out").matrices.items()}
    assert forms.pop("model.embed_tokens") == TABLE_FORM and set(forms.values()) == {Form("symmetric", 16, 8)}
    assert max(report.errors.values()) < 0.02


def test_a_measurement_that_fails_leaves_nothing(llama, tmp_path):
    def loss_of(made):
        raise ValueError("no text")

    with pytest.raises(ValueError, match="no text"):
        merge.merge_to_measured_store(*llama[:1], tmp_path / "out", llama[1], [], loss_of, 0.0)
    assert not list(tmp_path.iterdir())


def test_a_merged_store_is_another_model_than_its_base(llama, tmp_path):
    store, adapter = llama
    merge.merge_to_store(store, tmp_path / "out", adapter)
    merge.merge_to_store(store, tmp_path / "copy")
    assert Store(tmp_path / "out").base is None and Store(tmp_path / "copy").base == Store(store).base is not None


def test_each_matrix_keeps_its_own_form(tmp_path):
    """A store of a bitsandbytes checkpoint has NF4 with float32 scales; a Conv1D's weight is transposed."""
    quantize(bnb_directory(tmp_path, "gpt2", bnb_4bit_quant_type="nf4"), tmp_path / "store")
    adapter = adapter_of(tmp_path / "store", tmp_path / "adapter", target_modules=["c_proj"])
    report = merge.merge_to_store(tmp_path / "store", tmp_path / "out", adapter)
    new = Store(tmp_path / "out")
    assert {name for name, form in report.forms.items() if form.scheme != "codebook"} == {"transformer.wte"}
    assert set(report.errors) - set(report.taken_over) == {name for name in new.matrices if name.endswith("c_proj")}
    merge.merge(tmp_path / "store", tmp_path / "wide", adapter, "float32")
    for name, tensor in load_file(tmp_path / "wide" / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith("c_proj") and module in new.matrices:
            assert relative_rms(decode(new.weight(module)).t(), tensor) < 0.15


def test_another_scheme(llama, tmp_path):
    store, adapter = llama
    report = merge.merge_to_store(store, tmp_path / "out", adapter, Recipe("symmetric", 64))
    assert report.taken_over == ["model.embed_tokens"]
    forms = {name: info.form for name, info in Store(tmp_path / "out").matrices.items()}
    assert forms.pop("model.embed_tokens") == TABLE_FORM and set(forms.values()) == {Form("symmetric", 64)}
    report = merge.merge_to_store(store, tmp_path / "all", adapter, Recipe("symmetric", 64, embedding_bits=4))
    assert not report.taken_over and set(report.forms.values()) == {Form("symmetric", 64)}


def test_without_an_adapter_a_store_is_copied_bit_for_bit(llama, tmp_path):
    store, _ = llama
    merge.merge_to_store(store, tmp_path / "out")
    for path in store.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


# --- what is refused, and what is left behind -----------------------------------------------------------------------


@pytest.mark.parametrize("into", [merge.merge, merge.merge_to_store])
def test_an_adapter_that_does_not_fit_leaves_nothing(llama, shared_store, tmp_path, into):
    wrong = adapter_of(shared_store("gpt2"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit this model"):
        into(llama[0], tmp_path / "out", wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_weights_too_large_for_float16(tmp_path):
    source = save_tiny_model("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(source, tmp_path / "store", group_size=32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is too large for torch\.float16: choose bfloat16"):
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
