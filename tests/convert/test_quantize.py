"""A model becomes a store: every matrix in it, nothing twice, nothing left behind when it fails."""

import json
import os
import shutil

import pytest
import torch
from faults import failing
from models import ARCHITECTURES, decoded_model, relative_rms, save_tiny_model
from runs import model_directory, word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mebp_triton.convert import quantize as quantize_module
from mebp_triton.convert.quantize import quantize
from mebp_triton.convert.readers import open_source
from mebp_triton.convert.writers.store import StoreWriter
from mebp_triton.kernels.names import SCHEMES
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import build_skeleton, float_names
from mebp_triton.store.manifest import SHARED, block_file
from mebp_triton.store.reader import Store
from mebp_triton.system import errors


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("llama") / "model")


def original(source):
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_of_every_architecture_is_in_the_store_once(architecture, tmp_path):
    source = save_tiny_model(architecture, tmp_path / "model")
    report = quantize(source, tmp_path / "store", group_size=32)
    model, opened = original(source), Store(tmp_path / "store")
    names = {name.removesuffix(".weight") for name in opened.matrices} | set(opened.floats)
    parameters = {name.removesuffix(".weight"): p for name, p in model.named_parameters()}
    floats = {name.removesuffix(".weight") for name in opened.floats}
    assert {name.removesuffix(".weight") for name in names} == parameters.keys()
    assert not floats & opened.matrices.keys()
    assert {name for name, p in parameters.items() if p.dim() < 2} <= floats, "a vector became int4"
    assert report.errors.keys() == opened.matrices.keys() and not report.taken_over
    truth = dict(decoded_model(tmp_path / "store").named_parameters())
    for name, parameter in model.named_parameters():
        error = relative_rms(truth[name], parameter)
        if name in opened.floats:
            assert error == 0, name
        else:
            assert error == pytest.approx(report.errors[name.removesuffix(".weight")], rel=1e-4) and error < 0.15, name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("search", [True, False])
def test_a_matrix_is_what_quantize_matrix_makes_of_it(llama, tmp_path, scheme, search):
    report = quantize(llama, tmp_path / "store", scheme=scheme, group_size=64, scale_search=search)
    opened, named = Store(tmp_path / "store"), dict(original(llama).named_parameters())
    assert set(report.schemes.values()) == {scheme}
    for name, info in opened.matrices.items():
        weight, error = quantize_matrix(named[f"{name}.weight"].detach(), scheme, 64, search)
        found = opened.weight(name)
        assert found.scheme == info.scheme == scheme and found.group_size == 64
        assert all(torch.equal(found.tensors()[part], tensor) for part, tensor in weight.tensors().items())
        assert info.relative_error == report.errors[name] == error


def test_a_conv1d_is_stored_as_out_in(tmp_path):
    source = save_tiny_model("gpt2", tmp_path / "model")
    quantize(source, tmp_path / "store", group_size=32)
    info = Store(tmp_path / "store").matrices["transformer.h.0.attn.c_attn"]
    assert info.shape == (3 * 48, 48)
    assert tuple(original(source).transformer.h[0].attn.c_attn.weight.shape) == (48, 3 * 48)


def test_where_things_lie(llama, tmp_path):
    quantize(llama, tmp_path / "store", group_size=32)
    opened = Store(tmp_path / "store")
    assert set(opened.files) == {*(block_file(index) for index in range(3)), SHARED}
    for name, info in opened.matrices.items():
        parts = name.split(".")
        assert info.file == (block_file(int(parts[2])) if parts[1] == "layers" else SHARED), name
    assert opened.floats["model.norm.weight"] == SHARED
    assert opened.floats["model.layers.2.input_layernorm.weight"] == block_file(2)
    assert opened.tied_head and "lm_head" not in opened.matrices
    assert opened.source == "safetensors directory model"


