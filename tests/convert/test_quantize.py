"""A model becomes a store: every matrix in it, nothing twice, nothing left behind when it fails."""

import json
import os
import shutil

import pytest
import torch
from models import ARCHITECTURES, decoded_model, relative_rms, save_tiny_model
from runs import word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mebp_triton.convert.quantize import base_model, quantize, write_store
from mebp_triton.convert.readers import open_source
from mebp_triton.convert.recipe import TABLE_FORM, Recipe, scale_dtype_of
from mebp_triton.kernels.names import DEFAULT_FORM, Form
from mebp_triton.kernels.quantize import quantize_matrix
from mebp_triton.kernels.reference import decode
from mebp_triton.models.skeleton import build_skeleton
from mebp_triton.store.manifest import MANIFEST, SHARED, BaseModel, block_file
from mebp_triton.store.reader import Store
from mebp_triton.system import errors
from mebp_triton.system.reading import joint_checksum


@pytest.fixture(scope="module")
def llama(shared_store):
    """A model directory that tests only read."""
    return shared_store("llama").parent / "model"


@pytest.fixture(scope="module")
def store(shared_store):
    """Its store, with groups of 32."""
    return Store(shared_store("llama"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of one block."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("small"), num_hidden_layers=1)


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


@pytest.mark.parametrize(
    ("scheme", "search"), [("symmetric", True), ("symmetric", False), ("affine", False), ("codebook", True)]
)
def test_a_matrix_is_what_quantize_matrix_makes_of_it(small, tmp_path, scheme, search):
    report = quantize(small, tmp_path / "store", scheme=scheme, group_size=64, scale_search=search)
    opened, named = Store(tmp_path / "store"), dict(original(small).named_parameters())
    for name, info in opened.matrices.items():
        form = TABLE_FORM if name == "model.embed_tokens" else Form(scheme, 64)
        exact = named[f"{name}.weight"].detach()
        weight, error = quantize_matrix(exact, *form[:2], search, scale_dtype_of(form), form.bits)
        found = opened.weight(name)
        assert found.form == info.form == report.forms[name] == form
        assert all(torch.equal(found.tensors()[part], tensor) for part, tensor in weight.tensors().items())
        assert info.relative_error == report.errors[name] == error


def test_without_wishes_embedding_and_head_have_8_bits(tmp_path):
    report = quantize(save_tiny_model("qwen2", tmp_path / "model", num_hidden_layers=1), tmp_path / "store")
    tables = {name: report.forms.pop(name) for name in ("model.embed_tokens", "lm_head")}
    assert set(tables.values()) == {TABLE_FORM} and set(report.forms.values()) == {DEFAULT_FORM}
    matrices = Store(tmp_path / "store").matrices
    assert {matrices[name].scale_dtype for name in tables} == {"F16"}
    assert {matrices[name].scale_dtype for name in report.forms} == {"I8"}
    assert max(report.errors[name] for name in tables) < 0.01 < min(report.errors[name] for name in report.forms)


def test_a_conv1d_is_stored_as_out_in(shared_store):
    path = shared_store("gpt2")
    info = Store(path).matrices["transformer.h.0.attn.c_attn"]
    assert info.shape == (3 * 48, 48)
    assert tuple(original(path.parent / "model").transformer.h[0].attn.c_attn.weight.shape) == (48, 3 * 48)


def test_where_things_lie(store):
    assert set(store.files) == {*(block_file(index) for index in range(3)), SHARED}
    for name, info in store.matrices.items():
        parts = name.split(".")
        assert info.file == (block_file(int(parts[2])) if parts[1] == "layers" else SHARED), name
    assert store.floats["model.norm.weight"] == SHARED
    assert store.floats["model.layers.2.input_layernorm.weight"] == block_file(2)
    assert store.tied_head and "lm_head" not in store.matrices
    assert store.source == "safetensors directory model"


def test_a_head_of_its_own_is_stored(shared_store):
    opened = Store(shared_store("qwen2"))
    assert not opened.tied_head and opened.matrices["lm_head"].file == SHARED
    assert opened.matrices["model.embed_tokens"].shape == opened.matrices["lm_head"].shape == (97, 48)


def test_floats_keep_the_dtype_of_their_source(small, tmp_path):
    model = original(small)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "store", group_size=32)
    opened = Store(tmp_path / "store")
    named = dict(model.named_parameters())
    for name in opened.floats:
        assert opened.float_tensor(name).dtype == torch.bfloat16
        assert torch.equal(opened.float_tensor(name), named[name])


def test_buffers_are_stored_where_the_source_has_them(small, tmp_path, monkeypatch):
    source = shutil.copytree(small, tmp_path / "model")
    held = load_file(source / "model.safetensors")
    save_file(held | {"model.norm.counts": torch.arange(3.0)}, source / "model.safetensors", {"format": "pt"})

    def with_buffers(config, dtype):
        model = build_skeleton(config, dtype)
        for name in ("counts", "absent"):
            model.model.norm.register_buffer(name, torch.zeros(3))
        return model

    monkeypatch.setattr("mebp_triton.convert.quantize.build_skeleton", with_buffers)
    quantize(source, tmp_path / "store")
    opened = Store(tmp_path / "store")
    assert torch.equal(opened.float_tensor("model.norm.counts"), torch.arange(3.0))
    assert "model.norm.absent" not in opened.floats


def test_transformers_reads_config_and_tokenizer_from_the_store(store):
    config = AutoConfig.from_pretrained(store.directory)
    assert config.architectures == ["LlamaForCausalLM"] and config.hidden_size == 48
    text = "the cat sees the moon ."
    assert AutoTokenizer.from_pretrained(store.directory)(text).input_ids == word_tokenizer()(text).input_ids


def test_the_report_counts_bytes_and_progress_counts_matrices(small, tmp_path):
    seen = []
    report = quantize(small, tmp_path / "store", group_size=32, progress=lambda *pair: seen.append(pair))
    count = len(report.errors)
    assert seen == [(place + 1, count) for place in range(count)] and count == 8
    opened = Store(tmp_path / "store")
    assert report.int4_bytes == sum(opened.weight(name).nbytes for name in opened.matrices)
    assert report.float_bytes == sum(opened.float_tensor(name).nbytes for name in opened.floats)


def test_one_model_gives_one_store_to_the_byte(llama, store, tmp_path):
    quantize(llama, tmp_path / "again", group_size=32)
    assert {path.name for path in store.directory.iterdir()} == {path.name for path in (tmp_path / "again").iterdir()}
    for path in store.directory.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


# --- what is refused, and what is left behind -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"scheme": "nf4"}, "scheme must be one of symmetric, affine, codebook, got 'nf4'"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128, got 48"),
        ({"group_size": True}, "group_size must be one of"),
        ({"group_size": 16}, "group_size must be one of 32, 64, 128, got 16 for codes of 4 bits"),
        ({"bits": 3}, "bits must be one of 4, 8, got 3"),
        ({"bits": 8, "scheme": "codebook"}, "the codebook scheme has 4 bits"),
        ({"embedding_bits": 16}, "embedding_bits must be one of 4, 8, got 16"),
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


@pytest.mark.parametrize("at", range(1, 5))
def test_a_write_that_fails_leaves_nothing(small, tmp_path, monkeypatch, at):
    """Two weight files, the manifest, and the directory itself."""
    count = iter(range(1, 100))
    real = os.replace

    def replace(*paths):
        if next(count) == at:
            raise OSError(28, "No space left on device")
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        quantize(small, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_comes_last(small, tmp_path, monkeypatch):
    written = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (written.append(os.path.basename(new)), real(old, new)))
    quantize(small, tmp_path / "store")
    assert written == [block_file(0), SHARED, MANIFEST, "store"]


def test_a_checkpoint_that_lacks_a_tensor_is_refused(small, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(small, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1"):
        quantize(source, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- sources that have 4 bits already -------------------------------------------------------------------------------


class Native:
    """A source whose linear layers are affine with G = 32, but for one; its table, its norm and one layer are float."""

    FLOAT = "model.layers.0.mlp.up_proj"
    SYMMETRIC = "model.layers.0.mlp.down_proj"

    def __init__(self, path):
        self.inner = open_source(path)
        self.config, self.description = self.inner.config, "a GGUF file"
        self.bind, self.has, self.save_companions = self.inner.bind, self.inner.has, self.inner.save_companions
        self.coded, self.decoded = {}, {}

    def read(self, name):
        value = self.coded.get(name, self.inner.read(name))
        if name in self.coded or value.dim() < 2 or name == f"{self.FLOAT}.weight" or "embed" in name:
            return value
        return quantize_matrix(value, "symmetric" if name == f"{self.SYMMETRIC}.weight" else "affine", 32)[0]


OWN = {"model.embed_tokens", Native.FLOAT}


@pytest.fixture
def native(small):
    return Native(small)


def store_of(source, target, **options):
    """The store of a source, and the report of its making."""
    report = write_store(source, target, Recipe(**options), None, None, lambda done, total: None)
    return Store(target), report


def test_codes_are_taken_over_bit_for_bit_and_the_rest_follows_them(native, tmp_path):
    opened, report = store_of(native, tmp_path / "store")
    assert set(report.taken_over) == report.errors.keys() - OWN
    for name in report.taken_over:
        assert report.errors[name] == opened.matrices[name].relative_error == 0
        wanted, found = native.read(f"{name}.weight"), opened.weight(name)
        assert found.scheme == wanted.scheme and found.group_size == 32
        assert all(torch.equal(found.tensors()[part], tensor) for part, tensor in wanted.tensors().items())
    for name in OWN:
        info = opened.matrices[name]
        assert info.form == (Form("affine", 32) if name == Native.FLOAT else TABLE_FORM)
        assert 0 < info.relative_error < 0.15
    assert opened.matrices[Native.SYMMETRIC].scheme == "symmetric"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"scheme": "affine"}, lambda name: name != Native.SYMMETRIC),
        ({"scheme": "symmetric"}, lambda name: name == Native.SYMMETRIC),
        ({"group_size": 32}, lambda name: True),
        ({"group_size": 64}, lambda name: False),
        ({"scheme": "codebook", "group_size": 32}, lambda name: False),
        ({"bits": 4}, lambda name: True),
        ({"scheme": "affine", "bits": 8, "group_size": 16}, lambda name: False),
    ],
    ids=["affine", "symmetric", "groups of 32", "groups of 64", "codebook", "4 bits", "8 bits"],
)
def test_what_was_asked_for_wins_over_what_the_source_has(native, tmp_path, options, kept):
    opened, report = store_of(native, tmp_path / "store", **options)
    assert set(report.taken_over) == {name for name in report.errors.keys() - OWN if kept(name)}
    for name, info in opened.matrices.items():
        if name not in report.taken_over:
            wanted = Form(**({"scheme": "affine", "group_size": 32} | options))
            assert info.form == (TABLE_FORM if name == "model.embed_tokens" else wanted)
            value = native.read(f"{name}.weight")
            value = value if isinstance(value, torch.Tensor) else decode(value, torch.float32)
            weight, error = quantize_matrix(value, *info.form[:2], True, scale_dtype_of(info.form), info.bits)
            assert error == info.relative_error and torch.equal(weight.packed, opened.weight(name).packed), name