def test_a_head_of_its_own_is_stored(tmp_path):
    quantize(save_tiny_model("qwen2", tmp_path / "model"), tmp_path / "store", group_size=32)
    opened = Store(tmp_path / "store")
    assert not opened.tied_head and opened.matrices["lm_head"].file == SHARED
    assert opened.matrices["model.embed_tokens"].shape == opened.matrices["lm_head"].shape == (97, 48)


def test_floats_keep_the_dtype_of_their_source(tmp_path):
    model = original(save_tiny_model("llama", tmp_path / "wide"))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "store", group_size=32)
    opened = Store(tmp_path / "store")
    named = dict(model.named_parameters())
    for name in opened.floats:
        assert opened.float_tensor(name).dtype == torch.bfloat16
        assert torch.equal(opened.float_tensor(name), named[name])


def test_transformers_reads_config_and_tokenizer_from_the_store(llama, tmp_path):
    quantize(llama, tmp_path / "store", group_size=32)
    config = AutoConfig.from_pretrained(tmp_path / "store")
    assert config.architectures == ["LlamaForCausalLM"] and config.hidden_size == 48
    text = "the cat sees the moon ."
    assert AutoTokenizer.from_pretrained(tmp_path / "store")(text).input_ids == word_tokenizer()(text).input_ids


def test_the_report_counts_bytes_and_progress_counts_matrices(llama, tmp_path):
    seen = []
    report = quantize(llama, tmp_path / "store", group_size=32, progress=lambda *pair: seen.append(pair))
    count = len(report.errors)
    assert seen == [(place + 1, count) for place in range(count)]
    opened = Store(tmp_path / "store")
    assert report.int4_bytes == sum(opened.weight(name).nbytes for name in opened.matrices)
    assert report.float_bytes == sum(opened.float_tensor(name).nbytes for name in opened.floats)


def test_one_model_gives_one_store_to_the_byte(llama, tmp_path):
    for name in ("one", "two"):
        quantize(llama, tmp_path / name, group_size=32)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


# --- what is refused, and what is left behind -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"scheme": "nf4"}, "scheme must be one of symmetric, affine, codebook, got 'nf4'"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128, got 48"),
        ({"group_size": True}, "group_size must be one of"),
        ({"blocks": "model.norm"}, "blocks='model.norm' is a LlamaRMSNorm"),
    ],
)
def test_wrong_arguments(llama, tmp_path, options, problem):
    with pytest.raises(ValueError, match=problem):
        quantize(llama, tmp_path / "store", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_matrix_that_is_not_finite_is_named_and_nothing_is_left(tmp_path):
    model = original(save_tiny_model("llama", tmp_path / "fine"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .*finite"):
        quantize(tmp_path / "model", tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine", "model"]


def test_an_existing_directory_is_kept(llama, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine").write_text("mine")
    with pytest.raises(errors.FileError, match="exists already"):
        quantize(llama, tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["mine"]


def test_a_store_onto_its_own_source_is_refused(llama):
    before = sorted(llama.iterdir())
    with pytest.raises(errors.FileError, match="exists already"):
        quantize(llama, llama)
    assert sorted(llama.iterdir()) == before


@pytest.mark.parametrize("at", range(1, 7))
def test_a_write_that_fails_leaves_nothing(llama, tmp_path, at):
    """Four weight files, the manifest, and the directory itself."""
    with failing(at, operations=[(os, "replace")]), pytest.raises(OSError, match="No space"):
        quantize(llama, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_comes_last(llama, tmp_path, monkeypatch):
    log = []
    for name in ("write_file", "finish"):
        real = getattr(StoreWriter, name)
        monkeypatch.setattr(StoreWriter, name, lambda *args, real=real, name=name: (log.append(name), real(*args)))
    quantize(llama, tmp_path / "store")
    assert log == ["write_file"] * 4 + ["finish"]


def test_a_checkpoint_that_lacks_a_tensor_is_refused(llama, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(llama, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"lacks model\.layers\.3"):
        quantize(source, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- sources that are 4-bit already (GGUF) --------------------------------------------------------------------------


class Native:
    """A source whose linear layers are affine with G = 32, but for some; its table and norms are float."""

    FLOAT = "model.layers.1.mlp.up_proj.weight"
    SYMMETRIC = "model.layers.2.mlp.up_proj.weight"

    def __init__(self, path):
        self.inner = open_source(path)
        self.config, self.description = self.inner.config, "a GGUF file"
        self.bind, self.has, self.save_companions = self.inner.bind, self.inner.has, self.inner.save_companions

    def read(self, name):
        value = self.inner.read(name)
        if value.dim() < 2 or name == self.FLOAT or "embed" in name:
            return value
        return quantize_matrix(value, "symmetric" if name == self.SYMMETRIC else "affine", 32)[0]


@pytest.fixture
def native(monkeypatch, llama):
    monkeypatch.setattr(quantize_module, "open_source", Native)
    source = Native(llama)
    source.bind(build_skeleton(source.config, torch.float32))
    return source


def test_codes_are_taken_over_bit_for_bit_and_the_rest_follows_them(native, llama, tmp_path):
    report = quantize(llama, tmp_path / "store")
    opened = Store(tmp_path / "store")
    own = {"model.embed_tokens", native.FLOAT.removesuffix(".weight")}
    assert set(report.taken_over) == report.errors.keys() - own
    for name in report.taken_over:
        assert report.errors[name] == opened.matrices[name].relative_error == 0
        wanted, found = native.read(f"{name}.weight"), opened.weight(name)
        assert found.scheme == wanted.scheme and found.group_size == 32
        assert all(torch.equal(found.tensors()[part], tensor) for part, tensor in wanted.tensors().items())
    for name in own:
        info = opened.matrices[name]
        assert (info.scheme, info.group_size) == ("affine", 32) and 0 < info.relative_error < 0.15
    assert opened.matrices[native.SYMMETRIC.removesuffix(".weight")].scheme == "symmetric"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"scheme": "affine"}, lambda name: "layers.2.mlp.up_proj" not in name),
        ({"scheme": "symmetric"}, lambda name: "layers.2.mlp.up_proj" in name),
        ({"group_size": 32}, lambda name: True),
        ({"group_size": 64}, lambda name: False),
        ({"scheme": "codebook"}, lambda name: False),
    ],
)
def test_what_was_asked_for_wins_over_what_the_source_has(native, llama, tmp_path, options, kept):
    report = quantize(llama, tmp_path / "store", **options)
    opened = Store(tmp_path / "store")
    own = {"model.embed_tokens", native.FLOAT.removesuffix(".weight")}
    assert set(report.taken_over) == {name for name in report.errors.keys() - own if kept(name)}
    for name, info in opened.matrices.items():
        if name not in report.taken_over:
            assert info.scheme == options.get("scheme", "affine") and info.group_size == options.get("group_size", 32)
            value = native.read(f"{name}.weight")
            value = value if isinstance(value, torch.Tensor) else decode(value, torch.float32)
            weight, error = quantize_matrix(value, info.scheme, info.group_size)
            assert error == info.relative_error and torch.equal(weight.packed, opened.weight(name).packed), name


def test_a_float_parameter_that_the_source_has_as_codes_is_decoded(native, llama, tmp_path, monkeypatch):
    """GGUF files may hold position tables so."""
    name = "model.norm.weight"
    monkeypatch.setattr(
        quantize_module,
        "float_names",
        lambda model, sites: [name, *(n for n in float_names(model, sites) if n != name)],
    )
    coded = quantize_matrix(torch.randn(1, 48), "affine", 32)[0]
    real = Native.read
    monkeypatch.setattr(Native, "read", lambda self, which: coded if which == name else real(self, which))
    quantize(llama, tmp_path / "store")
    found = Store(tmp_path / "store").float_tensor(name)
    assert found.dtype == torch.float32 and torch.equal(found, decode(coded, torch.float32))