@pytest.mark.parametrize("first", [True, False])
def test_a_matrix_with_other_codes_gets_8_bits_whatever_the_first_linear_layer_is(native, small, tmp_path, first):
    """A mixed file keeps each matrix in the form that holds it, or in one that loses hardly anything."""
    linear, table, float_rest = "model.layers.0.self_attn.q_proj", "model.embed_tokens", OWN - {"model.embed_tokens"}
    other = {linear if first else Native.SYMMETRIC, table}
    named = {name: parameter.detach() for name, parameter in original(small).named_parameters()}
    native.coded = {f"{linear}.weight": quantize_matrix(named[f"{linear}.weight"], "symmetric", 128)[0]}
    native.coded |= {f"{name}.weight": named[f"{name}.weight"] for name in other}
    native.decoded = {f"{name}.weight": "Q6_K" for name in other}
    opened, report = store_of(native, tmp_path / "store")
    forms = {name: info.form for name, info in opened.matrices.items()}
    assert {forms[name] for name in other} == {Form("symmetric", 64, 8)}
    assert {forms[name] for name in float_rest} == {Form("symmetric", 64, 8) if first else Form("symmetric", 128)}
    assert all(0 < report.errors[name] < 0.006 for name in other)
    assert report.decoded == dict.fromkeys(other, "Q6_K")
    assert set(report.taken_over) == report.errors.keys() - other - float_rest
    asked, _ = store_of(native, tmp_path / "asked", scheme="codebook")
    assert {asked.matrices[name].scheme for name in (other | float_rest) - {table}} == {"codebook"}
    narrow, _ = store_of(native, tmp_path / "narrow", bits=4, embedding_bits=4)
    assert {narrow.matrices[name].form for name in other} == {DEFAULT_FORM}


def test_a_form_may_be_given_for_every_matrix(native, tmp_path):
    forms = {"model.embed_tokens": Form("symmetric", 128, 8)}
    write_store(
        native,
        tmp_path / "store",
        Recipe(None, None),
        None,
        lambda name: forms.get(name, Form("codebook", 64)),
        lambda done, total: None,
    )
    matrices = Store(tmp_path / "store").matrices
    assert matrices["model.embed_tokens"].form == Form("symmetric", 128, 8)
    assert matrices[Native.FLOAT].form == Form("codebook", 64)


def test_a_float_parameter_that_the_source_has_as_codes_is_decoded(native, tmp_path):
    """GGUF files may hold position tables so."""
    name = "model.norm.weight"
    native.coded[name] = quantize_matrix(torch.randn(1, 48), "affine", 32)[0]
    opened, _ = store_of(native, tmp_path / "store")
    found = opened.float_tensor(name)
    assert found.dtype == torch.float32 and torch.equal(found, decode(native.coded[name], torch.float32))


@pytest.mark.parametrize("name", [Native.SYMMETRIC, "model.norm"])
def test_codes_and_floats_that_are_not_finite(native, tmp_path, name):
    value = quantize_matrix(torch.randn(48, 80) if name == Native.SYMMETRIC else torch.randn(1, 48), "affine", 32)[0]
    value.scales[0, 0] = float("inf")
    native.coded[f"{name}.weight"] = value
    with pytest.raises(ValueError, match=f"{name}.weight of the source is damaged: scales must be finite"):
        store_of(native, tmp_path / "store")
    assert not list(tmp_path.iterdir())


# --- the model that adapters name ------------------------------------------------------------------------------------


def test_a_store_knows_the_model_that_it_was_made_of(store):
    model = store.directory.parent / "model"
    assert store.base == BaseModel(str(model)) and store.directory.is_absolute()
    assert store.base.crc32 == joint_checksum([model / "model.safetensors"])


def test_a_model_in_the_hubs_cache_has_its_name_there(small, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--some-team--Small-1.5" / "snapshots" / commit
    shutil.copytree(small, cached)
    (tmp_path / "link").symlink_to(cached)
    for path in (cached, tmp_path / "link"):
        assert base_model(path) == BaseModel("some-team/Small-1.5", commit)
    assert base_model(tmp_path / "models--gpt2" / "snapshots" / commit).name_or_path.endswith(commit), "not there"
    assert base_model(cached / "model.gguf") == BaseModel(str(cached / "model.gguf")), "a file of it is not the model"


def test_a_relative_path_is_named_whole(small, tmp_path, monkeypatch):
    monkeypatch.chdir(small.parent)
    quantize(f"../{small.parent.name}/{small.name}", tmp_path / "store", group_size=32)
    assert Store(tmp_path / "store").base == BaseModel(str(small))
